// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/remote/s3_object_store.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <functional>
#include <future>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/remote/s3_request.h"
#include "checkpoint/remote/s3_xml.h"
#include "checkpoint/remote/sha256.h"

namespace gradwire {
namespace {

constexpr std::string_view kScheme = "s3://";
// Of one upload; larger files get larger parts.
constexpr int64_t kMostParts = 10000;
constexpr int64_t kLeastPart = int64_t{5} << 20;

absl::Status Invalid(const char* field, const std::string& value,
                     const std::string& message) {
  return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                      "OBJECT_STORE_INVALID")
      .With("field", field)
      .With("value", value)
      .Message(message);
}

bool IsPlain(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' ||
           c == '.' || c == '_' || c == '/';
  });
}

absl::Status Unexpected(const char* what) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "OBJECT_STORE_REFUSED")
      .Server()
      .With("value", what)
      .Message(
          "The object store's answer is not one of the S3 API. Look at the "
          "endpoint.");
}

absl::Status WrongSize() {
  return ErrorBuilder(absl::StatusCode::kDataLoss, "OBJECT_CORRUPT")
      .Server()
      .Message(
          "An object has another size than when it was stored. Delete the "
          "checkpoint from the object store, and store it again.");
}

// Runs work in threads, at most `parallel` at a time, and takes results in the
// order in which the work was given.
template <typename T>
class Pipeline {
 public:
  Pipeline(int parallel, std::function<absl::Status(T)> take)
      : parallel_(static_cast<size_t>(parallel)), take_(std::move(take)) {}
  ~Pipeline() {
    for (auto& each : running_) each.wait();
  }
  absl::Status Add(std::function<absl::StatusOr<T>()> work) {
    if (running_.size() >= parallel_) GW_RETURN_IF_ERROR(TakeOne());
    running_.push_back(std::async(std::launch::async, std::move(work)));
    return absl::OkStatus();
  }
  absl::Status Finish() {
    while (!running_.empty()) GW_RETURN_IF_ERROR(TakeOne());
    return absl::OkStatus();
  }

 private:
  absl::Status TakeOne() {
    absl::StatusOr<T> result = running_.front().get();
    running_.pop_front();
    GW_RETURN_IF_ERROR(result.status());
    return take_(*std::move(result));
  }

  const size_t parallel_;
  const std::function<absl::Status(T)> take_;
  std::deque<std::future<absl::StatusOr<T>>> running_;
};

class S3ObjectStore final : public ObjectStore {
 public:
  S3ObjectStore(const S3Options& options, const std::string& endpoint,
                const std::string& bucket, std::string prefix)
      : connection_(options, endpoint, bucket),
        prefix_(std::move(prefix)),
        url_(options.url) {}

  void Stop() override { connection_.Stop(); }
  std::string url() const override { return url_; }

  absl::Status Check() override {
    GW_ASSIGN_OR_RETURN(const S3Answer answer,
                        connection_.Send({.query = {{"list-type", "2"},
                                                    {"max-keys", "1"},
                                                    {"prefix", prefix_}}}));
    if (!ParseListing(answer.body).valid) return Unexpected("no listing");
    return absl::OkStatus();
  }

  absl::Status PutNew(const std::string& key, std::string_view bytes) override {
    return connection_
        .Send({.method = "PUT",
               .key = prefix_ + key,
               .headers = {{"If-None-Match", "*"}},
               .body = bytes})
        .status();
  }

  absl::Status PutOver(const std::string& key, std::string_view bytes,
                       const std::string& version) override {
    return connection_
        .Send({.method = "PUT",
               .key = prefix_ + key,
               .headers = {{"If-Match", version}},
               .body = bytes})
        .status();
  }

  absl::StatusOr<std::string> Upload(const std::string& key, File& file,
                                     int64_t bytes) override {
    if (bytes <= connection_.options().part_bytes) {
      GW_ASSIGN_OR_RETURN(const std::string all, ReadPart(file, 0, bytes));
      GW_RETURN_IF_ERROR(
          connection_.Send({.method = "PUT", .key = prefix_ + key, .body = all})
              .status());
      return Sha256::Of(all);
    }
    GW_ASSIGN_OR_RETURN(const S3Answer begun,
                        connection_.Send({.method = "POST",
                                          .key = prefix_ + key,
                                          .query = {{"uploads", ""}}}));
    const std::string id = ParseUploadId(begun.body);
    if (id.empty()) return Unexpected("no UploadId");
    auto digest = UploadParts(prefix_ + key, id, file, bytes);
    if (!digest.ok()) {
      // If this fails as well, AbortUploads will find it.
      (void)Abort(prefix_ + key, id);
    }
    return digest;
  }

  absl::StatusOr<std::string> Get(const std::string& key, int64_t most,
                                  std::string* version) override {
    GW_ASSIGN_OR_RETURN(S3Answer answer,
                        connection_.Send({.key = prefix_ + key, .most = most}));
    if (version != nullptr) *version = answer.etag;
    return std::move(answer.body);
  }

  absl::StatusOr<std::string> Download(const std::string& key, int64_t bytes,
                                       File& file) override {
    Sha256 digest;
    int64_t written = 0;
    Pipeline<std::string> parts(
        connection_.options().parallel,
        [&](const std::string& part) -> absl::Status {
          digest.Add(part);
          GW_RETURN_IF_ERROR(file.WriteAt(written, part));
          written += std::ssize(part);
          return absl::OkStatus();
        });
    const int64_t part_bytes = connection_.options().part_bytes;
    for (int64_t at = 0; at < bytes; at += part_bytes) {
      const int64_t end = std::min(bytes, at + part_bytes);
      GW_RETURN_IF_ERROR(
          parts.Add([=, this] { return ReadRange(prefix_ + key, at, end); }));
    }
    GW_RETURN_IF_ERROR(parts.Finish());
    if (bytes == 0) {
      GW_RETURN_IF_ERROR(Get(key, 0, nullptr).status());
    }
    return digest.Finish();
  }

  absl::StatusOr<std::vector<std::string>> List(
      const std::string& prefix) override {
    return ListPages(prefix, false);
  }

  absl::StatusOr<std::vector<std::string>> ListSegments(
      const std::string& prefix) override {
    return ListPages(prefix, true);
  }

  absl::Status Delete(const std::string& key) override {
    const absl::Status status =
        connection_.Send({.method = "DELETE", .key = prefix_ + key}).status();
    return absl::IsNotFound(status) ? absl::OkStatus() : status;
  }

  absl::Status AbortUploads(
      const std::string& prefix,
      const std::function<bool(const std::string&)>& is_left) override {
    while (true) {
      bool aborted = false;
      GW_ASSIGN_OR_RETURN(
          const S3Answer answer,
          connection_.Send(
              {.query = {{"prefix", prefix_ + prefix}, {"uploads", ""}}}));
      const S3Uploads uploads = ParseUploads(answer.body);
      if (!uploads.valid) return Unexpected("no list of uploads");
      for (const auto& [key, id] : uploads.uploads) {
        // Not every store looks at the prefix.
        if (!key.starts_with(prefix_ + prefix)) continue;
        if (!is_left(key.substr(prefix_.size()))) continue;
        aborted = true;
        const absl::Status status = Abort(key, id);
        if (!status.ok() && !absl::IsNotFound(status)) return status;
      }
      if (!uploads.truncated || !aborted) return absl::OkStatus();
    }
  }

 private:
  static absl::StatusOr<std::string> ReadPart(File& file, int64_t begin,
                                              int64_t end) {
    std::string part(static_cast<size_t>(end - begin), 0);
    GW_ASSIGN_OR_RETURN(const int64_t got,
                        file.ReadAt(begin, end - begin, part.data()));
    if (got != end - begin) return WrongSize();
    return part;
  }

  absl::StatusOr<std::string> ReadRange(const std::string& key, int64_t begin,
                                        int64_t end) {
    std::string part(static_cast<size_t>(end - begin), 0);
    const std::string range =
        "bytes=" + std::to_string(begin) + "-" + std::to_string(end - 1);
    GW_ASSIGN_OR_RETURN(const S3Answer answer,
                        connection_.Send({.key = key,
                                          .headers = {{"Range", range}},
                                          .out = part.data(),
                                          .most = end - begin}));
    if (answer.bytes != end - begin) return WrongSize();
    return part;
  }

  absl::StatusOr<std::string> UploadParts(const std::string& key,
                                          const std::string& id, File& file,
                                          int64_t bytes) {
    Sha256 digest;
    std::vector<std::string> etags;
    Pipeline<std::string> parts(connection_.options().parallel,
                                [&](std::string etag) {
                                  etags.push_back(std::move(etag));
                                  return absl::OkStatus();
                                });
    const int64_t part_bytes =
        std::max({connection_.options().part_bytes, kLeastPart,
                  (bytes + kMostParts - 1) / kMostParts});
    int64_t number = 0;
    for (int64_t at = 0; at < bytes; at += part_bytes) {
      GW_ASSIGN_OR_RETURN(std::string part,
                          ReadPart(file, at, std::min(bytes, at + part_bytes)));
      digest.Add(part);
      ++number;
      GW_RETURN_IF_ERROR(
          parts.Add([this, key, id, number,
                     part = std::move(part)]() -> absl::StatusOr<std::string> {
            GW_ASSIGN_OR_RETURN(
                S3Answer answer,
                connection_.Send(
                    {.method = "PUT",
                     .key = key,
                     .query = {{"partNumber", std::to_string(number)},
                               {"uploadId", id}},
                     .body = part}));
            if (answer.etag.empty()) return Unexpected("no ETag");
            return std::move(answer.etag);
          }));
    }
    GW_RETURN_IF_ERROR(parts.Finish());
    const std::string completion = CompletionOf(etags);
    GW_ASSIGN_OR_RETURN(const S3Answer done,
                        connection_.Send({.method = "POST",
                                          .key = key,
                                          .query = {{"uploadId", id}},
                                          .body = completion}));
    // It answers before it has done it, and may say in the body that it failed.
    if (const std::string code = ParseErrorCode(done.body); !code.empty()) {
      return ErrorBuilder(absl::StatusCode::kUnavailable, "STORAGE_UNREACHABLE")
          .Server()
          .With("value", code)
          .Message(
              "The object store could not put the parts of an upload "
              "together (" +
              code + "). It is tried again by itself.");
    }
    return digest.Finish();
  }

  absl::Status Abort(const std::string& key, const std::string& id) {
    return connection_
        .Send({.method = "DELETE", .key = key, .query = {{"uploadId", id}}})
        .status();
  }

  absl::StatusOr<std::vector<std::string>> ListPages(const std::string& prefix,
                                                     bool segments) {
    const size_t skip = prefix_.size();
    std::vector<std::string> found;
    S3Request request = {
        .query = {{"list-type", "2"}, {"prefix", prefix_ + prefix}}};
    if (segments) request.query["delimiter"] = "/";
    while (true) {
      GW_ASSIGN_OR_RETURN(const S3Answer answer, connection_.Send(request));
      const S3Listing page = ParseListing(answer.body);
      if (!page.valid) return Unexpected("no listing");
      for (const std::string& each : segments ? page.prefixes : page.keys) {
        if (!each.starts_with(prefix_ + prefix)) continue;
        if (segments) {
          const size_t begin = skip + prefix.size();
          found.push_back(each.substr(begin, each.size() - begin - 1));
        } else {
          found.push_back(each.substr(skip));
        }
      }
      if (page.next.empty()) return found;
      request.query["continuation-token"] = page.next;
    }
  }

  S3Connection connection_;
  const std::string prefix_;  // "", or ends with '/'
  const std::string url_;
};

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

void FillFromEnvironment(S3Options& options) {
  options.access_key = Environment("AWS_ACCESS_KEY_ID");
  options.secret_key = Environment("AWS_SECRET_ACCESS_KEY");
  options.session_token = Environment("AWS_SESSION_TOKEN");
  for (const char* name : {"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"}) {
    if (options.endpoint.empty()) options.endpoint = Environment(name);
  }
  for (const char* name : {"AWS_REGION", "AWS_DEFAULT_REGION"}) {
    if (options.region.empty()) options.region = Environment(name);
  }
  if (options.region.empty()) options.region = "us-east-1";
}

absl::StatusOr<std::unique_ptr<ObjectStore>> OpenS3(const S3Options& options) {
  if (!options.url.starts_with(kScheme)) {
    return Invalid("object_store", options.url,
                   "object_store must be s3://bucket or s3://bucket/prefix.");
  }
  const std::string rest = options.url.substr(kScheme.size());
  const size_t slash = std::min(rest.find('/'), rest.size());
  const std::string bucket = rest.substr(0, slash);
  std::string prefix = rest.substr(std::min(slash + 1, rest.size()));
  while (prefix.ends_with('/')) prefix.pop_back();
  if (bucket.empty() || !IsPlain(rest) || prefix.starts_with('/') ||
      rest.find("//") != std::string::npos ||
      rest.find("..") != std::string::npos) {
    return Invalid("object_store", options.url,
                   "object_store must be s3://bucket or s3://bucket/prefix, "
                   "of letters, digits, '-', '.', '_' and '/'.");
  }
  if (!prefix.empty()) prefix += '/';
  if (options.access_key.empty() || options.secret_key.empty()) {
    return Invalid("object_store", options.url,
                   "an object store needs AWS_ACCESS_KEY_ID and "
                   "AWS_SECRET_ACCESS_KEY in the server's environment.");
  }
  if (options.region.empty() || !IsPlain(options.region)) {
    return Invalid("object_store_region", options.region,
                   "object_store_region is no name of a region.");
  }
  std::string endpoint = options.endpoint;
  if (endpoint.empty()) {
    endpoint = "https://s3." + options.region + ".amazonaws.com";
  }
  while (endpoint.ends_with('/')) endpoint.pop_back();
  const bool http = endpoint.starts_with("http://");
  const size_t host = http ? 7 : 8;
  if ((!http && !endpoint.starts_with("https://")) || endpoint.size() <= host ||
      endpoint.find_first_of("/?#@", host) != std::string::npos) {
    return Invalid("object_store_endpoint", options.endpoint,
                   "object_store_endpoint must be https://host[:port] or "
                   "http://host[:port].");
  }
  // Later, it would look like a store that is away.
  if (!options.ca_file.empty() && !std::ifstream(options.ca_file).good()) {
    return Invalid("object_store_ca", options.ca_file,
                   "object_store_ca is no file that can be read.");
  }
  return std::make_unique<S3ObjectStore>(options, endpoint, bucket, prefix);
}

}  // namespace gradwire
