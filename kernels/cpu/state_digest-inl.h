// SPDX-License-Identifier: Apache-2.0
// The digest of optimizer state (kernels/state_digest.h) as it lies in memory.
// Included once per target, inside foreach_target.
#if defined(GRADWIRE_KERNELS_CPU_STATE_DIGEST_INL_H_) == \
    defined(HWY_TARGET_TOGGLE)
#ifdef GRADWIRE_KERNELS_CPU_STATE_DIGEST_INL_H_
#undef GRADWIRE_KERNELS_CPU_STATE_DIGEST_INL_H_
#else
#define GRADWIRE_KERNELS_CPU_STATE_DIGEST_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "device/dtype.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/simd_math-inl.h"
#include "kernels/state_digest.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

// The float32 master of elements of a weight that is whole (float) or split.
template <class D>
HWY_INLINE hn::Vec<D> LoadMaster(D d, const float* weight, const int16_t*) {
  return hn::LoadU(d, weight);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadMaster(D d, const BFloat16* weight,
                                 const int16_t* low) {
  return LoadHalves(d, weight, low);
}

// The products of some of a block's numbers with their keys, added up: of
// those at even places and of those at odd ones beside each other.
class DigestVectors {
  using D32 = hn::CappedTag<uint32_t, 16>;
#if HWY_TARGET == HWY_SCALAR
  using D64 = hn::CappedTag<uint64_t, 1>;
#else
  using D64 = hn::RepartitionToWide<D32>;
#endif
  using V32 = hn::Vec<D32>;
  using V64 = hn::Vec<D64>;

 public:
  using D = hn::Rebind<float, D32>;

  // Written out, for an implicit one is compiled for no vector target.
  HWY_INLINE DigestVectors() : sum0_(hn::Zero(D64())), sum1_(sum0_) {}

  // `values` of stream `s`, from element j of the block on.
#if HWY_TARGET == HWY_SCALAR
  HWY_INLINE void Add(hn::Vec<D> values, int s, int64_t j) {
    const uint64_t bits = hn::GetLane(hn::BitCast(D32(), values));
    const auto product = [&](int64_t place) {
      return hn::Set(D64(), bits * kDigestKeys.key[s][place]);
    };
    sum0_ = hn::Add(sum0_, product(j));
    sum1_ = hn::Add(sum1_, product(j ^ 1));
  }
#else
  HWY_INLINE void Add(hn::Vec<D> values, int s, int64_t j) {
    const V32 bits = hn::BitCast(D32(), values), odd_bits = Odd(bits);
    const V32 keys = hn::LoadU(D32(), kDigestKeys.key[s] + j);
    const V32 odd_keys = Odd(keys);
    sum0_ = hn::Add(sum0_, hn::Add(hn::MulEven(bits, keys),
                                   hn::MulEven(odd_bits, odd_keys)));
    sum1_ = hn::Add(sum1_, hn::Add(hn::MulEven(bits, odd_keys),
                                   hn::MulEven(odd_bits, keys)));
  }
#endif
  HWY_INLINE void AddTo(DigestSums& sums, int64_t block) const {
    sums.AddBlock(block, {SumOf(sum0_), SumOf(sum1_)});
  }

 private:
  // Not SumOfLanes: of 512 bits the compiler's own header adds signed numbers,
  // whose overflow is undefined.
  static HWY_INLINE uint64_t SumOf(V64 vector) {
    const D64 d;
    HWY_ALIGN uint64_t lanes[hn::MaxLanes(D64())];
    hn::Store(vector, d, lanes);
    uint64_t sum = 0;
    for (size_t i = 0; i < hn::Lanes(d); ++i) sum += lanes[i];
    return sum;
  }
#if HWY_TARGET != HWY_SCALAR
  static HWY_INLINE V32 Odd(V32 x) {
    return hn::BitCast(D32(), hn::ShiftRight<32>(hn::BitCast(D64(), x)));
  }
#endif

  V64 sum0_, sum1_;
};

// Where the elements lie. `low` is null if Weight is float; m and v may be
// null: zeros.
template <class Weight, class Moment>
struct DigestedState {
  const Weight* weight;
  const int16_t* low;
  const Moment *m, *v;

  DigestedState From(int64_t i) const {
    return {weight + i, low == nullptr ? nullptr : low + i,
            m == nullptr ? nullptr : m + i, v == nullptr ? nullptr : v + i};
  }
};

// A vector of them, from element j of a block on.
template <class Weight, class Moment>
HWY_INLINE void AddStored(const DigestedState<Weight, Moment>& at, int64_t j,
                          DigestVectors& vectors) {
  const DigestVectors::D d;
  vectors.Add(LoadMaster(d, at.weight, at.low), 0, j);
  if (at.m == nullptr) return;
  vectors.Add(LoadF32(d, at.m), 1, j);
  vectors.Add(LoadF32(d, at.v), 2, j);
}

template <class Weight, class Moment>
HWY_INLINE void AddDigestBlock(const DigestedState<Weight, Moment>& state,
                               int64_t block, DigestSums& sums) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(DigestVectors::D()));
  DigestVectors vectors;
  for (int64_t j = 0; j < kDigestBlock; j += lanes) {
    AddStored(state.From(j), j, vectors);
  }
  vectors.AddTo(sums, block);
}

// Elements [0, n), which are the flat vector's from `first` on, a multiple of
// kDigestBlock.
template <class Weight, class Moment>
void AddDigest(const DigestedState<Weight, Moment>& state, int64_t n,
               int64_t first, DigestSums& sums) {
  int64_t block = first / kDigestBlock, i = 0;
  for (; i + kDigestBlock <= n; i += kDigestBlock) {
    AddDigestBlock(state.From(i), block++, sums);
  }
  if (i == n) return;
  // Zeros add nothing.
  Weight weight[kDigestBlock] = {};
  int16_t low[kDigestBlock] = {};
  Moment m[kDigestBlock] = {}, v[kDigestBlock] = {};
  const auto rest = state.From(i);
  std::copy_n(rest.weight, n - i, weight);
  if (rest.low != nullptr) std::copy_n(rest.low, n - i, low);
  if (rest.m != nullptr) {
    std::copy_n(rest.m, n - i, m);
    std::copy_n(rest.v, n - i, v);
  }
  AddDigestBlock(DigestedState<Weight, Moment>{weight, low, m, v}, block, sums);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#endif  // include guard toggle
