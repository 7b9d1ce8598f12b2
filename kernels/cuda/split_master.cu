// SPDX-License-Identifier: Apache-2.0
// A float32 master into two halves of 16 bits, and back. Bound by memory; at
// loading and in tests only, since AdamW does both in its own pass.
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/optimizer_state.h"

namespace gradwire {
namespace {

struct Split {
  static constexpr int kPack = kPackOf<float>;
  const float* master;
  BFloat16* high;
  int16_t* low;  // may be null

  bool IsAligned() const {
    return AreAligned(16, master) && AreAligned(8, high, low);
  }
  template <int kN>
  __device__ Pack<float, kN> Load(int64_t i) const {
    return LoadPack<kN>(master + i);
  }
  template <int kN>
  __device__ void Store(int64_t i, const Pack<float, kN>& loaded) const {
    Pack<BFloat16, kN> highs;
    Pack<int16_t, kN> lows;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const Halves halves = SplitHalves(loaded.element[j]);
      highs.element[j] = halves.high;
      lows.element[j] = halves.low;
    }
    StorePack(high + i, highs);
    if (low != nullptr) StorePack(low + i, lows);
  }
};

template <int kN>
struct HalvesPack {
  Pack<BFloat16, kN> high;
  Pack<int16_t, kN> low;
};

struct Join {
  static constexpr int kPack = kPackOf<float>;
  const BFloat16* high;
  const int16_t* low;
  float* master;

  bool IsAligned() const {
    return AreAligned(16, master) && AreAligned(8, high, low);
  }
  template <int kN>
  __device__ HalvesPack<kN> Load(int64_t i) const {
    return {LoadPack<kN>(high + i), LoadPack<kN>(low + i)};
  }
  template <int kN>
  __device__ void Store(int64_t i, const HalvesPack<kN>& loaded) const {
    Pack<float, kN> joined;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      joined.element[j] =
          JoinHalves({loaded.high.element[j], loaded.low.element[j]});
    }
    StorePack(master + i, joined);
  }
};

}  // namespace

void CudaKernels::SplitMaster(Stream& stream, const Tensor& master,
                              const Tensor& high, const Tensor& low) {
  if (!stream.ok() || master.num_elements() == 0) return;
  const int64_t n = master.num_elements();
  GW_CHECK(high.num_elements() == n);
  GW_CHECK(low.is_null() || low.num_elements() == n);
  const Split op = {master.data<float>(), high.data<BFloat16>(),
                    low.data<int16_t>()};
  CudaStream& cuda = Cuda(stream);
  cuda.Check(Elementwise(op, n, cuda.get()), "splitting masters");
}

void CudaKernels::JoinMaster(Stream& stream, const Tensor& high,
                             const Tensor& low, const Tensor& master) {
  if (!stream.ok() || master.num_elements() == 0) return;
  const int64_t n = master.num_elements();
  GW_CHECK(high.num_elements() == n && low.num_elements() == n);
  const Join op = {high.data<BFloat16>(), low.data<int16_t>(),
                   master.data<float>()};
  CudaStream& cuda = Cuda(stream);
  cuda.Check(Elementwise(op, n, cuda.get()), "joining masters");
}

}  // namespace gradwire
