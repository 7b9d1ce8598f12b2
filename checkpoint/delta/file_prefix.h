// SPDX-License-Identifier: Apache-2.0
// What stands before the data of a safetensors file.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace gradwire {

struct FileEntry {
  std::string name;
  std::string dtype;
  int64_t elements = 0;
  int64_t bytes = 0;
};

// Length and header of a file of one-dimensional `entries`, whose data follows
// in this order. The result has room for the data, too.
std::string FilePrefix(
    const std::vector<std::pair<std::string, std::string>>& metadata,
    const std::vector<FileEntry>& entries);

}  // namespace gradwire
