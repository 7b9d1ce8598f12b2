// SPDX-License-Identifier: Apache-2.0
// Weights that change, for tests of the delta codec.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "checkpoint/delta/apply.h"
#include "checkpoint/delta/encode.h"

namespace gradwire {

// Tensors that own their values.
class TestWeights {
 public:
  // `fill` makes the next byte.
  template <typename Fill>
  void Add(const TensorInfo& info, Fill fill) {
    infos_.push_back(info);
    // One more, so that an empty tensor has an address, too.
    std::vector<uint64_t> words(static_cast<size_t>(
        info.num_elements() * DeltaElementBytes(info.dtype) / 8 + 1));
    auto* bytes = reinterpret_cast<uint8_t*>(words.data());
    for (size_t i = 0; i < words.size() * 8; ++i) bytes[i] = fill();
    data_.push_back(std::move(words));
  }

  size_t size() const { return infos_.size(); }
  const TensorInfo& info(size_t i) const { return infos_[i]; }
  int64_t bytes(size_t i) const {
    return infos_[i].num_elements() * DeltaElementBytes(infos_[i].dtype);
  }
  template <typename T = uint8_t>
  T* data(size_t i) {
    return reinterpret_cast<T*>(data_[i].data());
  }
  template <typename T = uint8_t>
  const T* data(size_t i) const {
    return reinterpret_cast<const T*>(data_[i].data());
  }

  std::vector<TensorView> views() const {
    std::vector<TensorView> views;
    for (size_t i = 0; i < size(); ++i) {
      views.push_back({infos_[i], data_[i].data()});
    }
    return views;
  }
  std::vector<MutableTensor> tensors() {
    std::vector<MutableTensor> tensors;
    for (size_t i = 0; i < size(); ++i) {
      tensors.push_back({infos_[i], data_[i].data()});
    }
    return tensors;
  }
  std::string id() const { return ComputeWeightId(views()); }

  bool operator==(const TestWeights& other) const {
    if (infos_ != other.infos_) return false;
    for (size_t i = 0; i < size(); ++i) {
      if (std::memcmp(data(i), other.data(i), static_cast<size_t>(bytes(i))) !=
          0) {
        return false;
      }
    }
    return true;
  }

 private:
  std::vector<TensorInfo> infos_;
  std::vector<std::vector<uint64_t>> data_;
};

// Changes about a `density` of 16-bit elements, by small steps as training
// makes them, and sometimes by any.
inline void ChangeSome(uint16_t* values, int64_t n, double density,
                       std::mt19937& random, double wild = 0.001) {
  std::bernoulli_distribution change(density), any(wild);
  std::geometric_distribution<int> step(0.8);
  for (int64_t i = 0; i < n; ++i) {
    if (!change(random)) continue;
    const int by =
        any(random) ? static_cast<int>(random() & 0xffff) : 1 + step(random);
    values[i] =
        static_cast<uint16_t>(random() & 1 ? values[i] + by : values[i] - by);
  }
}

// Bytes of plausible bf16 weights.
struct FloatBytes {
  std::mt19937& random;
  uint16_t value = 0;
  bool high = false;
  uint8_t operator()() {
    high = !high;
    if (high) {
      value = static_cast<uint16_t>((random() & 0x81ff) | 0x3c00);
      return static_cast<uint8_t>(value & 255);
    }
    return static_cast<uint8_t>(value >> 8);
  }
};

inline DeltaOptions OptionsFor(const TestWeights& before) {
  DeltaOptions options;
  options.model = "test";
  options.step = 7;
  options.prev_id = before.id();
  options.base_id = options.prev_id;
  return options;
}

inline std::string ReasonOf(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail.has_value() ? detail->reason : std::string(status.message());
}

}  // namespace gradwire
