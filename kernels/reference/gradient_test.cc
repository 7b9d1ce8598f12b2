// SPDX-License-Identifier: Apache-2.0
// Every backward definition against the central difference of its forward:
// with the loss sum(c * forward(x)), the gradient of x, element by element.
#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "kernels/reference/linear.h"
#include "kernels/reference/number.h"
#include "kernels/reference/pointwise.h"
#include "kernels/reference/softmax_ops.h"

namespace gradwire {
namespace {

namespace ref = reference;

// Inputs are multiples of 1/64 and the step is a power of two, so that an input
// a step away is a float32 number without rounding.
constexpr double kStep = 1.0 / (1 << 13);
constexpr double kFloat64PerFloat32Roundoff = 1.0 / (int64_t{1} << 29);

template <class Forward>
double Loss(const Tensor& c, const Forward& forward) {
  const std::vector<double> y = forward(double{});
  double loss = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    loss += At(c, static_cast<int64_t>(i)) * y[i];
  }
  return loss;
}

template <class Forward>
double Slope(const Tensor& x, int64_t i, double step, const Tensor& c,
             const Forward& forward) {
  const float at = x.data<float>()[i];
  x.data<float>()[i] = at + static_cast<float>(step);
  const double above = Loss(c, forward);
  x.data<float>()[i] = at - static_cast<float>(step);
  const double below = Loss(c, forward);
  x.data<float>()[i] = at;
  return (above - below) / (2 * step);
}

// Empty if `gradient` is the gradient of sum(c * forward) by x, else a sentence
// on the first wrong element. It may be off by
//  - its own bound: it starts from float32 roundings of lse, rstd and the like;
//  - the difference's truncation, which falls with the square of the step and
//    hence is below the change from twice the step;
//  - the loss's float64 rounding over the step.
template <class Forward>
std::string GradientError(const Tensor& x, const Tensor& c, Forward forward,
                          const std::vector<Tracked>& gradient) {
  if (x.num_elements() != static_cast<int64_t>(gradient.size())) {
    return "has " + std::to_string(gradient.size()) + " elements";
  }
  const std::vector<Tracked> y = forward(Tracked());
  if (c.num_elements() != static_cast<int64_t>(y.size())) return "wrong c";
  Sum<Tracked> loss;
  for (size_t i = 0; i < y.size(); ++i) {
    loss.Add(y[i] * Tracked(At(c, static_cast<int64_t>(i))));
  }
  const double noise = loss.Total().error * kFloat64PerFloat32Roundoff / kStep;
  for (int64_t i = 0; i < x.num_elements(); ++i) {
    const Tracked& got = gradient[static_cast<size_t>(i)];
    const double slope = Slope(x, i, kStep, c, forward);
    const double truncation =
        std::abs(slope - Slope(x, i, 2 * kStep, c, forward));
    const double bound = got.error + truncation + noise;
    if (std::abs(got.value - slope) <= bound) continue;
    return "element " + std::to_string(i) + " is " + std::to_string(got.value) +
           ", not " + std::to_string(slope) + " +- " + std::to_string(bound);
  }
  return "";
}

class GradientTest : public testing::Test {
 protected:
  Tensor Zeros(std::initializer_list<int64_t> shape) {
    int64_t n = 1;
    for (const int64_t dim : shape) n *= dim;
    memory_.emplace_back(static_cast<size_t>(n));
    return Tensor(memory_.back().data(), DType::kF32, shape);
  }
  Tensor Normal(std::initializer_list<int64_t> shape) {
    const Tensor t = Zeros(shape);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < t.num_elements(); ++i) {
      t.data<float>()[i] = std::round(normal(random_) * 64) / 64;
    }
    return t;
  }
  Tensor Kept(const std::vector<double>& values) {
    const Tensor t = Zeros({static_cast<int64_t>(values.size())});
    Store(values, t);
    return t;
  }
  static Tensor Ints(std::vector<int32_t>& values,
                     std::initializer_list<int64_t> shape) {
    return Tensor(values.data(), DType::kI32, shape);
  }

 private:
  std::mt19937 random_{5};
  std::deque<std::vector<float>> memory_;
};

TEST_F(GradientTest, Embedding) {
  std::vector<int32_t> ids = {2, 0, 2, 3};
  const Tensor tokens = Ints(ids, {4}), table = Normal({5, 3});
  const Tensor c = Normal({4, 3});
  const auto forward = [&](auto num) {
    ref::Result<decltype(num)> y;
    for (const int32_t id : ids) {
      for (int64_t i = 0; i < 3; ++i) y.push_back(At(table, id * 3 + i));
    }
    return y;
  };
  EXPECT_EQ(
      GradientError(table, c, forward,
                    ref::EmbeddingBackward<Tracked>(tokens, c, Zeros({5, 3}))),
      "");
}

TEST_F(GradientTest, Matmul) {
  const Tensor x = Normal({3, 5}), w = Normal({4, 5}), c = Normal({3, 4});
  const auto forward = [&](auto num) {
    return ref::MatmulForward<decltype(num)>(x, w, c, false);
  };
  EXPECT_EQ(GradientError(x, c, forward,
                          ref::MatmulBackwardInput<Tracked>(c, w, x, false)),
            "");
  EXPECT_EQ(GradientError(w, c, forward,
                          ref::MatmulBackwardWeight<Tracked>(c, x, {w, false})),
            "");
}

TEST_F(GradientTest, Bias) {
  const Tensor bias = Normal({3}), y = Normal({4, 3}), c = Normal({4, 3});
  const auto forward = [&](auto num) {
    return ref::BiasForward<decltype(num)>(bias, y);
  };
  EXPECT_EQ(GradientError(bias, c, forward,
                          ref::BiasBackward<Tracked>(c, Zeros({3}))),
            "");
}

TEST_F(GradientTest, RmsNorm) {
  const float eps = 0.25f;
  const Tensor x = Normal({3, 5}), weight = Normal({5}), c = Normal({3, 5});
  const auto forward = [&](auto num) {
    return ref::RmsNormForward<decltype(num)>(x, weight, eps).y;
  };
  const Tensor rstd = Kept(ref::RmsNormForward<double>(x, weight, eps).rstd);
  const auto gradient = ref::RmsNormBackward<Tracked>(
      {c, x, weight, rstd}, Zeros({3, 5}), Zeros({5}));
  EXPECT_EQ(GradientError(x, c, forward, gradient.d_x), "");
  EXPECT_EQ(GradientError(weight, c, forward, gradient.d_weight), "");
}

TEST_F(GradientTest, QkNormRope) {
  for (const bool norm : {false, true}) {
    QkNormRope args;
    args.shape = {4, 2, 6, 1};
    args.eps = 0.25f;
    if (norm) {
      args.q_weight = Normal({6});
      args.k_weight = Normal({6});
    }
    args.cos = Normal({8, 3});
    args.sin = Normal({8, 3});
    std::vector<int32_t> positions = {0, 7, 3};
    args.positions = Ints(positions, {3});
    const int64_t width = args.shape.QkvWidth();
    const Tensor qkv = Normal({3, width}), c = Normal({3, width});
    const auto forward = [&](auto num) {
      return ref::QkNormRopeForward<decltype(num)>(args, qkv);
    };
    Kernels::QkNormRopeGrad grad{c, qkv, Tensor(), Tensor()};
    if (norm) {
      grad.d_q_weight = Zeros({6});
      grad.d_k_weight = Zeros({6});
    }
    const auto gradient = ref::QkNormRopeBackward<Tracked>(args, grad);
    EXPECT_EQ(GradientError(qkv, c, forward, gradient.d_qkv), "");
    if (!norm) continue;
    EXPECT_EQ(GradientError(args.q_weight, c, forward, gradient.d_q_weight),
              "");
    EXPECT_EQ(GradientError(args.k_weight, c, forward, gradient.d_k_weight),
              "");
  }
}

TEST_F(GradientTest, Attention) {
  const std::vector<int32_t> cu_seqlens = {0, 1, 6, 8};
  Kernels::Attention args;
  args.shape = {4, 2, 3, 0.5f};
  args.layout = {cu_seqlens.data(), 3};
  args.qkv = Normal({8, args.shape.QkvWidth()});
  const Tensor c = Normal({8, 12});
  const auto forward = [&](auto num) {
    return ref::AttentionForward<decltype(num)>(args).out;
  };
  const auto kept = ref::AttentionForward<double>(args);
  const auto gradient = ref::AttentionBackward<Tracked>(
      args, {c, Kept(kept.out), Kept(kept.lse)});
  EXPECT_EQ(GradientError(args.qkv, c, forward, gradient), "");
}

TEST_F(GradientTest, SwiGlu) {
  const Tensor x = Normal({3, 10}), c = Normal({3, 5});
  const auto forward = [&](auto num) {
    return ref::SwiGluForward<decltype(num)>(x);
  };
  EXPECT_EQ(GradientError(x, c, forward, ref::SwiGluBackward<Tracked>(x, c)),
            "");
}

TEST_F(GradientTest, LogprobHead) {
  std::vector<int32_t> ids = {1, 1, 6, 0, 3, 2, 5, 5, 5};
  const LogprobHead head{Normal({3, 4}), Normal({7, 4}), Ints(ids, {3, 3})};
  const Tensor c = Normal({3, 3});
  const auto forward = [&](auto num) {
    return ref::LogprobHeadForward<decltype(num)>(head, 0).logprobs;
  };
  const Tensor lse = Kept(ref::LogprobHeadForward<double>(head, 0).lse);
  const auto gradient = ref::LogprobHeadBackward<Tracked>(
      head, {c, lse, Tensor()}, {Zeros({7, 4})});
  EXPECT_EQ(GradientError(head.hidden, c, forward, gradient.d_hidden), "");
  EXPECT_EQ(GradientError(head.weight, c, forward, gradient.d_weight), "");
}

TEST_F(GradientTest, OneWrongElementIsNamed) {
  const Tensor x = Normal({3, 10}), c = Normal({3, 5});
  const auto forward = [&](auto num) {
    return ref::SwiGluForward<decltype(num)>(x);
  };
  for (const double wrong : {1.0001, static_cast<double>(NAN)}) {
    auto gradient = ref::SwiGluBackward<Tracked>(x, c);
    gradient[7].value *= wrong;
    EXPECT_NE(GradientError(x, c, forward, gradient).find("element 7 is"),
              std::string::npos);
  }
}

}  // namespace
}  // namespace gradwire
