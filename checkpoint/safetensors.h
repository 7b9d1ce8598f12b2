// SPDX-License-Identifier: Apache-2.0
// Safetensors files and Hugging Face directories of them, read by range and
// checked before anything of a declared size is allocated.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"

namespace gradwire {

struct SafetensorsEntry {
  std::string dtype;  // "F32", "F16", "BF16", "I64", ...
  std::vector<int64_t> shape;
  int64_t offset = 0;  // of the first byte, from the start of the file
  int64_t bytes = 0;
};

// What stands before the data of a file.
struct SafetensorsHeader {
  std::map<std::string, SafetensorsEntry> entries;
  // The members of __metadata__.
  std::map<std::string, std::string> metadata;
};

// The header of a file that lies in memory as a whole. The header may be of at
// most `limit` bytes. Errors: as SafetensorsFile::Open.
absl::StatusOr<SafetensorsHeader> ParseSafetensors(std::string_view file,
                                                   int64_t limit);

// One open file. Thread rule: const methods from any thread.
class SafetensorsFile {
 public:
  // Errors: NOT_FOUND MODEL_FILE_NOT_FOUND; INVALID_ARGUMENT
  // SAFETENSORS_INVALID naming the field: header longer than 100 MB or than the
  // file, not JSON, nested too deep, duplicate name, metadata other than texts,
  // unknown dtype, negative or overflowing shape, range that is negative,
  // overlapping, with gaps, outside the file or not the product of the shape.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(
      const std::string& path);
  ~SafetensorsFile();

  const std::map<std::string, SafetensorsEntry>& entries() const {
    return entries_;
  }
  // Reads elements [begin, begin + count) of a tensor of dtype F32, F16 or
  // BF16, widened to float. Errors: NOT_FOUND, OUT_OF_RANGE, UNIMPLEMENTED
  // (dtype), DATA_LOSS (the file has shrunk).
  absl::Status ReadFloats(const std::string& name, int64_t begin, int64_t count,
                          float* out) const;

 private:
  SafetensorsFile() = default;
  int fd_ = -1;
  std::string path_;
  std::map<std::string, SafetensorsEntry> entries_;
};

// Most tensor data of a file that save_pretrained of transformers writes,
// unless it is told otherwise.
inline constexpr int64_t kShardBytes = 5'000'000'000;

// model.safetensors.index.json of a directory whose weights are in shards.
struct SafetensorsIndex {
  // Of each tensor, the shard's name: one path segment.
  std::map<std::string, std::string> weight_map;
  // Bytes of all tensors, as its metadata says; -1 if it does not.
  int64_t total_size = -1;

  bool operator==(const SafetensorsIndex&) const = default;
};

// Longer ones are refused.
inline constexpr int64_t kMaxSafetensorsIndexBytes = 100'000'000;

// Errors: INVALID_ARGUMENT SAFETENSORS_INVALID naming the field.
absl::StatusOr<SafetensorsIndex> ParseSafetensorsIndex(const std::string& text);

// Of "F32" 4; 0 of a dtype that is not known.
int64_t SafetensorsElementBytes(const std::string& dtype);

// A directory with model.safetensors, or model.safetensors.index.json and its
// shards.
class HfWeights {
 public:
  static absl::StatusOr<std::unique_ptr<HfWeights>> Open(
      const std::string& directory);

  // Null if there is no such tensor.
  const SafetensorsEntry* Find(const std::string& name) const;
  std::vector<std::string> Names() const;
  absl::Status ReadFloats(const std::string& name, int64_t begin, int64_t count,
                          float* out) const;

 private:
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, size_t> file_of_;
};

// Writes one safetensors file tensor by tensor: the whole table first, then
// Append each tensor's bytes in table order. Errors, the file system's, stick
// and surface in Finish(), which syncs the file.
class SafetensorsWriter {
 public:
  struct Row {
    std::string name;
    std::string dtype;  // one that is known
    std::vector<int64_t> shape;
  };
  SafetensorsWriter(FileSystem& files, const std::string& path,
                    const std::vector<Row>& rows);
  ~SafetensorsWriter();
  void Append(const void* data, int64_t bytes);
  absl::Status Finish();
  // XXH3-128 of all bytes written, hexadecimal; after Finish().
  const std::string& digest() const { return digest_; }
  int64_t bytes_written() const { return bytes_written_; }

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  std::string digest_;
  int64_t bytes_written_ = 0;
};

}  // namespace gradwire
