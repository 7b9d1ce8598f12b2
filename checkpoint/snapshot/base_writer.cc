// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/snapshot/base_writer.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"
#include "checkpoint/sealed_text.h"

namespace gradwire {
namespace {

int64_t BytesOf(const TensorInfo& tensor) {
  return tensor.num_elements() * DeltaElementBytes(tensor.dtype);
}

}  // namespace

absl::StatusOr<std::vector<size_t>> SplitShards(
    absl::Span<const TensorInfo> tensors, int64_t shard_bytes) {
  std::vector<size_t> ends;
  int64_t left = shard_bytes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t bytes = BytesOf(tensors[i]);
    if (i > 0 && bytes > left) {
      ends.push_back(i);
      left = shard_bytes;
    }
    left -= bytes;
  }
  ends.push_back(tensors.size());
  if (std::ssize(ends) <= kMaxShards) return ends;
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "OPTION_OUT_OF_RANGE")
      .With("field", "snapshot_shard_bytes")
      .With("value", shard_bytes)
      .With("shards", std::ssize(ends))
      .With("limit", kMaxShards)
      .Message("with --snapshot_shard_bytes=" + std::to_string(shard_bytes) +
               " the weights would take " + std::to_string(std::ssize(ends)) +
               " files, and at most " + std::to_string(kMaxShards) +
               " are written; start the server with a larger one");
}

std::string IndexText(absl::Span<const TensorInfo> tensors,
                      const std::vector<size_t>& ends) {
  int64_t elements = 0, bytes = 0;
  nlohmann::json map = nlohmann::json::object();
  size_t shard = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    while (i >= ends[shard]) ++shard;
    map[tensors[i].name] =
        BaseWeightsName(static_cast<int64_t>(shard) + 1, std::ssize(ends));
    elements += tensors[i].num_elements();
    bytes += BytesOf(tensors[i]);
  }
  const nlohmann::json index = {
      {"metadata", {{"total_parameters", elements}, {"total_size", bytes}}},
      {"weight_map", std::move(map)}};
  return index.dump(2) + "\n";
}

absl::StatusOr<std::unique_ptr<BaseWriter>> BaseWriter::Create(
    FileSystem& files, PendingDirectory& pending,
    std::vector<TensorInfo> tensors, int64_t shard_bytes) {
  GW_ASSIGN_OR_RETURN(std::vector<size_t> ends,
                      SplitShards(tensors, shard_bytes));
  return std::unique_ptr<BaseWriter>(
      new BaseWriter(files, pending, std::move(tensors), std::move(ends)));
}

BaseWriter::BaseWriter(FileSystem& files, PendingDirectory& pending,
                       std::vector<TensorInfo> tensors,
                       std::vector<size_t> ends)
    : files_(files),
      pending_(pending),
      tensors_(std::move(tensors)),
      ends_(std::move(ends)) {
  BeginShard();
}

void BaseWriter::BeginShard() {
  const size_t begin = made_.empty() ? 0 : ends_[made_.size() - 1];
  const size_t end = ends_[made_.size()];
  made_.push_back(
      {BaseWeightsName(std::ssize(made_) + 1, std::ssize(ends_)), 0, ""});
  std::vector<SafetensorsWriter::Row> rows;
  for (size_t i = begin; i < end; ++i) {
    rows.push_back({tensors_[i].name, tensors_[i].dtype, tensors_[i].shape});
    bytes_left_ += BytesOf(tensors_[i]);
  }
  shard_ = std::make_unique<SafetensorsWriter>(
      files_, pending_.path() + "/" + made_.back().name, rows);
}

absl::Status BaseWriter::EndShard() {
  GW_RETURN_IF_ERROR(shard_->Finish());
  made_.back().bytes = shard_->bytes_written();
  made_.back().digest = shard_->digest();
  return absl::OkStatus();
}

void BaseWriter::Append(const void* data, int64_t bytes) {
  if (!status_.ok()) return;
  if (bytes_left_ == 0 && made_.size() < ends_.size()) {
    status_ = EndShard();
    if (!status_.ok()) return;
    BeginShard();
  }
  GW_CHECK(bytes <= bytes_left_);
  shard_->Append(data, bytes);
  bytes_left_ -= bytes;
}

absl::Status BaseWriter::Finish() {
  GW_RETURN_IF_ERROR(status_);
  if (made_.size() < ends_.size()) {
    return absl::InternalError("not all tensors have come");
  }
  GW_RETURN_IF_ERROR(EndShard());
  if (ends_.size() == 1) return absl::OkStatus();
  const std::string index = IndexText(tensors_, ends_);
  made_.push_back({kBaseIndex, std::ssize(index), DigestOf(index)});
  return pending_.Write(kBaseIndex, index);
}

}  // namespace gradwire
