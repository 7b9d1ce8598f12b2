// SPDX-License-Identifier: Apache-2.0
// Snapshots for inference: the first rank writes what all hold.
#include <algorithm>
#include <functional>
#include <future>
#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/status.h"
#include "device/cpu_device.h"
#include "trainer/model_files.h"
#include "trainer/snapshot_save.h"
#include "trainer/trainer_impl.h"

namespace gradwire {
namespace {

SnapshotKind KindOf(SnapshotType type) {
  switch (type) {
    case SnapshotType::kBase:
      return SnapshotKind::kBase;
    case SnapshotType::kDelta:
      return SnapshotKind::kDelta;
    case SnapshotType::kAuto:
      break;
  }
  return SnapshotKind::kAuto;
}

}  // namespace

int64_t TrainerImpl::SpareHostBytes() const {
  const int64_t available = AvailableHostBytes();
  if (!device_.IsHostMemory()) return available;
  const MemoryUse use = memory_use();
  int64_t untouched = plan_.weights + plan_.gradients + plan_.workspace;
  untouched -= use.weights + use.gradients + use.workspace;
  if (!has_moments_) untouched += plan_.optimizer - use.optimizer;
  return std::max<int64_t>(
      0, available - options_.ranks_on_host * std::max<int64_t>(0, untouched));
}

SnapshotRequest TrainerImpl::RequestOf(const SnapshotOptions& options) const {
  SnapshotRequest request;
  request.directory = options.directory;
  request.job = options.job;
  request.kind = KindOf(options.type);
  request.parent = options.parent;
  request.operation = options.operation;
  request.base_model = options.base_model;
  request.weight_version = weight_version_;
  request.optimizer_step = optimizer_->step();
  request.ttl_seconds = options.ttl_seconds;
  request.tensors = TensorsOf(table_, state_.weight.dtype());
  request.memory_bytes = SpareHostBytes();
  request.shard_bytes = options_.snapshot_shard_bytes;
  return request;
}

void TrainerImpl::BeginSnapshot(
    const SnapshotOptions& options,
    std::function<void(const absl::Status&)> written) {
  GW_CHECK(snapshot_ == nullptr);
  const bool gathers = layout_.world() > 1;
  if (rank_ == 0) {
    SnapshotRequest request = RequestOf(options);
    const DType dtype = state_.weight.dtype();
    const int64_t model_bytes = table_.num_elements() * DTypeBytes(dtype);
    // A delta's parent takes as much, and comes first.
    const int64_t parent_bytes =
        request.kind == SnapshotKind::kBase ? 0 : model_bytes;
    const int64_t room =
        std::max<int64_t>(0, request.memory_bytes - parent_bytes);
    SnapshotSave::Part part = {
        .table = table_,
        .layout = layout_,
        .device = device_,
        .weight = gathers ? Tensor() : state_.weight,
        .dtype = dtype,
        .model_directory = options_.model_directory,
        .config_json = config_json_,
        // What is left then is not all for this.
        .queue_bytes = std::min(model_bytes, room / 2),
    };
    snapshot_ = std::make_unique<SnapshotSave>(
        files_, std::move(request), std::move(part), std::move(written));
  }
  if (!gathers) {
    if (rank_ != 0) written(absl::OkStatus());
    return;
  }
  std::function<void(std::vector<char>, int64_t)> append;
  if (rank_ == 0) {
    append = [&](std::vector<char> bytes, int64_t elements) {
      snapshot_->gathered().Push({std::move(bytes), elements});
    };
  }
  absl::Status status;
  // Replicas of the model hold the same.
  if (rank_ < layout_.world()) {
    status = ReadParameters(table_, layout_, *unit_weights_, device_,
                            step_->stream(), append);
  }
  if (rank_ == 0) {
    snapshot_->gathered().End(status);
  } else {
    written(status);
  }
}

absl::StatusOr<ExportOutcome> TrainerImpl::PublishSnapshot() {
  const std::unique_ptr<SnapshotSave> snapshot = std::move(snapshot_);
  absl::StatusOr<ExportOutcome> outcome = ExportOutcome();
  if (snapshot != nullptr) outcome = snapshot->Publish();
  GW_RETURN_IF_ERROR(Agree(outcome.status()));
  return outcome;
}

absl::StatusOr<ExportOutcome> TrainerImpl::SaveSnapshot(
    const SnapshotOptions& options) {
  std::promise<absl::Status> written;
  BeginSnapshot(options,
                [&](const absl::Status& status) { written.set_value(status); });
  if (absl::Status status = Agree(written.get_future().get()); !status.ok()) {
    AbandonSnapshot();
    return status;
  }
  return PublishSnapshot();
}

}  // namespace gradwire
