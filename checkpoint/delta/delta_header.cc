// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/delta_header.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/status.h"
#include "checkpoint/strict_json.h"

namespace gradwire {
namespace {

// What is written keeps its order.
using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

constexpr int64_t kMaxElements = int64_t{1} << 36;
constexpr size_t kMaxDims = 8;
constexpr size_t kMaxText = 4096;
constexpr int64_t kMaxCount = int64_t{1} << 53;
constexpr int kMaxDepth = 8;

std::string DigestHex(uint64_t digest) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (int shift = 60; shift >= 0; shift -= 4) {
    hex.push_back(kDigits[digest >> shift & 15]);
  }
  return hex;
}

std::optional<uint64_t> DigestFromHex(const std::string& hex) {
  if (hex.size() != 16) return std::nullopt;
  const std::optional<Hash128> hash = Hash128::FromHex(hex + hex);
  if (!hash.has_value()) return std::nullopt;
  uint64_t digest = 0;
  for (size_t i = 0; i < 8; ++i) digest = digest << 8 | hash->bytes[i];
  return digest;
}

// Reads members of one JSON object; the first that is missing or of another
// kind sticks. Every member that is there must be read.
class Members {
 public:
  Members(const Json& json, std::string where)
      : json_(json), where_(std::move(where)) {
    if (!json.is_object()) Fail("", "is not an object");
  }

  std::string Text(const char* key) {
    const Json* value = Find(key);
    if (value == nullptr) return "";
    if (!value->is_string() ||
        value->get_ref<const std::string&>().size() > kMaxText) {
      Fail(key, "is not a text of at most 4096 bytes");
      return "";
    }
    return value->get<std::string>();
  }

  int64_t Count(const char* key, int64_t most = kMaxCount) {
    const Json* value = Find(key);
    return value == nullptr ? 0 : Number(*value, key, most);
  }

  std::vector<int64_t> Counts(const char* key, size_t most_entries,
                              int64_t most) {
    std::vector<int64_t> counts;
    const Json* value = Find(key);
    if (value == nullptr) return counts;
    if (!value->is_array() || value->size() > most_entries) {
      Fail(key, "is not a list, or too long a one");
      return counts;
    }
    for (const Json& entry : *value) counts.push_back(Number(entry, key, most));
    return counts;
  }

  uint64_t Digest(const char* key) {
    const std::optional<uint64_t> digest = DigestFromHex(Text(key));
    if (!digest.has_value()) Fail(key, "is not 16 hexadecimal digits");
    return digest.value_or(0);
  }
  Hash128 Hash(const char* key) {
    const std::optional<Hash128> hash = Hash128::FromHex(Text(key));
    if (!hash.has_value()) Fail(key, "is not 32 hexadecimal digits");
    return hash.value_or(Hash128());
  }
  std::string Id(const char* key) { return Hash(key).Hex(); }

  bool Has(const char* key) const {
    return json_.is_object() && json_.contains(key);
  }
  // Null if it is not a list.
  const Json* List(const char* key) {
    const Json* value = Find(key);
    if (value != nullptr && !value->is_array()) {
      Fail(key, "is not a list");
      return nullptr;
    }
    return value;
  }

  void Fail(const std::string& key, const std::string& what) {
    if (status_.ok()) {
      status_ =
          DeltaInvalid(where_ + (key.empty() ? "" : "." + key), "", "", what);
    }
  }
  absl::Status Finish() {
    if (status_.ok() && json_.size() != read_) {
      Fail("", "has a member that is not known");
    }
    return status_;
  }

 private:
  const Json* Find(const char* key) {
    if (!Has(key)) {
      Fail(key, "is missing");
      return nullptr;
    }
    ++read_;
    return &json_[key];
  }
  int64_t Number(const Json& value, const char* key, int64_t most) {
    if (!value.is_number_unsigned() ||
        value.get<uint64_t>() > static_cast<uint64_t>(most)) {
      if (status_.ok()) {
        status_ = DeltaInvalid(where_ + "." + key, value.dump().substr(0, 40),
                               std::to_string(most),
                               "is not a whole number within its limit");
      }
      return 0;
    }
    return value.get<int64_t>();
  }

  const Json& json_;
  const std::string where_;
  size_t read_ = 0;
  absl::Status status_;
};

OrderedJson TensorToJson(const DeltaTensor& tensor, uint64_t table_digest) {
  OrderedJson json = {{"name", tensor.info.name},
                      {"dtype", tensor.info.dtype},
                      {"shape", tensor.info.shape},
                      {"hash", tensor.hash.Hex()}};
  if (tensor.fresh) json["fresh"] = 1;
  if (!tensor.changed()) return json;
  json["table_digest"] = DigestHex(table_digest);
  OrderedJson groups = OrderedJson::array();
  for (const DeltaGroup& group : tensor.groups) {
    groups.push_back({{"chunks", group.chunks},
                      {"sizes", group.sizes},
                      {"digest", DigestHex(group.digest)}});
  }
  json["groups"] = std::move(groups);
  return json;
}

absl::Status ReadGroups(const Json& list, const std::string& where,
                        DeltaTensor& tensor) {
  const size_t streams =
      static_cast<size_t>(kPlaneStream + DeltaElementBytes(tensor.info.dtype));
  int64_t chunks = 0;
  for (const Json& entry : list) {
    Members members(entry, where + ".groups");
    DeltaGroup group;
    group.chunks = members.Count("chunks", kGroupChunks);
    group.sizes = members.Counts("sizes", kMaxStreams, kMaxCount);
    group.digest = members.Digest("digest");
    GW_RETURN_IF_ERROR(members.Finish());
    if (group.chunks == 0 || group.sizes.size() != streams) {
      return DeltaInvalid(where + ".groups", std::to_string(group.sizes.size()),
                          std::to_string(streams),
                          "has a group without chunks, or with another number "
                          "of streams than its dtype");
    }
    chunks += group.chunks;
    tensor.groups.push_back(std::move(group));
  }
  const int64_t limit = NumChunks(tensor.info.num_elements());
  if (chunks != limit || chunks == 0) {
    return DeltaInvalid(where + ".groups", std::to_string(chunks),
                        std::to_string(limit),
                        "do not have the chunks of the tensor's shape");
  }
  return absl::OkStatus();
}

absl::StatusOr<DeltaTensor> TensorFromJson(const Json& json,
                                           const std::string& where,
                                           uint64_t& table_digest) {
  Members members(json, where);
  DeltaTensor tensor;
  tensor.info.name = members.Text("name");
  tensor.info.dtype = members.Text("dtype");
  tensor.info.shape = members.Counts("shape", kMaxDims, kMaxElements);
  tensor.hash = members.Hash("hash");
  if (members.Has("fresh")) {
    tensor.fresh = members.Count("fresh", 1) == 1;
    if (!tensor.fresh) members.Fail("fresh", "is not 1");
  }
  const Json* groups = nullptr;
  if (members.Has("groups")) {
    groups = members.List("groups");
    table_digest = members.Digest("table_digest");
  }
  GW_RETURN_IF_ERROR(members.Finish());
  if (DeltaElementBytes(tensor.info.dtype) == 0) {
    return DeltaInvalid(where + ".dtype", tensor.info.dtype.substr(0, 40), "",
                        "is not known");
  }
  __int128 elements = 1;
  for (const int64_t dim : tensor.info.shape) {
    elements *= dim;
    if (elements > kMaxElements) {
      return DeltaInvalid(where + ".shape", "", std::to_string(kMaxElements),
                          "has too many elements");
    }
  }
  if (groups != nullptr) {
    GW_RETURN_IF_ERROR(ReadGroups(*groups, where, tensor));
  } else if (tensor.fresh && elements > 0) {
    return DeltaInvalid(where, "", "", "is fresh and has no values");
  }
  return tensor;
}

}  // namespace

std::string TableEntry(const std::string& tensor) { return "table/" + tensor; }
std::string PayloadEntry(const std::string& tensor) {
  return "payload/" + tensor;
}

std::string DeltaHeaderToJson(const DeltaHeader& header) {
  const DeltaInfo& info = header.info;
  OrderedJson json = {{"format", kDeltaFormat},
                      {"model", info.model},
                      {"step", info.step},
                      {"id", info.id},
                      {"prev_id", info.prev_id},
                      {"base_id", info.base_id},
                      {"chain_length", info.chain_length}};
  OrderedJson tensors = OrderedJson::array();
  for (size_t i = 0; i < header.tensors.size(); ++i) {
    tensors.push_back(TensorToJson(header.tensors[i], header.table_digests[i]));
  }
  json["tensors"] = std::move(tensors);
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

absl::StatusOr<DeltaHeader> DeltaHeaderFromJson(const std::string& text) {
  Json json;
  const std::string wrong = ParseStrictJson(text, kMaxDepth, &json);
  if (!wrong.empty()) return DeltaInvalid("delta", "", "", wrong);
  Members members(json, "delta");
  DeltaHeader header;
  const std::string format = members.Text("format");
  header.info.model = members.Text("model");
  header.info.step = members.Count("step");
  header.info.id = members.Id("id");
  header.info.prev_id = members.Id("prev_id");
  header.info.base_id = members.Id("base_id");
  header.info.chain_length = members.Count("chain_length");
  if (header.info.chain_length == 0) members.Fail("chain_length", "is 0");
  const Json* tensors = members.List("tensors");
  GW_RETURN_IF_ERROR(members.Finish());
  if (format != kDeltaFormat) {
    return DeltaInvalid("delta.format", format.substr(0, 40), kDeltaFormat,
                        "is another");
  }
  for (size_t i = 0; i < tensors->size(); ++i) {
    const std::string where = "tensors[" + std::to_string(i) + "]";
    uint64_t digest = 0;
    GW_ASSIGN_OR_RETURN(DeltaTensor tensor,
                        TensorFromJson((*tensors)[i], where, digest));
    if (i > 0 && header.tensors.back().info.name >= tensor.info.name) {
      return DeltaInvalid(where + ".name", tensor.info.name.substr(0, 40), "",
                          "is not above the one before");
    }
    header.tensors.push_back(std::move(tensor));
    header.table_digests.push_back(digest);
  }
  return header;
}

}  // namespace gradwire
