// SPDX-License-Identifier: Apache-2.0
// A place for objects under keys, such as a bucket of S3. An object appears
// whole or not at all, and outlasts whatever the store promises.
//
// Errors of all methods, beside those named:
//   UNAVAILABLE STORAGE_UNREACHABLE: it gave no answer, or said that it cannot
//     now, after all tries;
//   FAILED_PRECONDITION OBJECT_STORE_REFUSED (value: the store's own code): it
//     will not, and will not the next time: keys, rights, region, bucket;
//   those of the file that is read.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"

namespace gradwire {

// Keys are segments of [A-Za-z0-9._-], with a '/' between them. Thread rule:
// any method from any thread.
class ObjectStore {
 public:
  virtual ~ObjectStore() = default;

  // From now on every call fails at once, those that wait as well.
  virtual void Stop() = 0;
  // "s3://bucket/prefix", for people.
  virtual std::string url() const = 0;
  // That it is there and lets itself be listed.
  virtual absl::Status Check() = 0;

  // Errors: ALREADY_EXISTS OBJECT_EXISTS: there is one under the key. After
  // another error it may be there.
  virtual absl::Status PutNew(const std::string& key,
                              std::string_view bytes) = 0;
  // In place of the object of this version, as Get has told it. Errors:
  // ALREADY_EXISTS OBJECT_EXISTS: there is another one by now; NOT_FOUND
  // OBJECT_NOT_FOUND. After another error it may be there.
  virtual absl::Status PutOver(const std::string& key, std::string_view bytes,
                               const std::string& version) = 0;
  // The file's first `bytes` bytes, in place of what was there.
  // Returns their SHA-256 in hexadecimal.
  virtual absl::StatusOr<std::string> Upload(const std::string& key, File& file,
                                             int64_t bytes) = 0;
  // `version`, if given: of the object, opaque.
  // Errors: NOT_FOUND OBJECT_NOT_FOUND; DATA_LOSS OBJECT_CORRUPT: more than
  // `most` bytes.
  virtual absl::StatusOr<std::string> Get(const std::string& key, int64_t most,
                                          std::string* version) = 0;
  // All of the object, which must have `bytes` bytes, to the file's begin.
  // Returns their SHA-256. Errors: as Get.
  virtual absl::StatusOr<std::string> Download(const std::string& key,
                                               int64_t bytes, File& file) = 0;
  // Keys that begin with `prefix`, in ascending order.
  virtual absl::StatusOr<std::vector<std::string>> List(
      const std::string& prefix) = 0;
  // The next segments of such keys: "b" of "a/b/c" and "a/b/d" below "a/".
  virtual absl::StatusOr<std::vector<std::string>> ListSegments(
      const std::string& prefix) = 0;
  // Nothing there is as good.
  virtual absl::Status Delete(const std::string& key) = 0;
  // Uploads that were begun and not ended take space: ends those of keys that
  // begin with `prefix` and of which `is_left` holds.
  virtual absl::Status AbortUploads(
      const std::string& prefix,
      const std::function<bool(const std::string& key)>& is_left) = 0;
};

}  // namespace gradwire
