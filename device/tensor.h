// SPDX-License-Identifier: Apache-2.0
// A tensor is a view: address, element type, shape. It owns nothing.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "base/check.h"
#include "device/dtype.h"

namespace gradwire {

// A dense row-major view of at most four dimensions. Copying copies the view.
// A default-made tensor is null: no memory, no elements; ops that admit an
// optional tensor take a null one as "absent".
class Tensor {
 public:
  static constexpr int kMaxRank = 4;

  Tensor() = default;
  Tensor(void* data, DType dtype, std::initializer_list<int64_t> shape)
      : data_(data), dtype_(dtype), rank_(static_cast<int>(shape.size())) {
    GW_CHECK(rank_ <= kMaxRank);
    int i = 0;
    for (int64_t dim : shape) {
      GW_CHECK(dim >= 0);
      shape_[i++] = dim;
    }
  }

  bool is_null() const { return data_ == nullptr; }
  void* raw() const { return data_; }
  DType dtype() const { return dtype_; }
  int rank() const { return rank_; }
  int64_t dim(int i) const {
    GW_CHECK(i >= 0 && i < rank_);
    return shape_[i];
  }
  int64_t num_elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank_; ++i) n *= shape_[i];
    return is_null() ? 0 : n;
  }
  int64_t bytes() const { return num_elements() * DTypeBytes(dtype_); }

  // The elements as T. REQUIRES: T is the tensor's element type.
  template <typename T>
  T* data() const {
    GW_CHECK(is_null() || dtype_ == DTypeOf<T>::value);
    return static_cast<T*>(data_);
  }

  // Rows [begin, end) of the first dimension.
  Tensor Rows(int64_t begin, int64_t end) const {
    GW_CHECK(rank_ >= 1 && 0 <= begin && begin <= end && end <= shape_[0]);
    Tensor t = *this;
    int64_t row = DTypeBytes(dtype_);
    for (int i = 1; i < rank_; ++i) row *= shape_[i];
    t.data_ = static_cast<char*>(data_) + begin * row;
    t.shape_[0] = end - begin;
    return t;
  }

  // The same memory under another shape of as many elements.
  Tensor Reshape(std::initializer_list<int64_t> shape) const {
    Tensor t(data_, dtype_, shape);
    GW_CHECK(t.num_elements() == num_elements());
    return t;
  }

  // "f32[3, 4]"
  std::string DebugString() const;

 private:
  void* data_ = nullptr;
  DType dtype_ = DType::kF32;
  int rank_ = 0;
  std::array<int64_t, kMaxRank> shape_ = {};
};

}  // namespace gradwire
