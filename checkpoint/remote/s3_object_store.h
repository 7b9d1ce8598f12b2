// SPDX-License-Identifier: Apache-2.0
// The S3 API, by libcurl: a bucket of AWS, or of anything that speaks the same
// (MinIO, Ceph, ...). docs/object_storage.md.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "checkpoint/remote/object_store.h"

namespace gradwire {

struct S3Options {
  // "s3://bucket" or "s3://bucket/prefix".
  std::string url;
  // "https://host" or "http://host:port"; "": AWS's own of the region. Buckets
  // are named in the path.
  std::string endpoint;
  std::string region;
  std::string access_key, secret_key;
  std::string session_token;  // may be empty
  // PEM file of authorities for https; "": the system's.
  std::string ca_file;
  // Of an upload or download of more than this, so many bytes at a time, and
  // `parallel` of them at once.
  int64_t part_bytes = int64_t{16} << 20;
  int parallel = 4;
  // Of one request: tries, and the pause after the first, which doubles.
  int tries = 6;
  absl::Duration pause = absl::Milliseconds(200);
  // A transfer that stands still for so long has failed.
  absl::Duration stall = absl::Seconds(30);
};

// Fills what the environment says: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
// AWS_SESSION_TOKEN; where the option is empty, AWS_ENDPOINT_URL_S3 or
// AWS_ENDPOINT_URL, and AWS_REGION or AWS_DEFAULT_REGION.
void FillFromEnvironment(S3Options& options);

// Makes no request. Errors: INVALID_ARGUMENT OBJECT_STORE_INVALID (field).
absl::StatusOr<std::unique_ptr<ObjectStore>> OpenS3(const S3Options& options);

}  // namespace gradwire
