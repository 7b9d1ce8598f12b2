// SPDX-License-Identifier: Apache-2.0
// Bound by memory: one pass reads and writes every state once, and takes its
// digest while it is in the cache.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/check.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/simd.h"
#include "kernels/optimizer_state.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/adamw.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"
#include "kernels/cpu/state_digest-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
using D32 = hn::Rebind<uint32_t, D>;
using Bits = hn::Vec<D32>;

struct Factors {
  V grad_scale, keep, beta1, beta2, rest1, rest2, rate, correct2, eps;
  RoundingKey key;
};

Factors FactorsOf(const AdamWParams& params) {
  const D d;
  const double step = static_cast<double>(params.step);
  const double correct1 = 1.0 / (1.0 - std::pow(double{params.beta1}, step));
  const double correct2 = 1.0 / (1.0 - std::pow(double{params.beta2}, step));
  Factors f;
  f.grad_scale = hn::Set(d, params.grad_scale);
  f.keep = hn::Set(d, 1.0f - params.learning_rate * params.weight_decay);
  f.beta1 = hn::Set(d, params.beta1);
  f.beta2 = hn::Set(d, params.beta2);
  f.rest1 = hn::Set(d, 1.0f - params.beta1);
  f.rest2 = hn::Set(d, 1.0f - params.beta2);
  f.rate = hn::Set(d, static_cast<float>(params.learning_rate * correct1));
  f.correct2 = hn::Set(d, static_cast<float>(correct2));
  f.eps = hn::Set(d, params.eps);
  f.key = RoundingKeyOf(params.seed, params.step);
  return f;
}

// RoundingBits of the elements from `index` on. REQUIRES: the upper half of
// their indices is the same.
HWY_INLINE Bits RoundingBitsFrom(const RoundingKey& key, int64_t index) {
  const D32 d;
  Bits x = hn::Xor(hn::Iota(d, static_cast<uint32_t>(index)),
                   hn::Set(d, RoundingStart(key, index)));
  x = hn::Mul(hn::Xor(x, hn::ShiftRight<16>(x)), hn::Set(d, 0x7feb352du));
  x = hn::Add(x, hn::Set(d, key.second));
  x = hn::Mul(hn::Xor(x, hn::ShiftRight<15>(x)), hn::Set(d, 0x846ca68bu));
  return hn::Xor(x, hn::ShiftRight<16>(x));
}

// StochasticBFloat16.
HWY_INLINE void StoreStochastic(V value, Bits random, BFloat16* to) {
  const D32 d32;
  const hn::Rebind<uint16_t, D> d16;
  const Bits bits = hn::BitCast(d32, value);
  const Bits sign = hn::And(bits, hn::Set(d32, 0x80000000u));
  const Bits size = hn::Min(hn::Add(hn::AndNot(sign, bits), random),
                            hn::Set(d32, 0x7f7fffffu));
  const auto finite = hn::RebindMask(d32, hn::IsFinite(value));
  const auto nan = hn::RebindMask(d32, hn::IsNaN(value));
  const Bits quiet =
      hn::Or(bits, hn::IfThenElseZero(nan, hn::Set(d32, 0x400000u)));
  const Bits rounded = hn::IfThenElse(finite, hn::Or(sign, size), quiet);
  hn::StoreU(hn::TruncateTo(d16, hn::ShiftRight<16>(rounded)), d16,
             reinterpret_cast<uint16_t*>(to));
}

HWY_INLINE void StoreMoments(const Factors&, V m, V v, int64_t, float* to_m,
                             float* to_v) {
  hn::StoreU(m, D(), to_m);
  hn::StoreU(v, D(), to_v);
}
HWY_INLINE void StoreMoments(const Factors& f, V m, V v, int64_t index,
                             BFloat16* to_m, BFloat16* to_v) {
  const Bits random = RoundingBitsFrom(f.key, index);
  StoreStochastic(m, hn::And(random, hn::Set(D32(), 0xffffu)), to_m);
  StoreStochastic(v, hn::ShiftRight<16>(random), to_v);
}

HWY_INLINE void StoreMaster(V master, float* weight, int16_t*) {
  hn::StoreU(master, D(), weight);
}
HWY_INLINE void StoreMaster(V master, BFloat16* weight, int16_t* low) {
  StoreHalves(D(), master, weight, low);
}

// Where the elements from some index on lie.
template <class Weight, class Moment>
struct States {
  Weight* weight;
  int16_t* low;  // null if Weight is float
  Moment *m, *v;
  const float* grad;
  int64_t index;  // of the first, in the flat vector

  States From(int64_t i) const {
    return {weight + i, low == nullptr ? nullptr : low + i,
            m + i,      v + i,
            grad + i,   index + i};
  }
};

// One vector of elements.
template <class S>
HWY_INLINE void UpdateVector(const Factors& f, const S& at) {
  const D d;
  const V g = hn::Mul(hn::LoadU(d, at.grad), f.grad_scale);
  const V m = hn::MulAdd(f.rest1, g, hn::Mul(f.beta1, LoadF32(d, at.m)));
  const V v =
      hn::MulAdd(f.rest2, hn::Mul(g, g), hn::Mul(f.beta2, LoadF32(d, at.v)));
  const V root = hn::Sqrt(hn::Mul(v, f.correct2));
  const V change = hn::Div(hn::Mul(f.rate, m), hn::Add(root, f.eps));
  const V w =
      hn::Sub(hn::Mul(LoadMaster(d, at.weight, at.low), f.keep), change);
  StoreMoments(f, m, v, at.index, at.m, at.v);
  StoreMaster(w, at.weight, at.low);
}

// Elements [begin, end).
template <class Weight, class Moment>
void UpdateRange(const Factors& factors, const States<Weight, Moment>& states,
                 int64_t begin, int64_t end) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(D()));
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) {
    UpdateVector(factors, states.From(i));
  }
  if (i == end) return;
  // The last few, in copies as long as a vector.
  constexpr size_t kLanes = hn::MaxLanes(D());
  Weight weight[kLanes] = {};
  int16_t low[kLanes] = {};
  Moment m[kLanes] = {}, v[kLanes] = {};
  float grad[kLanes] = {};
  const auto rest = states.From(i);
  const States<Weight, Moment> copy = {
      weight, rest.low == nullptr ? nullptr : low, m, v, grad, rest.index};
  const auto move = [n = end - i](const auto& from, const auto& to) {
    std::copy_n(from.weight, n, to.weight);
    if (from.low != nullptr) std::copy_n(from.low, n, to.low);
    std::copy_n(from.m, n, to.m);
    std::copy_n(from.v, n, to.v);
  };
  move(rest, copy);
  std::copy_n(rest.grad, end - i, grad);
  UpdateVector(factors, copy);
  move(copy, rest);
}

// What is updated before its digest is taken: still in the innermost cache, and
// so little that the products overlap with the next divisions and roots.
constexpr int64_t kStride = 2 * kDigestBlock;

// As UpdateRange, from the beginning of a block on.
template <class Weight, class Moment>
void UpdateAndDigest(const Factors& factors,
                     const States<Weight, Moment>& states, int64_t begin,
                     int64_t end, DigestSums& digest) {
  for (int64_t i = begin; i < end; i += kStride) {
    const int64_t n = std::min(end - i, kStride);
    const auto at = states.From(i);
    UpdateRange(factors, at, 0, n);
    // As it is stored, not as it was computed.
    AddDigest<Weight, Moment>({at.weight, at.low, at.m, at.v}, n, at.index,
                              digest);
  }
}

template <class Weight, class Moment>
void UpdateStates(const Factors& factors, const AdamWTensors& tensors,
                  int64_t begin, int64_t end, DigestSums* digest) {
  const States<Weight, Moment> states = {
      tensors.weight.data<Weight>(), tensors.low.data<int16_t>(),
      tensors.m.data<Moment>(),      tensors.v.data<Moment>(),
      tensors.grad.data<float>(),    tensors.first};
  if (digest == nullptr) {
    UpdateRange(factors, states, begin, end);
  } else {
    UpdateAndDigest(factors, states, begin, end, *digest);
  }
}

void Update(const AdamWParams& params, const AdamWTensors& tensors,
            int64_t begin, int64_t end, DigestSums* digest) {
  const Factors factors = FactorsOf(params);
  const bool whole = tensors.low.is_null();
  if (tensors.m.dtype() == DType::kF32) {
    (whole
         ? UpdateStates<float, float>
         : UpdateStates<BFloat16, float>)(factors, tensors, begin, end, digest);
  } else {
    (whole ? UpdateStates<float, BFloat16>
           : UpdateStates<BFloat16, BFloat16>)(factors, tensors, begin, end,
                                               digest);
  }
}

template <class Weight, class Moment>
void DigestStates(const AdamWTensors& tensors, int64_t begin, int64_t end,
                  DigestSums& digest) {
  const DigestedState<Weight, Moment> state = {
      tensors.weight.data<Weight>(), tensors.low.data<int16_t>(),
      tensors.m.data<Moment>(), tensors.v.data<Moment>()};
  AddDigest(state.From(begin), end - begin, tensors.first + begin, digest);
}

void Digest(const AdamWTensors& tensors, int64_t begin, int64_t end,
            DigestSums& digest) {
  const bool whole = tensors.low.is_null();
  if (tensors.m.is_null() || tensors.m.dtype() == DType::kF32) {
    (whole ? DigestStates<float, float>
           : DigestStates<BFloat16, float>)(tensors, begin, end, digest);
  } else {
    (whole ? DigestStates<float, BFloat16>
           : DigestStates<BFloat16, BFloat16>)(tensors, begin, end, digest);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {
namespace {

HWY_EXPORT(Update);
HWY_EXPORT(Digest);

// Elements a thread takes at a time, whichever is free: 1 to 2 MiB, which last
// long beside the taking of one. Others may want a core for a moment, the
// client's program among them, and a thread that waits for it has no more than
// this left to do. A multiple of kDigestBlock.
constexpr int64_t kGrain = 1 << 16;

// Threads' sums: integers, whose order does not matter.
class SharedSums {
 public:
  void Add(const DigestSums& sums) {
    for (int i = 0; i < 2; ++i) {
      lanes_[i].fetch_add(sums.lane[i], std::memory_order_relaxed);
    }
  }
  void AddTo(const Tensor& digest) const {
    if (digest.is_null()) return;
    for (int i = 0; i < 2; ++i) {
      int64_t& to = digest.data<int64_t>()[i];
      to = static_cast<int64_t>(static_cast<uint64_t>(to) + lanes_[i]);
    }
  }

 private:
  std::atomic<uint64_t> lanes_[2] = {};
};

template <class Body>
void ForEachRange(ThreadPool& pool, int64_t n, const Body& body) {
  pool.ParallelItems((n + kGrain - 1) / kGrain, [&](int64_t item, int) {
    body(item * kGrain, std::min(n, (item + 1) * kGrain));
  });
}

void CheckSizes(const AdamWTensors& tensors) {
  const int64_t n = tensors.weight.num_elements();
  GW_CHECK(tensors.low.is_null() || tensors.low.num_elements() == n);
  GW_CHECK(tensors.digest.is_null() || (tensors.digest.num_elements() == 2 &&
                                        tensors.first % kDigestBlock == 0));
}

}  // namespace

void CpuKernels::AdamW(Stream& stream, const AdamWParams& params,
                       const AdamWTensors& tensors) {
  if (!stream.ok()) return;
  const int64_t n = tensors.weight.num_elements();
  CheckSizes(tensors);
  GW_CHECK(tensors.m.num_elements() == n && tensors.v.num_elements() == n);
  GW_CHECK(tensors.grad.num_elements() == n && params.step >= 1);
  SharedSums sums;
  ForEachRange(Pool(stream), n, [&](int64_t begin, int64_t end) {
    DigestSums own;
    HWY_DYNAMIC_DISPATCH(Update)
    (params, tensors, begin, end, tensors.digest.is_null() ? nullptr : &own);
    sums.Add(own);
  });
  sums.AddTo(tensors.digest);
}

void CpuKernels::StateDigest(Stream& stream, const AdamWTensors& tensors) {
  if (!stream.ok()) return;
  const int64_t n = tensors.weight.num_elements();
  CheckSizes(tensors);
  GW_CHECK(!tensors.digest.is_null());
  GW_CHECK(tensors.m.is_null() == tensors.v.is_null());
  SharedSums sums;
  ForEachRange(Pool(stream), n, [&](int64_t begin, int64_t end) {
    DigestSums own;
    HWY_DYNAMIC_DISPATCH(Digest)(tensors, begin, end, own);
    sums.Add(own);
  });
  sums.AddTo(tensors.digest);
}

}  // namespace gradwire
#endif
