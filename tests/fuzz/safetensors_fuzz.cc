// SPDX-License-Identifier: Apache-2.0
// A safetensors file, read from memory and from a file.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/check.h"
#include "checkpoint/safetensors.h"
#include "tests/fuzz/fuzz.h"

namespace gradwire {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kHeaderLimit = 1 << 20;

std::string FileOf(const std::string& header, const std::string& data) {
  std::string file;
  for (int shift = 0; shift < 64; shift += 8) {
    file.push_back(static_cast<char>(header.size() >> shift));
  }
  return file + header + data;
}

int64_t ElementBytes(const std::string& dtype) {
  static const std::map<std::string, int64_t> bytes = {
      {"F64", 8}, {"I64", 8}, {"U64", 8},  {"F32", 4},     {"I32", 4},
      {"U32", 4}, {"F16", 2}, {"BF16", 2}, {"I16", 2},     {"U16", 2},
      {"I8", 1},  {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  const auto found = bytes.find(dtype);
  return found == bytes.end() ? 0 : found->second;
}

// Ranges that follow each other and have the sizes of the shapes, where these
// are small enough for a file.
void Repack(Json& header, std::string& data) {
  int64_t end = 0;
  for (auto& [name, entry] : header.items()) {
    if (name == "__metadata__" || !entry.is_object()) continue;
    const Json dtype = entry.value("dtype", Json());
    const Json shape = entry.value("shape", Json());
    if (!dtype.is_string() || !shape.is_array()) continue;
    int64_t bytes = ElementBytes(dtype.get<std::string>());
    for (const Json& dim : shape) {
      const int64_t count = dim.is_number_integer() ? dim.get<int64_t>() : -1;
      if (count < 0 || count > 2000) return;
      bytes *= count;
      if (bytes > 2000) return;
    }
    entry["data_offsets"] = {end, end + bytes};
    end += bytes;
  }
  data.resize(static_cast<size_t>(end), 'd');
}

// Another file that says the same.
std::string Encode(const SafetensorsHeader& header, const std::string& file,
                   int64_t data_begin) {
  Json json = Json::object();
  if (!header.metadata.empty()) json["__metadata__"] = header.metadata;
  for (const auto& [name, entry] : header.entries) {
    const int64_t begin = entry.offset - data_begin;
    json[name] = {{"dtype", entry.dtype},
                  {"shape", entry.shape},
                  {"data_offsets", {begin, begin + entry.bytes}}};
  }
  return FileOf(json.dump(), file.substr(static_cast<size_t>(data_begin)));
}

bool SameEntries(const SafetensorsHeader& a, const std::string& file_a,
                 const SafetensorsHeader& b, const std::string& file_b) {
  return std::equal(a.entries.begin(), a.entries.end(), b.entries.begin(),
                    b.entries.end(), [&](const auto& x, const auto& y) {
                      const SafetensorsEntry &s = x.second, &t = y.second;
                      return x.first == y.first && s.dtype == t.dtype &&
                             s.shape == t.shape && s.bytes == t.bytes &&
                             file_a.compare(static_cast<size_t>(s.offset),
                                            static_cast<size_t>(s.bytes),
                                            file_b,
                                            static_cast<size_t>(t.offset),
                                            static_cast<size_t>(t.bytes)) == 0;
                    });
}

// A file in memory, whose content is replaced for each input.
class MemoryFile {
 public:
  MemoryFile() : fd_(memfd_create("fuzz", MFD_CLOEXEC)) { GW_CHECK(fd_ >= 0); }
  const std::string& path() const { return path_; }
  void Set(const std::string& content) const {
    GW_CHECK(ftruncate(fd_, 0) == 0);
    GW_CHECK(pwrite(fd_, content.data(), content.size(), 0) ==
             std::ssize(content));
  }

 private:
  const int fd_;
  const std::string path_ = "/proc/self/fd/" + std::to_string(fd_);
};

void CheckFloats(const SafetensorsFile& open, const std::string& name,
                 const SafetensorsEntry& entry, const std::string& file) {
  const int64_t element = ElementBytes(entry.dtype);
  GW_CHECK(element > 0);
  const int64_t count = entry.bytes / element;
  std::vector<float> floats(static_cast<size_t>(count));
  const absl::Status read = open.ReadFloats(name, 0, count, floats.data());
  const bool known =
      entry.dtype == "F32" || entry.dtype == "F16" || entry.dtype == "BF16";
  GW_CHECK(read.ok() == known);
  GW_CHECK(!open.ReadFloats(name, 1, count, floats.data()).ok());
  if (entry.dtype == "F32") {
    GW_CHECK(count == 0 || memcmp(floats.data(), file.data() + entry.offset,
                                  static_cast<size_t>(entry.bytes)) == 0);
  }
  if (entry.dtype != "F16" && entry.dtype != "BF16") return;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    memcpy(&bits, file.data() + entry.offset + 2 * i, sizeof(bits));
    float expected;
    if (entry.dtype == "F16") {
      // As IEEE 754 defines it.
      const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
      expected =
          exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
          : exponent < 31
              ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
          : mantissa == 0 ? INFINITY
                          : NAN;
      if (bits >> 15) expected = -expected;
    } else {
      const uint32_t wide = uint32_t{bits} << 16;
      memcpy(&expected, &wide, sizeof(expected));
    }
    const float got = floats[static_cast<size_t>(i)];
    GW_CHECK(got == expected || (std::isnan(got) && std::isnan(expected)));
  }
}

}  // namespace

std::string FuzzSeed(Dice& dice) {
  Json header = {{"__metadata__", {{"format", "pt"}}},
                 {"w", {{"dtype", "F32"}, {"shape", {2, 3}}}},
                 {"b", {{"dtype", "BF16"}, {"shape", {5}}}},
                 {"h", {{"dtype", "F16"}, {"shape", {2, 2, 1}}}},
                 {"none", {{"dtype", "I64"}, {"shape", {0, 4}}}},
                 {"one", {{"dtype", "U8"}, {"shape", Json::array()}}}};
  while (header.size() > 1 && dice.OneIn(2)) header.erase(header.begin());
  std::string data;
  Repack(header, data);
  for (char& c : data) c = static_cast<char>(dice.Below(256));
  return FileOf(header.dump(), data);
}

void FuzzMutate(std::string& input, Dice& dice) {
  uint64_t bytes = 0;
  if (input.size() >= 8) memcpy(&bytes, input.data(), 8);
  if (input.size() < 8 || bytes > input.size() - 8 || dice.OneIn(50)) {
    MutatePart(input, dice);
    return;
  }
  std::string header = input.substr(8, bytes);
  std::string data = input.substr(8 + bytes);
  for (int64_t i = dice.Changes(); i > 0; --i) {
    if (dice.OneIn(10)) {
      MutatePart(data, dice);
    } else {
      MutateJson(header, dice);
    }
  }
  if (dice.OneIn(3)) {
    Json json = Json::parse(header, nullptr, /*allow_exceptions=*/false);
    if (json.is_object()) {
      Repack(json, data);
      // Not through the parser what it has no word for: names that come twice.
      if (dice.OneIn(2)) header = json.dump();
    }
  }
  if (dice.OneIn(8)) header.insert(header.size(), 8 - header.size() % 8, ' ');
  input = FileOf(header, data);
}

void FuzzOne(const std::string& input) {
  static const MemoryFile memory_file;
  absl::StatusOr<SafetensorsHeader> header;
  {
    const BoundedMemory bound(20'000, 300, input.size());
    header = ParseSafetensors(input, kHeaderLimit);
  }
  memory_file.Set(input);
  const auto open = SafetensorsFile::Open(memory_file.path());
  GW_CHECK(open.ok() == header.ok());
  if (!header.ok()) {
    CheckRefusal(header.status());
    return;
  }
  CountAccepted();
  uint64_t header_bytes;
  memcpy(&header_bytes, input.data(), 8);
  const auto data_begin = static_cast<int64_t>(8 + header_bytes);
  int64_t bytes = 0;
  for (const auto& [name, entry] : header->entries) {
    GW_CHECK(entry.offset >= data_begin && entry.bytes >= 0 &&
             entry.offset + entry.bytes <= std::ssize(input));
    bytes += entry.bytes;
    CheckFloats(**open, name, entry, input);
  }
  // Ranges without overlap or gap: what is added up is what there is.
  GW_CHECK(data_begin + bytes == std::ssize(input));
  GW_CHECK((*open)->entries().size() == header->entries.size());

  const std::string again = Encode(*header, input, data_begin);
  const auto same = ParseSafetensors(again, kHeaderLimit);
  GW_CHECK(same.ok());
  GW_CHECK(same->metadata == header->metadata);
  GW_CHECK(SameEntries(*header, input, *same, again));
}

}  // namespace gradwire
