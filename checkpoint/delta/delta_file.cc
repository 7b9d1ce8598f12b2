// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/delta_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/delta/delta_header.h"
#include "checkpoint/safetensors.h"

namespace gradwire {
namespace {

// A million tensors take less.
constexpr int64_t kMaxHeaderBytes = int64_t{1} << 28;

std::string_view Bytes(const std::string& file, const SafetensorsEntry& entry) {
  return std::string_view(file).substr(static_cast<size_t>(entry.offset),
                                       static_cast<size_t>(entry.bytes));
}

uint64_t Digest(std::string_view bytes) {
  return HashBytes64(bytes.data(), static_cast<int64_t>(bytes.size()));
}

// The streams of `tensor` among the file's entries, checked against what its
// record says.
absl::Status FindStreams(const std::string& file,
                         const SafetensorsHeader& header, uint64_t table_digest,
                         DeltaTensor& tensor) {
  const std::string& name = tensor.info.name;
  const auto table = header.entries.find(TableEntry(name));
  const auto payload = header.entries.find(PayloadEntry(name));
  if (table == header.entries.end() || payload == header.entries.end() ||
      table->second.dtype != "U8" || payload->second.dtype != "U8") {
    return DeltaInvalid(name, "", "", "has no streams of dtype U8");
  }
  tensor.table = Bytes(file, table->second);
  tensor.payload = Bytes(file, payload->second);
  const int64_t limit = NumChunks(tensor.info.num_elements()) * kChunkRowBytes;
  if (table->second.bytes == 0 || table->second.bytes > limit) {
    return DeltaInvalid(table->first, std::to_string(table->second.bytes),
                        std::to_string(limit), "has an impossible size");
  }
  if (Digest(tensor.table) != table_digest) {
    return DeltaCorrupt(table->first, "does not have its digest");
  }
  std::string_view left = tensor.payload;
  for (const DeltaGroup& group : tensor.groups) {
    for (const int64_t size : group.sizes) {
      if (size > payload->second.bytes) {
        return DeltaInvalid(payload->first, std::to_string(size),
                            std::to_string(payload->second.bytes),
                            "is shorter than one of its streams");
      }
    }
    const size_t size = static_cast<size_t>(group.stored_bytes());
    if (size > left.size()) {
      return DeltaInvalid(payload->first, std::to_string(size),
                          std::to_string(left.size()),
                          "is shorter than its groups");
    }
    if (Digest(left.substr(0, size)) != group.digest) {
      return DeltaCorrupt(payload->first, "does not have its digest");
    }
    left.remove_prefix(size);
  }
  if (!left.empty()) {
    return DeltaInvalid(payload->first, std::to_string(left.size()), "0",
                        "has bytes behind its groups");
  }
  return absl::OkStatus();
}

absl::Status CheckId(const DeltaHeader& header) {
  std::vector<TensorInfo> infos;
  std::vector<Hash128> hashes;
  for (const DeltaTensor& tensor : header.tensors) {
    infos.push_back(tensor.info);
    hashes.push_back(tensor.hash);
  }
  const std::string id = WeightId(infos, hashes);
  if (id == header.info.id) return absl::OkStatus();
  return DeltaInvalid("delta.id", header.info.id, id,
                      "is not that of the tensors");
}

absl::Status CheckRows(const DeltaTensor& tensor,
                       const std::vector<ChunkRow>& rows) {
  const bool floats = IsFloat16(tensor.info.dtype) && !tensor.fresh;
  for (const ChunkRow& row : rows) {
    const bool raw = row.method == ChunkMethod::kRaw;
    const bool good = floats || raw ||
                      (row.method == ChunkMethod::kUnchanged && !tensor.fresh);
    if (!good) {
      return DeltaInvalid(TableEntry(tensor.info.name),
                          std::to_string(static_cast<int>(row.method)), "",
                          "has a method that its dtype does not have");
    }
  }
  size_t first = 0;
  for (const DeltaGroup& group : tensor.groups) {
    const auto part =
        absl::MakeSpan(rows).subspan(first, static_cast<size_t>(group.chunks));
    const GroupShape shape =
        tensor.group_shape(static_cast<int64_t>(first), group.chunks);
    const auto bytes = StreamBytes(shape, part);
    bool fast = false;
    for (const ChunkRow& row : part) fast |= (row.flags & kFlagFast) != 0;
    for (size_t s = 0; s < group.sizes.size(); ++s) {
      const bool whole = group.sizes[s] == bytes[s];
      if (group.sizes[s] > bytes[s] || (group.sizes[s] == 0 && !whole) ||
          (fast && !whole)) {
        return DeltaInvalid(PayloadEntry(tensor.info.name),
                            std::to_string(group.sizes[s]),
                            std::to_string(bytes[s]),
                            "has a stream that is longer than its table says, "
                            "or missing");
      }
    }
    first += static_cast<size_t>(group.chunks);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status DeltaInvalid(const std::string& field, const std::string& value,
                          const std::string& limit, const std::string& what) {
  ErrorBuilder error(absl::StatusCode::kInvalidArgument, "DELTA_INVALID");
  error.With("field", field);
  if (!value.empty()) error.With("value", value);
  if (!limit.empty()) error.With("limit", limit);
  return error.Message("delta: " + field + " " + what +
                       "; the file is damaged or not a delta, fetch it again");
}

absl::Status DeltaCorrupt(const std::string& field, const std::string& what) {
  return ErrorBuilder(absl::StatusCode::kDataLoss, "DELTA_CORRUPT")
      .Server()
      .With("field", field)
      .Message("delta: " + field + " " + what +
               "; fetch the file again, or load full weights");
}

GroupShape DeltaTensor::group_shape(int64_t first_chunk, int64_t chunks) const {
  GroupShape shape;
  shape.num_elements =
      std::min(info.num_elements() - first_chunk * kChunkElements,
               chunks * kChunkElements);
  shape.element_bytes = DeltaElementBytes(info.dtype);
  shape.floats16 = IsFloat16(info.dtype);
  return shape;
}

absl::StatusOr<DeltaFile> DeltaFile::Parse(std::string bytes) {
  DeltaFile file;
  file.bytes_ = std::make_unique<const std::string>(std::move(bytes));
  GW_ASSIGN_OR_RETURN(SafetensorsHeader header,
                      ParseSafetensors(*file.bytes_, kMaxHeaderBytes));
  const auto json = header.metadata.find("delta");
  const auto digest = header.metadata.find("digest");
  const auto format = header.metadata.find("format");
  if (json == header.metadata.end() || digest == header.metadata.end() ||
      format == header.metadata.end() || format->second != kDeltaFormat ||
      header.metadata.size() != 3) {
    return DeltaInvalid("__metadata__", "", kDeltaFormat,
                        "is not that of a delta");
  }
  if (HashBytes128(json->second.data(),
                   static_cast<int64_t>(json->second.size()))
          .Hex() != digest->second) {
    return DeltaCorrupt("__metadata__", "does not have its digest");
  }
  GW_ASSIGN_OR_RETURN(DeltaHeader parsed, DeltaHeaderFromJson(json->second));
  size_t streams = 0;
  for (size_t i = 0; i < parsed.tensors.size(); ++i) {
    if (!parsed.tensors[i].changed()) continue;
    streams += 2;
    GW_RETURN_IF_ERROR(FindStreams(*file.bytes_, header,
                                   parsed.table_digests[i], parsed.tensors[i]));
  }
  if (streams != header.entries.size()) {
    return DeltaInvalid("header", std::to_string(header.entries.size()),
                        std::to_string(streams),
                        "has entries that belong to no tensor");
  }
  GW_RETURN_IF_ERROR(CheckId(parsed));
  file.info_ = std::move(parsed.info);
  file.tensors_ = std::move(parsed.tensors);
  return file;
}

absl::StatusOr<DeltaFile> DeltaFile::Open(const std::string& path) {
  const std::string name = std::filesystem::path(path).filename();
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    if (fd >= 0) close(fd);
    return ErrorBuilder(absl::StatusCode::kNotFound, "MODEL_FILE_NOT_FOUND")
        .With("field", name)
        .Message(name + " cannot be read");
  }
  std::string bytes(static_cast<size_t>(info.st_size), '\0');
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got = read(fd, bytes.data() + done, bytes.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    done += static_cast<size_t>(got);
  }
  close(fd);
  if (done < bytes.size()) return DeltaCorrupt(name, "cannot be read in full");
  return Parse(std::move(bytes));
}

absl::StatusOr<std::vector<ChunkRow>> DeltaFile::ReadRows(
    const DeltaTensor& tensor) {
  const int64_t num_elements = tensor.info.num_elements();
  const int64_t bytes = NumChunks(num_elements) * kChunkRowBytes;
  StreamUnpacker unpacker;
  ByteBuffer buffer;
  const uint8_t* planes =
      unpacker.Unpack(reinterpret_cast<const uint8_t*>(tensor.table.data()),
                      static_cast<int64_t>(tensor.table.size()), bytes, buffer);
  std::vector<ChunkRow> rows;
  if (planes == nullptr || !ReadChunkTable(planes, num_elements, rows)) {
    return DeltaInvalid(TableEntry(tensor.info.name), "", "",
                        "is not a table of its chunks");
  }
  GW_RETURN_IF_ERROR(CheckRows(tensor, rows));
  return rows;
}

}  // namespace gradwire
