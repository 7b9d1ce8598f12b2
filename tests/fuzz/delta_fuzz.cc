// SPDX-License-Identifier: Apache-2.0
// A delta: read, applied to the weights that it names, and merged.
#include <array>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/crc32c.h"
#include "checkpoint/delta/apply.h"
#include "checkpoint/delta/delta_file.h"
#include "checkpoint/delta/delta_testing.h"
#include "checkpoint/delta/encode.h"
#include "checkpoint/delta/group.h"
#include "checkpoint/delta/merge.h"
#include "checkpoint/safetensors.h"
#include "tests/fuzz/fuzz.h"

namespace gradwire {
namespace {

using Json = nlohmann::ordered_json;

// What deltas apply to, and what it was one step before.
struct Receiver {
  TestWeights before, weights;
  std::string before_id, id;
  std::unique_ptr<DeltaFile> step;  // from `before` to `weights`
};

// Changes some of the 16-bit floats, and of the other tensors a byte.
void Change(TestWeights& weights, double density, uint32_t seed) {
  std::mt19937 random(seed);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (IsFloat16(weights.info(i).dtype)) {
      ChangeSome(weights.data<uint16_t>(i), weights.info(i).num_elements(),
                 density, random, 0.1);
    } else if (weights.bytes(i) > 0) {
      weights.data(i)[0] ^= static_cast<uint8_t>(random());
    }
  }
}

std::string DeltaBetween(const TestWeights& before, const TestWeights& after,
                         bool fast) {
  DeltaOptions options = OptionsFor(before);
  options.fast = fast;
  auto file = EncodeDelta(before.views(), after.views(), options);
  GW_CHECK(file.ok());
  return *std::move(file);
}

std::vector<Receiver> MakeReceivers() {
  const std::vector<std::vector<TensorInfo>> shapes = {
      {{"a", "BF16", {40}}},
      {{"a", "BF16", {6, 5}}, {"b", "F16", {300}}},
      {{"a", "F32", {3}}, {"b", "BF16", {7}}, {"none", "BF16", {0}}},
      // More than a chunk.
      {{"a", "BF16", {kChunkElements + 9}}},
  };
  std::vector<Receiver> receivers;
  std::mt19937 random(1);
  for (const auto& infos : shapes) {
    Receiver receiver;
    for (const TensorInfo& info : infos) {
      receiver.before.Add(info, FloatBytes{random});
    }
    receiver.weights = receiver.before;
    Change(receiver.weights, 0.05, 2);
    receiver.before_id = receiver.before.id();
    receiver.id = receiver.weights.id();
    auto step = DeltaFile::Parse(
        DeltaBetween(receiver.before, receiver.weights, false));
    GW_CHECK(step.ok());
    receiver.step = std::make_unique<DeltaFile>(*std::move(step));
    receivers.push_back(std::move(receiver));
  }
  return receivers;
}

const std::vector<Receiver>& Receivers() {
  static const std::vector<Receiver> receivers = MakeReceivers();
  return receivers;
}

const Receiver* ReceiverOf(const std::string& id) {
  for (const Receiver& receiver : Receivers()) {
    if (receiver.id == id) return &receiver;
  }
  return nullptr;
}

std::string Hex(uint64_t digest) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx",
                static_cast<unsigned long long>(digest));
  return text;
}

std::string Digest64(std::string_view bytes) {
  return Hex(HashBytes64(bytes.data(), std::ssize(bytes)));
}

std::string Quoted(const std::string& text) {
  return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

// A file in parts, as the mutator takes it.
struct Parts {
  std::string delta;  // the JSON of the metadata
  std::map<std::string, std::string> streams;

  // False if there are none.
  bool Read(const std::string& file) {
    const auto header = ParseSafetensors(file, 1 << 20);
    if (!header.ok() || !header->metadata.contains("delta")) return false;
    delta = header->metadata.at("delta");
    for (const auto& [name, entry] : header->entries) {
      streams[name] = file.substr(static_cast<size_t>(entry.offset),
                                  static_cast<size_t>(entry.bytes));
    }
    return true;
  }

  std::string File() const {
    // As text: JSON values would take longer than all the rest.
    std::string text = R"({"__metadata__":{"format":)" + Quoted(kDeltaFormat) +
                       R"(,"delta":)" + Quoted(delta) + R"(,"digest":")" +
                       HashBytes128(delta.data(), std::ssize(delta)).Hex() +
                       "\"}";
    std::string data;
    for (const auto& [name, stream] : streams) {
      const size_t begin = data.size();
      data += stream;
      text += "," + Quoted(name) + R"(:{"dtype":"U8","shape":[)" +
              std::to_string(stream.size()) + R"(],"data_offsets":[)" +
              std::to_string(begin) + "," + std::to_string(data.size()) + "]}";
    }
    text += "}";
    std::string file;
    for (int shift = 0; shift < 64; shift += 8) {
      file.push_back(static_cast<char>(text.size() >> shift));
    }
    return file + text + data;
  }
};

std::string TextOf(const Json& json, const char* key) {
  const auto found = json.find(key);
  return found != json.end() && found->is_string() ? found->get<std::string>()
                                                   : "";
}

// The stored bytes of a group, or -1 if it is none.
int64_t StoredBytes(const Json& group) {
  if (!group.is_object() || !group.contains("sizes") ||
      !group["sizes"].is_array()) {
    return -1;
  }
  int64_t sum = 0;
  for (const Json& size : group["sizes"]) {
    // Not by comparing the value, which is signed for that.
    if (!size.is_number_unsigned() || size.get<uint64_t>() > 1'000'000) {
      return -1;
    }
    sum += size.get<int64_t>();
  }
  return sum;
}

// Makes the digests of streams, and the id of the tensors, right.
void Seal(Parts& parts) {
  Json delta = Json::parse(parts.delta, nullptr, /*allow_exceptions=*/false);
  if (!delta.is_object() || !delta.contains("tensors") ||
      !delta["tensors"].is_array()) {
    return;
  }
  std::vector<TensorInfo> infos;
  std::vector<Hash128> hashes;
  for (Json& tensor : delta["tensors"]) {
    if (!tensor.is_object()) return;
    TensorInfo& info = infos.emplace_back();
    info.name = TextOf(tensor, "name");
    info.dtype = TextOf(tensor, "dtype");
    if (tensor.contains("shape") && tensor["shape"].is_array()) {
      for (const Json& dim : tensor["shape"]) {
        info.shape.push_back(dim.is_number_integer() ? dim.get<int64_t>() : 0);
      }
    }
    hashes.push_back(
        Hash128::FromHex(TextOf(tensor, "hash")).value_or(Hash128()));
    if (!tensor.contains("groups") || !tensor["groups"].is_array()) continue;
    tensor["table_digest"] = Digest64(parts.streams["table/" + info.name]);
    std::string_view payload = parts.streams["payload/" + info.name];
    for (Json& group : tensor["groups"]) {
      const int64_t bytes = StoredBytes(group);
      if (bytes < 0 || bytes > std::ssize(payload)) break;
      group["digest"] = Digest64(payload.substr(0, static_cast<size_t>(bytes)));
      payload.remove_prefix(static_cast<size_t>(bytes));
    }
  }
  delta["id"] = WeightId(infos, hashes);
  parts.delta = delta.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Changes one stream of the payloads, and the size that is said of it; stores
// it as it is, or packs it.
void MutatePayload(Parts& parts, Dice& dice) {
  Json delta = Json::parse(parts.delta, nullptr, /*allow_exceptions=*/false);
  if (!delta.is_object() || !delta.contains("tensors") ||
      !delta["tensors"].is_array() || delta["tensors"].empty()) {
    return;
  }
  Json& tensor =
      delta["tensors"]
           [static_cast<size_t>(dice.Below(std::ssize(delta["tensors"])))];
  if (!tensor.is_object() || !tensor.contains("groups") ||
      !tensor["groups"].is_array()) {
    return;
  }
  std::string& payload = parts.streams["payload/" + TextOf(tensor, "name")];
  size_t at = 0;
  for (Json& group : tensor["groups"]) {
    const int64_t stored = StoredBytes(group);
    if (stored < 0 || at + static_cast<size_t>(stored) > payload.size()) return;
    for (Json& size : group["sizes"]) {
      const auto bytes = size.get<size_t>();
      if (bytes > 0 && dice.OneIn(3)) {
        std::string stream = payload.substr(at, bytes);
        MutatePart(stream, dice);
        if (dice.OneIn(3)) stream.resize(bytes);
        if (dice.OneIn(8)) {
          ByteBuffer packed;
          StreamPacker packer;
          packer.PackFrame(reinterpret_cast<const uint8_t*>(stream.data()),
                           std::ssize(stream), packed);
          stream.assign(reinterpret_cast<const char*>(packed.data()),
                        static_cast<size_t>(packed.size()));
        }
        payload.replace(at, bytes, stream);
        size = stream.size();
        parts.delta = delta.dump();
        return;
      }
      at += bytes;
    }
  }
}

// Makes the checksums of the chunks those of what comes out, so that it passes.
// False if nothing has changed.
bool SealChunks(Parts& parts) {
  const auto delta = DeltaFile::Parse(parts.File());
  if (!delta.ok()) return false;
  const Receiver* receiver = ReceiverOf(delta->info().prev_id);
  if (receiver == nullptr) return false;
  bool changed = false;
  TestWeights weights = receiver->weights;
  for (const DeltaTensor& tensor : delta->tensors()) {
    if (!tensor.changed()) continue;
    size_t i = 0;
    while (i < weights.size() && weights.info(i) != tensor.info) ++i;
    if (i == weights.size()) continue;
    auto rows = DeltaFile::ReadRows(tensor);
    if (!rows.ok()) continue;
    const auto* stored =
        reinterpret_cast<const uint8_t*>(tensor.payload.data());
    int64_t chunk = 0;
    for (const DeltaGroup& group : tensor.groups) {
      const GroupShape shape = tensor.group_shape(chunk, group.chunks);
      const absl::Span<const ChunkRow> part = absl::MakeSpan(*rows).subspan(
          static_cast<size_t>(chunk), static_cast<size_t>(group.chunks));
      uint8_t* at =
          weights.data(i) + chunk * kChunkElements * shape.element_bytes;
      GroupDecoder::Options options;
      options.check = false;
      static GroupDecoder decoder;
      if (decoder.Decode(shape, part, group, stored, options, at) !=
          GroupResult::kOk) {
        return changed;
      }
      for (int64_t c = 0; c < group.chunks; ++c) {
        const int64_t bytes = shape.chunk_size(c) * shape.element_bytes;
        (*rows)[static_cast<size_t>(chunk + c)].crc = Crc32c(at, bytes);
        at += bytes;
      }
      stored += group.stored_bytes();
      chunk += group.chunks;
    }
    ByteBuffer table;
    WriteChunkTable(*rows, table);
    parts.streams["table/" + tensor.info.name].assign(
        reinterpret_cast<const char*>(table.data()),
        static_cast<size_t>(table.size()));
    changed = true;
  }
  return changed;
}

// Whether each chunk of the tensors that changed has its checksum, and the rest
// is as before.
void CheckApplied(const DeltaFile& delta, const TestWeights& before,
                  const TestWeights& after) {
  for (const DeltaTensor& tensor : delta.tensors()) {
    size_t i = 0;
    while (after.info(i) != tensor.info) ++i;
    if (!tensor.changed()) {
      GW_CHECK(memcmp(before.data(i), after.data(i),
                      static_cast<size_t>(after.bytes(i))) == 0);
      continue;
    }
    const auto rows = DeltaFile::ReadRows(tensor);
    GW_CHECK(rows.ok());
    const GroupShape shape = tensor.group_shape(0, std::ssize(*rows));
    const uint8_t* at = after.data(i);
    for (int64_t c = 0; c < std::ssize(*rows); ++c) {
      const int64_t bytes = shape.chunk_size(c) * shape.element_bytes;
      GW_CHECK(Crc32c(at, bytes) == (*rows)[static_cast<size_t>(c)].crc);
      at += bytes;
    }
  }
}

// A merge takes memory by the shapes, which nothing here bounds but this.
bool IsSmall(const DeltaFile& delta) {
  int64_t elements = 0;
  for (const DeltaTensor& tensor : delta.tensors()) {
    if (tensor.info.num_elements() > 100'000) return false;
    elements += tensor.info.num_elements();
  }
  return elements <= 100'000;
}

// One delta of itself says the same; of the step before and it, both.
void CheckMerges(const DeltaFile& delta, const Receiver* receiver,
                 const TestWeights* after) {
  const auto merged = MergeDeltas({&delta});
  if (!merged.ok()) {
    GW_CHECK(after == nullptr);
    CheckRefusal(merged.status());
    return;
  }
  const auto same = DeltaFile::Parse(*merged);
  GW_CHECK(same.ok() && same->info() == delta.info());
  GW_CHECK(same->tensors().size() == delta.tensors().size());
  for (size_t i = 0; i < delta.tensors().size(); ++i) {
    const DeltaTensor &a = delta.tensors()[i], &b = same->tensors()[i];
    GW_CHECK(a.info == b.info && a.hash == b.hash && a.fresh == b.fresh);
  }
  if (after == nullptr) return;
  TestWeights weights = receiver->weights;
  std::string id = receiver->id;
  GW_CHECK(ApplyDelta(*same, weights.tensors(), id).ok());
  GW_CHECK(weights == *after && id == delta.info().id);

  const auto both = MergeDeltas({receiver->step.get(), &delta});
  if (!both.ok()) {
    GW_CHECK(ReasonOf(both.status()) == "DELTA_SHARDS_DIFFER");
    return;
  }
  const auto from_before = DeltaFile::Parse(*both);
  GW_CHECK(from_before.ok());
  weights = receiver->before;
  id = receiver->before_id;
  GW_CHECK(ApplyDelta(*from_before, weights.tensors(), id).ok());
  GW_CHECK(weights == *after && id == delta.info().id);
}

// Of the large receiver two.
std::vector<std::string> MakeSeeds() {
  const int64_t last = std::ssize(Receivers()) - 1;
  std::vector<std::string> seeds;
  for (int64_t i = 0; i < 100; ++i) {
    const int64_t which = i % 50 == 0 ? last : i % last;
    const Receiver& receiver = Receivers()[static_cast<size_t>(which)];
    TestWeights after = receiver.weights;
    const std::array<double, 3> densities = {0.05, 0.3, 0.9};
    Change(after,
           which == last ? 0.0005 : densities[static_cast<size_t>(i / 5 % 3)],
           static_cast<uint32_t>(i));
    seeds.push_back(DeltaBetween(receiver.weights, after, i % 2 == 0));
  }
  return seeds;
}

}  // namespace

std::string FuzzSeed(Dice& dice) {
  // To make one takes a hundred times as long as to read it.
  static const std::vector<std::string> seeds = MakeSeeds();
  return seeds[static_cast<size_t>(dice.Below(std::ssize(seeds)))];
}

void FuzzMutate(std::string& input, Dice& dice) {
  Parts parts;
  if (dice.OneIn(20) || !parts.Read(input)) {
    MutatePart(input, dice);
    return;
  }
  const bool streams = !parts.streams.empty() && !dice.OneIn(3);
  for (int64_t i = dice.Changes(); i > 0; --i) {
    if (!streams) {
      MutateJson(parts.delta, dice);
    } else if (dice.OneIn(2)) {
      auto stream = parts.streams.begin();
      std::advance(stream, dice.Below(std::ssize(parts.streams)));
      MutatePart(stream->second, dice);
    } else {
      MutatePayload(parts, dice);
    }
  }
  // Sealed JSON is in the form in which it is written.
  if (streams || dice.OneIn(2)) Seal(parts);
  if (streams && dice.OneIn(2) && SealChunks(parts)) Seal(parts);
  input = parts.File();
}

void FuzzOne(const std::string& input) {
  // Merging takes longer than all the rest: of some.
  const bool merge = std::hash<std::string>{}(input) % 8 == 0;
  // Before memory is counted.
  Receivers();
  absl::StatusOr<DeltaFile> delta = absl::UnknownError("");
  {
    const BoundedMemory bound(20'000, 300, input.size());
    delta = DeltaFile::Parse(input);
  }
  if (!delta.ok()) {
    CheckRefusal(delta.status());
    return;
  }
  const Receiver* receiver = ReceiverOf(delta->info().prev_id);
  if (receiver == nullptr) {
    if (merge && IsSmall(*delta)) CheckMerges(*delta, nullptr, nullptr);
    return;
  }
  TestWeights weights = receiver->weights;
  std::string id = receiver->id;
  absl::Status applied;
  {
    int64_t bytes = 0;
    for (size_t i = 0; i < weights.size(); ++i) bytes += weights.bytes(i);
    // Buffers of a chunk, zstd's, and what takes its size from the weights.
    const BoundedMemory bound(1'000'000 + 20 * bytes, 50, input.size());
    applied = ApplyDelta(*delta, weights.tensors(), id);
  }
  if (applied.ok()) {
    CountAccepted();
    GW_CHECK(id == delta->info().id);
    CheckApplied(*delta, receiver->weights, weights);
    if (merge) CheckMerges(*delta, receiver, &weights);
    return;
  }
  CheckRefusal(applied);
  // All or nothing, but for what was not there before.
  GW_CHECK(id == receiver->id);
  for (size_t i = 0; i < weights.size(); ++i) {
    bool fresh = false;
    for (const DeltaTensor& tensor : delta->tensors()) {
      fresh = fresh || (tensor.fresh && tensor.info == weights.info(i));
    }
    GW_CHECK(fresh || memcmp(weights.data(i), receiver->weights.data(i),
                             static_cast<size_t>(weights.bytes(i))) == 0);
  }
  if (merge && IsSmall(*delta)) CheckMerges(*delta, nullptr, nullptr);
}

}  // namespace gradwire
