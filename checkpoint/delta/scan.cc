// SPDX-License-Identifier: Apache-2.0
// Bound by memory at low densities, by compressing vectors at high ones.
#include "checkpoint/delta/scan.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "checkpoint/delta/simd.h"
#include "checkpoint/delta/value_code.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "checkpoint/delta/scan.cc"
// The first of these includes this file for each target.
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "checkpoint/delta/value_code-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D16 = hn::CappedTag<uint16_t, 32>;

// Elements of a word of a bitmap.
constexpr int64_t kWord = 64;

#if HWY_TARGET == HWY_SCALAR
// One lane makes no byte of a bitmap.
uint64_t WordOfChanges(const uint16_t* before, const uint16_t* after) {
  uint64_t word = 0;
  for (int64_t i = 0; i < kWord; ++i) {
    word |= uint64_t{before[i] != after[i]} << i;
  }
  return word;
}

int64_t CompressWord(const uint16_t* before, const uint16_t* after,
                     const uint64_t* word, int64_t base, uint16_t* positions,
                     uint16_t* z) {
  int64_t count = 0;
  for (int64_t i = 0; i < kWord; ++i) {
    if ((*word >> i & 1) == 0) continue;
    if (positions) positions[count] = static_cast<uint16_t>(base + i);
    z[count++] = EncodeChange(before[i], after[i]);
  }
  return count;
}
#else
HWY_INLINE uint64_t WordOfChanges(const uint16_t* before,
                                  const uint16_t* after) {
  const D16 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  uint8_t bits[kWord / 8 + 8];
  for (int64_t j = 0; j < kWord; j += lanes) {
    hn::StoreMaskBits(d,
                      hn::Ne(hn::LoadU(d, before + j), hn::LoadU(d, after + j)),
                      bits + j / 8);
  }
  uint64_t word;
  std::memcpy(&word, bits, 8);
  return word;
}

HWY_INLINE int64_t CompressWord(const uint16_t* before, const uint16_t* after,
                                const uint64_t* word, int64_t base,
                                uint16_t* positions, uint16_t* z) {
  const D16 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto* bits = reinterpret_cast<const uint8_t*>(word);
  int64_t count = 0;
  for (int64_t j = 0; j < kWord; j += lanes) {
    const auto changed = hn::LoadMaskBits(d, bits + j / 8);
    const auto change =
        Changes(d, hn::LoadU(d, before + j), hn::LoadU(d, after + j));
    hn::StoreU(hn::Compress(change, changed), d, z + count);
    if (positions) {
      const auto index = hn::Iota(d, static_cast<uint16_t>(base + j));
      hn::StoreU(hn::Compress(index, changed), d, positions + count);
    }
    count += static_cast<int64_t>(hn::CountTrue(d, changed));
  }
  return count;
}
#endif

int64_t FindChanges(const uint16_t* before, const uint16_t* after, int64_t n,
                    uint64_t* bitmap) {
  int64_t count = 0, i = 0;
  for (; i + kWord <= n; i += kWord) {
    const uint64_t word = WordOfChanges(before + i, after + i);
    bitmap[i / kWord] = word;
    count += std::popcount(word);
  }
  if (i < n) {
    uint64_t word = 0;
    for (int64_t j = i; j < n; ++j) {
      word |= uint64_t{before[j] != after[j]} << (j - i);
    }
    bitmap[i / kWord] = word;
    count += std::popcount(word);
  }
  return count;
}

int64_t TakePositions(const uint64_t* bitmap, int64_t n, int64_t base,
                      uint16_t* positions) {
  uint16_t* out = positions;
  for (int64_t i = 0; i < n; i += kWord) {
    uint64_t word = bitmap[i / kWord];
    const int ones = std::popcount(word);
    auto take = [&](int k) {
      // The added bit spares the question whether there is one at all, and does
      // no harm: if it is the lowest, it is either there or not kept.
      constexpr uint64_t kLast = uint64_t{1} << 63;
      out[k] = static_cast<uint16_t>(base + i + std::countr_zero(word | kLast));
      word &= word - 1;
    };
    // Two are taken without asking whether they are there: in a sparse chunk a
    // word rarely has more, and what is too many is overwritten.
    take(0);
    take(1);
    for (int k = 2; k < ones; ++k) take(k);
    out += ones;
  }
  return out - positions;
}

void TakeChanges(const uint16_t* before, const uint16_t* after, int64_t n,
                 const uint64_t* bitmap, uint16_t* positions, uint16_t* z) {
  int64_t i = 0, count = 0;
  for (; i + kWord <= n; i += kWord) {
    count += CompressWord(before + i, after + i, bitmap + i / kWord, i,
                          positions ? positions + count : nullptr, z + count);
  }
  for (; i < n; ++i) {
    if ((bitmap[i / kWord] >> (i % kWord) & 1) == 0) continue;
    if (positions) positions[count] = static_cast<uint16_t>(i);
    z[count++] = EncodeChange(before[i], after[i]);
  }
}

// Lanes of at most 255 as bytes.
template <class V>
HWY_INLINE void StoreBytes(V v, uint8_t* out) {
  const hn::RebindToSigned<D16> di;
  const hn::Rebind<uint8_t, D16> d8;
  hn::StoreU(hn::DemoteTo(d8, hn::BitCast(di, v)), d8, out);
}

int64_t NarrowValues(const uint16_t* z, int64_t n, uint8_t* out,
                     uint16_t* escapes) {
  const D16 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto most = hn::Set(d, 255);
  int64_t escaped = 0;
  for (int64_t i = 0; i < n; i += lanes) {
    // `z` has its slack to read from; what is read there is not kept.
    const auto v = hn::LoadU(d, z + i);
    const auto bytes = hn::Min(v, most);
    StoreBytes(bytes, out + i);
    if (hn::AllFalse(d, hn::Eq(bytes, most))) continue;
    for (int64_t j = i; j < std::min(n, i + lanes); ++j) {
      if (z[j] >= 255) escapes[escaped++] = z[j];
    }
  }
  return escaped;
}

int64_t EncodeGaps(const uint16_t* positions, int64_t n, uint8_t* out) {
  const D16 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  uint8_t* const begin = out;
  // Elements before `next` are accounted for.
  int64_t next = 0, i = 0;
  auto scalar = [&](int64_t end) {
    for (; i < end; ++i) {
      int64_t gap = positions[i] - next;
      for (; gap >= 255; gap -= 255) *out++ = 255;
      *out++ = static_cast<uint8_t>(gap);
      next = positions[i] + 1;
    }
  };
  scalar(std::min<int64_t>(n, 1));
  while (i + lanes <= n) {
    const auto gaps = hn::Sub(
        hn::Sub(hn::LoadU(d, positions + i), hn::LoadU(d, positions + i - 1)),
        hn::Set(d, 1));
    // The sparser a chunk is, the more of its vectors hold a long gap.
    if (hn::AllTrue(d, hn::Lt(gaps, hn::Set(d, 255)))) {
      StoreBytes(gaps, out);
      out += lanes;
      i += lanes;
      next = positions[i - 1] + 1;
    } else {
      scalar(i + lanes);
    }
  }
  scalar(n);
  return out - begin;
}

void DenseChanges(const uint16_t* before, const uint16_t* after, int64_t n,
                  uint8_t* low, uint8_t* high) {
  const D16 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto z =
        Changes(d, hn::LoadU(d, before + i), hn::LoadU(d, after + i));
    StoreBytes(hn::And(z, hn::Set(d, 255)), low + i);
    StoreBytes(hn::ShiftRight<8>(z), high + i);
  }
  for (; i < n; ++i) {
    const uint16_t z = EncodeChange(before[i], after[i]);
    low[i] = static_cast<uint8_t>(z & 255);
    high[i] = static_cast<uint8_t>(z >> 8);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {
namespace {

HWY_EXPORT(FindChanges);
HWY_EXPORT(TakePositions);
HWY_EXPORT(TakeChanges);
HWY_EXPORT(NarrowValues);
HWY_EXPORT(EncodeGaps);
HWY_EXPORT(DenseChanges);

}  // namespace

int64_t FindChanges(const uint16_t* before, const uint16_t* after, int64_t n,
                    uint64_t* bitmap) {
  return HWY_DYNAMIC_DISPATCH(FindChanges)(before, after, n, bitmap);
}
int64_t TakePositions(const uint64_t* bitmap, int64_t n, int64_t base,
                      uint16_t* positions) {
  return HWY_DYNAMIC_DISPATCH(TakePositions)(bitmap, n, base, positions);
}
void TakeChangesAt(const uint16_t* before, const uint16_t* after,
                   const uint16_t* positions, int64_t count, uint16_t* z) {
  for (int64_t i = 0; i < count; ++i) {
    z[i] = EncodeChange(before[positions[i]], after[positions[i]]);
  }
}
void TakeChanges(const uint16_t* before, const uint16_t* after, int64_t n,
                 const uint64_t* bitmap, uint16_t* positions, uint16_t* z) {
  HWY_DYNAMIC_DISPATCH(TakeChanges)(before, after, n, bitmap, positions, z);
}
int64_t NarrowValues(const uint16_t* z, int64_t n, uint8_t* out,
                     uint16_t* escapes) {
  return HWY_DYNAMIC_DISPATCH(NarrowValues)(z, n, out, escapes);
}
int64_t EncodeGaps(const uint16_t* positions, int64_t n, uint8_t* out) {
  return HWY_DYNAMIC_DISPATCH(EncodeGaps)(positions, n, out);
}
void DenseChanges(const uint16_t* before, const uint16_t* after, int64_t n,
                  uint8_t* low, uint8_t* high) {
  HWY_DYNAMIC_DISPATCH(DenseChanges)(before, after, n, low, high);
}

void TakePlane(const uint8_t* elements, int64_t n, int64_t element_bytes,
               int64_t p, uint8_t* plane) {
  for (int64_t i = 0; i < n; ++i) plane[i] = elements[i * element_bytes + p];
}

void PutPlane(const uint8_t* plane, int64_t n, int64_t element_bytes, int64_t p,
              uint8_t* elements) {
  for (int64_t i = 0; i < n; ++i) elements[i * element_bytes + p] = plane[i];
}

}  // namespace gradwire
#endif
