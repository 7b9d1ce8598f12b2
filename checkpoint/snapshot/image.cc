// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/snapshot/image.h"

#include <algorithm>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/sealed_text.h"

namespace gradwire {
namespace {

constexpr int64_t kMaxHeaderBytes = 100'000'000;

std::string ReasonOf(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : std::string("UNKNOWN");
}

absl::Status ParentUnavailable(const SnapshotManifest& child,
                               const absl::Status& why) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "DELTA_PARENT_UNAVAILABLE")
      .With("field", "parent")
      .With("value", child.parent)
      .With("snapshot", child.name)
      .With("cause", ReasonOf(why))
      .Message("snapshot " + child.name + " is a delta to " + child.parent +
               ", which cannot be used (" + ReasonOf(why) +
               "); save a base, or give another parent");
}

absl::Status ParentMismatch(const SnapshotManifest& child,
                            const SnapshotManifest& parent) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "DELTA_PARENT_MISMATCH")
      .With("field", "parent")
      .With("value", parent.name)
      .With("snapshot", child.name)
      .With("expected", child.parent_id)
      .With("have", parent.weight_id)
      .Message("snapshot " + child.name + " is a delta to other weights than " +
               parent.name + " holds; save a base");
}

// Of the weights of a snapshot, whatever the library says of them.
absl::Status Damaged(const SnapshotManifest& manifest,
                     const absl::Status& why) {
  if (ReasonOf(why) == "CHECKPOINT_CORRUPT") {
    return WithErrorMetadata(why, "snapshot", manifest.name);
  }
  return WithErrorMetadata(
      CorruptField(manifest.weights().name, "",
                   "does not give the weights that its manifest names (" +
                       ReasonOf(why) + ")"),
      "snapshot", manifest.name);
}

absl::Status TooLarge(int64_t bytes, int64_t limit) {
  return ErrorBuilder(absl::StatusCode::kResourceExhausted, "OUT_OF_MEMORY")
      .Server()
      .With("value", bytes)
      .With("limit", limit)
      .Message("the snapshot's weights take " + std::to_string(bytes) +
               " bytes of memory and " + std::to_string(limit) +
               " are available; free memory on the server's machine");
}

}  // namespace

absl::StatusOr<std::vector<SnapshotManifest>> ReadChain(
    FileSystem& files, const std::string& directory, const std::string& name) {
  GW_ASSIGN_OR_RETURN(SnapshotManifest last,
                      ReadSnapshot(files, directory, name));
  std::vector<SnapshotManifest> chain = {std::move(last)};
  std::set<std::string> seen = {name};
  while (chain.back().is_delta) {
    const SnapshotManifest& child = chain.back();
    if (!seen.insert(child.parent).second) {
      return CorruptField(kSnapshotManifest, "parent",
                          "is one of its descendants");
    }
    auto parent = ReadSnapshot(files, directory, child.parent);
    if (absl::IsNotFound(parent.status()) ||
        absl::IsDataLoss(parent.status())) {
      return ParentUnavailable(child, parent.status());
    }
    GW_RETURN_IF_ERROR(parent.status());
    if (parent->weight_id != child.parent_id) {
      return ParentMismatch(child, *parent);
    }
    chain.push_back(*std::move(parent));
  }
  std::reverse(chain.begin(), chain.end());
  return chain;
}

absl::StatusOr<std::string> ReadSnapshotFile(FileSystem& files,
                                             const std::string& path,
                                             const SnapshotFile& file) {
  auto opened = files.Open(path + "/" + file.name, FileSystem::Access::kRead);
  if (absl::IsNotFound(opened.status())) {
    return CorruptField(file.name, "", "is missing");
  }
  GW_RETURN_IF_ERROR(opened.status());
  // Memory is taken for what is there, not for what somebody has written.
  GW_ASSIGN_OR_RETURN(const int64_t bytes, (*opened)->Size());
  if (bytes != file.bytes) {
    return CorruptField(
        file.name, "bytes",
        "are " + std::to_string(bytes) + ", not " + std::to_string(file.bytes));
  }
  std::string content(static_cast<size_t>(bytes), '\0');
  GW_ASSIGN_OR_RETURN(const int64_t got,
                      (*opened)->ReadAt(0, bytes, content.data()));
  if (got != bytes || DigestOf(content) != file.digest) {
    return CorruptField(file.name, "digest", "is not that of its content");
  }
  return content;
}

absl::Status SnapshotImage::Load(std::string bytes) {
  bytes_ = std::move(bytes);
  GW_ASSIGN_OR_RETURN(const SafetensorsHeader header,
                      ParseSafetensors(bytes_, kMaxHeaderBytes));
  std::vector<std::pair<int64_t, MutableTensor>> tensors;
  for (const auto& [name, entry] : header.entries) {
    const int64_t element = DeltaElementBytes(entry.dtype);
    if (element == 0 || entry.offset % element != 0) {
      return DeltaInvalid(name, entry.dtype, "",
                          "has an unknown dtype, or is not aligned");
    }
    tensors.push_back(
        {entry.offset,
         {{name, entry.dtype, entry.shape}, bytes_.data() + entry.offset}});
  }
  std::sort(tensors.begin(), tensors.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  for (auto& [offset, tensor] : tensors) tensors_.push_back(std::move(tensor));
  return absl::OkStatus();
}

absl::Status SnapshotImage::Apply(std::string delta,
                                  const SnapshotManifest& manifest,
                                  ThreadPool* pool) {
  GW_ASSIGN_OR_RETURN(const DeltaFile file, DeltaFile::Parse(std::move(delta)));
  if (file.info().id != manifest.weight_id) {
    return DeltaInvalid("delta.id", file.info().id, manifest.weight_id,
                        "is not that of its manifest");
  }
  // Fresh tensors would not be in the base's file.
  for (const DeltaTensor& tensor : file.tensors()) {
    if (tensor.fresh) {
      return DeltaInvalid(tensor.info.name, "", "", "was not in the parent");
    }
  }
  return ApplyDelta(file, tensors_, weight_id_, pool);
}

std::vector<TensorView> SnapshotImage::tensors() const {
  std::vector<TensorView> views;
  for (const MutableTensor& tensor : tensors_) {
    views.push_back({tensor.info, tensor.data});
  }
  return views;
}

absl::StatusOr<std::unique_ptr<SnapshotImage>> SnapshotImage::Read(
    FileSystem& files, const std::string& directory,
    const std::vector<SnapshotManifest>& chain, int64_t limit_bytes,
    ThreadPool* pool) {
  const SnapshotManifest& base = chain.front();
  if (base.weights().bytes > limit_bytes) {
    return TooLarge(base.weights().bytes, limit_bytes);
  }
  std::unique_ptr<SnapshotImage> image(new SnapshotImage);
  const SnapshotManifest* now = &base;
  const auto read = [&]() -> absl::Status {
    image->weight_id_ = base.weight_id;
    for (const SnapshotManifest& each : chain) {
      now = &each;
      GW_ASSIGN_OR_RETURN(
          std::string bytes,
          ReadSnapshotFile(files, directory + "/" + each.name, each.weights()));
      GW_RETURN_IF_ERROR(each.is_delta
                             ? image->Apply(std::move(bytes), each, pool)
                             : image->Load(std::move(bytes)));
    }
    // A delta's tensors that have not changed were not looked at.
    const std::string id = ComputeWeightId(image->tensors(), pool);
    if (id == now->weight_id) return absl::OkStatus();
    return CorruptField(now->weights().name, "weight_id",
                        "is that of other weights");
  };
  const absl::Status status = read();
  if (status.ok()) return image;
  const bool damage = absl::IsDataLoss(status) ||
                      absl::IsInvalidArgument(status) ||
                      absl::IsFailedPrecondition(status);
  return damage ? Damaged(*now, status) : status;
}

}  // namespace gradwire
