// SPDX-License-Identifier: Apache-2.0
// A head of q or k in the registers of a few lanes, each of which holds kHeld
// packs of kN elements of both halves: what is rotated into each other lies in
// one lane.
#pragma once

#include "device/cuda/kernel.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"

namespace gradwire {

// What a lane holds of half a head.
template <int kN, int kHeld>
struct Held {
  float value[kHeld][kN];
};
template <int kN, int kHeld>
struct HeldPair {
  Held<kN, kHeld> a, b;
};

// A lane's part of a head. `lanes` of them, a power of two, hold it between
// them: as many as a warp has, or so few that several heads share a warp.
template <typename T, int kN, int kHeld>
class Head {
 public:
  using Pair = HeldPair<kN, kHeld>;

  __device__ Head(int lane, int lanes, int head_dim)
      : lane_(lane), lanes_(lanes), half_(head_dim / 2) {}

  // Visits the packs that this lane holds, with their column in the half.
  template <typename Visit>
  __device__ void ForPacks(const Visit& visit) const {
#pragma unroll
    for (int p = 0; p < kHeld; ++p) {
      const int column = (p * lanes_ + lane_) * kN;
      if (column < half_) visit(p, column);
    }
  }

  __device__ Pair Load(const T* from) const {
    Pair x;
    ForPacks([&](int p, int column) {
      const Pack<T, kN> a = LoadPack<kN>(from + column);
      const Pack<T, kN> b = LoadPack<kN>(from + half_ + column);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        x.a.value[p][j] = static_cast<float>(a.element[j]);
        x.b.value[p][j] = static_cast<float>(b.element[j]);
      }
    });
    return x;
  }

  __device__ void Store(const Pair& x, T* to) const {
    ForPacks([&](int p, int column) {
      Pack<T, kN> a, b;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        a.element[j] = T(x.a.value[p][j]);
        b.element[j] = T(x.b.value[p][j]);
      }
      StorePack(to + column, a);
      StorePack(to + half_ + column, b);
    });
  }

  // Half a head's floats, such as angles. At most 16 bytes at a time.
  __device__ Held<kN, kHeld> LoadFloats(const float* from) const {
    constexpr int kMoved = kN < 4 ? kN : 4;
    Held<kN, kHeld> x;
    ForPacks([&](int p, int column) {
#pragma unroll
      for (int i = 0; i < kN; i += kMoved) {
        const auto pack = LoadPack<kMoved>(from + column + i);
#pragma unroll
        for (int j = 0; j < kMoved; ++j) x.value[p][i + j] = pack.element[j];
      }
    });
    return x;
  }

  // f(a, b, p, j) for each pair of elements.
  template <typename Visit>
  __device__ void ForPairs(const Visit& visit) const {
    ForPacks([&](int p, int) {
#pragma unroll
      for (int j = 0; j < kN; ++j) visit(p, j);
    });
  }

  // By the angle, or with `sign` -1 back.
  __device__ void Rotate(const Held<kN, kHeld>& cos, const Held<kN, kHeld>& sin,
                         float sign, Pair* x) const {
    ForPairs([&](int p, int j) {
      const float a = x->a.value[p][j], b = x->b.value[p][j];
      const float c = cos.value[p][j], s = sign * sin.value[p][j];
      x->a.value[p][j] = a * c - b * s;
      x->b.value[p][j] = b * c + a * s;
    });
  }

  // Over the lanes of the head; all lanes of the warp take part.
  __device__ float Sum(float value) const {
    for (int lanes = lanes_ / 2; lanes > 0; lanes /= 2) {
      value += __shfl_xor_sync(kAllLanes, value, lanes);
    }
    return value;
  }

  __device__ float Rstd(const Pair& x, float eps) const {
    float squares = 0;
    ForPairs([&](int p, int j) {
      squares = fmaf(x.a.value[p][j], x.a.value[p][j], squares);
      squares = fmaf(x.b.value[p][j], x.b.value[p][j], squares);
    });
    return 1.0f / sqrtf(Sum(squares) / static_cast<float>(2 * half_) + eps);
  }

  __device__ void Norm(const Pair& weight, float rstd, Pair* x) const {
    ForPairs([&](int p, int j) {
      x->a.value[p][j] = x->a.value[p][j] * rstd * weight.a.value[p][j];
      x->b.value[p][j] = x->b.value[p][j] * rstd * weight.b.value[p][j];
    });
  }

  // The gradient of the normed head becomes that of x; adds the weight's.
  __device__ void NormBackward(const Pair& x, const Pair& weight, float rstd,
                               Pair* grad, Pair* d_weight) const {
    float dot = 0;
    ForPairs([&](int p, int j) {
      const float a = grad->a.value[p][j] * (x.a.value[p][j] * rstd);
      const float b = grad->b.value[p][j] * (x.b.value[p][j] * rstd);
      d_weight->a.value[p][j] += a;
      d_weight->b.value[p][j] += b;
      dot = fmaf(a, weight.a.value[p][j], dot);
      dot = fmaf(b, weight.b.value[p][j], dot);
    });
    const float mean = Sum(dot) / static_cast<float>(2 * half_);
    const auto d_x = [&](float g, float w, float v) {
      return rstd * (g * w - v * rstd * mean);
    };
    ForPairs([&](int p, int j) {
      float& a = grad->a.value[p][j];
      float& b = grad->b.value[p][j];
      a = d_x(a, weight.a.value[p][j], x.a.value[p][j]);
      b = d_x(b, weight.b.value[p][j], x.b.value[p][j]);
    });
  }

 private:
  const int lane_, lanes_, half_;
};

}  // namespace gradwire
