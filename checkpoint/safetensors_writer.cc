// SPDX-License-Identifier: Apache-2.0
// The writing half of checkpoint/safetensors.h.
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/safetensors.h"
#include "checkpoint/sealed_text.h"

namespace gradwire {
namespace {

// The disk begins to write at once, so that the sync finds little left to do.
constexpr int64_t kWriteBackBytes = int64_t{4} << 20;

}  // namespace

struct SafetensorsWriter::Impl {
  std::unique_ptr<File> file;
  absl::Status status;
  StreamDigest digest;
  int64_t expected = 0;
  int64_t written = 0;
  int64_t write_back_begin = 0;
};

SafetensorsWriter::SafetensorsWriter(FileSystem& files, const std::string& path,
                                     const std::vector<Row>& rows)
    : impl_(std::make_unique<Impl>()) {
  auto file = files.Create(path, 0644);
  impl_->status = file.status();
  if (!file.ok()) return;
  impl_->file = *std::move(file);
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};
  int64_t offset = 0;
  for (const Row& row : rows) {
    int64_t bytes = SafetensorsElementBytes(row.dtype);
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
  prefix += text;
  Append(prefix.data(), static_cast<int64_t>(prefix.size()));
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::Append(const void* data, int64_t bytes) {
  Impl& impl = *impl_;
  if (!impl.status.ok()) return;
  const std::string_view part(static_cast<const char*>(data),
                              static_cast<size_t>(bytes));
  impl.digest.Add(part);
  impl.status = impl.file->WriteAt(impl.written, part);
  impl.written += bytes;
  if (impl.written - impl.write_back_begin < kWriteBackBytes) return;
  impl.file->StartWriteBack(impl.write_back_begin,
                            impl.written - impl.write_back_begin);
  impl.write_back_begin = impl.written;
}

absl::Status SafetensorsWriter::Finish() {
  Impl& impl = *impl_;
  if (impl.status.ok() && impl.written != impl.expected) {
    impl.status = absl::InternalError("the tensors do not fill their table");
  }
  if (impl.status.ok()) impl.status = impl.file->Sync();
  impl.file.reset();
  bytes_written_ = impl.written;
  digest_ = impl.digest.Take();
  return impl.status;
}

}  // namespace gradwire
