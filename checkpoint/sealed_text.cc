// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/sealed_text.h"

#include <xxhash.h>

#include <cstdio>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/strict_json.h"

namespace gradwire {
namespace {

using Json = nlohmann::json;

// A text is an object whose last member is the digest of all that stands before
// these bytes.
constexpr std::string_view kSealBegin = ",\n \"digest\": \"";
constexpr std::string_view kSealEnd = "\"\n}\n";
constexpr int64_t kSealBytes =
    std::ssize(kSealBegin) + kDigestDigits + std::ssize(kSealEnd);

std::string DigitsOf(const XXH128_hash_t& hash) {
  char digits[kDigestDigits + 1];
  std::snprintf(digits, sizeof(digits), "%016llx%016llx",
                static_cast<unsigned long long>(hash.high64),
                static_cast<unsigned long long>(hash.low64));
  return digits;
}

}  // namespace

StreamDigest::StreamDigest() : state_(XXH3_createState()) {
  XXH3_128bits_reset(state_);
}

StreamDigest::~StreamDigest() { XXH3_freeState(state_); }

void StreamDigest::Add(std::string_view bytes) {
  XXH3_128bits_update(state_, bytes.data(), bytes.size());
}

std::string StreamDigest::Take() {
  const XXH128_hash_t hash = XXH3_128bits_digest(state_);
  XXH3_128bits_reset(state_);
  return DigitsOf(hash);
}

std::string DigestOf(std::string_view bytes) {
  return DigitsOf(XXH3_128bits(bytes.data(), bytes.size()));
}

bool IsDigest(const std::string& text) {
  return std::ssize(text) == kDigestDigits &&
         text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::string SealJson(const Json& json) {
  // What is no UTF-8 has been refused before (CheckHeader).
  std::string text =
      json.dump(1, ' ', false, nlohmann::detail::error_handler_t::replace);
  text.resize(text.size() - std::string_view("\n}").size());
  const std::string digest = DigestOf(text);
  text += kSealBegin;
  text += digest;
  text += kSealEnd;
  return text;
}

absl::StatusOr<std::pair<Json, std::string>> UnsealJson(const std::string& text,
                                                        const std::string& file,
                                                        int max_depth) {
  const int64_t body = std::ssize(text) - kSealBytes;
  bool whole = body > 0;
  if (whole) {
    const std::string_view all = text;
    const std::string_view seal = all.substr(static_cast<size_t>(body));
    const std::string digest =
        DigestOf(all.substr(0, static_cast<size_t>(body)));
    whole = seal.starts_with(kSealBegin) && seal.ends_with(kSealEnd) &&
            seal.substr(kSealBegin.size(), kDigestDigits) == digest;
    if (whole) {
      Json json;
      const std::string wrong = ParseStrictJson(text, max_depth, &json);
      if (!wrong.empty()) return CorruptField(file, "", wrong);
      return std::pair(std::move(json), digest);
    }
  }
  return CorruptField(file, "digest", "is not that of the file's content");
}

absl::StatusOr<std::string> ReadStateFile(FileSystem& files,
                                          const std::string& directory,
                                          const std::string& name,
                                          int64_t limit) {
  GW_ASSIGN_OR_RETURN(
      const std::unique_ptr<File> file,
      files.Open(directory + "/" + name, FileSystem::Access::kRead));
  GW_ASSIGN_OR_RETURN(const int64_t bytes, file->Size());
  if (bytes > limit) {
    return CorruptField(name, "bytes",
                        "are " + std::to_string(bytes) + ", more than " +
                            std::to_string(limit));
  }
  std::string text(static_cast<size_t>(bytes), '\0');
  GW_ASSIGN_OR_RETURN(const int64_t got, file->ReadAt(0, bytes, text.data()));
  text.resize(static_cast<size_t>(got));
  return text;
}

absl::Status CorruptField(const std::string& file, const std::string& field,
                          const std::string& what) {
  ErrorBuilder error(absl::StatusCode::kDataLoss, "CHECKPOINT_CORRUPT");
  error.Server().With("file", file);
  if (!field.empty()) error.With("field", field);
  return error.Message("the checkpoint is damaged: " + file + ": " + field +
                       (field.empty() ? "" : " ") + what +
                       "; load an older one");
}

absl::Status CheckpointNotFound() {
  return ErrorBuilder(absl::StatusCode::kNotFound, "CHECKPOINT_NOT_FOUND")
      .With("field", "name")
      .Message(
          "there is no such checkpoint; list the checkpoints and give the "
          "name of one");
}

absl::Status WrongVersion(int64_t have, int64_t need) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "STATE_VERSION")
      .With("field", "version")
      .With("have", have)
      .With("need", need)
      .Message("the checkpoint has format version " + std::to_string(have) +
               ", this server reads " + std::to_string(need) +
               "; start the version that wrote it, or a newer one");
}

std::string LastSegment(const std::string& path) {
  return path.substr(path.find_last_of('/') + 1);
}

}  // namespace gradwire
