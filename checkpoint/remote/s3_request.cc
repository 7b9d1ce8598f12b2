// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/remote/s3_request.h"

#include <curl/curl.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <random>

#include "absl/time/time.h"
#include "base/check.h"
#include "base/error.h"
#include "checkpoint/remote/s3_xml.h"
#include "checkpoint/remote/sha256.h"

namespace gradwire {
namespace {

constexpr long kConnectSeconds = 10;
// Of what a refusal says.
constexpr size_t kMostErrorBytes = size_t{64} << 10;
constexpr const char* kEmptySha256 =
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

// As the signature wants it: all but what never needs it.
std::string Escape(std::string_view text, bool keep_slash) {
  static constexpr char kDigits[] = "0123456789ABCDEF";
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isalnum(byte) != 0 || c == '-' || c == '.' || c == '_' ||
        c == '~' || (keep_slash && c == '/')) {
      out += c;
    } else {
      out += '%';
      out += kDigits[byte >> 4];
      out += kDigits[byte & 15];
    }
  }
  return out;
}

std::string HostOf(const std::string& endpoint) {
  return endpoint.substr(endpoint.find("//") + 2);
}

// curl's, about once a second and more often while bytes flow.
int Progress(void* stopped, curl_off_t, curl_off_t, curl_off_t, curl_off_t) {
  return *static_cast<const std::atomic<bool>*>(stopped) ? 1 : 0;
}

struct Sink {
  const S3Request* request;
  S3Answer* answer;
  CURL* curl;
  bool too_large = false;
};

size_t TakeBody(char* data, size_t size, size_t count, void* to) {
  Sink& sink = *static_cast<Sink*>(to);
  const size_t bytes = size * count;
  long status = 0;
  curl_easy_getinfo(sink.curl, CURLINFO_RESPONSE_CODE, &status);
  if (status / 100 != 2) {
    const size_t left = kMostErrorBytes - sink.answer->body.size();
    sink.answer->body.append(data, std::min(bytes, left));
    return bytes;
  }
  const auto end = sink.answer->bytes + static_cast<int64_t>(bytes);
  if (end > sink.request->most) {
    sink.too_large = true;
    return 0;
  }
  if (sink.request->out != nullptr) {
    std::memcpy(sink.request->out + sink.answer->bytes, data, bytes);
  } else {
    sink.answer->body.append(data, bytes);
  }
  sink.answer->bytes = end;
  return bytes;
}

size_t TakeHeader(char* data, size_t size, size_t count, void* to) {
  S3Answer& answer = *static_cast<S3Answer*>(to);
  std::string line(data, size * count);
  constexpr std::string_view kName = "etag:";
  const bool is_etag =
      line.size() > kName.size() &&
      std::equal(kName.begin(), kName.end(), line.begin(), [](char a, char b) {
        return a == std::tolower(static_cast<unsigned char>(b));
      });
  if (is_etag) {
    line.erase(0, kName.size());
    line.erase(0, line.find_first_not_of(' '));
    line.erase(line.find_last_not_of("\r\n ") + 1);
    answer.etag = line;
  }
  return size * count;
}

absl::Status Unreachable(const std::string& what) {
  return ErrorBuilder(absl::StatusCode::kUnavailable, "STORAGE_UNREACHABLE")
      .Server()
      .With("value", what)
      .Message("The object store gives no answer (" + what +
               "). It is tried again by itself; if it stays so, look at the "
               "network between it and the server.");
}

absl::Status Corrupt() {
  return ErrorBuilder(absl::StatusCode::kDataLoss, "OBJECT_CORRUPT")
      .Server()
      .Message(
          "An object has another size than when it was stored. Delete the "
          "checkpoint from the object store, and store it again.");
}

// Of a status that is not 2xx.
absl::Status Refusal(const S3Answer& answer) {
  std::string code = ParseErrorCode(answer.body);
  if (code.empty()) code = "HTTP " + std::to_string(answer.status);
  if (answer.status == 412) {
    return ErrorBuilder(absl::StatusCode::kAlreadyExists, "OBJECT_EXISTS")
        .Server()
        .Message("There is already an object under the key.");
  }
  // A range behind the end.
  if (answer.status == 416) return Corrupt();
  if (answer.status == 404 && code != "NoSuchBucket") {
    return ErrorBuilder(absl::StatusCode::kNotFound, "OBJECT_NOT_FOUND")
        .Server()
        .Message("The object store has no such object.");
  }
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "OBJECT_STORE_REFUSED")
      .Server()
      .With("value", code)
      .Message("The object store refuses: " + code +
               ". Look at its bucket, region, keys and rights.");
}

bool MayPass(const S3Answer& answer) {
  // 409: two conditional requests at once. Codes behind 400 that say "later".
  const std::string code =
      answer.status == 400 ? ParseErrorCode(answer.body) : "";
  return answer.status / 100 == 5 || answer.status == 408 ||
         answer.status == 409 || answer.status == 429 ||
         code == "RequestTimeout" || code == "SlowDown";
}

}  // namespace

struct S3Connection::Handle {
  Handle() : curl(curl_easy_init()) { GW_CHECK(curl != nullptr); }
  ~Handle() { curl_easy_cleanup(curl); }
  Handle(const Handle&) = delete;
  CURL* const curl;
};

S3Connection::S3Connection(S3Options options, std::string endpoint,
                           std::string bucket)
    : options_(std::move(options)),
      endpoint_(std::move(endpoint)),
      bucket_(std::move(bucket)),
      host_("Host: " + HostOf(endpoint_)),
      sign_("aws:amz:" + options_.region + ":s3"),
      credentials_(options_.access_key + ":" + options_.secret_key) {
  static const CURLcode ready = curl_global_init(CURL_GLOBAL_DEFAULT);
  GW_CHECK(ready == CURLE_OK);
}

S3Connection::~S3Connection() = default;

void S3Connection::Stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }
  stop_.notify_all();
}

std::unique_ptr<S3Connection::Handle> S3Connection::Take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.empty()) return std::make_unique<Handle>();
  std::unique_ptr<Handle> handle = std::move(idle_.back());
  idle_.pop_back();
  return handle;
}

absl::StatusOr<S3Answer> S3Connection::Try(Handle& handle,
                                           const S3Request& request) const {
  CURL* const curl = handle.curl;
  // Connections stay open.
  curl_easy_reset(curl);
  std::string url = endpoint_ + "/" + bucket_;
  if (!request.key.empty()) url += "/" + Escape(request.key, true);
  char separator = '?';
  for (const auto& [name, value] : request.query) {
    url += separator + Escape(name, false) + "=" + Escape(value, false);
    separator = '&';
  }
  curl_slist* headers = nullptr;
  const auto add = [&](const std::string& line) {
    headers = curl_slist_append(headers, line.c_str());
    GW_CHECK(headers != nullptr);
  };
  // The port belongs to what is signed, which this libcurl leaves out.
  add(host_);
  add("x-amz-content-sha256: " +
      (request.body.empty() ? kEmptySha256 : Sha256::Of(request.body)));
  if (!options_.session_token.empty()) {
    add("x-amz-security-token: " + options_.session_token);
  }
  for (const auto& [name, value] : request.headers) add(name + ": " + value);

  S3Answer answer;
  Sink sink = {&request, &answer, curl};
  char reason[CURL_ERROR_SIZE] = "";
  curl_easy_setopt(curl, CURLOPT_URL, url.c_str());
  curl_easy_setopt(curl, CURLOPT_PATH_AS_IS, 1L);
  curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
  curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, &Progress);
  curl_easy_setopt(curl, CURLOPT_XFERINFODATA, &stopped_);
  curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, reason);
  curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
  curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT, kConnectSeconds);
  curl_easy_setopt(curl, CURLOPT_LOW_SPEED_LIMIT, 1L);
  curl_easy_setopt(curl, CURLOPT_LOW_SPEED_TIME,
                   std::max<long>(1, absl::ToInt64Seconds(options_.stall)));
  curl_easy_setopt(curl, CURLOPT_AWS_SIGV4, sign_.c_str());
  curl_easy_setopt(curl, CURLOPT_USERPWD, credentials_.c_str());
  if (!options_.ca_file.empty()) {
    curl_easy_setopt(curl, CURLOPT_CAINFO, options_.ca_file.c_str());
  }
  if (request.method == "PUT" || request.method == "POST") {
    add("Content-Type: application/octet-stream");
    curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE,
                     static_cast<curl_off_t>(request.body.size()));
    curl_easy_setopt(curl, CURLOPT_POSTFIELDS,
                     request.body.empty() ? "" : request.body.data());
  }
  if (request.method != "GET") {
    curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, request.method.c_str());
  }
  curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers);
  curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, &TakeBody);
  curl_easy_setopt(curl, CURLOPT_WRITEDATA, &sink);
  curl_easy_setopt(curl, CURLOPT_HEADERFUNCTION, &TakeHeader);
  curl_easy_setopt(curl, CURLOPT_HEADERDATA, &answer);
  const CURLcode code = curl_easy_perform(curl);
  curl_slist_free_all(headers);
  if (sink.too_large) return Corrupt();
  if (code != CURLE_OK) {
    return Unreachable(*reason != 0 ? reason : curl_easy_strerror(code));
  }
  long status = 0;
  curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
  answer.status = status;
  return answer;
}

absl::StatusOr<S3Answer> S3Connection::Send(const S3Request& request) {
  thread_local std::minstd_rand random{std::random_device{}()};
  std::unique_ptr<Handle> handle = Take();
  absl::StatusOr<S3Answer> answer = absl::UnknownError("not tried");
  absl::Duration pause = options_.pause;
  for (int left = options_.tries; left > 0; --left) {
    answer = Try(*handle, request);
    const bool again =
        answer.ok() ? MayPass(*answer) : absl::IsUnavailable(answer.status());
    if (!again || left == 1 || stopped_) break;
    // Not all that wait come back in the same moment.
    const absl::Duration wait =
        pause * std::uniform_real_distribution<>(0.5, 1.5)(random);
    std::unique_lock<std::mutex> lock(mutex_);
    stop_.wait_for(lock, absl::ToChronoNanoseconds(wait),
                   [this] { return stopped_.load(); });
    pause *= 2;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(handle));
  }
  if (!answer.ok()) return answer;
  if (MayPass(*answer)) {
    std::string what = ParseErrorCode(answer->body);
    if (what.empty()) what = "HTTP " + std::to_string(answer->status);
    return Unreachable(what);
  }
  if (answer->status / 100 != 2) return Refusal(*answer);
  return answer;
}

}  // namespace gradwire
