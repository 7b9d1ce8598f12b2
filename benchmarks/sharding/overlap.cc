// SPDX-License-Identifier: Apache-2.0
// Whether communication hides behind computing: steps of ranks that are threads
// of this process, whose collectives take as long as a link of a given speed
// would. Prints a JSON line for each speed, medians: how long a step takes, how
// long it computes over a link without limits (less what it waits for), how
// long its collectives take alone, and the step over the longer of both.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "base/check.h"
#include "base/status.h"
#include "checkpoint/safetensors.h"
#include "device/cpu_device.h"
#include "kernels/cpu/cpu_kernels.h"
#include "model/config.h"
#include "model/param_table.h"
#include "nlohmann/json.hpp"
#include "sharding/local/local_collectives.h"
#include "sharding/queued_collectives.h"
#include "trainer/rank_plan.h"
#include "trainer/trainer.h"

ABSL_FLAG(int, world, 2, "ranks, of one thread each");
ABSL_FLAG(int, layers, 12, "blocks of the model");
ABSL_FLAG(int, hidden, 576, "width of the model");
ABSL_FLAG(int, vocab, 4096, "ids");
ABSL_FLAG(bool, tied, true, "the head and the embedding are one");
ABSL_FLAG(int64_t, sequences, 4, "sequences of a step");
ABSL_FLAG(int64_t, length, 256, "tokens of a sequence");
ABSL_FLAG(int, rounds, 5, "timed steps for each speed");
ABSL_FLAG(bool, keep_gathered, false, "weights stay between steps");
ABSL_FLAG(std::string, commit, "", "commit of the build, for the record");

namespace gradwire {
namespace {

using Clock = std::chrono::steady_clock;
// Of links that are tried, as multiples of the time that computing takes.
constexpr double kShares[] = {0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0};

double Since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

class IdleStream : public Stream {
 protected:
  void Synchronize() override {}
};

// Takes, for what a rank sends, as long as a link of `bytes_per_second`. 0: no
// longer than it takes. Remembers what it was asked for.
class SlowLink : public BlockingCollectives {
 public:
  SlowLink(std::unique_ptr<Collectives> group, const double* bytes_per_second)
      : group_(std::move(group)), bytes_per_second_(*bytes_per_second) {}
  int rank() const override { return group_->rank(); }
  int world() const override { return group_->world(); }
  absl::Status AllGather(const Tensor& shard, const Tensor& full) override {
    calls_.push_back({Call::kAllGather, shard.dtype(), shard.num_elements()});
    return Run((world() - 1) * shard.bytes(),
               [&] { return group_->AllGather(stream_, shard, full); });
  }
  absl::Status ReduceScatterParts(const Tensor& full, int64_t stride,
                                  const Tensor& shard,
                                  bool accumulate) override {
    calls_.push_back({Call::kReduceScatter, DType::kF32, shard.num_elements()});
    return Run((world() - 1) * shard.bytes(), [&] {
      return group_->ReduceScatterParts(stream_, full, stride, shard,
                                        accumulate);
    });
  }
  absl::Status AllReduce(const Tensor& values) override {
    calls_.push_back({Call::kAllReduce, values.dtype(), values.num_elements()});
    return Run(2 * values.bytes(),
               [&] { return group_->AllReduce(stream_, values); });
  }
  absl::Status Broadcast(const Tensor& values, int root) override {
    calls_.push_back(
        {Call::kBroadcast, values.dtype(), values.num_elements(), root});
    return Run(values.bytes(),
               [&] { return group_->Broadcast(stream_, values, root); });
  }
  void Interrupt() override { group_->Abort(absl::CancelledError("ended")); }
  void End() override { group_->Abort(absl::CancelledError("ended")); }
  int64_t bytes_sent() const override { return bytes_; }

  // REQUIRES, of both: no collective is queued.
  void Forget() { calls_.clear(); }
  // What it was asked for since Forget, again, one behind the other, with
  // nothing computed in between.
  absl::Status Repeat() {
    const std::vector<Call> calls = std::move(calls_);
    int64_t most = 0;
    for (const Call& call : calls) {
      most = std::max(most, call.elements * DTypeBytes(call.dtype));
    }
    std::vector<char> full(static_cast<size_t>(most * world()), 0);
    std::vector<char> shard(static_cast<size_t>(most), 0);
    for (const Call& call : calls) {
      const int64_t n = call.elements;
      const Tensor one(shard.data(), call.dtype, {n});
      const Tensor all(full.data(), call.dtype, {n * world()});
      absl::Status status;
      switch (call.kind) {
        case Call::kAllGather:
          status = AllGather(one, all);
          break;
        case Call::kReduceScatter:
          status = ReduceScatterParts(all, n, one, /*accumulate=*/false);
          break;
        case Call::kAllReduce:
          status = AllReduce(one);
          break;
        case Call::kBroadcast:
          status = Broadcast(one, call.root);
          break;
      }
      GW_RETURN_IF_ERROR(status);
    }
    return absl::OkStatus();
  }

 private:
  struct Call {
    enum { kAllGather, kReduceScatter, kAllReduce, kBroadcast } kind;
    DType dtype;
    int64_t elements;
    int root = 0;
  };

  absl::Status Run(int64_t bytes,
                   const std::function<Collectives::Ticket()>& collective) {
    const Clock::time_point start = Clock::now();
    const absl::Status status = group_->Wait(stream_, collective());
    bytes_ += bytes;
    if (bytes_per_second_ > 0) {
      std::this_thread::sleep_until(
          start + std::chrono::duration_cast<Clock::duration>(
                      std::chrono::duration<double>(static_cast<double>(bytes) /
                                                    bytes_per_second_)));
    }
    return status;
  }

  const std::unique_ptr<Collectives> group_;
  const double& bytes_per_second_;
  IdleStream stream_;
  std::atomic<int64_t> bytes_{0};
  std::vector<Call> calls_;
};

std::string WriteModel() {
  const std::string directory =
      (std::filesystem::temp_directory_path() /
       ("gradwire-overlap-" + std::to_string(getpid())))
          .string();
  std::filesystem::create_directories(directory);
  const int hidden = absl::GetFlag(FLAGS_hidden);
  const nlohmann::json json = {
      {"model_type", "llama"},
      {"architectures", {"LlamaForCausalLM"}},
      {"hidden_size", hidden},
      {"intermediate_size", hidden / 3 * 8},
      {"num_hidden_layers", absl::GetFlag(FLAGS_layers)},
      {"num_attention_heads", hidden / 64},
      {"num_key_value_heads", hidden / 64},
      {"vocab_size", absl::GetFlag(FLAGS_vocab)},
      {"max_position_embeddings", 8192},
      {"rms_norm_eps", 1e-5},
      {"rope_theta", 10000.0},
      {"hidden_act", "silu"},
      {"tie_word_embeddings", absl::GetFlag(FLAGS_tied)}};
  std::ofstream(directory + "/config.json") << json.dump();
  const auto config = ParseModelConfig(json.dump());
  GW_CHECK(config.ok());
  const ParamTable table(*config);
  std::vector<SafetensorsWriter::Row> rows;
  for (const ParamRow& row : table.rows()) {
    rows.push_back({row.hf_name, "F32", row.shape});
  }
  SafetensorsWriter writer(PosixFileSystem(), directory + "/model.safetensors",
                           rows);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  for (const ParamRow& row : table.rows()) {
    std::vector<float> values(static_cast<size_t>(row.num_elements), 1.0f);
    if (row.group != ParamGroup::kNorm) {
      for (float& value : values) value = normal(random);
    }
    writer.Append(values.data(), row.num_elements * 4);
  }
  GW_CHECK(writer.Finish().ok());
  return directory;
}

struct Rank {
  std::unique_ptr<CpuDevice> device = std::make_unique<CpuDevice>(1);
  std::unique_ptr<Kernels> kernels = NewCpuKernels();
  std::unique_ptr<Collectives> collectives;
  SlowLink* link = nullptr;  // of `collectives`
  std::unique_ptr<Trainer> trainer;
};

void OnAll(std::vector<Rank>& ranks, const std::function<void(Rank&)>& body) {
  std::vector<std::thread> threads;
  for (Rank& rank : ranks) threads.emplace_back([&] { body(rank); });
  for (std::thread& thread : threads) thread.join();
}

void Step(std::vector<Rank>& ranks) {
  const int64_t length = absl::GetFlag(FLAGS_length);
  const auto vocab = static_cast<uint32_t>(absl::GetFlag(FLAGS_vocab));
  const auto world = static_cast<int>(ranks.size());
  ForwardOptions options;
  options.backward = true;
  options.share.tokens.assign(
      static_cast<size_t>(absl::GetFlag(FLAGS_sequences)), length);
  options.share.k.assign(options.share.tokens.size(), 1);
  options.share.rank_of = AssignRanks(options.share.tokens, 0, world);
  OnAll(ranks, [&](Rank& rank) {
    std::mt19937 random(3);
    std::vector<TrainDatum> data;
    for (const int owner : options.share.rank_of) {
      TrainDatum datum;
      for (int64_t t = 0; t < length; ++t) {
        datum.tokens.push_back(static_cast<int32_t>(random() % vocab));
        datum.targets.push_back(static_cast<int32_t>(random() % vocab));
        datum.weights.push_back(1.0f);
      }
      if (owner == rank.collectives->rank()) data.push_back(std::move(datum));
    }
    GW_CHECK(rank.trainer->Forward(data, options, [](DatumLogprobs) {}).ok());
    GW_CHECK(rank.trainer->OptimStep({}).ok());
  });
}

struct Timed {
  double seconds = 0, waited = 0;
  int64_t bytes = 0;
};

Timed TimedStep(std::vector<Rank>& ranks) {
  for (Rank& rank : ranks) rank.link->Forget();
  const auto before = ranks[0].collectives->statistics();
  const Clock::time_point start = Clock::now();
  Step(ranks);
  Timed timed;
  timed.seconds = Since(start);
  const auto after = ranks[0].collectives->statistics();
  timed.waited = after.wait_seconds - before.wait_seconds;
  timed.bytes = after.bytes_sent - before.bytes_sent;
  return timed;
}

// Seconds that the collectives of the last step take alone.
double Communication(std::vector<Rank>& ranks) {
  // What the optimizer step has begun to gather is behind this.
  OnAll(ranks, [](Rank& rank) {
    IdleStream stream;
    float value = 0;
    const auto ticket =
        rank.collectives->AllReduce(stream, Tensor(&value, DType::kF32, {1}));
    GW_CHECK(rank.collectives->Wait(stream, ticket).ok());
  });
  const Clock::time_point start = Clock::now();
  OnAll(ranks, [](Rank& rank) { GW_CHECK(rank.link->Repeat().ok()); });
  return Since(start);
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void Main() {
  const std::string directory = WriteModel();
  const int world = absl::GetFlag(FLAGS_world);
  double bytes_per_second = 0;
  std::vector<Rank> ranks(static_cast<size_t>(world));
  auto groups = NewLocalCollectives(world, absl::Minutes(5));
  for (size_t r = 0; r < ranks.size(); ++r) {
    auto link =
        std::make_unique<SlowLink>(std::move(groups[r]), &bytes_per_second);
    ranks[r].link = link.get();
    ranks[r].collectives = NewQueuedCollectives(std::move(link));
  }
  OnAll(ranks, [&](Rank& rank) {
    TrainerOptions options;
    options.model_directory = directory;
    options.precision = Precision::kBF16;
    options.reshard_after_forward = !absl::GetFlag(FLAGS_keep_gathered);
    options.collectives = rank.collectives.get();
    auto trainer = Trainer::Create(
        options, *rank.device, *rank.kernels, [](const MemoryPlan&) {},
        [](double) {});
    GW_CHECK(trainer.ok());
    rank.trainer = *std::move(trainer);
  });
  (void)TimedStep(ranks);
  const Timed first = TimedStep(ranks);
  for (const double share : kShares) {
    const double limit = share == 0
                             ? 0
                             : static_cast<double>(first.bytes) /
                                   (share * (first.seconds - first.waited));
    std::vector<double> steps, computing, communicating;
    // In turns: the machine's own speed changes.
    for (int round = 0; round < absl::GetFlag(FLAGS_rounds); ++round) {
      bytes_per_second = 0;
      const Timed free = TimedStep(ranks);
      computing.push_back(free.seconds - free.waited);
      bytes_per_second = limit;
      steps.push_back(TimedStep(ranks).seconds);
      communicating.push_back(Communication(ranks));
    }
    const double step = Median(steps), compute = Median(computing);
    const double communication = Median(communicating);
    const nlohmann::ordered_json line = {
        {"bench", "overlap"},
        {"commit", absl::GetFlag(FLAGS_commit)},
        {"world", world},
        {"layers", absl::GetFlag(FLAGS_layers)},
        {"vocab", absl::GetFlag(FLAGS_vocab)},
        {"tied", absl::GetFlag(FLAGS_tied)},
        {"keep_gathered", absl::GetFlag(FLAGS_keep_gathered)},
        {"gbps", limit * 1e-9},
        {"step_ms", step * 1e3},
        {"compute_ms", compute * 1e3},
        {"communication_ms", communication * 1e3},
        {"of_the_longer", step / std::max(compute, communication)}};
    std::printf("%s\n", line.dump().c_str());
    std::fflush(stdout);
  }
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("whether communication hides behind computing");
  absl::ParseCommandLine(argc, argv);
  gradwire::Main();
  return 0;
}
