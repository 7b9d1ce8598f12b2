// SPDX-License-Identifier: Apache-2.0
// value_code.h on vectors of uint16_t. Included once for each target.
#if defined(GRADWIRE_CHECKPOINT_DELTA_VALUE_CODE_INL_H_) == \
    defined(HWY_TARGET_TOGGLE)
#ifdef GRADWIRE_CHECKPOINT_DELTA_VALUE_CODE_INL_H_
#undef GRADWIRE_CHECKPOINT_DELTA_VALUE_CODE_INL_H_
#else
#define GRADWIRE_CHECKPOINT_DELTA_VALUE_CODE_INL_H_
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// All ones in lanes whose highest bit is set.
template <class D, class V>
HWY_INLINE V SignMask(D d, V v) {
  const hn::RebindToSigned<D> di;
  return hn::BitCast(d, hn::ShiftRight<15>(hn::BitCast(di, v)));
}

template <class D, class V>
HWY_INLINE V OrderKeys(D d, V bits) {
  return hn::Xor(bits, hn::Or(SignMask(d, bits), hn::Set(d, 0x8000)));
}
template <class D, class V>
HWY_INLINE V FromOrderKeys(D d, V keys) {
  return hn::Xor(keys, hn::Or(hn::Not(SignMask(d, keys)), hn::Set(d, 0x8000)));
}

template <class D, class V>
HWY_INLINE V FromZigZag(D d, V z) {
  const V odd = hn::And(z, hn::Set(d, 1));
  return hn::Xor(hn::ShiftRight<1>(z), hn::Sub(hn::Zero(d), odd));
}

template <class D, class V>
HWY_INLINE V Changes(D d, V before, V after) {
  const V difference = hn::Sub(OrderKeys(d, after), OrderKeys(d, before));
  return hn::Xor(hn::Add(difference, difference), SignMask(d, difference));
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#endif
