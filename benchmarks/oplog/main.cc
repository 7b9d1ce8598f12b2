// SPDX-License-Identifier: Apache-2.0
// Times append and sync of the op-log beside a loop that writes the same bytes
// with pwrite and fdatasync and nothing else, call by call in turn: one JSON
// line for each payload and way. Both begin a new file after 64 MiB.
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "base/check.h"
#include "checkpoint/file_system.h"
#include "nlohmann/json.hpp"
#include "server/oplog/oplog.h"

ABSL_FLAG(std::string, directory, "",
          "where to write, on the disk to measure; empty: the system's "
          "directory for temporary files");
ABSL_FLAG(double, scale, 1, "how many times the usual number of calls");
ABSL_FLAG(std::string, commit, "", "commit of the build, for the record");

namespace gradwire {
namespace {

constexpr int64_t kFileBytes = int64_t{64} << 20;

double MillisecondsOf(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double, std::milli>(
             std::chrono::steady_clock::now() - begin)
      .count();
}

class BareFile {
 public:
  explicit BareFile(std::string path) : path_(std::move(path)) { Begin(); }
  ~BareFile() { close(fd_); }
  BareFile(const BareFile&) = delete;
  BareFile& operator=(const BareFile&) = delete;

  void Write(const std::string& bytes) {
    if (end_ + std::ssize(bytes) > kFileBytes && end_ > 0) {
      close(fd_);
      Begin();
    }
    GW_CHECK(pwrite(fd_, bytes.data(), bytes.size(), end_) ==
             std::ssize(bytes));
    GW_CHECK(fdatasync(fd_) == 0);
    end_ += std::ssize(bytes);
  }

 private:
  void Begin() {
    fd_ = open(path_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    GW_CHECK(fd_ >= 0);
    end_ = 0;
  }

  const std::string path_;
  int fd_ = -1;
  int64_t end_ = 0;
};

void Print(const char* way, int64_t payload_bytes, std::vector<double> ms,
           double other_p50) {
  std::sort(ms.begin(), ms.end());
  const auto at = [&](double share) {
    return ms[static_cast<size_t>(share * static_cast<double>(ms.size() - 1))];
  };
  nlohmann::ordered_json line = {
      {"bench", "oplog"},   {"commit", absl::GetFlag(FLAGS_commit)},
      {"way", way},         {"payload_bytes", payload_bytes},
      {"calls", ms.size()}, {"p50_ms", at(0.5)},
      {"p99_ms", at(0.99)}, {"max_ms", ms.back()}};
  if (other_p50 > 0) line["ratio"] = at(0.5) / other_p50;
  std::printf("%s\n", line.dump().c_str());
  std::fflush(stdout);
}

double Median(std::vector<double> ms) {
  std::sort(ms.begin(), ms.end());
  return ms[(ms.size() - 1) / 2];
}

void Run(const std::string& directory, int64_t payload_bytes, int calls) {
  std::string payload(static_cast<size_t>(payload_bytes), '\0');
  std::mt19937 random(1);
  for (char& byte : payload) byte = static_cast<char>(random());

  const std::string log_directory = directory + "/log";
  auto log = Oplog::Open(PosixFileSystem(), log_directory, OplogOptions());
  GW_CHECK(log.ok());
  BareFile bare(directory + "/bare");
  const auto append = [&] {
    const auto range = (*log)->Append({.epoch = 1, .payload = payload});
    GW_CHECK(range.ok());
    GW_CHECK((*log)->Sync(range->end).ok());
  };

  constexpr int kWarmUp = 3;
  std::vector<double> log_ms, bare_ms;
  for (int i = -kWarmUp; i < calls; ++i) {
    const double of_log = MillisecondsOf(append);
    const double of_bare = MillisecondsOf([&] { bare.Write(payload); });
    if (i < 0) continue;
    log_ms.push_back(of_log);
    bare_ms.push_back(of_bare);
    // Neither fills the disk, nor is removing part of the time.
    GW_CHECK((*log)->Trim((*log)->end() - kFileBytes).ok());
  }
  int64_t read = 0;
  GW_CHECK((*log)
               ->Read((*log)->begin(),
                      [&](const OplogRecord& record) {
                        if (record.header.type == OplogType::kOp) {
                          GW_CHECK(record.payload == payload);
                          ++read;
                        }
                        return absl::OkStatus();
                      })
               .ok());
  GW_CHECK(read > 0);
  Print("oplog", payload_bytes, log_ms, Median(bare_ms));
  Print("bare", payload_bytes, bare_ms, 0);
  std::filesystem::remove_all(log_directory);
}

void Main() {
  std::string parent = absl::GetFlag(FLAGS_directory);
  if (parent.empty()) parent = std::filesystem::temp_directory_path();
  std::string directory = parent + "/oplog_bench.XXXXXX";
  GW_CHECK(mkdtemp(directory.data()) != nullptr);
  const double scale = absl::GetFlag(FLAGS_scale);
  const auto calls = [&](int usual) {
    return std::max(1, static_cast<int>(usual * scale));
  };
  Run(directory, int64_t{64} << 10, calls(1000));
  Run(directory, int64_t{1} << 20, calls(300));
  Run(directory, int64_t{16} << 20, calls(60));
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("Times the op-log; see the head of main.cc.");
  absl::ParseCommandLine(argc, argv);
  gradwire::Main();
}
