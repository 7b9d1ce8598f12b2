// SPDX-License-Identifier: Apache-2.0
// Encoded tensors become a file.
#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "checkpoint/delta/delta_header.h"
#include "checkpoint/delta/encode.h"
#include "checkpoint/delta/file_prefix.h"

namespace gradwire {
namespace {

constexpr size_t kMaxName = 1024;

absl::Status CheckNames(const std::vector<EncodedTensor>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string& name = tensors[i].info.name;
    const bool plain = std::all_of(name.begin(), name.end(),
                                   [](char c) { return c >= ' ' && c <= '~'; });
    if (name.empty() || name.size() > kMaxName || !plain) {
      return DeltaInvalid("name", std::to_string(name.size()),
                          std::to_string(kMaxName),
                          "of a tensor is empty, too long or not ASCII");
    }
    if (i > 0 && tensors[i - 1].info.name == name) {
      return DeltaInvalid(name, "", "", "comes twice");
    }
  }
  return absl::OkStatus();
}

absl::Status CheckOptions(const DeltaOptions& options) {
  for (const auto& [field, id] : {std::pair("prev_id", &options.prev_id),
                                  std::pair("base_id", &options.base_id)}) {
    if (!Hash128::FromHex(*id).has_value()) {
      return DeltaInvalid(field, *id, "", "is not a weight id");
    }
  }
  if (options.step < 0 || options.chain_length < 1) {
    return DeltaInvalid("step", std::to_string(options.step), "0",
                        "or the chain's length is below its least");
  }
  return absl::OkStatus();
}

std::string PackTable(const std::vector<ChunkRow>& rows, StreamPacker& packer) {
  ByteBuffer planes, packed;
  WriteChunkTable(rows, planes);
  packer.Pack(planes.data(), planes.size(), StreamPacker::Content::kRuns,
              packed);
  return std::string(reinterpret_cast<const char*>(packed.data()),
                     static_cast<size_t>(packed.size()));
}

}  // namespace

absl::StatusOr<std::string> AssembleDelta(std::vector<EncodedTensor> tensors,
                                          const DeltaOptions& options) {
  std::sort(tensors.begin(), tensors.end(),
            [](const EncodedTensor& a, const EncodedTensor& b) {
              return a.info.name < b.info.name;
            });
  GW_RETURN_IF_ERROR(CheckNames(tensors));
  GW_RETURN_IF_ERROR(CheckOptions(options));
  StreamPacker packer;
  DeltaHeader header;
  std::vector<std::string> tables;
  std::vector<TensorInfo> infos;
  std::vector<Hash128> hashes;
  for (const EncodedTensor& tensor : tensors) {
    std::vector<ChunkRow> rows;
    std::vector<Hash128> chunks;
    for (const EncodedGroup& part : tensor.groups) {
      rows.insert(rows.end(), part.rows.begin(), part.rows.end());
      chunks.insert(chunks.end(), part.hashes.begin(), part.hashes.end());
    }
    GW_CHECK(static_cast<int64_t>(rows.size()) ==
                 NumChunks(tensor.info.num_elements()) ||
             (rows.empty() && tensor.hash.has_value()));
    DeltaTensor record;
    record.info = tensor.info;
    record.hash = tensor.hash.value_or(HashOfChunks(chunks));
    record.fresh = tensor.fresh;
    tables.emplace_back();
    if (std::any_of(rows.begin(), rows.end(), [](const ChunkRow& row) {
          return row.method != ChunkMethod::kUnchanged;
        })) {
      for (const EncodedGroup& part : tensor.groups) {
        record.groups.push_back(part.group);
      }
      tables.back() = PackTable(rows, packer);
    }
    header.table_digests.push_back(HashBytes64(
        tables.back().data(), static_cast<int64_t>(tables.back().size())));
    infos.push_back(record.info);
    hashes.push_back(record.hash);
    header.tensors.push_back(std::move(record));
  }
  header.info = {options.model,   options.step,    WeightId(infos, hashes),
                 options.prev_id, options.base_id, options.chain_length};
  std::vector<FileEntry> entries;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!header.tensors[i].changed()) continue;
    const std::string& name = tensors[i].info.name;
    const int64_t table = static_cast<int64_t>(tables[i].size());
    int64_t payload = 0;
    for (const EncodedGroup& part : tensors[i].groups) {
      payload += static_cast<int64_t>(part.payload.size());
    }
    entries.push_back({TableEntry(name), "U8", table, table});
    entries.push_back({PayloadEntry(name), "U8", payload, payload});
  }
  const std::string json = DeltaHeaderToJson(header);
  const Hash128 digest =
      HashBytes128(json.data(), static_cast<int64_t>(json.size()));
  std::string file = FilePrefix(
      {{"format", kDeltaFormat}, {"delta", json}, {"digest", digest.Hex()}},
      entries);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!header.tensors[i].changed()) continue;
    file += tables[i];
    for (const EncodedGroup& part : tensors[i].groups) file += part.payload;
  }
  return file;
}

}  // namespace gradwire
