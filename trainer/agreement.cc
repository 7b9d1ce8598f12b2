// SPDX-License-Identifier: Apache-2.0
#include "trainer/agreement.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"

namespace gradwire {

absl::StatusOr<std::unique_ptr<Agreement>> Agreement::Create(
    Collectives* collectives, Device& device, Stream& stream) {
  if (collectives != nullptr && collectives->world() == 1)
    collectives = nullptr;
  std::unique_ptr<Agreement> agreement(
      new Agreement(collectives, device, stream));
  if (collectives != nullptr) {
    GW_ASSIGN_OR_RETURN(agreement->buffer_, device.Allocate(kDoubles * 8));
  }
  return agreement;
}

absl::Status Agreement::Sum(std::vector<double>& values) {
  if (alone()) return absl::OkStatus();
  const auto count = static_cast<int64_t>(values.size());
  GW_CHECK(count <= kDoubles);
  const Tensor shared(buffer_->data(), DType::kF64, {count});
  device_.CopyFromHost(stream_, values.data(), shared);
  const auto ticket = collectives_->AllReduce(stream_, shared);
  GW_RETURN_IF_ERROR(collectives_->Wait(stream_, ticket));
  device_.CopyToHost(stream_, shared, values.data());
  return absl::OkStatus();
}

absl::Status Agreement::Agree(const absl::Status& mine,
                              std::vector<double>* sums) {
  if (alone()) return mine;
  // One place for each rank's failure, then the sums.
  std::vector<double> values(static_cast<size_t>(collectives_->world()), 0.0);
  if (!mine.ok()) values[static_cast<size_t>(collectives_->rank())] = 1;
  if (sums != nullptr) {
    values.insert(values.end(), sums->begin(), sums->end());
  }
  GW_RETURN_IF_ERROR(Sum(values));
  const auto begin_sums = values.begin() + collectives_->world();
  const auto failed = std::find(values.begin(), begin_sums, 1.0);
  if (failed != begin_sums) {
    return Share(static_cast<int>(failed - values.begin()), mine);
  }
  if (sums != nullptr) sums->assign(begin_sums, values.end());
  return absl::OkStatus();
}

absl::Status Agreement::Broadcast(float* values, int64_t n, int rank) {
  for (int64_t at = 0; !alone() && at < n; at += 2 * kDoubles) {
    const int64_t count = std::min(2 * kDoubles, n - at);
    const Tensor shared(buffer_->data(), DType::kF32, {count});
    device_.CopyFromHost(stream_, values + at, shared);
    const auto ticket = collectives_->Broadcast(stream_, shared, rank);
    GW_RETURN_IF_ERROR(collectives_->Wait(stream_, ticket));
    device_.CopyToHost(stream_, shared, values + at);
  }
  return absl::OkStatus();
}

absl::Status Agreement::Share(int rank, absl::Status mine) {
  // Its length, then the bytes.
  std::string bytes(static_cast<size_t>(kDoubles * 8), '\0');
  if (rank == collectives_->rank()) {
    const std::string status = StatusToBytes(mine);
    const size_t length = std::min(status.size(), bytes.size() - 8);
    const std::string digits = std::to_string(length);
    bytes.replace(0, digits.size(), digits);
    bytes.replace(8, length, status, 0, length);
  }
  const Tensor shared(buffer_->data(), DType::kI32, {kDoubles * 2});
  device_.CopyFromHost(stream_, bytes.data(), shared);
  const auto ticket = collectives_->Broadcast(stream_, shared, rank);
  GW_RETURN_IF_ERROR(collectives_->Wait(stream_, ticket));
  device_.CopyToHost(stream_, shared, bytes.data());
  const size_t length = std::min<size_t>(
      static_cast<size_t>(std::atoi(bytes.c_str())), bytes.size() - 8);
  return StatusFromBytes(bytes.substr(8, length));
}

}  // namespace gradwire
