// SPDX-License-Identifier: Apache-2.0
#include "device/arena.h"

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>

#include "base/status.h"

namespace gradwire {
namespace {

int64_t Bytes(DType dtype, std::initializer_list<int64_t> shape) {
  int64_t n = DTypeBytes(dtype);
  for (int64_t dim : shape) n *= dim;
  return n;
}

}  // namespace

int64_t Arena::AlignedBytes(DType dtype, std::initializer_list<int64_t> shape) {
  return AlignedBytes(Bytes(dtype, shape));
}

absl::StatusOr<Arena> Arena::Create(Device& device, int64_t bytes) {
  Arena arena;
  GW_ASSIGN_OR_RETURN(arena.buffer_, device.Allocate(bytes));
  return arena;
}

Tensor Arena::Alloc(const std::string& name, DType dtype,
                    std::initializer_list<int64_t> shape) {
  const int64_t bytes = Bytes(dtype, shape);
  if (used_ + bytes > capacity_bytes()) {
    std::fprintf(stderr, "arena: %s needs %lld bytes, %lld of %lld are left\n",
                 name.c_str(), static_cast<long long>(bytes),
                 static_cast<long long>(capacity_bytes() - used_),
                 static_cast<long long>(capacity_bytes()));
    GW_CHECK(used_ + bytes <= capacity_bytes());
  }
  Tensor tensor(static_cast<char*>(buffer_->data()) + used_, dtype, shape);
  used_ = std::min(used_ + AlignedBytes(bytes), capacity_bytes());
  peak_ = std::max(peak_, used_);
  return tensor;
}

void Arena::ResetTo(int64_t mark) {
  GW_CHECK(mark >= 0 && mark <= used_);
  used_ = mark;
}

}  // namespace gradwire
