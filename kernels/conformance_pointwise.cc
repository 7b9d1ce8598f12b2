// SPDX-License-Identifier: Apache-2.0
// Norms, rotary embedding, SwiGLU, split masters, AdamW.
#include <bit>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/conformance.h"
#include "kernels/optimizer_state.h"
#include "kernels/reference/pointwise.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

namespace ref = reference;

struct Size {
  int64_t tokens, width;
};
const Size kSizes[] = {{0, 5}, {1, 1}, {3, 7}, {5, 16}, {33, 100}, {70, 576}};
// More rows than a GPU has blocks for, and rows wider than a block holds.
const Size kNormSizes[] = {{0, 5},    {1, 1},     {3, 7},
                           {5, 16},   {33, 100},  {70, 576},
                           {3, 2051}, {2, 16400}, {9000, 8}};

std::string Name(const Size& s) {
  return std::to_string(s.tokens) + " x " + std::to_string(s.width);
}

TEST_P(KernelsConformanceTest, RmsNormForward) {
  for (const Size& s : kNormSizes) {
    const float eps = 1e-5f;
    const Operand x = Normal(act(), {s.tokens, s.width});
    const Operand weight = Normal(act(), {s.width});
    const Operand y = Unwritten(act(), {s.tokens, s.width});
    const Operand rstd = Unwritten(DType::kF32, {s.tokens});
    kernels().RmsNormForward(stream(), x.device, weight.device, eps, y.device,
                             rstd.device);
    const auto want = ref::RmsNormForward<Tracked>(x.host, weight.host, eps);
    ExpectWithin("y " + Name(s), y, want.y);
    ExpectWithin("rstd " + Name(s), rstd, want.rstd);
  }
}

TEST_P(KernelsConformanceTest, AddRmsNormForward) {
  for (const Size& s : kNormSizes) {
    for (const bool in_place : {false, true}) {
      const float eps = 1e-6f;
      const Operand x = Normal(act(), {s.tokens, s.width});
      const Operand delta = Normal(act(), {s.tokens, s.width});
      const Operand weight = Normal(act(), {s.width});
      const Operand sum = in_place ? x : Unwritten(act(), {s.tokens, s.width});
      const Operand y = Unwritten(act(), {s.tokens, s.width});
      const Operand rstd = Unwritten(DType::kF32, {s.tokens});
      kernels().AddRmsNormForward(stream(),
                                  {x.device, delta.device, weight.device, eps},
                                  sum.device, y.device, rstd.device);
      // The norm is of the sum as stored, so the sum must be exact.
      const Operand stored = Normal(act(), {s.tokens, s.width});
      std::vector<double> sums;
      for (int64_t i = 0; i < x.host.num_elements(); ++i) {
        sums.push_back(
            ref::AddRounded(act(), At(x.host, i), At(delta.host, i)));
      }
      Store(sums, stored.host);
      ExpectSame("sum " + Name(s), Fetch(sum.device), stored.host);
      const auto want =
          ref::RmsNormForward<Tracked>(stored.host, weight.host, eps);
      ExpectWithin("y " + Name(s), y, want.y);
      ExpectWithin("rstd " + Name(s), rstd, want.rstd);
    }
  }
}

TEST_P(KernelsConformanceTest, RmsNormBackward) {
  for (const Size& s : kNormSizes) {
    const Operand d_y = Normal(act(), {s.tokens, s.width});
    const Operand x = Normal(act(), {s.tokens, s.width});
    const Operand weight = Normal(act(), {s.width});
    const Operand rstd = Normal(DType::kF32, {s.tokens});
    const Operand d_x = Normal(act(), {s.tokens, s.width});
    const Operand d_weight = Normal(DType::kF32, {s.width});
    kernels().RmsNormBackward(
        stream(), {d_y.device, x.device, weight.device, rstd.device},
        d_x.device, d_weight.device);
    const auto want = ref::RmsNormBackward<Tracked>(
        {d_y.host, x.host, weight.host, rstd.host}, d_x.host, d_weight.host);
    ExpectWithin("d_x " + Name(s), d_x, want.d_x);
    ExpectWithin("d_weight " + Name(s), d_weight, want.d_weight);
  }
}

struct RopeCase {
  int64_t tokens;
  AttentionShape shape;
  bool q_norm, k_norm;
};
const RopeCase kRopeCases[] = {
    {0, {2, 1, 8, 1}, true, true},    {3, {1, 1, 2, 1}, true, true},
    {9, {3, 1, 20, 1}, true, true},   {70, {9, 3, 64, 1}, false, false},
    {5, {4, 2, 128, 1}, true, true},  {6, {2, 2, 6, 1}, false, false},
    {4, {2, 1, 96, 1}, true, false},  {1100, {2, 1, 16, 1}, true, true},
    {3, {40, 2, 128, 1}, true, true}, {2, {2, 1, 512, 1}, false, true},
    {2, {2, 1, 1024, 1}, true, true},
};

TEST_P(KernelsConformanceTest, QkNormRope) {
  for (const RopeCase& c : kRopeCases) {
    const std::string name = "head_dim " + std::to_string(c.shape.head_dim);
    const int64_t width = c.shape.QkvWidth(), dim = c.shape.head_dim;
    const int64_t positions = 50;
    const Operand qkv = Normal(act(), {c.tokens, width});
    const Operand q_weight = Normal(act(), {dim});
    const Operand k_weight = Normal(act(), {dim});
    const Operand cos = Normal(DType::kF32, {positions, dim / 2});
    const Operand sin = Normal(DType::kF32, {positions, dim / 2});
    const Operand at = RandomInts({c.tokens}, positions);
    const auto args = [&](Tensor Operand::*side) {
      QkNormRope result;
      result.shape = c.shape;
      if (c.q_norm) result.q_weight = q_weight.*side;
      if (c.k_norm) result.k_weight = k_weight.*side;
      result.cos = cos.*side;
      result.sin = sin.*side;
      result.positions = at.*side;
      return result;
    };
    const bool norm = c.q_norm || c.k_norm;
    const Operand out = norm ? Unwritten(act(), {c.tokens, width}) : qkv;
    kernels().QkNormRopeForward(stream(), args(&Operand::device), qkv.device,
                                out.device);
    ExpectWithin(
        "out " + name, out,
        ref::QkNormRopeForward<Tracked>(args(&Operand::host), qkv.host));

    const Operand d_out = Normal(act(), {c.tokens, width});
    const Operand d_q_weight = Normal(DType::kF32, {dim});
    const Operand d_k_weight = Normal(DType::kF32, {dim});
    const auto grad = [&](Tensor Operand::*side) {
      Kernels::QkNormRopeGrad result;
      result.d_out = d_out.*side;
      if (norm) result.qkv = qkv.*side;
      if (c.q_norm) result.d_q_weight = d_q_weight.*side;
      if (c.k_norm) result.d_k_weight = d_k_weight.*side;
      return result;
    };
    const auto want = ref::QkNormRopeBackward<Tracked>(args(&Operand::host),
                                                       grad(&Operand::host));
    const Operand d_qkv = Unwritten(act(), {c.tokens, width});
    kernels().QkNormRopeBackward(stream(), args(&Operand::device),
                                 grad(&Operand::device), d_qkv.device);
    ExpectWithin("d_qkv " + name, d_qkv, want.d_qkv);
    if (c.q_norm) ExpectWithin("d_q_weight", d_q_weight, want.d_q_weight);
    if (c.k_norm) ExpectWithin("d_k_weight", d_k_weight, want.d_k_weight);
    // In place, and without the weights' gradients.
    Kernels::QkNormRopeGrad alone = grad(&Operand::device);
    alone.d_q_weight = alone.d_k_weight = Tensor();
    kernels().QkNormRopeBackward(stream(), args(&Operand::device), alone,
                                 d_out.device);
    ExpectWithin("d_qkv in place " + name, d_out, want.d_qkv);
  }
}

TEST_P(KernelsConformanceTest, AFailedStreamLeavesNormsAndAnglesAlone) {
  const Operand x = Normal(act(), {4, 32});
  const Operand delta = Normal(act(), {4, 32});
  const Operand weight = Normal(act(), {32});
  const Operand rstd = Normal(DType::kF32, {4});
  const Operand d_weight = Normal(DType::kF32, {32});
  const Operand d_x = Normal(act(), {4, 32});
  const Operand table = Normal(DType::kF32, {4, 32});
  QkNormRope rope;
  rope.shape = {2, 1, 8, 1};
  const Operand angles = Normal(DType::kF32, {4, 4});
  rope.cos = rope.sin = angles.device;
  const Operand positions = RandomInts({4}, 4);
  rope.positions = positions.device;
  Kernels::QkNormRopeGrad rope_grad;
  rope_grad.d_out = x.device;
  stream().Fail(absl::InternalError("first failure"));
  kernels().RmsNormForward(stream(), x.device, weight.device, 1e-6f,
                           delta.device, rstd.device);
  kernels().AddRmsNormForward(stream(),
                              {x.device, delta.device, weight.device, 1e-6f},
                              x.device, d_x.device, rstd.device);
  kernels().RmsNormBackward(
      stream(), {delta.device, x.device, weight.device, rstd.device},
      d_x.device, d_weight.device);
  kernels().QkNormRopeForward(stream(), rope, x.device, d_x.device);
  kernels().QkNormRopeBackward(stream(), rope, rope_grad, d_x.device);
  kernels().BiasForward(stream(), weight.device, d_x.device);
  kernels().BiasBackward(stream(), d_x.device, d_weight.device);
  kernels().EmbeddingForward(stream(), positions.device, x.device, d_x.device);
  kernels().EmbeddingBackward(stream(), positions.device, d_x.device,
                              table.device, Tensor());
  EXPECT_EQ(stream().Finish().message(), "first failure");
  for (const Operand& written : {x, delta, rstd, d_weight, d_x, table}) {
    ExpectSame("output", Fetch(written.device), written.host);
  }
}

TEST_P(KernelsConformanceTest, SwiGlu) {
  for (const Size& s : kSizes) {
    // Wide enough that the sigmoid saturates on both sides.
    const Operand x = Normal(act(), {s.tokens, 2 * s.width}, 20.0f);
    const Operand d_y = Normal(act(), {s.tokens, s.width});
    const Operand y = Unwritten(act(), {s.tokens, s.width});
    const Operand again = Unwritten(act(), {s.tokens, s.width});
    const Operand d_x = Unwritten(act(), {s.tokens, 2 * s.width});
    const auto want_y = ref::SwiGluForward<Tracked>(x.host);
    const auto want_d_x = ref::SwiGluBackward<Tracked>(x.host, d_y.host);
    kernels().SwiGluForward(stream(), x.device, y.device);
    ExpectWithin("y " + Name(s), y, want_y);
    kernels().SwiGluBackward(stream(), x.device, d_y.device, d_x.device,
                             again.device);
    ExpectWithin("d_x " + Name(s), d_x, want_d_x);
    ExpectWithin("y again " + Name(s), again, want_y);
    kernels().SwiGluBackward(stream(), x.device, d_y.device, x.device,
                             Tensor());
    ExpectWithin("d_x in place " + Name(s), x, want_d_x);
  }
}

TEST_P(KernelsConformanceTest, SumsOfSquares) {
  for (const Size& s : {Size{0, 5}, {1, 1}, {1, 70001}, {3, 256}, {300, 257}}) {
    const Operand x = Normal(DType::kF32, {s.tokens, s.width});
    const Operand squares =
        Unwritten(DType::kF64, {s.tokens, SquareBlocks(s.width)});
    kernels().RowSquares(stream(), x.device, squares.device);
    ExpectSquares(Name(s), x, squares);
  }
  Operand x = Normal(DType::kF32, {2, 1000});
  x.host.data<float>()[1999] = INFINITY;
  Upload(x);
  const Operand squares = Unwritten(DType::kF64, {2, 4});
  kernels().RowSquares(stream(), x.device, squares.device);
  EXPECT_FALSE(std::isfinite(kernels().Sum(stream(), squares.device)));
}

TEST_P(KernelsConformanceTest, Sum) {
  for (const int64_t n : {0, 1, 100, 70001}) {
    const Operand x = Normal(DType::kF64, {n});
    double want = 0, size = 0;
    for (int64_t i = 0; i < n; ++i) {
      want += At(x.host, i);
      size += std::abs(At(x.host, i));
    }
    const double float64_roundoff = 1.0 / (int64_t{1} << 53);
    EXPECT_NEAR(kernels().Sum(stream(), x.device), want,
                static_cast<double>(n) * float64_roundoff * size);
  }
}

struct AdamWCase {
  int64_t n;
  float eps, weight_decay;
  int64_t step;
};
// The first step starts from moments of zero and gradients among which some are
// zero: there all of the denominator is eps.
const AdamWCase kAdamWCases[] = {{0, 1e-8f, 0.1f, 3},
                                 {1, 1e-8f, 0.1f, 3},
                                 {37, 1e-12f, 0.0f, 1},
                                 {70001, 1e-8f, 0.1f, 3},
                                 {70001, 1e-12f, 0.01f, 100000}};

// One more rounding, for a stochastic one is up to a whole unit off.
std::vector<Tracked> Rounded(DType dtype, std::vector<Tracked> values) {
  if (dtype == DType::kF32) return values;
  for (Tracked& value : values) value = MayRound(dtype, value);
  return values;
}

TEST_P(KernelsConformanceTest, AdamW) {
  for (const AdamWCase& c : kAdamWCases) {
    for (const DType moment : {DType::kF32, DType::kBF16}) {
      const int64_t n = c.n;
      AdamWParams params;
      params.learning_rate = 1e-2f;
      params.beta1 = 0.9f;
      params.beta2 = 0.95f;
      params.eps = c.eps;
      params.weight_decay = c.weight_decay;
      params.grad_scale = 0.25f;
      params.step = c.step;
      const Operand master = Normal(DType::kF32, {n});
      const Operand m = Normal(moment, {n});
      const Operand v = Normal(moment, {n});
      const Operand grad = Normal(DType::kF32, {n});
      std::vector<double> ms, vs;
      for (int64_t i = 0; i < n; ++i) {
        ms.push_back(c.step > 1 ? At(m.host, i) : 0);
        vs.push_back(c.step > 1 ? std::abs(At(v.host, i)) : 0);
        if (c.step == 1 && i % 3 == 0) grad.host.data<float>()[i] = 0;
      }
      Store(ms, m.host);
      Store(vs, v.host);
      for (const Operand& changed : {m, v, grad}) Upload(changed);
      const auto want = ref::AdamW<Tracked>(
          params, {master.host, Tensor(), m.host, v.host, grad.host});
      if (act() == DType::kF32) {
        kernels().AdamW(
            stream(), params,
            {master.device, Tensor(), m.device, v.device, grad.device});
      } else {
        // The master is what the halves join to, and they are its halves.
        const Operand high = Unwritten(DType::kBF16, {n});
        const Operand low = Unwritten(DType::kI16, {n});
        kernels().SplitMaster(stream(), master.device, high.device, low.device);
        kernels().AdamW(
            stream(), params,
            {high.device, low.device, m.device, v.device, grad.device});
        kernels().JoinMaster(stream(), high.device, low.device, master.device);
        const Tensor stored = Fetch(master.device), top = Fetch(high.device);
        for (int64_t i = 0; i < n; ++i) {
          ASSERT_EQ(top.data<BFloat16>()[i].bits,
                    SplitHalves(stored.data<float>()[i]).high.bits)
              << i;
        }
      }
      ExpectWithin("master", master, want.master);
      ExpectWithin("m", m, Rounded(moment, want.m));
      ExpectWithin("v", v, Rounded(moment, want.v));
      ExpectSame("gradient", Fetch(grad.device), grad.host);
    }
  }
}

// Moments before rounding that no order of operations can change: factors that
// are powers of two, and gradients whose squares float32 holds or is far from
// holding. Then every backend must give the same bits.
//
// The bits go by an element's place in the whole model, also where its number
// outgrows 32 bits.
TEST_P(KernelsConformanceTest, AdamWRoundsMomentsStochastically) {
  const std::pair<int64_t, int64_t> cases[] = {
      {1, 0}, {37, 192}, {70001, 0}, {70001, (int64_t{3} << 32) - 640}};
  for (const auto& [n, first] : cases) {
    AdamWParams params;
    params.learning_rate = 1e-2f;
    params.beta1 = 0.0f;
    params.beta2 = 0.75f;
    params.eps = 1e-8f;
    params.step = 7;
    params.seed = 0x123456789abcdef0;
    const Operand master = Normal(DType::kF32, {n});
    const Operand m = Normal(DType::kBF16, {n}, 0);
    const Operand v = Normal(DType::kBF16, {n}, 0);
    const Operand grad = Normal(DType::kF32, {n});
    const RoundingKey key = RoundingKeyOf(params.seed, params.step);
    for (int64_t i = 0; i < n; ++i) {
      // Twelve bits, and from tiny to where v is infinite.
      int exponent = static_cast<int>(random_() % 180) - 52;
      if (exponent == 64) exponent = 63;  // whose square only doubles hold
      const float g = std::ldexp(
          static_cast<float>(2048 + random_() % 2048) / 2048, exponent);
      grad.host.data<float>()[i] = i % 2 == 0 ? g : -g;
    }
    // Which must not become infinite.
    if (n > 1) grad.host.data<float>()[1] = -0x1.fffffep127f;
    if (n > 1) grad.host.data<float>()[2] = NAN;
    for (const Operand& changed : {m, v, grad}) Upload(changed);
    kernels().AdamW(
        stream(), params,
        {master.device, Tensor(), m.device, v.device, grad.device, first});
    // Only then has the device got what the host's memory held.
    const Tensor got_m = Fetch(m.device), got_v = Fetch(v.device);
    for (int64_t i = 0; i < n; ++i) {
      const float g = grad.host.data<float>()[i];
      const uint32_t random = RoundingBits(key, first + i);
      m.host.data<BFloat16>()[i] = StochasticBFloat16(g, random & 0xffff);
      v.host.data<BFloat16>()[i] =
          StochasticBFloat16(0.25f * (g * g), random >> 16);
    }
    // A NaN that arithmetic makes has the bits that the hardware chooses.
    for (const auto& [got, want] :
         {std::pair(got_m, m.host), {got_v, v.host}}) {
      if (n < 2) continue;
      ASSERT_TRUE(std::isnan(At(got, 2)));
      want.data<BFloat16>()[2] = got.data<BFloat16>()[2];
    }
    ExpectSame("m", got_m, m.host);
    ExpectSame("v", got_v, v.host);
  }
}

TEST_P(KernelsConformanceTest, SplitMasterAndBack) {
  for (const int64_t n : {0, 1, 37, 70001}) {
    // Of every exponent, with infinities, NaNs and ties among them.
    const Operand master = Normal(DType::kF32, {n});
    for (int64_t i = 0; i < n; ++i) {
      uint32_t bits = static_cast<uint32_t>(random_());
      if (i % 4 == 1) bits |= 0x7f800000u;
      if (i % 4 == 2) bits = (bits & 0xffff0000u) | 0x8000u;
      if (i % 8 == 1) bits |= 0x007f8000u;  // would carry into the sign
      if (i % 16 == 5) bits &= 0xff800000u;
      master.host.data<float>()[i] = std::bit_cast<float>(bits);
    }
    Upload(master);
    const Operand high = Unwritten(DType::kBF16, {n});
    const Operand low = Unwritten(DType::kI16, {n});
    const Operand alone = Unwritten(DType::kBF16, {n});
    const Operand joined = Unwritten(DType::kF32, {n});
    kernels().SplitMaster(stream(), master.device, high.device, low.device);
    kernels().SplitMaster(stream(), master.device, alone.device, Tensor());
    kernels().JoinMaster(stream(), high.device, low.device, joined.device);
    for (int64_t i = 0; i < n; ++i) {
      const Halves halves = SplitHalves(master.host.data<float>()[i]);
      high.host.data<BFloat16>()[i] = halves.high;
      low.host.data<int16_t>()[i] = halves.low;
      joined.host.data<float>()[i] = JoinHalves(halves);
    }
    ExpectSame("high", Fetch(high.device), high.host);
    ExpectSame("low", Fetch(low.device), low.host);
    ExpectSame("high alone", Fetch(alone.device), high.host);
    ExpectSame("joined", Fetch(joined.device), joined.host);
  }
}

}  // namespace
}  // namespace gradwire
