// SPDX-License-Identifier: Apache-2.0
// One request to S3, signed, repeated where that may help.
#pragma once

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "checkpoint/remote/s3_object_store.h"

namespace gradwire {

struct S3Request {
  std::string method = "GET";
  std::string key = {};  // "": the bucket
  // By name, which is the order in which they are signed.
  std::map<std::string, std::string> query = {};
  std::vector<std::pair<std::string, std::string>> headers = {};
  std::string_view body = {};
  // Where the answer goes, at most so many bytes; else S3Answer::body. What a
  // refusal says goes there in any case.
  char* out = nullptr;
  int64_t most = int64_t{64} << 20;
};

struct S3Answer {
  int64_t status = 0;
  std::string body;
  int64_t bytes = 0;  // of the body, wherever it went
  std::string etag;
};

// Thread rule: any method from any thread.
class S3Connection {
 public:
  // `options` have been checked; `bucket` and endpoint are taken apart.
  S3Connection(S3Options options, std::string endpoint, std::string bucket);
  ~S3Connection();

  // The answer to a request that the store took: status 2xx. Errors: those of
  // ObjectStore; NOT_FOUND OBJECT_NOT_FOUND; ALREADY_EXISTS OBJECT_EXISTS: a
  // condition of the request does not hold; DATA_LOSS OBJECT_CORRUPT: the
  // answer is larger than it may be.
  absl::StatusOr<S3Answer> Send(const S3Request& request);

  // All calls that wait fail, and all later ones.
  void Stop();
  const S3Options& options() const { return options_; }

 private:
  struct Handle;
  std::unique_ptr<Handle> Take();
  // One try. An answer of any status, or what curl says.
  absl::StatusOr<S3Answer> Try(Handle& handle, const S3Request& request) const;

  const S3Options options_;
  const std::string endpoint_, bucket_, host_, sign_, credentials_;
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;
  std::condition_variable stop_;
  std::vector<std::unique_ptr<Handle>> idle_;
};

}  // namespace gradwire
