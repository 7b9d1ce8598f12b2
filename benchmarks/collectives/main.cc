// SPDX-License-Identifier: Apache-2.0
// Times all-gather and reduce-scatter between processes over loopback: one JSON
// line for each size of the full tensor. gbps counts what a rank sends; the
// word of rank 0 that there is another call is part of the time.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "base/check.h"
#include "benchmarks/kernels/json_line.h"
#include "benchmarks/kernels/timing.h"
#include "device/cpu_device.h"
#include "nlohmann/json.hpp"
#include "sharding/gloo/address_board.h"
#include "sharding/gloo/gloo_collectives.h"

ABSL_FLAG(int, rounds, 5, "timed rounds of each size");
ABSL_FLAG(std::string, commit, "", "commit of the build, for the record");

namespace gradwire {
namespace {

constexpr double kRoundSeconds = 0.2;

Tensor TensorOf(std::vector<float>& values, int64_t n) {
  return Tensor(values.data(), DType::kF32, {n});
}

// One rank's side of the calls, with a full tensor of `bytes`.
class Rank {
 public:
  Rank(Collectives& group, int64_t bytes)
      : group_(group),
        shard_n_(bytes / 4 / group.world()),
        full_(static_cast<size_t>(shard_n_ * group.world()), 1.0f),
        shard_(static_cast<size_t>(shard_n_), 1.0f) {}

  void AllGather() {
    Wait(group_.AllGather(*stream_, TensorOf(shard_, shard_n_),
                          TensorOf(full_, shard_n_ * group_.world())));
  }
  void ReduceScatter() {
    Wait(group_.ReduceScatter(*stream_,
                              TensorOf(full_, shard_n_ * group_.world()),
                              TensorOf(shard_, shard_n_), false));
  }
  void Check() {
    ReduceScatter();
    AllGather();
    for (const float value : full_) {
      GW_CHECK(value == static_cast<float>(group_.world()));
    }
  }
  // Rank 0 says whether there is another call.
  bool Another(bool more) {
    std::vector<float> word = {more ? 1.0f : 0.0f};
    Wait(group_.Broadcast(*stream_, TensorOf(word, 1), 0));
    return word[0] != 0;
  }
  double sent_bytes() const {
    return 4.0 * static_cast<double>(shard_n_ * (group_.world() - 1));
  }

 private:
  void Wait(Collectives::Ticket ticket) {
    GW_CHECK(group_.Wait(*stream_, ticket).ok());
  }

  Collectives& group_;
  CpuDevice device_{1};
  const std::unique_ptr<Stream> stream_ = device_.NewStream();
  const int64_t shard_n_;
  std::vector<float> full_, shard_;
};

void Measure(Collectives& group, const std::string& op, int64_t bytes) {
  Rank rank(group, bytes);
  rank.Check();
  const auto run = [&] {
    if (op == "all_gather") {
      rank.AllGather();
    } else {
      rank.ReduceScatter();
    }
  };
  if (group.rank() != 0) {
    while (rank.Another(false)) run();
    return;
  }
  const int rounds = absl::GetFlag(FLAGS_rounds);
  const auto call = [&](int) {
    rank.Another(true);
    run();
  };
  Time(call, 1, kRoundSeconds);  // so that TCP knows its windows
  const Timing t = Time(call, rounds, kRoundSeconds);
  rank.Another(false);
  RunInfo info;
  info.bench = "collectives";
  info.commit = absl::GetFlag(FLAGS_commit);
  info.device = "gloo over loopback";
  info.rounds = rounds;
  nlohmann::ordered_json line = NewLine(info, op);
  line["world"] = group.world();
  line["bytes"] = bytes;
  line["ms"] = {t.median * 1e3, t.min * 1e3, t.max * 1e3};
  line["gbps"] = rank.sent_bytes() / t.median * 1e-9;
  PrintLine(line);
}

void RunRank(int rank, int world, AddressBoard& board) {
  auto group =
      NewGlooCollectives({.rank = rank, .world = world}, board.ForRank(rank));
  GW_CHECK(group.ok());
  for (const std::string op : {"all_gather", "reduce_scatter"}) {
    for (int64_t bytes = 64 << 10; bytes <= 64 << 20; bytes *= 4) {
      Measure(**group, op, bytes);
    }
  }
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("times collectives over loopback");
  absl::ParseCommandLine(argc, argv);
  bool ok = true;
  for (const int world : {2, 4}) {
    gradwire::AddressBoard board(world);
    for (int rank = 0; rank < world; ++rank) {
      const pid_t pid = fork();
      GW_CHECK(pid >= 0);
      if (pid > 0) continue;
      gradwire::RunRank(rank, world, board);
      _exit(0);
    }
    for (int rank = 0; rank < world; ++rank) {
      int status;
      ok &= wait(&status) > 0 && status == 0;
    }
  }
  return ok ? 0 : 1;
}
