// SPDX-License-Identifier: Apache-2.0
// What the ranks of a test hold, and what collectives make of it by plain
// loops.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "base/check.h"
#include "device/device.h"
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

// Memory of a device. A copy is another view of it.
template <typename T>
class OnDevice {
 public:
  OnDevice() = default;
  OnDevice(Device& device, Stream& stream, const std::vector<T>& values)
      : device_(&device), size_(static_cast<int64_t>(values.size())) {
    auto buffer =
        device.Allocate(std::max<int64_t>(size_, 1) * int64_t{sizeof(T)});
    GW_CHECK(buffer.ok());
    buffer_ = *std::move(buffer);
    Write(stream, values);
  }

  Tensor tensor() const {
    return Tensor(buffer_->data(), DTypeOf<T>::value, {size_});
  }
  // REQUIRES: as many values. They are there when it returns.
  void Write(Stream& stream, const std::vector<T>& values) {
    GW_CHECK(static_cast<int64_t>(values.size()) == size_);
    device_->CopyFromHost(stream, values.data(), tensor());
    GW_CHECK(stream.Finish().ok());
  }
  std::vector<T> Read(Stream& stream) const {
    std::vector<T> values(static_cast<size_t>(size_));
    device_->CopyToHost(stream, tensor(), values.data());
    GW_CHECK(stream.Finish().ok());
    return values;
  }
  bool empty() const { return buffer_ == nullptr; }

 private:
  Device* device_ = nullptr;
  int64_t size_ = 0;
  std::shared_ptr<DeviceBuffer> buffer_;
};

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
