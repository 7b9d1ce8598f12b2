// SPDX-License-Identifier: Apache-2.0
// The digest of optimizer state: that of its definition, and another after any
// change.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/conformance.h"
#include "kernels/reference/pointwise.h"
#include "kernels/state_digest.h"

namespace gradwire {

OptimizerState KernelsConformanceTest::AnyState(int64_t n, DType moment) {
  OptimizerState state = {
      Unwritten(act(), {n}),    {},
      Unwritten(moment, {n}),   Unwritten(moment, {n}),
      Normal(DType::kF32, {n}), Unwritten(DType::kI64, {2})};
  if (act() == DType::kBF16) state.low = Unwritten(DType::kI16, {n});
  for (const Operand& of : {state.weight, state.low, state.m, state.v}) {
    if (of.host.is_null()) continue;
    auto* bytes = static_cast<unsigned char*>(of.host.raw());
    for (int64_t i = 0; i < of.host.bytes(); ++i) {
      bytes[i] = static_cast<unsigned char>(random_());
    }
    Upload(of);
  }
  SetDigest(state, {});
  return state;
}

void KernelsConformanceTest::SetDigest(const OptimizerState& state,
                                       const DigestSums& sums) {
  for (int i = 0; i < 2; ++i) {
    state.digest.host.data<int64_t>()[i] = static_cast<int64_t>(sums.lane[i]);
  }
  Upload(state.digest);
}

DigestSums KernelsConformanceTest::FetchDigest(const OptimizerState& state) {
  const Tensor got = Fetch(state.digest.device);
  DigestSums sums;
  for (int i = 0; i < 2; ++i) {
    sums.lane[i] = static_cast<uint64_t>(got.data<int64_t>()[i]);
  }
  return sums;
}

DigestSums KernelsConformanceTest::DigestOf(const OptimizerState& state,
                                            int64_t first) {
  SetDigest(state, {});
  kernels().StateDigest(stream(), state.Device(first));
  return FetchDigest(state);
}

namespace {

TEST_P(KernelsConformanceTest, StateDigestIsThatOfItsDefinition) {
  for (const int64_t n : {0, 1, 37, 64, 130, 70001}) {
    for (const DType moment : {DType::kF32, DType::kBF16}) {
      for (const int64_t first : {int64_t{0}, (int64_t{3} << 32) - 640}) {
        const OptimizerState state = AnyState(n, moment);
        AdamWTensors host = state.Host(first);
        EXPECT_EQ(DigestOf(state, first), reference::StateDigest(host)) << n;
        // Of zeros that are not there; and it adds.
        AdamWTensors device = state.Device(first);
        host.m = host.v = device.m = device.v = Tensor();
        SetDigest(state, {{5, ~uint64_t{0}}});
        kernels().StateDigest(stream(), device);
        DigestSums want = reference::StateDigest(host);
        want.lane[0] += 5;
        want.lane[1] -= 1;
        EXPECT_EQ(FetchDigest(state), want) << n;
      }
    }
  }
}

TEST_P(KernelsConformanceTest, StateDigestOfPiecesAddsUp) {
  const int64_t n = 70016, cut = 640, first = 192;
  const OptimizerState state = AnyState(n, DType::kF32);
  const DigestSums whole = DigestOf(state, first);
  SetDigest(state, {});
  for (const auto& [begin, end] : {std::pair(cut, n), {int64_t{0}, cut}}) {
    AdamWTensors piece = state.Device(first + begin);
    for (Tensor* t : {&piece.weight, &piece.low, &piece.m, &piece.v}) {
      if (!t->is_null()) *t = t->Rows(begin, end);
    }
    kernels().StateDigest(stream(), piece);
  }
  EXPECT_EQ(FetchDigest(state), whole);
}

TEST_P(KernelsConformanceTest, StateDigestAdamWTakesItOfWhatItLeaves) {
  for (const int64_t n : {0, 1, 63, 130, 70001}) {
    for (const DType moment : {DType::kF32, DType::kBF16}) {
      AdamWParams params;
      params.learning_rate = 1e-2f;
      params.beta1 = 0.9f;
      params.beta2 = 0.95f;
      params.eps = 1e-8f;
      params.step = 3;
      // Bits of any kind: infinities and NaNs are stored, too.
      const OptimizerState state = AnyState(n, moment);
      kernels().AdamW(stream(), params, state.Device(640));
      const DigestSums left = FetchDigest(state);
      EXPECT_EQ(left, DigestOf(state, 640)) << n;
    }
  }
}

TEST_P(KernelsConformanceTest, StateDigestEveryBitAndEveryPlaceCount) {
  const int64_t n = 150;
  for (const DType moment : {DType::kF32, DType::kBF16}) {
    const OptimizerState state = AnyState(n, moment);
    const DigestSums was = DigestOf(state, 0);
    const auto expect_other = [&](const Operand& of, const std::string& what) {
      Upload(of);
      const DigestSums now = DigestOf(state, 0);
      for (int lane = 0; lane < 2; ++lane) {
        EXPECT_NE(now.lane[lane], was.lane[lane]) << what;
      }
    };
    std::vector<Operand> stored = {state.weight, state.m, state.v};
    if (act() == DType::kBF16) stored.push_back(state.low);
    for (size_t s = 0; s < stored.size(); ++s) {
      const Operand& of = stored[s];
      const int64_t size = DTypeBytes(of.host.dtype());
      auto* bytes = static_cast<unsigned char*>(of.host.raw());
      for (int64_t bit = 0; bit < 8 * of.host.bytes(); ++bit) {
        bytes[bit / 8] ^= static_cast<unsigned char>(1 << (bit % 8));
        expect_other(of, std::to_string(s) + ", bit " + std::to_string(bit));
        bytes[bit / 8] ^= static_cast<unsigned char>(1 << (bit % 8));
      }
      // Exchanged: neighbours, in one block and across its end, and blocks.
      for (const int64_t distance : {1, 64}) {
        for (int64_t i = 0; i + distance < n; ++i) {
          unsigned char* a = bytes + i * size;
          unsigned char* b = a + distance * size;
          if (std::equal(a, a + size, b)) continue;
          std::swap_ranges(a, a + size, b);
          expect_other(of, std::to_string(s) + ", place " + std::to_string(i));
          std::swap_ranges(a, a + size, b);
        }
      }
      Upload(of);
    }
    EXPECT_EQ(DigestOf(state, 0), was);
    EXPECT_NE(DigestOf(state, 64), was) << "of another place in the model";
  }
}

}  // namespace
}  // namespace gradwire
