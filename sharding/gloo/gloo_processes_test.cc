// SPDX-License-Identifier: Apache-2.0
// Ranks as processes, one of which is killed or stopped in the middle of its
// work.
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/error.h"
#include "device/cpu_device.h"
#include "sharding/gloo/address_board.h"
#include "sharding/gloo/gloo_collectives.h"

namespace gradwire {
namespace {

constexpr int kWorld = 3;
constexpr int kVictim = 2;

// What a rank tells the test, in memory that both have.
struct Report {
  std::atomic<int> rounds;  // collectives done
  char error[128];          // "REASON rank N"
};

// A loop of collectives until one fails.
void RunRank(int rank, absl::Duration timeout, AddressBoard& board,
             Report& report) {
  auto made = NewGlooCollectives(
      {.rank = rank, .world = kWorld, .timeout = timeout}, board.ForRank(rank));
  GW_CHECK(made.ok());
  Collectives& group = **made;
  CpuDevice device(1);
  const std::unique_ptr<Stream> stream = device.NewStream();
  std::vector<float> full(3 << 18), shard(1 << 18), few(10);
  const auto tensor = [](std::vector<float>& values) {
    return Tensor(values.data(), DType::kF32,
                  {static_cast<int64_t>(values.size())});
  };
  absl::Status status;
  while (status.ok()) {
    group.ReduceScatter(*stream, tensor(full), tensor(shard), false);
    group.AllGather(*stream, tensor(shard), tensor(full));
    status = group.Wait(*stream, group.AllReduce(*stream, tensor(few)));
    report.rounds.fetch_add(1);
  }
  const auto detail = GetErrorDetail(status);
  GW_CHECK(detail.has_value());
  std::snprintf(report.error, sizeof(report.error), "%s rank %s",
                detail->reason.c_str(), detail->metadata.at("rank").c_str());
}

// Runs the ranks, sends the signal to the victim when all are at work, and
// returns what the others say. The victim is dead after that.
std::vector<std::string> ErrorsAfter(int signal, absl::Duration timeout) {
  AddressBoard board(kWorld);
  void* memory = mmap(nullptr, kWorld * sizeof(Report), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  GW_CHECK(memory != MAP_FAILED);
  Report* reports = static_cast<Report*>(memory);
  std::vector<pid_t> pids;
  for (int rank = 0; rank < kWorld; ++rank) {
    const pid_t pid = fork();
    GW_CHECK(pid >= 0);
    if (pid == 0) {
      RunRank(rank, timeout, board, reports[rank]);
      _exit(0);
    }
    pids.push_back(pid);
  }
  for (int rank = 0; rank < kWorld; ++rank) {
    while (reports[rank].rounds < 3) {
      int status;
      GW_CHECK(waitpid(pids[static_cast<size_t>(rank)], &status, WNOHANG) == 0);
      sched_yield();
    }
  }
  const absl::Time start = absl::Now();
  kill(pids[kVictim], signal);
  std::vector<std::string> errors;
  for (int rank = 0; rank < kWorld; ++rank) {
    if (rank == kVictim) continue;
    int status;
    waitpid(pids[static_cast<size_t>(rank)], &status, 0);
    EXPECT_EQ(status, 0) << "rank " << rank;
    errors.emplace_back(reports[rank].error);
  }
  // In time, with room for a busy machine.
  EXPECT_LT(absl::Now() - start, timeout + absl::Seconds(5));
  kill(pids[kVictim], SIGKILL);
  waitpid(pids[kVictim], nullptr, 0);
  munmap(memory, kWorld * sizeof(Report));
  return errors;
}

TEST(GlooProcessesTest, AKilledRankIsNamedLongBeforeTheTimeout) {
  for (int round = 0; round < 4; ++round) {
    const absl::Time start = absl::Now();
    const std::vector<std::string> want(kWorld - 1, "COLLECTIVE_FAILED rank 2");
    EXPECT_EQ(ErrorsAfter(SIGKILL, absl::Seconds(60)), want);
    EXPECT_LT(absl::Now() - start, absl::Seconds(30));
  }
}

TEST(GlooProcessesTest, AStoppedRankIsNamedAfterTheTimeout) {
  for (int round = 0; round < 4; ++round) {
    const std::vector<std::string> want(kWorld - 1,
                                        "COLLECTIVE_TIMEOUT rank 2");
    EXPECT_EQ(ErrorsAfter(SIGSTOP, absl::Seconds(1)), want);
  }
}

}  // namespace
}  // namespace gradwire
