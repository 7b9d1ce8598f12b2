// SPDX-License-Identifier: Apache-2.0
// Snapshots for inference: the first rank writes what all hold.
#include <memory>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "base/status.h"
#include "checkpoint/snapshot/writer.h"
#include "device/cpu_device.h"
#include "trainer/model_files.h"
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

ExportOutcome OutcomeOf(const SnapshotManifest& manifest,
                        const std::string& reason) {
  return {
      manifest.kind(),         manifest.parent,          reason,
      manifest.weight_bytes(), manifest.weight_digest(), manifest.weight_id};
}

}  // namespace

absl::StatusOr<SnapshotPlan> TrainerImpl::MakeSnapshotPlan(
    const SnapshotOptions& options) {
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
  request.memory_bytes = AvailableHostBytes();
  request.shard_bytes = options_.snapshot_shard_bytes;
  return PlanSnapshot(files_, std::move(request), device_.host_threads());
}

absl::StatusOr<ExportOutcome> TrainerImpl::SaveSnapshot(
    const SnapshotOptions& options) {
  absl::Status status;
  std::unique_ptr<SnapshotWriter> writer;
  ExportOutcome outcome;
  std::vector<double> done = {0};
  if (rank_ == 0) {
    auto plan = MakeSnapshotPlan(options);
    status = plan.status();
    if (status.ok() && plan->existing) {
      outcome = OutcomeOf(*plan->existing, "this operation has made it before");
      done[0] = 1;
    } else if (status.ok()) {
      outcome.reason = plan->reason;
      auto made = SnapshotWriter::Create(files_, *std::move(plan));
      status = made.status();
      if (made.ok()) writer = *std::move(made);
    }
  }
  // The others wait for what the first one finds before it writes.
  GW_RETURN_IF_ERROR(agreement_->Agree(status, &done));
  if (done[0] > 0) return outcome;

  std::function<void(const void*, int64_t)> append;
  if (writer != nullptr) {
    append = [&](const void* data, int64_t n) { writer->Append(data, n); };
  }
  status = ReadParameters(table_, layout_, *unit_weights_, device_,
                          step_->stream(), append);
  if (status.ok() && writer != nullptr) {
    if (!writer->is_delta()) {
      status = CopyModelFiles(options_.model_directory, config_json_,
                              state_.weight.dtype(), *writer);
    }
    if (status.ok()) {
      const auto made = writer->Publish(absl::ToUnixMicros(absl::Now()));
      status = made.status();
      if (made.ok()) outcome = OutcomeOf(*made, outcome.reason);
    }
  }
  GW_RETURN_IF_ERROR(agreement_->Agree(status, nullptr));
  return outcome;
}

}  // namespace gradwire
