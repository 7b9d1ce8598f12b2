// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/strict_json.h"

namespace gradwire {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxHeaderBytes = 100'000'000;
constexpr int kMaxDepth = 8;
constexpr int64_t kMaxElements = int64_t{1} << 48;

absl::Status Invalid(const std::string& field, const std::string& value,
                     const std::string& what) {
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "SAFETENSORS_INVALID")
      .With("field", field)
      .With("value", value)
      .Message("safetensors file: " + field + " " + what +
               "; the file is damaged, fetch it again");
}

absl::Status NotFound(const std::string& name) {
  return ErrorBuilder(absl::StatusCode::kNotFound, "MODEL_FILE_NOT_FOUND")
      .With("field", name)
      .Message(name +
               " cannot be read; base_model must be a Hugging Face directory "
               "on the server's machine");
}

std::string FileName(const std::string& path) {
  return path.substr(path.find_last_of('/') + 1);
}

// Reads exactly `bytes` at `offset`; false at end of file or on an error.
bool ReadAt(int fd, int64_t offset, int64_t bytes, void* out) {
  char* at = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = pread(fd, at, static_cast<size_t>(bytes), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got;
    offset += got;
    bytes -= got;
  }
  return true;
}

// Not -0, which others take for a float.
bool IsCount(const Json& value) {
  return value.is_number_unsigned() &&
         value.get<uint64_t>() <= static_cast<uint64_t>(kMaxElements) * 8;
}

absl::StatusOr<SafetensorsEntry> ParseEntry(const std::string& name,
                                            const Json& value,
                                            int64_t data_bytes) {
  if (!value.is_object() || !value.contains("dtype") ||
      !value.contains("shape") || !value.contains("data_offsets") ||
      !value["dtype"].is_string() || !value["shape"].is_array() ||
      !value["data_offsets"].is_array() || value["data_offsets"].size() != 2) {
    return Invalid(name, "", "lacks a dtype, shape or data_offsets");
  }
  SafetensorsEntry entry;
  entry.dtype = value["dtype"].get<std::string>();
  const int64_t element = SafetensorsElementBytes(entry.dtype);
  if (element == 0) {
    return Invalid(name, entry.dtype.substr(0, 40), "has an unknown dtype");
  }
  if (value["shape"].size() > 8) {
    return Invalid(name, "", "has more than 8 dimensions");
  }
  __int128 elements = 1;
  for (const Json& dim : value["shape"]) {
    if (!IsCount(dim)) return Invalid(name, "", "has a bad dimension");
    entry.shape.push_back(dim.get<int64_t>());
    elements *= entry.shape.back();
    if (elements > kMaxElements) {
      return Invalid(name, "", "has a shape that overflows");
    }
  }
  const Json& offsets = value["data_offsets"];
  if (!IsCount(offsets[0]) || !IsCount(offsets[1])) {
    return Invalid(name, "", "has negative or huge offsets");
  }
  const int64_t begin = offsets[0].get<int64_t>();
  const int64_t end = offsets[1].get<int64_t>();
  if (begin > end || end > data_bytes) {
    return Invalid(name, std::to_string(end), "lies outside the file");
  }
  if (end - begin != static_cast<int64_t>(elements) * element) {
    return Invalid(name, std::to_string(end - begin),
                   "has another number of bytes than its shape");
  }
  entry.offset = begin;
  entry.bytes = end - begin;
  return entry;
}

// Bytes of the header by the first eight of a file of `size`.
absl::StatusOr<int64_t> HeaderBytes(const unsigned char* prefix, int64_t size,
                                    int64_t limit) {
  uint64_t bytes = 0;
  for (int i = 7; i >= 0; --i) bytes = bytes << 8 | prefix[i];
  if (bytes > static_cast<uint64_t>(limit) ||
      bytes > static_cast<uint64_t>(size - 8)) {
    return Invalid("header", std::to_string(bytes),
                   "is longer than the file or than " +
                       std::to_string(limit / 1'000'000) + " MB");
  }
  return static_cast<int64_t>(bytes);
}

// Of a file of `size` bytes.
absl::StatusOr<SafetensorsHeader> ReadHeader(const std::string& text,
                                             int64_t size) {
  Json json;
  const std::string wrong = ParseStrictJson(text, kMaxDepth, &json);
  if (!wrong.empty()) return Invalid("header", "", wrong);
  SafetensorsHeader header;
  const int64_t data_begin = 8 + static_cast<int64_t>(text.size());
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) {
        return Invalid(name, "", "is not an object of texts");
      }
      for (const auto& [key, entry] : value.items()) {
        if (!entry.is_string()) {
          return Invalid(name, "", "is not an object of texts");
        }
        header.metadata[key] = entry.get<std::string>();
      }
      continue;
    }
    GW_ASSIGN_OR_RETURN(SafetensorsEntry entry,
                        ParseEntry(name, value, size - data_begin));
    ranges.emplace_back(entry.offset, entry.offset + entry.bytes);
    entry.offset += data_begin;
    header.entries.emplace(name, std::move(entry));
  }
  // The format has no gaps and no overlaps.
  std::sort(ranges.begin(), ranges.end());
  int64_t end = 0;
  for (const auto& [begin, next] : ranges) {
    if (begin != end) {
      return Invalid("data_offsets", std::to_string(begin),
                     begin < end ? "overlap" : "leave a gap");
    }
    end = next;
  }
  if (end != size - data_begin) {
    return Invalid("data_offsets", std::to_string(end),
                   "do not cover the file");
  }
  return header;
}

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  if (exponent == 31) {
    return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) |
                              (mantissa << 13));
}

}  // namespace

int64_t SafetensorsElementBytes(const std::string& dtype) {
  if (dtype == "F64" || dtype == "I64" || dtype == "U64") return 8;
  if (dtype == "F32" || dtype == "I32" || dtype == "U32") return 4;
  if (dtype == "F16" || dtype == "BF16" || dtype == "I16" || dtype == "U16") {
    return 2;
  }
  if (dtype == "I8" || dtype == "U8" || dtype == "BOOL" || dtype == "F8_E4M3" ||
      dtype == "F8_E5M2") {
    return 1;
  }
  return 0;
}

absl::StatusOr<SafetensorsHeader> ParseSafetensors(std::string_view file,
                                                   int64_t limit) {
  const int64_t size = static_cast<int64_t>(file.size());
  if (size < 8) {
    return Invalid("file", std::to_string(size), "is shorter than 8 bytes");
  }
  GW_ASSIGN_OR_RETURN(
      const int64_t bytes,
      HeaderBytes(reinterpret_cast<const unsigned char*>(file.data()), size,
                  limit));
  return ReadHeader(std::string(file.substr(8, static_cast<size_t>(bytes))),
                    size);
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(
    const std::string& path) {
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile());
  file->path_ = path;
  file->fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info;
  if (file->fd_ < 0 || fstat(file->fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
    return NotFound(FileName(path));
  }
  const int64_t size = info.st_size;
  unsigned char prefix[8];
  if (size < 8 || !ReadAt(file->fd_, 0, 8, prefix)) {
    return Invalid("file", std::to_string(size), "is shorter than 8 bytes");
  }
  GW_ASSIGN_OR_RETURN(const int64_t header_bytes,
                      HeaderBytes(prefix, size, kMaxHeaderBytes));
  std::string text(static_cast<size_t>(header_bytes), '\0');
  if (!ReadAt(file->fd_, 8, header_bytes, text.data())) {
    return Invalid("header", "", "cannot be read");
  }
  GW_ASSIGN_OR_RETURN(SafetensorsHeader header, ReadHeader(text, size));
  file->entries_ = std::move(header.entries);
  return file;
}

SafetensorsFile::~SafetensorsFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status SafetensorsFile::ReadFloats(const std::string& name, int64_t begin,
                                         int64_t count, float* out) const {
  auto found = entries_.find(name);
  if (found == entries_.end()) {
    return absl::NotFoundError("no tensor " + name);
  }
  const SafetensorsEntry& entry = found->second;
  const int64_t element = SafetensorsElementBytes(entry.dtype);
  if (entry.dtype != "F32" && entry.dtype != "F16" && entry.dtype != "BF16") {
    return ErrorBuilder(absl::StatusCode::kUnimplemented, "MODEL_UNSUPPORTED")
        .With("field", name)
        .With("value", entry.dtype)
        .Message("tensor " + name + " has dtype " + entry.dtype +
                 "; gradwire reads F32, F16 and BF16");
  }
  if (begin < 0 || count < 0 || begin > entry.bytes / element ||
      count > entry.bytes / element - begin) {
    return absl::OutOfRangeError("elements outside tensor " + name);
  }
  const absl::Status lost =
      ErrorBuilder(absl::StatusCode::kDataLoss, "SAFETENSORS_INVALID")
          .Server()
          .With("field", name)
          .Message("tensor " + name + " can no longer be read in full");
  const int64_t offset = entry.offset + begin * element;
  if (entry.dtype == "F32") {
    return ReadAt(fd_, offset, count * element, out) ? absl::OkStatus() : lost;
  }
  constexpr int64_t kBlock = 1 << 18;
  std::vector<uint16_t> block(std::min(count, kBlock));
  const bool half = entry.dtype == "F16";
  for (int64_t done = 0; done < count; done += kBlock) {
    const int64_t n = std::min(kBlock, count - done);
    if (!ReadAt(fd_, offset + done * 2, n * 2, block.data())) return lost;
    for (int64_t i = 0; i < n; ++i) {
      out[done + i] =
          half ? HalfToFloat(block[i])
               : std::bit_cast<float>(static_cast<uint32_t>(block[i]) << 16);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<SafetensorsIndex> ParseSafetensorsIndex(
    const std::string& text) {
  Json json;
  const std::string wrong = ParseStrictJson(text, kMaxDepth, &json);
  if (!wrong.empty()) return Invalid("header", "", wrong);
  SafetensorsIndex index;
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object()) {
    return Invalid("weight_map", "", "is missing");
  }
  for (const auto& [tensor, file] : map->items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    if (name.empty() || name[0] == '.' || name.find('/') != std::string::npos ||
        name.find('\0') != std::string::npos) {
      return Invalid("weight_map", tensor, "does not name a shard");
    }
    index.weight_map[tensor] = name;
  }
  const auto metadata = json.find("metadata");
  if (metadata == json.end() || !metadata->is_object()) return index;
  const auto size = metadata->find("total_size");
  if (size != metadata->end() && IsCount(*size)) {
    index.total_size = size->get<int64_t>();
  }
  return index;
}

absl::StatusOr<std::unique_ptr<HfWeights>> HfWeights::Open(
    const std::string& directory) {
  auto weights = std::make_unique<HfWeights>();
  std::set<std::string> names;
  SafetensorsIndex index;
  const std::string index_name = "model.safetensors.index.json";
  const int fd =
      open((directory + "/" + index_name).c_str(), O_RDONLY | O_CLOEXEC);
  if (fd >= 0) {
    struct stat info;
    std::string text;
    const bool small = fstat(fd, &info) == 0 && S_ISREG(info.st_mode) &&
                       info.st_size <= kMaxSafetensorsIndexBytes;
    if (small) text.resize(info.st_size);
    const bool read = small && ReadAt(fd, 0, info.st_size, text.data());
    close(fd);
    if (!read) return Invalid(index_name, "", "cannot be read");
    GW_ASSIGN_OR_RETURN(index, ParseSafetensorsIndex(text));
    for (const auto& [tensor, name] : index.weight_map) names.insert(name);
  } else {
    names.insert("model.safetensors");
  }
  const std::map<std::string, std::string>& wanted = index.weight_map;
  std::vector<std::string> order(names.begin(), names.end());
  for (const std::string& name : order) {
    GW_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file,
                        SafetensorsFile::Open(directory + "/" + name));
    for (const auto& [tensor, entry] : file->entries()) {
      auto place = wanted.find(tensor);
      if (!wanted.empty() && (place == wanted.end() || place->second != name)) {
        return Invalid("weight_map", tensor, "disagrees with the shards");
      }
      weights->file_of_[tensor] = weights->files_.size();
    }
    weights->files_.push_back(std::move(file));
  }
  for (const auto& [tensor, name] : wanted) {
    if (!weights->file_of_.count(tensor)) {
      return Invalid("weight_map", tensor, "names a tensor that is not there");
    }
  }
  return weights;
}

const SafetensorsEntry* HfWeights::Find(const std::string& name) const {
  auto found = file_of_.find(name);
  if (found == file_of_.end()) return nullptr;
  return &files_[found->second]->entries().at(name);
}

std::vector<std::string> HfWeights::Names() const {
  std::vector<std::string> names;
  for (const auto& [name, file] : file_of_) names.push_back(name);
  return names;
}

absl::Status HfWeights::ReadFloats(const std::string& name, int64_t begin,
                                   int64_t count, float* out) const {
  auto found = file_of_.find(name);
  if (found == file_of_.end()) {
    return absl::NotFoundError("no tensor " + name);
  }
  return files_[found->second]->ReadFloats(name, begin, count, out);
}

}  // namespace gradwire
