// SPDX-License-Identifier: Apache-2.0
// Our own bf16 products against plain float64 loops, in every form of operands
// and at sizes that no tile divides; and their promise that an element's bits
// depend on its row and column alone.
#include "kernels/cpu/bf16_gemm.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/scratch.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

constexpr double kFloatRoundoff = 1.0 / (1 << 24);
constexpr double kDoubleRoundoff = 1.0 / (int64_t{1} << 53);
constexpr double kBf16Roundoff = 1.0 / (1 << 8);
// Around c, to see writes outside.
constexpr float kGuard = 12288.0f;

struct Case {
  int64_t m, n, k;
  bool a_transposed, b_transposed;
  DType c;
  bool accumulate;
};

class Product {
 public:
  explicit Product(const Case& x) : case_(x) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](int64_t n) {
      std::vector<BFloat16> values(static_cast<size_t>(n));
      for (BFloat16& value : values) value = BFloat16(normal(random));
      return values;
    };
    a_ = fill(x.m * x.k);
    b_ = fill(x.k * x.n);
    // Room for guards, or rows that are aligned as large results must be.
    c_row_ = x.n % 64 == 0 ? x.n + 16 : x.n + 3;
    old_.assign(static_cast<size_t>(x.m * c_row_), kGuard);
    for (int64_t i = 0; i < x.m; ++i) {
      for (int64_t j = 0; j < x.n; ++j) {
        old_[At(i, j)] = static_cast<float>(BFloat16(normal(random)));
      }
    }
  }

  GemmShape Shape() const {
    GemmShape s{.m = case_.m, .n = case_.n, .k = case_.k};
    s.a_row = case_.a_transposed ? 1 : case_.k;
    s.a_col = case_.a_transposed ? case_.m : 1;
    s.b_row = case_.b_transposed ? 1 : case_.n;
    s.b_col = case_.b_transposed ? case_.k : 1;
    s.c_row = c_row_;
    s.ab = DType::kBF16;
    s.c = case_.c;
    s.accumulate = case_.accumulate;
    return s;
  }

  // c after the product by `threads` parts, as float32.
  std::vector<float> Run(int threads, double* squares = nullptr) const {
    const bool narrow = case_.c == DType::kBF16;
    Scratch memory;  // aligned
    memory.Reserve(1, static_cast<int64_t>(old_.size()) * 4);
    char* c = memory.part(0);
    float* f32 = reinterpret_cast<float*>(c);
    BFloat16* bf16 = reinterpret_cast<BFloat16*>(c);
    for (size_t i = 0; i < old_.size(); ++i) {
      if (narrow) {
        bf16[i] = BFloat16(old_[i]);
      } else {
        f32[i] = old_[i];
      }
    }
    const GemmShape shape = Shape();
    for (int t = 0; t < threads; ++t) {
      const GemmPart part = Bf16GemmPart(shape, squares != nullptr, threads, t);
      Scratch scratch;
      scratch.Reserve(1, Bf16GemmScratchBytes(shape, part));
      Bf16GemmRun(shape, part, a_.data(), b_.data(), c, squares,
                  scratch.part(0));
    }
    std::vector<float> result(old_.size());
    for (size_t i = 0; i < result.size(); ++i) {
      result[i] = narrow ? static_cast<float>(bf16[i]) : f32[i];
    }
    return result;
  }

  void Check(const std::vector<float>& c) const {
    const GemmShape s = Shape();
    const double terms = static_cast<double>(s.k) + 1;
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t j = 0; j < s.n; ++j) {
        double sum = s.accumulate ? double{old_[At(i, j)]} : 0.0;
        double magnitude = std::abs(sum);
        for (int64_t k = 0; k < s.k; ++k) {
          const double term =
              static_cast<double>(static_cast<float>(
                  a_[static_cast<size_t>(i * s.a_row + k * s.a_col)])) *
              static_cast<double>(static_cast<float>(
                  b_[static_cast<size_t>(k * s.b_row + j * s.b_col)]));
          sum += term;
          magnitude += std::abs(term);
        }
        double bound = terms * kFloatRoundoff * magnitude;
        if (s.c == DType::kBF16)
          bound += kBf16Roundoff * (std::abs(sum) + bound);
        ASSERT_LE(std::abs(double{c[At(i, j)]} - sum), bound)
            << "row " << i << " column " << j;
      }
      for (int64_t j = s.n; j < s.c_row; ++j) {
        ASSERT_EQ(c[At(i, j)], kGuard) << "written beyond row " << i;
      }
    }
  }

  void CheckSquares(const std::vector<float>& c,
                    const std::vector<double>& squares) const {
    const int64_t blocks = SquareBlocks(case_.n);
    for (int64_t i = 0; i < case_.m; ++i) {
      for (int64_t b = 0; b < blocks; ++b) {
        double sum = 0;
        for (int64_t j = b * kSquareBlock;
             j < std::min(case_.n, (b + 1) * kSquareBlock); ++j) {
          sum += double{c[At(i, j)]} * double{c[At(i, j)]};
        }
        ASSERT_NEAR(squares[static_cast<size_t>(i * blocks + b)], sum,
                    kSquareBlock * kDoubleRoundoff * sum)
            << "row " << i << ", block " << b;
      }
    }
  }

 private:
  size_t At(int64_t i, int64_t j) const {
    return static_cast<size_t>(i * c_row_ + j);
  }

  const Case case_;
  int64_t c_row_ = 0;
  std::vector<BFloat16> a_, b_;
  std::vector<float> old_;
};

TEST(Bf16GemmTest, EqualsPlainLoopsInEveryForm) {
  if (!HasBf16Dot()) GTEST_SKIP() << "this processor has no AVX512-BF16";
  const int64_t sizes[][3] = {
      {1, 1, 1},      {1, 17, 2},   {7, 16, 31},   {6, 64, 32},   {13, 65, 33},
      {100, 150, 67}, {5, 300, 64}, {800, 20, 50}, {3, 33, 5200}, {50, 3, 128},
      {769, 130, 35}, {24, 257, 1}, {450, 640, 9}};
  for (const auto& [m, n, k] : sizes) {
    for (int form = 0; form < 16; ++form) {
      const Case x = {m,
                      n,
                      k,
                      (form & 1) != 0,
                      (form & 2) != 0,
                      (form & 4) != 0 ? DType::kBF16 : DType::kF32,
                      (form & 8) != 0};
      SCOPED_TRACE(testing::Message()
                   << m << " x " << n << " x " << k << ", form " << form);
      const Product product(x);
      const std::vector<float> one = product.Run(1);
      product.Check(one);
      if (testing::Test::HasFatalFailure()) return;
      for (const int threads : {2, 3, 6}) {
        const std::vector<float> many = product.Run(threads);
        ASSERT_EQ(std::memcmp(one.data(), many.data(), one.size() * 4), 0)
            << threads << " threads";
      }
      if (x.c == DType::kBF16) continue;
      // Asking for sums of squares moves panels, and no bit of c.
      std::vector<double> squares(static_cast<size_t>(m * SquareBlocks(n)),
                                  NAN);
      ASSERT_EQ(product.Run(1, squares.data()), one);
      product.CheckSquares(one, squares);
      for (const int threads : {2, 3, 6}) {
        std::vector<double> again(squares.size(), NAN);
        ASSERT_EQ(product.Run(threads, again.data()), one);
        ASSERT_EQ(again, squares) << threads << " threads";
      }
    }
  }
}

TEST(Bf16GemmTest, ARowHasTheSameBitsInAnyBatch) {
  if (!HasBf16Dot()) GTEST_SKIP() << "this processor has no AVX512-BF16";
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  constexpr int64_t kM = 29, kN = 70, kK = 96;
  std::vector<BFloat16> a(kM * kK), b(kN * kK);
  for (BFloat16& value : a) value = BFloat16(normal(random));
  for (BFloat16& value : b) value = BFloat16(normal(random));
  std::vector<float> whole(kM * kN), alone(kN);
  const auto run = [&](int64_t row, int64_t rows, float* c) {
    const GemmShape shape{.m = rows,
                          .n = kN,
                          .k = kK,
                          .a_row = kK,
                          .b_row = 1,
                          .b_col = kK,
                          .c_row = kN,
                          .ab = DType::kBF16};
    const GemmPart part = {0, rows, 0, kN};
    Scratch scratch;
    scratch.Reserve(1, Bf16GemmScratchBytes(shape, part));
    Bf16GemmRun(shape, part, a.data() + row * kK, b.data(), c, nullptr,
                scratch.part(0));
  };
  run(0, kM, whole.data());
  for (int64_t row = 0; row < kM; ++row) {
    run(row, 1, alone.data());
    ASSERT_EQ(std::memcmp(whole.data() + row * kN, alone.data(), kN * 4), 0)
        << "row " << row;
  }
}

// The three products of a tile of causal attention, with and without leave to
// skip what is hidden: `visible` from before the first key to behind the last.
TEST(Bf16GemmTest, LeavingOutTheHiddenMovesNoBit) {
  if (!HasBf16Dot()) GTEST_SKIP() << "this processor has no AVX512-BF16";
  constexpr int64_t kQueries = 22, kKeys = 150, kDim = 35;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const auto fill = [&](int64_t n) {
    std::vector<BFloat16> values(static_cast<size_t>(n));
    for (BFloat16& value : values) value = BFloat16(normal(random));
    return values;
  };
  const auto run = [&](const GemmShape& shape, const std::vector<BFloat16>& a,
                       const std::vector<BFloat16>& b, const CausalSkip* skip) {
    std::vector<float> c(static_cast<size_t>(shape.m * shape.n), 0.5f);
    const GemmPart part = {0, shape.m, 0, shape.n};
    Scratch scratch;
    scratch.Reserve(1, Bf16GemmScratchBytes(shape, part));
    Bf16GemmRun(shape, part, a.data(), b.data(), c.data(), nullptr,
                scratch.part(0), skip);
    return c;
  };
  for (const int64_t group : {1, 3, 8}) {
    const int64_t rows = kQueries * group;
    for (const int64_t visible : {-30, -3, 0, 1, 5, 64, 129, 145, 149, 200}) {
      SCOPED_TRACE(testing::Message()
                   << "group " << group << ", visible " << visible);
      const auto sees = [&](int64_t row, int64_t key) {
        return key < visible + row / group;
      };
      CausalSkip skip = {CausalSkip::Of::kResult, visible, group};
      const GemmShape scores{.m = rows,
                             .n = kKeys,
                             .k = kDim,
                             .a_row = kDim,
                             .b_row = 1,
                             .b_col = kDim,
                             .c_row = kKeys,
                             .ab = DType::kBF16};
      const std::vector<BFloat16> q = fill(rows * kDim);
      const std::vector<BFloat16> k = fill(kKeys * kDim);
      const std::vector<float> all = run(scores, q, k, nullptr);
      const std::vector<float> seen = run(scores, q, k, &skip);
      std::vector<BFloat16> probs(all.size());
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < kKeys; ++i) {
          const size_t at = static_cast<size_t>(r * kKeys + i);
          probs[at] = BFloat16(sees(r, i) ? all[at] : 0.0f);
          if (sees(r, i)) {
            ASSERT_EQ(seen[at], all[at]) << "row " << r << ", key " << i;
          }
        }
      }
      for (const bool accumulate : {false, true}) {
        skip.of = CausalSkip::Of::kLeft;
        const GemmShape out{.m = rows,
                            .n = kDim,
                            .k = kKeys,
                            .a_row = kKeys,
                            .b_row = kDim,
                            .c_row = kDim,
                            .ab = DType::kBF16,
                            .accumulate = accumulate};
        ASSERT_EQ(run(out, probs, k, &skip), run(out, probs, k, nullptr));
        skip.of = CausalSkip::Of::kLeftTransposed;
        const GemmShape d_keys{.m = kKeys,
                               .n = kDim,
                               .k = rows,
                               .a_row = 1,
                               .a_col = kKeys,
                               .b_row = kDim,
                               .c_row = kDim,
                               .ab = DType::kBF16,
                               .accumulate = accumulate};
        ASSERT_EQ(run(d_keys, probs, q, &skip), run(d_keys, probs, q, nullptr));
      }
    }
  }
}

}  // namespace
}  // namespace gradwire
