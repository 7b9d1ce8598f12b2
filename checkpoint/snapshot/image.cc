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
absl::Status Damaged(const SnapshotManifest& manifest, const std::string& file,
                     const absl::Status& why) {
  if (ReasonOf(why) == "CHECKPOINT_CORRUPT") {
    return WithErrorMetadata(why, "snapshot", manifest.name);
  }
  return WithErrorMetadata(
      CorruptField(file, "",
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

// What lies beside the files of the manifest must not be taken for weights.
absl::Status CheckNoOthers(FileSystem& files, const std::string& path,
                           const SnapshotManifest& manifest) {
  const auto names = files.List(path);
  // It was removed since its manifest was read.
  if (absl::IsNotFound(names.status())) {
    return CorruptField(kSnapshotManifest, "", "is missing");
  }
  GW_RETURN_IF_ERROR(names.status());
  for (const std::string& name : *names) {
    if (!NamesWeights(name) || manifest.Find(name) != nullptr) continue;
    return CorruptField(name, "", "is not in the manifest");
  }
  return absl::OkStatus();
}

// The tensors of a file that lies in memory, in its order.
absl::StatusOr<std::vector<MutableTensor>> TensorsIn(std::string& file) {
  GW_ASSIGN_OR_RETURN(const SafetensorsHeader header,
                      ParseSafetensors(file, kMaxHeaderBytes));
  std::vector<std::pair<int64_t, MutableTensor>> placed;
  for (const auto& [name, entry] : header.entries) {
    const int64_t element = DeltaElementBytes(entry.dtype);
    if (element == 0 || entry.offset % element != 0) {
      return DeltaInvalid(name, entry.dtype, "",
                          "has an unknown dtype, or is not aligned");
    }
    placed.push_back(
        {entry.offset,
         {{name, entry.dtype, entry.shape}, file.data() + entry.offset}});
  }
  std::sort(placed.begin(), placed.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<MutableTensor> tensors;
  for (auto& [offset, tensor] : placed) tensors.push_back(std::move(tensor));
  return tensors;
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

absl::Status SnapshotImage::Load(FileSystem& files, const std::string& path,
                                 const SnapshotManifest& manifest,
                                 std::string& reading) {
  SafetensorsIndex held;
  held.total_size = 0;
  for (const SnapshotFile& file : manifest.weights()) {
    reading = file.name;
    GW_ASSIGN_OR_RETURN(std::string content,
                        ReadSnapshotFile(files, path, file));
    files_.push_back(std::move(content));
    GW_ASSIGN_OR_RETURN(std::vector<MutableTensor> tensors,
                        TensorsIn(files_.back()));
    for (MutableTensor& tensor : tensors) {
      const TensorInfo& info = tensor.info;
      if (!held.weight_map.emplace(info.name, file.name).second) {
        return DeltaInvalid(info.name, "", "", "is in two files");
      }
      held.total_size += info.num_elements() * DeltaElementBytes(info.dtype);
      tensors_.push_back(std::move(tensor));
    }
  }
  const SnapshotFile* index = manifest.Find(kBaseIndex);
  if (index == nullptr) return absl::OkStatus();
  reading = index->name;
  if (index->bytes > kMaxSafetensorsIndexBytes) {
    return CorruptField(index->name, "bytes", "are more than of any index");
  }
  GW_ASSIGN_OR_RETURN(const std::string text,
                      ReadSnapshotFile(files, path, *index));
  GW_ASSIGN_OR_RETURN(const SafetensorsIndex said, ParseSafetensorsIndex(text));
  if (said == held) return absl::OkStatus();
  return CorruptField(
      index->name,
      said.weight_map == held.weight_map ? "metadata.total_size" : "weight_map",
      "is not that of the files it names");
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

int64_t SnapshotImage::bytes() const {
  int64_t sum = 0;
  for (const std::string& file : files_) sum += std::ssize(file);
  return sum;
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
  if (base.weight_bytes() > limit_bytes) {
    return TooLarge(base.weight_bytes(), limit_bytes);
  }
  std::unique_ptr<SnapshotImage> image(new SnapshotImage);
  const SnapshotManifest* now = &base;
  std::string reading;
  const auto read = [&]() -> absl::Status {
    image->weight_id_ = base.weight_id;
    for (const SnapshotManifest& each : chain) {
      now = &each;
      const std::string path = directory + "/" + each.name;
      GW_RETURN_IF_ERROR(CheckNoOthers(files, path, each));
      if (!each.is_delta) {
        GW_RETURN_IF_ERROR(image->Load(files, path, each, reading));
        continue;
      }
      const SnapshotFile delta = each.weights().front();
      reading = delta.name;
      GW_ASSIGN_OR_RETURN(std::string content,
                          ReadSnapshotFile(files, path, delta));
      GW_RETURN_IF_ERROR(image->Apply(std::move(content), each, pool));
    }
    // A delta's tensors that have not changed were not looked at.
    const std::string id = ComputeWeightId(image->tensors(), pool);
    if (id == now->weight_id) return absl::OkStatus();
    return CorruptField(reading, "weight_id", "is that of other weights");
  };
  const absl::Status status = read();
  if (status.ok()) return image;
  const bool damage = absl::IsDataLoss(status) ||
                      absl::IsInvalidArgument(status) ||
                      absl::IsFailedPrecondition(status);
  return damage ? Damaged(*now, reading, status) : status;
}

}  // namespace gradwire
