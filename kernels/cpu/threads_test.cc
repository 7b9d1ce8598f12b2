// SPDX-License-Identifier: Apache-2.0
// Which of the CPU's ops give the same bits on any number of threads, and that
// the others do on the same number.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "device/cpu_device.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/kernels.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

constexpr int64_t kTokens = 67, kHidden = 200;

// Memory with the same content each time it is made.
class Numbers {
 public:
  Tensor New(DType dtype, std::initializer_list<int64_t> shape) {
    int64_t n = 1;
    for (const int64_t dim : shape) n *= dim;
    memory_.emplace_back(static_cast<size_t>(n * DTypeBytes(dtype)));
    const Tensor t(memory_.back().data(), dtype, shape);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) {
      const float value = normal(random_);
      if (dtype == DType::kF32) t.data<float>()[i] = value;
      if (dtype == DType::kF64) t.data<double>()[i] = value;
      if (dtype == DType::kBF16) t.data<BFloat16>()[i] = BFloat16(value);
      if (dtype == DType::kI16) t.data<int16_t>()[i] = static_cast<int16_t>(i);
      if (dtype == DType::kI32) t.data<int32_t>()[i] = static_cast<int>(i % 5);
    }
    return t;
  }
  bool operator==(const Numbers& other) const {
    return memory_ == other.memory_;
  }

 private:
  std::mt19937 random_{3};
  std::vector<std::vector<char>> memory_;
};

using Op = std::function<void(Kernels&, Stream&, DType act, Numbers&)>;

Numbers RunOp(const Op& op, DType act, int threads) {
  CpuDevice device(threads);
  const auto stream = device.NewStream();
  const auto kernels = NewCpuKernels();
  Numbers numbers;
  op(*kernels, *stream, act, numbers);
  EXPECT_TRUE(stream->Finish().ok());
  return numbers;
}

struct NamedOp {
  std::string name;
  Op op;
};

void SwiGlu(Kernels& k, Stream& s, DType act, Numbers& n) {
  const Tensor x = n.New(act, {kTokens, 2 * kHidden});
  const Tensor y = n.New(act, {kTokens, kHidden});
  k.SwiGluForward(s, x, y);
  k.SwiGluBackward(s, x, n.New(act, {kTokens, kHidden}), x, y);
}
void RmsNormForward(Kernels& k, Stream& s, DType act, Numbers& n) {
  k.RmsNormForward(s, n.New(act, {kTokens, kHidden}), n.New(act, {kHidden}),
                   1e-5f, n.New(act, {kTokens, kHidden}),
                   n.New(DType::kF32, {kTokens}));
}
void EmbeddingBackward(Kernels& k, Stream& s, DType act, Numbers& n) {
  k.EmbeddingBackward(s, n.New(DType::kI32, {kTokens}),
                      n.New(act, {kTokens, kHidden}),
                      n.New(DType::kF32, {5, kHidden}),
                      n.New(DType::kF64, {5, SquareBlocks(kHidden)}));
}
void BiasBackward(Kernels& k, Stream& s, DType act, Numbers& n) {
  k.BiasBackward(s, n.New(act, {kTokens, kHidden}),
                 n.New(DType::kF32, {kHidden}));
}
void Sum(Kernels& k, Stream& s, DType, Numbers& n) {
  const Tensor x = n.New(DType::kF64, {200003});
  x.data<double>()[0] = k.Sum(s, x);
}
void AdamW(Kernels& k, Stream& s, DType act, Numbers& n) {
  // In bf16 both the master is split and the moments are rounded.
  const Tensor m = n.New(act, {100003}), v = n.New(act, {100003});
  for (int64_t i = 0; i < v.num_elements(); ++i) {
    if (act == DType::kF32) v.data<float>()[i] *= v.data<float>()[i];
    if (act == DType::kBF16) v.data<BFloat16>()[i].bits &= 0x7fff;
  }
  const AdamWParams params{1e-3f, 0.9f, 0.95f, 1e-12f, 0.1f, 0.5f, 3};
  const Tensor low =
      act == DType::kBF16 ? n.New(DType::kI16, {100003}) : Tensor();
  k.AdamW(s, params,
          {n.New(act, {100003}), low, m, v, n.New(DType::kF32, {100003}), 0,
           n.New(DType::kI64, {2})});
}

void RmsNormBackward(Kernels& k, Stream& s, DType act, Numbers& n) {
  k.RmsNormBackward(
      s,
      {n.New(act, {kTokens, kHidden}), n.New(act, {kTokens, kHidden}),
       n.New(act, {kHidden}), n.New(DType::kF32, {kTokens})},
      n.New(act, {kTokens, kHidden}), n.New(DType::kF32, {kHidden}));
}
void MatmulBackwardWeight(Kernels& k, Stream& s, DType act, Numbers& n) {
  k.MatmulBackwardWeight(s, n.New(act, {kTokens, kHidden}),
                         n.New(act, {kTokens, 96}),
                         {n.New(DType::kF32, {kHidden, 96})});
}
// The product's own bits aside, which may depend on how oneDNN is called.
void Squares(Kernels& k, Stream& s, DType act, Numbers& n) {
  constexpr int64_t kCols = 600;
  const Tensor squares = n.New(DType::kF64, {kHidden, SquareBlocks(kCols)});
  const Tensor x = n.New(act, {0, kCols});
  k.MatmulBackwardWeight(s, n.New(act, {0, kHidden}), x,
                         {n.New(DType::kF32, {kHidden, kCols}), true, squares});
  k.EmbeddingBackward(s, n.New(DType::kI32, {kTokens}),
                      n.New(act, {kTokens, kCols}),
                      n.New(DType::kF32, {kHidden, kCols}), squares);
}

TEST(ThreadsTest, TheseOpsDoNotDependOnTheNumberOfThreads) {
  const NamedOp ops[] = {
      {"SwiGlu", SwiGlu},
      {"RmsNormForward", RmsNormForward},
      {"EmbeddingBackward", EmbeddingBackward},
      {"BiasBackward", BiasBackward},
      {"Sum", Sum},
      {"Squares", Squares},
      {"AdamW", AdamW},
  };
  for (const NamedOp& op : ops) {
    for (const DType act : {DType::kF32, DType::kBF16}) {
      const Numbers one = RunOp(op.op, act, 1);
      for (const int threads : {2, 3, 7}) {
        EXPECT_TRUE(RunOp(op.op, act, threads) == one)
            << op.name << ", " << DTypeName(act) << ", " << threads;
      }
    }
  }
}

TEST(ThreadsTest, SumsOverTokensRepeatOnTheSameNumberOfThreads) {
  const NamedOp ops[] = {{"RmsNormBackward", RmsNormBackward},
                         {"MatmulBackwardWeight", MatmulBackwardWeight}};
  for (const NamedOp& op : ops) {
    for (const DType act : {DType::kF32, DType::kBF16}) {
      const Numbers first = RunOp(op.op, act, 3);
      for (int i = 0; i < 5; ++i) {
        EXPECT_TRUE(RunOp(op.op, act, 3) == first) << op.name;
      }
    }
  }
}

// The comparison itself: an op that writes its thread count is found out.
TEST(ThreadsTest, ADependenceShows) {
  const Op op = [](Kernels&, Stream& s, DType, Numbers& n) {
    const Tensor x = n.New(DType::kI32, {4});
    x.data<int32_t>()[3] = static_cast<CpuStream&>(s).pool().num_threads();
  };
  EXPECT_TRUE(RunOp(op, DType::kF32, 2) == RunOp(op, DType::kF32, 2));
  EXPECT_FALSE(RunOp(op, DType::kF32, 2) == RunOp(op, DType::kF32, 1));
}

}  // namespace
}  // namespace gradwire
