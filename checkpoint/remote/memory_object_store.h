// SPDX-License-Identifier: Apache-2.0
// A bucket in memory that fails on request, for tests. It knows two things that
// a test must be able to see: a request that failed and yet was carried out,
// and uploads that were begun and not ended.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/remote/object_store.h"
#include "checkpoint/remote/sha256.h"

namespace gradwire {

class MemoryObjectStore final : public ObjectStore {
 public:
  enum class Fault {
    kUnreachable,  // nothing happens, once
    kAnswerLost,   // it happens, and the answer does not come
    kDead,         // this and every later call fail: the process is gone
  };

  // Calls are counted from 1.
  void FailAt(int64_t call, Fault fault) {
    fault_at_ = call;
    fault_ = fault;
    calls_ = 0;
    dead_ = false;
  }
  int64_t calls() const { return calls_; }
  // Calls back before the call of this number, from now on.
  void BeforeCall(int64_t call, std::function<void()> then) {
    FailAt(0, Fault::kUnreachable);
    then_at_ = call;
    then_ = std::move(then);
  }

  std::map<std::string, std::string> objects;
  std::set<std::string> uploads;  // begun and not ended

  void Stop() override { FailAt(1, Fault::kDead); }
  std::string url() const override { return "memory"; }
  absl::Status Check() override {
    return Do([] { return absl::OkStatus(); });
  }

  absl::Status PutNew(const std::string& key, std::string_view bytes) override {
    return Do([&]() -> absl::Status {
      if (objects.count(key) != 0) {
        return ErrorBuilder(absl::StatusCode::kAlreadyExists, "OBJECT_EXISTS")
            .Message("there is one");
      }
      objects[key] = std::string(bytes);
      return absl::OkStatus();
    });
  }

  absl::Status PutOver(const std::string& key, std::string_view bytes,
                       const std::string& version) override {
    return Do([&]() -> absl::Status {
      const auto object = objects.find(key);
      if (object == objects.end()) return NotFound();
      if (Sha256::Of(object->second) != version) {
        return ErrorBuilder(absl::StatusCode::kAlreadyExists, "OBJECT_EXISTS")
            .Message("there is another one");
      }
      object->second = std::string(bytes);
      return absl::OkStatus();
    });
  }

  absl::StatusOr<std::string> Upload(const std::string& key, File& file,
                                     int64_t bytes) override {
    // In two requests, as a large file is.
    GW_RETURN_IF_ERROR(Do([&] {
      uploads.insert(key);
      return absl::OkStatus();
    }));
    std::string content(static_cast<size_t>(bytes), 0);
    GW_RETURN_IF_ERROR(file.ReadAt(0, bytes, content.data()).status());
    GW_RETURN_IF_ERROR(Do([&] {
      uploads.erase(key);
      objects[key] = content;
      return absl::OkStatus();
    }));
    return Sha256::Of(content);
  }

  absl::StatusOr<std::string> Get(const std::string& key, int64_t,
                                  std::string* version) override {
    std::string content;
    GW_RETURN_IF_ERROR(Do([&]() -> absl::Status {
      const auto object = objects.find(key);
      if (object == objects.end()) return NotFound();
      content = object->second;
      return absl::OkStatus();
    }));
    if (version != nullptr) *version = Sha256::Of(content);
    return content;
  }

  absl::StatusOr<std::string> Download(const std::string& key, int64_t bytes,
                                       File& file) override {
    GW_ASSIGN_OR_RETURN(const std::string content, Get(key, bytes, nullptr));
    if (std::ssize(content) != bytes) {
      return ErrorBuilder(absl::StatusCode::kDataLoss, "OBJECT_CORRUPT")
          .Message("size");
    }
    GW_RETURN_IF_ERROR(file.WriteAt(0, content));
    return Sha256::Of(content);
  }

  absl::StatusOr<std::vector<std::string>> List(
      const std::string& prefix) override {
    std::vector<std::string> keys;
    GW_RETURN_IF_ERROR(Do([&] {
      for (const auto& [key, content] : objects) {
        if (key.starts_with(prefix)) keys.push_back(key);
      }
      return absl::OkStatus();
    }));
    return keys;
  }

  absl::StatusOr<std::vector<std::string>> ListSegments(
      const std::string& prefix) override {
    GW_ASSIGN_OR_RETURN(const auto keys, List(prefix));
    std::set<std::string> segments;
    for (const std::string& key : keys) {
      const size_t end = key.find('/', prefix.size());
      if (end == std::string::npos) continue;
      segments.insert(key.substr(prefix.size(), end - prefix.size()));
    }
    return std::vector<std::string>(segments.begin(), segments.end());
  }

  absl::Status Delete(const std::string& key) override {
    return Do([&] {
      objects.erase(key);
      return absl::OkStatus();
    });
  }

  absl::Status AbortUploads(
      const std::string& prefix,
      const std::function<bool(const std::string&)>& is_left) override {
    return Do([&] {
      std::erase_if(uploads, [&](const std::string& key) {
        return key.starts_with(prefix) && is_left(key);
      });
      return absl::OkStatus();
    });
  }

 private:
  static absl::Status NotFound() {
    return ErrorBuilder(absl::StatusCode::kNotFound, "OBJECT_NOT_FOUND")
        .Message("there is none");
  }

  template <typename Work>
  absl::Status Do(const Work& work) {
    if (++calls_ == then_at_) {
      then_at_ = 0;
      then_();
    }
    const absl::Status unreachable =
        ErrorBuilder(absl::StatusCode::kUnavailable, "STORAGE_UNREACHABLE")
            .Message("no answer");
    const bool faulty = calls_ == fault_at_;
    if (faulty && fault_ == Fault::kDead) dead_ = true;
    if (dead_ || (faulty && fault_ == Fault::kUnreachable)) return unreachable;
    const absl::Status status = work();
    return faulty ? unreachable : status;
  }

  int64_t calls_ = 0, fault_at_ = 0, then_at_ = 0;
  std::function<void()> then_;
  Fault fault_ = Fault::kUnreachable;
  bool dead_ = false;
};

}  // namespace gradwire
