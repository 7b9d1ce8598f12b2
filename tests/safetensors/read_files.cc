// SPDX-License-Identifier: Apache-2.0
// Reads the safetensors files whose paths are the lines of standard input, and
// prints a line of JSON for each, for test_accept_set.py: its tensors, or the
// reason of the error.
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/error.h"
#include "checkpoint/safetensors.h"

namespace gradwire {
namespace {

using Json = nlohmann::json;

// The elements as float32, in hexadecimal.
std::string Floats(const SafetensorsFile& file, const std::string& name,
                   int64_t count) {
  std::vector<float> floats(static_cast<size_t>(count));
  GW_CHECK(file.ReadFloats(name, 0, count, floats.data()).ok());
  std::string hex;
  const auto* bytes = reinterpret_cast<const unsigned char*>(floats.data());
  for (int64_t i = 0; i < 4 * count; ++i) {
    char digits[3];
    std::snprintf(digits, sizeof(digits), "%02x", bytes[i]);
    hex += digits;
  }
  return hex;
}

Json Read(const std::string& path) {
  const auto file = SafetensorsFile::Open(path);
  if (!file.ok()) {
    const auto detail = GetErrorDetail(file.status());
    return {{"error", detail.has_value() ? detail->reason : "none"}};
  }
  Json tensors = Json::object();
  for (const auto& [name, entry] : (*file)->entries()) {
    Json& tensor = tensors[name];
    tensor = {{"dtype", entry.dtype},
              {"shape", entry.shape},
              {"offset", entry.offset},
              {"bytes", entry.bytes}};
    if (entry.dtype == "F32") {
      tensor["floats"] = Floats(**file, name, entry.bytes / 4);
    } else if (entry.dtype == "F16" || entry.dtype == "BF16") {
      tensor["floats"] = Floats(**file, name, entry.bytes / 2);
    }
  }
  return {{"tensors", tensors}};
}

}  // namespace
}  // namespace gradwire

int main() {
  std::string path;
  while (std::getline(std::cin, path)) {
    std::cout << gradwire::Read(path).dump() << '\n';
  }
  return 0;
}
