// SPDX-License-Identifier: Apache-2.0
// What the ranks of a test hold, and what collectives make of it by plain
// loops.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "device/tensor.h"

namespace gradwire {

// Ranks' values repeat after this many elements, a prime number. So they are
// quickly made, and still none stands in for another a power of two away.
constexpr int64_t kPeriod = 65537;
constexpr int kMaxWorld = 7;

// Of any magnitude: the order in which such numbers are added shows in the sum.
template <typename T>
T ValueOf(int rank, int64_t i) {
  uint64_t x = 0x9e3779b97f4a7c15u * static_cast<uint64_t>(i + 1);
  x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9u + static_cast<uint64_t>(rank);
  x = (x ^ (x >> 29)) * 0x94d049bb133111ebu;
  x ^= x >> 32;
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(x);
  } else {
    const double scale = static_cast<double>(1u << (x % 24));
    const auto signed_x = static_cast<int32_t>(static_cast<uint32_t>(x));
    return T(static_cast<float>(signed_x / scale));
  }
}

// The values of a rank, once.
template <typename T>
const std::vector<T>& Period(int rank) {
  static const std::vector<std::vector<T>> periods = [] {
    std::vector<std::vector<T>> made(kMaxWorld);
    for (int r = 0; r < kMaxWorld; ++r) {
      std::vector<T>& period = made[static_cast<size_t>(r)];
      for (int64_t i = 0; i < kPeriod; ++i) period.push_back(ValueOf<T>(r, i));
    }
    return made;
  }();
  return periods[static_cast<size_t>(rank)];
}

// Appends elements of a repeated period until there are n.
template <typename T>
void Repeat(const std::vector<T>& period, int64_t from, int64_t n,
            std::vector<T>& out) {
  const int64_t size = static_cast<int64_t>(period.size());
  while (static_cast<int64_t>(out.size()) < n) {
    const int64_t count =
        std::min(size - from, n - static_cast<int64_t>(out.size()));
    out.insert(out.end(), period.begin() + from, period.begin() + from + count);
    from = 0;
  }
}

// n values of a rank, others for each seed.
template <typename T>
std::vector<T> Values(int rank, int64_t n, uint64_t seed) {
  std::vector<T> values;
  values.reserve(static_cast<size_t>(n));
  Repeat(Period<T>(rank), static_cast<int64_t>(seed * 7919 % kPeriod), n,
         values);
  return values;
}

// Elements [begin, end) of the sum of all ranks' values, in rank order.
template <typename T>
std::vector<T> SumOfValues(int world, int64_t begin, int64_t end,
                           uint64_t seed) {
  const int64_t first =
      (static_cast<int64_t>(seed * 7919 % kPeriod) + begin) % kPeriod;
  std::vector<T> period;
  for (int64_t i = 0; i < std::min(end - begin, kPeriod); ++i) {
    const size_t at = static_cast<size_t>((first + i) % kPeriod);
    T total = Period<T>(0)[at];
    for (int rank = 1; rank < world; ++rank) total += Period<T>(rank)[at];
    period.push_back(total);
  }
  std::vector<T> sum;
  sum.reserve(static_cast<size_t>(end - begin));
  Repeat(period, 0, end - begin, sum);
  return sum;
}

template <typename T>
Tensor TensorOf(std::vector<T>& values) {
  return Tensor(values.data(), DTypeOf<T>::value,
                {static_cast<int64_t>(values.size())});
}

// Bit by bit.
template <typename T>
void ExpectSame(const std::vector<T>& got, const std::vector<T>& want) {
  ASSERT_EQ(got.size(), want.size());
  if (got.empty()) return;
  if (std::memcmp(got.data(), want.data(), got.size() * sizeof(T)) == 0) return;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(std::memcmp(&got[i], &want[i], sizeof(T)), 0)
        << "at element " << i << " of " << got.size();
  }
}

}  // namespace gradwire
