// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/file_prefix.h"

#include <nlohmann/json.hpp>

namespace gradwire {

std::string FilePrefix(
    const std::vector<std::pair<std::string, std::string>>& metadata,
    const std::vector<FileEntry>& entries) {
  using Json = nlohmann::ordered_json;
  Json header;
  for (const auto& [key, value] : metadata) {
    header["__metadata__"][key] = value;
  }
  int64_t offset = 0;
  for (const FileEntry& entry : entries) {
    header[entry.name] = {{"dtype", entry.dtype},
                          {"shape", {entry.elements}},
                          {"data_offsets", {offset, offset + entry.bytes}}};
    offset += entry.bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string prefix;
  for (int i = 0; i < 8; ++i) {
    prefix.push_back(static_cast<char>(text.size() >> (8 * i)));
  }
  prefix.reserve(prefix.size() + text.size() + static_cast<size_t>(offset));
  return prefix += text;
}

}  // namespace gradwire
