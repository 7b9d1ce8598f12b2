// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/snapshot/writer.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"
#include "checkpoint/sealed_text.h"

namespace gradwire {

absl::StatusOr<std::unique_ptr<SnapshotWriter>> SnapshotWriter::Create(
    FileSystem& files, SnapshotPlan plan) {
  GW_CHECK(!plan.existing.has_value());
  // From here on nobody removes the parent.
  GW_ASSIGN_OR_RETURN(
      PendingDirectory pending,
      PendingDirectory::Create(files, plan.request.directory,
                               plan.parent ? plan.parent->name : ""));
  std::unique_ptr<SnapshotWriter> writer(
      new SnapshotWriter(files, std::move(plan), std::move(pending)));
  if (!writer->is_delta()) {
    const SnapshotRequest& request = writer->plan_.request;
    GW_ASSIGN_OR_RETURN(
        writer->base_,
        BaseWriter::Create(files, writer->pending_, request.tensors,
                           request.shard_bytes));
  }
  return writer;
}

SnapshotWriter::SnapshotWriter(FileSystem& files, SnapshotPlan plan,
                               PendingDirectory pending)
    : files_(files), plan_(std::move(plan)), pending_(std::move(pending)) {
  if (!is_delta()) return;
  std::map<std::string, const void*> before;
  for (const TensorView& tensor : plan_.image->tensors()) {
    before[tensor.info.name] = tensor.data;
  }
  for (const TensorInfo& info : plan_.request.tensors) {
    before_.push_back(static_cast<const char*>(before.at(info.name)));
    encoded_.push_back({info, false, {}, {}});
  }
}

SnapshotWriter::~SnapshotWriter() = default;

void SnapshotWriter::Append(const void* data, int64_t elements) {
  if (!status_.ok()) return;
  GW_CHECK(tensor_ < plan_.request.tensors.size());
  const TensorInfo& info = plan_.request.tensors[tensor_];
  GW_CHECK(elements ==
           std::min(kSnapshotPieceElements, info.num_elements() - done_));
  const int64_t width = DeltaElementBytes(info.dtype);
  if (is_delta()) {
    std::vector<EncodedGroup> groups =
        EncodeShard(info.dtype, before_[tensor_] + done_ * width, data,
                    elements, /*fast=*/false);
    std::vector<EncodedGroup>& all = encoded_[tensor_].groups;
    std::move(groups.begin(), groups.end(), std::back_inserter(all));
  } else {
    base_->Append(data, elements * width);
    HashChunks(data, elements, width, chunks_);
  }
  done_ += elements;
  if (done_ < info.num_elements()) return;
  if (!is_delta()) hashes_.push_back(HashOfChunks(chunks_));
  chunks_.clear();
  done_ = 0;
  ++tensor_;
}

void SnapshotWriter::AddFile(const std::string& name,
                             const std::string& content) {
  if (!status_.ok()) return;
  status_ = pending_.Write(name, content);
  others_.push_back({name, std::ssize(content), DigestOf(content)});
}

absl::Status SnapshotWriter::FinishWeights(SnapshotManifest& manifest) {
  if (tensor_ != plan_.request.tensors.size()) {
    return absl::InternalError("not all tensors have come");
  }
  if (!is_delta()) {
    GW_RETURN_IF_ERROR(base_->Finish());
    manifest.files = base_->files();
    manifest.weight_id = WeightId(plan_.request.tensors, hashes_);
    manifest.base_id = manifest.weight_id;
    return absl::OkStatus();
  }
  const SnapshotManifest& parent = *plan_.parent;
  DeltaOptions options;
  options.model = manifest.job;
  options.step = manifest.optimizer_step;
  options.prev_id = parent.weight_id;
  options.base_id = plan_.base_id;
  options.chain_length = parent.chain_length + 1;
  GW_ASSIGN_OR_RETURN(std::string file,
                      AssembleDelta(std::move(encoded_), options));
  GW_RETURN_IF_ERROR(pending_.Write(kDeltaWeights, file));
  manifest.files.push_back({kDeltaWeights, std::ssize(file), DigestOf(file)});
  GW_ASSIGN_OR_RETURN(const DeltaFile parsed,
                      DeltaFile::Parse(std::move(file)));
  manifest.is_delta = true;
  manifest.weight_id = parsed.info().id;
  manifest.base_id = plan_.base_id;
  manifest.parent = parent.name;
  manifest.parent_id = parent.weight_id;
  manifest.chain_length = options.chain_length;
  return absl::OkStatus();
}

absl::Status SnapshotWriter::Finish(int64_t now_micros) {
  GW_RETURN_IF_ERROR(status_);
  const SnapshotRequest& request = plan_.request;
  SnapshotManifest manifest;
  manifest.name = LastSegment(request.directory);
  manifest.job = request.job;
  manifest.weight_version = request.weight_version;
  manifest.optimizer_step = request.optimizer_step;
  manifest.base_model = request.base_model;
  manifest.dtype = request.tensors.empty() ? "" : request.tensors.front().dtype;
  manifest.operation = request.operation;
  manifest.created_micros = std::max(now_micros, plan_.newest_micros + 1);
  if (request.ttl_seconds > 0) {
    manifest.expires_micros =
        manifest.created_micros +
        static_cast<int64_t>(std::llround(request.ttl_seconds * 1e6));
  }
  GW_RETURN_IF_ERROR(FinishWeights(manifest));
  // Large, and of no more use.
  before_.clear();
  plan_.image.reset();
  manifest.files.insert(manifest.files.end(), others_.begin(), others_.end());
  const std::string text = SnapshotText(manifest);
  // What could not be read is not published.
  GW_ASSIGN_OR_RETURN(manifest, ParseSnapshot(text));
  GW_RETURN_IF_ERROR(pending_.Write(kSnapshotManifest, text));
  finished_ = std::move(manifest);
  return absl::OkStatus();
}

absl::StatusOr<SnapshotManifest> SnapshotWriter::Publish() {
  GW_CHECK(finished_.has_value());
  if (is_delta()) {
    // Whoever removes it looks for this directory after that, and puts it back.
    auto parent = ReadSnapshot(files_, DirectoryOf(plan_.request.directory),
                               plan_.parent->name);
    const bool gone =
        absl::IsNotFound(parent.status()) || absl::IsDataLoss(parent.status());
    if (!parent.ok() && !gone) return parent.status();
    if (!parent.ok() || *parent != *plan_.parent) {
      return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                          "DELTA_PARENT_UNAVAILABLE")
          .With("field", "parent")
          .With("value", plan_.parent->name)
          .With("cause", "DELETED")
          .Message("the parent " + plan_.parent->name +
                   " was deleted while its delta was made; save again");
    }
  }
  GW_RETURN_IF_ERROR(pending_.Publish());
  return *finished_;
}

}  // namespace gradwire
