// SPDX-License-Identifier: Apache-2.0
// Owns one block of device memory and hands out tensors from it by name.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "device/device.h"
#include "device/tensor.h"

namespace gradwire {

// Bump allocation; every tensor starts at a multiple of kAlignment. The size is
// fixed when it is made: plan first (AlignedBytes), allocate once, and nothing
// allocates during a step. Running out is a broken plan, hence a check failure.
// Thread rule: one thread at a time.
class Arena {
 public:
  static constexpr int64_t kAlignment = 256;

  static int64_t AlignedBytes(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  static int64_t AlignedBytes(DType dtype,
                              std::initializer_list<int64_t> shape);

  static absl::StatusOr<Arena> Create(Device& device, int64_t bytes);

  Tensor Alloc(const std::string& name, DType dtype,
               std::initializer_list<int64_t> shape);

  // Everything allocated after a mark is given back by ResetTo(mark): scratch
  // of one micro-batch is LIFO.
  int64_t Mark() const { return used_; }
  void ResetTo(int64_t mark);

  int64_t used_bytes() const { return used_; }
  int64_t peak_bytes() const { return peak_; }
  int64_t capacity_bytes() const { return buffer_ ? buffer_->bytes() : 0; }

 private:
  std::unique_ptr<DeviceBuffer> buffer_;
  int64_t used_ = 0;
  int64_t peak_ = 0;
};

}  // namespace gradwire
