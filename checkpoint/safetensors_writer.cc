// SPDX-License-Identifier: Apache-2.0
// The writing half of checkpoint/safetensors.h.
#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/error.h"
#include "checkpoint/safetensors.h"

namespace gradwire {
namespace {

absl::Status StorageError(int error, const std::string& what) {
  if (error == ENOSPC || error == EDQUOT) {
    return ErrorBuilder(absl::StatusCode::kResourceExhausted, "STORAGE_FULL")
        .Server()
        .Message("no space is left to " + what +
                 "; free space on the server's state volume and save again");
  }
  return ErrorBuilder(absl::StatusCode::kInternal, "STORAGE_ERROR")
      .Server()
      .With("errno", error)
      .Message("the server's disk failed to " + what + " (errno " +
               std::to_string(error) + ")");
}

}  // namespace

struct SafetensorsWriter::Impl {
  int fd = -1;
  absl::Status status;
  XXH3_state_t* hash = nullptr;
  int64_t expected = 0;
  int64_t written = 0;
};

SafetensorsWriter::SafetensorsWriter(const std::string& path,
                                     const std::vector<Row>& rows)
    : impl_(std::make_unique<Impl>()) {
  impl_->hash = XXH3_createState();
  XXH3_128bits_reset(impl_->hash);
  impl_->fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (impl_->fd < 0) {
    impl_->status = StorageError(errno, "create a weight file");
    return;
  }
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};
  int64_t offset = 0;
  for (const Row& row : rows) {
    int64_t bytes = row.dtype == "F32" ? 4 : 2;
    for (int64_t dim : row.shape) bytes *= dim;
    header[row.name] = {{"dtype", row.dtype},
                        {"shape", row.shape},
                        {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string prefix(8, '\0');
  for (int i = 0; i < 8; ++i) {
    prefix[i] = static_cast<char>(text.size() >> (8 * i));
  }
  impl_->expected = offset + 8 + static_cast<int64_t>(text.size());
  Append(prefix.data(), 8);
  Append(text.data(), static_cast<int64_t>(text.size()));
}

SafetensorsWriter::~SafetensorsWriter() {
  if (impl_->fd >= 0) close(impl_->fd);
  XXH3_freeState(impl_->hash);
}

void SafetensorsWriter::Append(const void* data, int64_t bytes) {
  if (!impl_->status.ok()) return;
  XXH3_128bits_update(impl_->hash, data, static_cast<size_t>(bytes));
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t put = write(impl_->fd, at, static_cast<size_t>(bytes));
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) {
      impl_->status = StorageError(put < 0 ? errno : EIO, "write weights");
      return;
    }
    at += put;
    bytes -= put;
    impl_->written += put;
  }
}

absl::Status SafetensorsWriter::Finish() {
  Impl& impl = *impl_;
  if (impl.status.ok() && impl.written != impl.expected) {
    impl.status = absl::InternalError("the tensors do not fill their table");
  }
  if (impl.status.ok() && fsync(impl.fd) != 0) {
    impl.status = StorageError(errno, "sync weights");
  }
  if (impl.fd >= 0 && close(impl.fd) != 0 && impl.status.ok()) {
    impl.status = StorageError(errno, "close a weight file");
  }
  impl.fd = -1;
  bytes_written_ = impl.written;
  const XXH128_hash_t hash = XXH3_128bits_digest(impl.hash);
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  digest_.clear();
  for (unsigned char byte : canonical.digest) {
    constexpr char kHex[] = "0123456789abcdef";
    digest_.push_back(kHex[byte >> 4]);
    digest_.push_back(kHex[byte & 15]);
  }
  return impl.status;
}

}  // namespace gradwire
