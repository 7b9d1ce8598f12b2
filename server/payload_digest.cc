// SPDX-License-Identifier: Apache-2.0
#include "server/payload_digest.h"

#include <xxhash.h>

#include <algorithm>
#include <vector>

#include "base/check.h"
#include "base/error.h"

namespace gradwire {
namespace {

std::string Hex(const std::string& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (unsigned char byte : bytes.substr(0, 32)) {
    out += kDigits[byte >> 4];
    out += kDigits[byte & 15];
  }
  return out;
}

ErrorBuilder Mismatch(const std::string& field) {
  ErrorBuilder error(absl::StatusCode::kInvalidArgument, "COMMIT_MISMATCH");
  error.With("field", field);
  return error;
}

constexpr char kAdvice[] =
    "The commit record does not fit what was received, so nothing of it was "
    "taken. Send the whole request again.";

}  // namespace

struct PayloadDigest::State {
  XXH3_state_t* hash = XXH3_createState();
  ~State() { XXH3_freeState(hash); }
};

PayloadDigest::PayloadDigest() : state_(std::make_unique<State>()) {
  GW_CHECK(state_->hash != nullptr);
  XXH3_128bits_reset(state_->hash);
}
PayloadDigest::~PayloadDigest() = default;

void PayloadDigest::Update(const std::string& bytes) {
  XXH3_128bits_update(state_->hash, bytes.data(), bytes.size());
  bytes_ += static_cast<int64_t>(bytes.size());
}

void PayloadDigest::Add(const v1::Datum& datum) {
  ++items_;
  for (const v1::ModelInputChunk& chunk : datum.chunks()) {
    Update(chunk.text().tokens());
  }
  std::vector<std::string> names;
  for (const auto& [name, tensor] : datum.loss_fn_inputs()) {
    names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  for (const std::string& name : names) {
    const v1::TensorData& tensor = datum.loss_fn_inputs().at(name);
    Update(name);
    Update(tensor.data());
    Update(tensor.csr_columns());
    Update(tensor.csr_row_offsets());
  }
}

void PayloadDigest::Add(const v1::GradientItem& item) {
  ++items_;
  Update(item.d_logprobs().data());
}

void PayloadDigest::Add(const v1::LogprobItem& item) {
  ++items_;
  Update(item.logprobs().data());
}

std::string PayloadDigest::OfBytes(const std::string& bytes) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical,
                           XXH3_128bits(bytes.data(), bytes.size()));
  return std::string(reinterpret_cast<const char*>(canonical.digest),
                     sizeof(canonical.digest));
}

void PayloadDigest::Fill(v1::CommitRecord* commit) const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_->hash));
  commit->set_datum_count(items_);
  commit->set_byte_count(bytes_);
  commit->set_xxh3_128(reinterpret_cast<const char*>(canonical.digest),
                       sizeof(canonical.digest));
}

absl::Status PayloadDigest::Check(const v1::CommitRecord& commit) const {
  v1::CommitRecord mine;
  Fill(&mine);
  if (commit.datum_count() != mine.datum_count()) {
    return Mismatch("datum_count")
        .With("value", commit.datum_count())
        .With("limit", mine.datum_count())
        .Message(kAdvice);
  }
  if (commit.byte_count() != mine.byte_count()) {
    return Mismatch("byte_count")
        .With("value", commit.byte_count())
        .With("limit", mine.byte_count())
        .Message(kAdvice);
  }
  if (commit.xxh3_128() != mine.xxh3_128()) {
    return Mismatch("xxh3_128")
        .With("value", Hex(commit.xxh3_128()))
        .With("limit", Hex(mine.xxh3_128()))
        .Message(kAdvice);
  }
  return absl::OkStatus();
}

}  // namespace gradwire
