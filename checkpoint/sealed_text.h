// SPDX-License-Identifier: Apache-2.0
// JSON files whose last member is a digest of all that stands before it: the
// tables and manifests of checkpoints and snapshots. docs/checkpoints.md.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"

struct XXH3_state_s;

namespace gradwire {

inline constexpr int64_t kDigestDigits = 32;

// XXH3-128 of bytes that come in parts.
class StreamDigest {
 public:
  StreamDigest();
  ~StreamDigest();
  StreamDigest(const StreamDigest&) = delete;
  StreamDigest& operator=(const StreamDigest&) = delete;

  void Add(std::string_view bytes);
  // Hexadecimal, 32 digits, in lower case. Begins anew.
  std::string Take();

 private:
  XXH3_state_s* const state_;
};

std::string DigestOf(std::string_view bytes);
bool IsDigest(const std::string& text);

// The text of an object, sealed with its digest.
std::string SealJson(const nlohmann::json& json);
// The object in a text that is as it was sealed, the member "digest" included,
// and its digest. `file` is its name, for errors.
// Errors: DATA_LOSS CHECKPOINT_CORRUPT.
absl::StatusOr<std::pair<nlohmann::json, std::string>> UnsealJson(
    const std::string& text, const std::string& file, int max_depth);

// Reads a whole file of at most `limit` bytes. Errors: the file system's;
// DATA_LOSS CHECKPOINT_CORRUPT.
absl::StatusOr<std::string> ReadStateFile(FileSystem& files,
                                          const std::string& directory,
                                          const std::string& name,
                                          int64_t limit);

// DATA_LOSS CHECKPOINT_CORRUPT, with the field if there is one.
absl::Status CorruptField(const std::string& file, const std::string& field,
                          const std::string& what);
// NOT_FOUND CHECKPOINT_NOT_FOUND.
absl::Status CheckpointNotFound();
// FAILED_PRECONDITION STATE_VERSION.
absl::Status WrongVersion(int64_t have, int64_t need);

std::string LastSegment(const std::string& path);

}  // namespace gradwire
