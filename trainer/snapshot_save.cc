// SPDX-License-Identifier: Apache-2.0
#include "trainer/snapshot_save.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "base/status.h"
#include "trainer/model_files.h"

namespace gradwire {
namespace {

ExportOutcome OutcomeOf(const SnapshotManifest& manifest,
                        const std::string& reason) {
  ExportOutcome outcome;
  outcome.type = manifest.kind();
  outcome.parent = manifest.parent;
  outcome.reason = reason;
  outcome.bytes = manifest.weight_bytes();
  outcome.digest = manifest.weight_digest();
  outcome.weight_id = manifest.weight_id;
  outcome.optimizer_step = manifest.optimizer_step;
  outcome.weight_version = manifest.weight_version;
  return outcome;
}

}  // namespace

SnapshotSave::SnapshotSave(FileSystem& files, SnapshotRequest request,
                           Part part,
                           std::function<void(const absl::Status&)> written)
    : files_(files),
      part_(std::move(part)),
      request_(std::move(request)),
      reader_(part_.device),
      gathered_(part_.queue_bytes),
      thread_([this, written = std::move(written)] {
        // What is gathered is nobody else's.
        if (part_.weight.is_null()) reader_.SetRead(part_.layout.num_units());
        const absl::Status status = Write();
        // Nobody waits for what will not be written.
        reader_.SetRead(part_.layout.num_units());
        gathered_.Close();
        written(status);
      }) {}

SnapshotSave::~SnapshotSave() {
  reader_.GiveUp();
  if (thread_.joinable()) thread_.join();
}

absl::Status SnapshotSave::Write() {
  // The pool is the step's.
  GW_ASSIGN_OR_RETURN(
      SnapshotPlan plan,
      PlanSnapshot(files_, std::move(request_), /*pool=*/nullptr));
  if (plan.existing.has_value()) {
    outcome_ = OutcomeOf(*plan.existing, "this operation has made it before");
    return absl::OkStatus();
  }
  outcome_.reason = plan.reason;
  GW_ASSIGN_OR_RETURN(writer_, SnapshotWriter::Create(files_, std::move(plan)));
  GW_RETURN_IF_ERROR(part_.weight.is_null() ? WriteGathered()
                                            : WriteFromHere());
  if (!writer_->is_delta()) {
    GW_RETURN_IF_ERROR(CopyModelFiles(part_.model_directory, part_.config_json,
                                      part_.dtype, *writer_));
  }
  return writer_->Finish(absl::ToUnixMicros(absl::Now()));
}

absl::Status SnapshotSave::WriteFromHere() {
  std::vector<char> copy;
  auto row = part_.table.rows().begin();
  for (int unit = 0; unit < part_.layout.num_units(); ++unit) {
    for (; row != part_.table.rows().end() &&
           row->offset < part_.layout.unit(unit).end;
         ++row) {
      for (int64_t done = 0; done < row->num_elements;) {
        GW_RETURN_IF_ERROR(reader_.CheckGoesOn());
        const int64_t n =
            std::min(kSnapshotPieceElements, row->num_elements - done);
        GW_ASSIGN_OR_RETURN(
            const void* data,
            reader_.InHostMemory(part_.weight, row->offset + done, n, copy));
        writer_->Append(data, n);
        done += n;
      }
    }
    reader_.SetRead(unit + 1);
  }
  return absl::OkStatus();
}

absl::Status SnapshotSave::WriteGathered() {
  while (true) {
    GW_RETURN_IF_ERROR(reader_.CheckGoesOn());
    GW_ASSIGN_OR_RETURN(const std::optional<PieceQueue::Piece> piece,
                        gathered_.Take());
    if (!piece.has_value()) return absl::OkStatus();
    writer_->Append(piece->bytes.data(), piece->elements);
  }
}

absl::StatusOr<ExportOutcome> SnapshotSave::Publish() {
  thread_.join();
  if (writer_ != nullptr) {
    GW_ASSIGN_OR_RETURN(const SnapshotManifest manifest, writer_->Publish());
    outcome_ = OutcomeOf(manifest, outcome_.reason);
  }
  return outcome_;
}

}  // namespace gradwire
