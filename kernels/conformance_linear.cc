// SPDX-License-Identifier: Apache-2.0
// Matmul, bias, embedding, rows, casts.
#include <iterator>
#include <string>
#include <vector>

#include "kernels/conformance.h"
#include "kernels/reference/linear.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

namespace ref = reference;

struct Size {
  int64_t m, n, k;
};
const Size kSizes[] = {{0, 3, 5},      {1, 1, 1},      {3, 2, 1},
                       {7, 5, 3},      {33, 70, 40},   {130, 64, 9},
                       {257, 33, 130}, {20, 450, 600}, {9, 450, 640}};

// With `more`.
std::vector<Size> SizesAnd(const Size& more) {
  std::vector<Size> sizes(std::begin(kSizes), std::end(kSizes));
  sizes.push_back(more);
  return sizes;
}

std::string Name(const Size& s) {
  return std::to_string(s.m) + " x " + std::to_string(s.n) + " x " +
         std::to_string(s.k);
}

TEST_P(KernelsConformanceTest, MatmulForward) {
  for (const Size& s : kSizes) {
    for (const bool accumulate : {false, true}) {
      const Operand x = Normal(act(), {s.m, s.k});
      const Operand w = Normal(act(), {s.n, s.k});
      const Operand y =
          accumulate ? Normal(act(), {s.m, s.n}) : Unwritten(act(), {s.m, s.n});
      kernels().MatmulForward(stream(), x.device, w.device, y.device,
                              accumulate);
      ExpectWithin(
          Name(s), y,
          ref::MatmulForward<Tracked>(x.host, w.host, y.host, accumulate));
    }
  }
}

TEST_P(KernelsConformanceTest, MatmulBackwardInput) {
  for (const Size& s : kSizes) {
    for (const bool accumulate : {false, true}) {
      const Operand d_y = Normal(act(), {s.m, s.n});
      const Operand w = Normal(act(), {s.n, s.k});
      const Operand d_x =
          accumulate ? Normal(act(), {s.m, s.k}) : Unwritten(act(), {s.m, s.k});
      kernels().MatmulBackwardInput(stream(), d_y.device, w.device, d_x.device,
                                    accumulate);
      ExpectWithin(Name(s), d_x,
                   ref::MatmulBackwardInput<Tracked>(d_y.host, w.host, d_x.host,
                                                     accumulate));
    }
  }
}

TEST_P(KernelsConformanceTest, MatmulBackwardWeight) {
  for (const Size& s : kSizes) {
    for (const bool accumulate : {false, true}) {
      const Operand d_y = Normal(act(), {s.m, s.n});
      const Operand x = Normal(act(), {s.m, s.k});
      const Operand d_w = accumulate ? Normal(DType::kF32, {s.n, s.k})
                                     : Unwritten(DType::kF32, {s.n, s.k});
      const Operand squares = Unwritten(DType::kF64, {s.n, SquareBlocks(s.k)});
      const Operand alone = Normal(DType::kF32, {s.n, s.k});
      Upload({d_w.host, alone.device});
      const auto want = ref::MatmulBackwardWeight<Tracked>(
          d_y.host, x.host, {d_w.host, accumulate});
      kernels().MatmulBackwardWeight(stream(), d_y.device, x.device,
                                     {d_w.device, accumulate, squares.device});
      ExpectWithin(Name(s), d_w, want);
      ExpectSquares(Name(s), d_w, squares);
      kernels().MatmulBackwardWeight(stream(), d_y.device, x.device,
                                     {alone.device, accumulate});
      ExpectSame("without squares, " + Name(s), Fetch(alone.device),
                 Fetch(d_w.device));
    }
  }
}

// A packed copy of old weights would show.
TEST_P(KernelsConformanceTest, MatmulSeesWeightsThatHaveChanged) {
  const Operand x = Normal(act(), {40, 32});
  const Operand w = Normal(act(), {48, 32});
  const Operand other = Normal(act(), {48, 32});
  const Operand y = Unwritten(act(), {40, 48});
  kernels().MatmulForward(stream(), x.device, w.device, y.device, false);
  kernels().Cast(stream(), other.device, w.device);
  kernels().InvalidateWeights(w.device);
  kernels().MatmulForward(stream(), x.device, w.device, y.device, false);
  ExpectWithin("after the change", y,
               ref::MatmulForward<Tracked>(x.host, other.host, y.host, false));
}

TEST_P(KernelsConformanceTest, Bias) {
  for (const Size& s : SizesAnd({40, 1032, 1})) {
    const Operand bias = Normal(act(), {s.n});
    const Operand y = Normal(act(), {s.m, s.n});
    kernels().BiasForward(stream(), bias.device, y.device);
    ExpectWithin("y " + Name(s), y,
                 ref::BiasForward<Tracked>(bias.host, y.host));
    const Operand d_y = Normal(act(), {s.m, s.n});
    const Operand d_bias = Normal(DType::kF32, {s.n});
    kernels().BiasBackward(stream(), d_y.device, d_bias.device);
    ExpectWithin("d_bias " + Name(s), d_bias,
                 ref::BiasBackward<Tracked>(d_y.host, d_bias.host));
  }
}

TEST_P(KernelsConformanceTest, Embedding) {
  // Of few tokens, each comes often.
  for (const Size& s : SizesAnd({3000, 7, 24})) {
    const Operand tokens = RandomInts({s.m}, static_cast<int32_t>(s.n));
    const Operand table = Normal(act(), {s.n, s.k});
    const Operand out = Unwritten(act(), {s.m, s.k});
    kernels().EmbeddingForward(stream(), tokens.device, table.device,
                               out.device);
    std::vector<Tracked> rows;
    for (int64_t t = 0; t < s.m; ++t) {
      const int64_t id = tokens.host.data<int32_t>()[t];
      for (int64_t c = 0; c < s.k; ++c) {
        rows.emplace_back(At(table.host, id * s.k + c));
      }
    }
    ExpectWithin("out " + Name(s), out, rows);
    const Operand d_out = Normal(act(), {s.m, s.k});
    const Operand d_table = Normal(DType::kF32, {s.n, s.k});
    const Operand squares = Unwritten(DType::kF64, {s.n, SquareBlocks(s.k)});
    kernels().RowSquares(stream(), d_table.device, squares.device);
    ExpectSquares("table " + Name(s), d_table, squares);
    kernels().EmbeddingBackward(stream(), tokens.device, d_out.device,
                                d_table.device, squares.device);
    ExpectWithin(
        "d_table " + Name(s), d_table,
        ref::EmbeddingBackward<Tracked>(tokens.host, d_out.host, d_table.host));
    ExpectSquares("d_table " + Name(s), d_table, squares);
    const Operand again = Normal(DType::kF32, {s.n, s.k}, 0);
    const Operand without = Normal(DType::kF32, {s.n, s.k}, 0);
    kernels().EmbeddingBackward(stream(), tokens.device, d_out.device,
                                again.device, squares.device);
    kernels().EmbeddingBackward(stream(), tokens.device, d_out.device,
                                without.device, Tensor());
    ExpectSame("without squares, " + Name(s), Fetch(again.device),
               Fetch(without.device));
  }
}

TEST_P(KernelsConformanceTest, GatherAndScatterRows) {
  for (const int64_t n : {1, 5, 64}) {
    const Operand x = Normal(act(), {9, n});
    const Operand rows = Ints({8, 0, 3, 4}, {4});
    const Operand gathered = Unwritten(act(), {4, n});
    const Operand scattered = Unwritten(act(), {9, n});
    kernels().GatherRows(stream(), x.device, rows.device, gathered.device);
    kernels().ScatterRows(stream(), gathered.device, rows.device,
                          scattered.device);
    std::vector<Tracked> some, all(static_cast<size_t>(9 * n));
    for (const int64_t row : {8, 0, 3, 4}) {
      for (int64_t c = 0; c < n; ++c) {
        some.emplace_back(At(x.host, row * n + c));
        all[static_cast<size_t>(row * n + c)] = some.back();
      }
    }
    ExpectWithin("gathered", gathered, some);
    ExpectWithin("scattered", scattered, all);
  }
}

TEST_P(KernelsConformanceTest, ScatterAddRows) {
  for (const int64_t n : {1, 5, 64, 97}) {
    const Operand x = Normal(act(), {6, n});
    // Row 2 gets three, row 0 none.
    const Operand rows = Ints({2, 1, 2, 4, 3, 2}, {6});
    const Operand out = Unwritten(act(), {5, n});
    kernels().ScatterAddRows(stream(), x.device, rows.device, out.device);
    ExpectWithin(std::to_string(n), out,
                 ref::ScatterAddRows<Tracked>(x.host, rows.host, 5));
  }
}

// Rows that get more terms than a backend may note, among others; more columns
// than a block has threads.
TEST_P(KernelsConformanceTest, ScatterAddRowsOfManyTerms) {
  for (const int64_t n : {3, 2056}) {
    const int64_t terms = 150;
    std::vector<int32_t> to;
    for (int64_t i = 0; i < terms; ++i) {
      to.push_back(i % 2 == 0 ? 3 : static_cast<int32_t>(random_() % 9));
    }
    const Operand x = Normal(act(), {terms, n});
    const Operand rows = Ints(to, {terms});
    const Operand out = Unwritten(act(), {10, n});
    const Operand again = Unwritten(act(), {10, n});
    kernels().ScatterAddRows(stream(), x.device, rows.device, out.device);
    kernels().ScatterAddRows(stream(), x.device, rows.device, again.device);
    ExpectWithin(std::to_string(n), out,
                 ref::ScatterAddRows<Tracked>(x.host, rows.host, 10));
    ExpectSame("again", Fetch(out.device), Fetch(again.device));
  }
}

TEST_P(KernelsConformanceTest, CastRoundsToNearestEven) {
  const Operand wide = Normal(DType::kF32, {3, 1031});
  const Operand narrow = Unwritten(DType::kBF16, {3, 1031});
  const Operand back = Unwritten(DType::kF32, {3, 1031});
  kernels().Cast(stream(), wide.device, narrow.device);
  kernels().Cast(stream(), narrow.device, back.device);
  const Tensor got = Fetch(narrow.device), wider = Fetch(back.device);
  for (int64_t i = 0; i < got.num_elements(); ++i) {
    const BFloat16 want(wide.host.data<float>()[i]);
    ASSERT_EQ(got.data<BFloat16>()[i].bits, want.bits) << i;
    ASSERT_EQ(wider.data<float>()[i], static_cast<float>(want)) << i;
  }
}

TEST_P(KernelsConformanceTest, Add) {
  for (const int64_t n : {0, 1, 17, 5000}) {
    const Operand x = Normal(act(), {n});
    const Operand y = Normal(act(), {n});
    kernels().Add(stream(), x.device, y.device);
    ExpectWithin(std::to_string(n), y, ref::Add<Tracked>(x.host, y.host));
  }
}

}  // namespace
}  // namespace gradwire
