// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/patch.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/crc32c.h"
#include "checkpoint/delta/simd.h"
#include "checkpoint/delta/value_code.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "checkpoint/delta/patch.cc"
// The first of these includes this file for each target.
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "checkpoint/delta/value_code-inl.h"
// clang-format on

#ifndef GRADWIRE_CHECKPOINT_DELTA_PATCH_ONCE_
#define GRADWIRE_CHECKPOINT_DELTA_PATCH_ONCE_
namespace gradwire {
namespace {

struct Spread {
  alignas(16) uint8_t bytes[256][16];
};

// For each byte of a bitmap, which of eight consecutive 16-bit lanes goes to
// which; 0x80 leaves a lane zero.
constexpr Spread MakeSpread() {
  Spread spread = {};
  for (int mask = 0; mask < 256; ++mask) {
    int from = 0;
    for (int lane = 0; lane < 8; ++lane) {
      const bool set = (mask >> lane & 1) != 0;
      for (int half = 0; half < 2; ++half) {
        spread.bytes[mask][2 * lane + half] =
            static_cast<uint8_t>(set ? 2 * from + half : 0x80);
      }
      from += set;
    }
  }
  return spread;
}
constexpr Spread kSpread = MakeSpread();

inline void Add(uint16_t& weight, uint16_t difference) {
  weight = FromOrderKey(static_cast<uint16_t>(OrderKey(weight) + difference));
}

}  // namespace
}  // namespace gradwire
#endif

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D16 = hn::CappedTag<uint16_t, 32>;
using D8 = hn::Rebind<uint8_t, D16>;

bool ReadValues(const uint8_t* bytes, int64_t n, const uint8_t* escapes,
                int64_t num_escapes, Direction direction,
                uint16_t* differences) {
  const D16 d;
  const D8 d8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto flip =
      hn::Set(d, direction == Direction::kUndo ? uint16_t{0xffff} : 0);
  int64_t used = 0, i = 0;
  bool good = true;
  auto scalar = [&](int64_t end) {
    for (; i < end; ++i) {
      uint16_t z = bytes[i];
      if (z == 255) {
        if (used == num_escapes) {
          good = false;
          continue;
        }
        z = static_cast<uint16_t>(escapes[2 * used] | escapes[2 * used + 1]
                                                          << 8);
        ++used;
      }
      good &= z != 0;
      const uint16_t difference = FromZigZag16(z);
      differences[i] = static_cast<uint16_t>(
          direction == Direction::kUndo ? -difference : difference);
    }
  };
  while (i + lanes <= n) {
    const auto v = hn::LoadU(d8, bytes + i);
    // 0 and 255 need a closer look; both are the two largest of v - 1.
    const auto odd = hn::Max(hn::Sub(v, hn::Set(d8, 1)), hn::Set(d8, 253));
    if (!hn::AllTrue(d8, hn::Eq(odd, hn::Set(d8, 253)))) {
      scalar(i + lanes);
      continue;
    }
    const auto difference = FromZigZag(d, hn::PromoteTo(d, v));
    hn::StoreU(hn::Sub(hn::Xor(difference, flip), flip), d, differences + i);
    i += lanes;
  }
  scalar(n);
  return good && used == num_escapes;
}

// The sum of n bytes and how many of them are 255.
void SumBytes(const uint8_t* bytes, int64_t n, int64_t* sum, int64_t* full) {
  const hn::CappedTag<uint8_t, 64> d;
  const hn::RepartitionToWide<
      hn::RepartitionToWide<hn::RepartitionToWide<decltype(d)>>>
      d64;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto sums = hn::Zero(d64);
  int64_t i = 0, ones = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto v = hn::LoadU(d, bytes + i);
    sums = hn::Add(sums, hn::SumsOf8(v));
    ones += static_cast<int64_t>(hn::CountTrue(d, hn::Eq(v, hn::Set(d, 255))));
  }
  int64_t total = static_cast<int64_t>(hn::GetLane(hn::SumOfLanes(d64, sums)));
  for (; i < n; ++i) {
    total += bytes[i];
    ones += bytes[i] == 255;
  }
  *sum = total;
  *full = ones;
}

// Elements that are patched and summed in turns: alone, the patching would wait
// for one weight after another to come from memory.
constexpr int64_t kBlock = 1024;

bool PatchGaps(const uint8_t* gaps, int64_t num_bytes,
               const uint16_t* differences, int64_t n, uint16_t* weights,
               int64_t size, uint32_t& crc) {
  int64_t sum = 0, full = 0;
  SumBytes(gaps, num_bytes, &sum, &full);
  if (num_bytes - full != n || sum + n > size ||
      (num_bytes > 0 && gaps[num_bytes - 1] == 255)) {
    return false;
  }
  const uint8_t* const end = gaps + num_bytes;
  crc = 0;
  // The next element to look at: all before it are as they shall be.
  int64_t next = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t limit = std::min(begin + kBlock, size);
    while (gaps != end && next + *gaps < limit) {
      next += *gaps;
      if (*gaps++ != 255) Add(weights[next++], *differences++);
    }
    crc = Crc32c(weights + begin, 2 * (limit - begin), crc);
  }
  return true;
}

bool PatchBitmap(const uint8_t* bitmap, const uint16_t* differences, int64_t n,
                 uint16_t* weights, int64_t size) {
  const int64_t num_bytes = (size + 7) / 8;
  int64_t ones = 0, b = 0;
  for (; b + 8 <= num_bytes; b += 8) {
    uint64_t word;
    std::memcpy(&word, bitmap + b, 8);
    ones += std::popcount(word);
  }
  for (; b < num_bytes; ++b) ones += std::popcount(bitmap[b]);
  if (ones != n || (size % 8 != 0 && bitmap[num_bytes - 1] >> (size % 8))) {
    return false;
  }
  b = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::FixedTag<uint16_t, 8> d;
  const hn::Repartition<uint8_t, decltype(d)> d8;
  for (; b < size / 8; ++b) {
    const auto packed = hn::BitCast(d8, hn::LoadU(d, differences));
    const auto spread =
        hn::BitCast(d, hn::TableLookupBytesOr0(
                           packed, hn::Load(d8, kSpread.bytes[bitmap[b]])));
    const auto keys = OrderKeys(d, hn::LoadU(d, weights + 8 * b));
    hn::StoreU(FromOrderKeys(d, hn::Add(keys, spread)), d, weights + 8 * b);
    differences += std::popcount(bitmap[b]);
  }
#endif
  for (int64_t i = 8 * b; i < size; ++i) {
    if (bitmap[i / 8] >> (i % 8) & 1) Add(weights[i], *differences++);
  }
  return true;
}

void PatchDense(const uint8_t* low, const uint8_t* high, Direction direction,
                uint16_t* weights, int64_t size) {
  const D16 d;
  const D8 d8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const bool undo = direction == Direction::kUndo;
  const auto flip = hn::Set(d, undo ? uint16_t{0xffff} : 0);
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    const auto z =
        hn::Or(hn::PromoteTo(d, hn::LoadU(d8, low + i)),
               hn::ShiftLeft<8>(hn::PromoteTo(d, hn::LoadU(d8, high + i))));
    const auto difference = hn::Sub(hn::Xor(FromZigZag(d, z), flip), flip);
    const auto keys = OrderKeys(d, hn::LoadU(d, weights + i));
    hn::StoreU(FromOrderKeys(d, hn::Add(keys, difference)), d, weights + i);
  }
  for (; i < size; ++i) {
    const uint16_t difference =
        FromZigZag16(static_cast<uint16_t>(low[i] | high[i] << 8));
    Add(weights[i], static_cast<uint16_t>(undo ? -difference : difference));
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {
namespace {

HWY_EXPORT(ReadValues);
HWY_EXPORT(PatchGaps);
HWY_EXPORT(PatchBitmap);
HWY_EXPORT(PatchDense);

}  // namespace

bool ReadValues(const uint8_t* bytes, int64_t n, const uint8_t* escapes,
                int64_t num_escapes, Direction direction,
                uint16_t* differences) {
  return HWY_DYNAMIC_DISPATCH(ReadValues)(bytes, n, escapes, num_escapes,
                                          direction, differences);
}
bool PatchGaps(const uint8_t* gaps, int64_t num_bytes,
               const uint16_t* differences, int64_t n, uint16_t* weights,
               int64_t size, uint32_t& crc) {
  return HWY_DYNAMIC_DISPATCH(PatchGaps)(gaps, num_bytes, differences, n,
                                         weights, size, crc);
}
bool PatchBitmap(const uint8_t* bitmap, const uint16_t* differences, int64_t n,
                 uint16_t* weights, int64_t size) {
  return HWY_DYNAMIC_DISPATCH(PatchBitmap)(bitmap, differences, n, weights,
                                           size);
}
void PatchDense(const uint8_t* low, const uint8_t* high, Direction direction,
                uint16_t* weights, int64_t size) {
  HWY_DYNAMIC_DISPATCH(PatchDense)(low, high, direction, weights, size);
}

}  // namespace gradwire
#endif
