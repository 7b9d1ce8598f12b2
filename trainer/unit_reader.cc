// SPDX-License-Identifier: Apache-2.0
#include "trainer/unit_reader.h"

#include "base/status.h"

namespace gradwire {

absl::StatusOr<const void*> UnitReader::InHostMemory(const Tensor& values,
                                                     int64_t begin, int64_t n,
                                                     std::vector<char>& copy) {
  const Tensor part = values.Rows(begin, begin + n);
  if (device_.IsHostMemory()) return part.raw();
  copy.resize(static_cast<size_t>(part.bytes()));
  device_.CopyToHost(*stream_, part, copy.data());
  GW_RETURN_IF_ERROR(stream_->Finish());
  return copy.data();
}

void UnitReader::SetRead(int units) {
  const std::lock_guard lock(mutex_);
  units_read_ = units;
  read_.notify_all();
}

absl::Status UnitReader::CheckGoesOn() const {
  const std::lock_guard lock(mutex_);
  return given_up_ ? absl::CancelledError("the save was given up")
                   : absl::OkStatus();
}

void UnitReader::AwaitRead(int unit) const {
  std::unique_lock lock(mutex_);
  read_.wait(lock, [&] { return units_read_ > unit; });
}

void UnitReader::GiveUp() {
  const std::lock_guard lock(mutex_);
  given_up_ = true;
}

}  // namespace gradwire
