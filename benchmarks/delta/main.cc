// SPDX-License-Identifier: Apache-2.0
// What a training step's delta takes: the codec of checkpoint/delta beside XOR
// + zstd-1 of the same buffers, in turns, medians. One JSON line for each
// learning rate and number of steps, or for the weights of two snapshots
// (fine_tuning.py); GB/s count bytes of raw bf16.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "base/check.h"
#include "benchmarks/delta/snapshot_weights.h"
#include "benchmarks/delta/training_step.h"
#include "benchmarks/delta/xor_zstd.h"
#include "checkpoint/delta/apply.h"
#include "checkpoint/delta/encode.h"
#include "checkpoint/delta/interop.h"
#include "nlohmann/json.hpp"

ABSL_FLAG(int64_t, elements, 25165824, "weights");
ABSL_FLAG(int, rounds, 7, "timed rounds of each row");
ABSL_FLAG(int, threads, 1, "threads of the codec; the baseline has one");
ABSL_FLAG(bool, fast, false, "deltas whose streams are stored as they are");
ABSL_FLAG(int, rows, 10, "of the table");
ABSL_FLAG(std::string, before, "",
          "a file model.safetensors; with --after, in place of the table");
ABSL_FLAG(std::string, after, "", "the same later");
ABSL_FLAG(double, learning_rate, 0, "of the steps between the two");
ABSL_FLAG(int, steps, 1, "between the two");
ABSL_FLAG(std::string, commit, "", "commit of the build, for the record");

namespace gradwire {
namespace {

struct Row {
  double learning_rate;
  int steps;
};
// From one step of reinforcement learning to eight of pretraining.
constexpr Row kRows[] = {{1e-6, 1}, {3e-6, 1}, {1e-6, 8}, {1e-5, 1}, {3e-6, 8},
                         {3e-5, 1}, {1e-5, 8}, {1e-4, 1}, {3e-5, 8}, {1e-4, 8}};

double Seconds(const std::function<void()>& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  const std::chrono::duration<double> took =
      std::chrono::steady_clock::now() - begin;
  return took.count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Both codecs on one pair of weights.
class Contest {
 public:
  Contest(TrainedWeights weights, ThreadPool* pool)
      : weights_(std::move(weights)), pool_(pool), work_(weights_.before) {
    options_.prev_id = ComputeWeightId(Views(weights_.before));
    options_.base_id = options_.prev_id;
    options_.fast = absl::GetFlag(FLAGS_fast);
    options_.pool = pool;
  }

  void XorEncode() {
    xor_bytes_ = xor_.Encode(weights_.before, weights_.after);
  }
  void DeltaEncode() {
    delta_ =
        *EncodeDelta(Views(weights_.before), Views(weights_.after), options_);
  }
  void XorApply() { xor_.Apply(work_); }
  // Takes a copy of the file, as it has come.
  void DeltaApply(std::string file) {
    const auto delta = DeltaFile::Parse(std::move(file));
    GW_CHECK(delta.ok());
    std::string id = options_.prev_id;
    std::vector<MutableTensor> tensors;
    uint16_t* values = work_.data();
    for (const TensorInfo& tensor : weights_.tensors) {
      tensors.push_back({tensor, values});
      values += tensor.num_elements();
    }
    GW_CHECK(ApplyDelta(*delta, tensors, id, pool_).ok());
  }
  void Reset() { work_ = weights_.before; }
  void Check() const { GW_CHECK(work_ == weights_.after); }

  const std::string& delta() const { return delta_; }
  int64_t xor_bytes() const { return xor_bytes_; }
  int64_t sparse_bytes() const {
    return static_cast<int64_t>(
        EncodeSparseDelta(Views(weights_.before), Views(weights_.after))
            ->size());
  }

 private:
  std::vector<TensorView> Views(const std::vector<uint16_t>& values) const {
    std::vector<TensorView> views;
    const uint16_t* next = values.data();
    for (const TensorInfo& tensor : weights_.tensors) {
      views.push_back({tensor, next});
      next += tensor.num_elements();
    }
    return views;
  }

  const TrainedWeights weights_;
  ThreadPool* const pool_;
  DeltaOptions options_;
  XorZstd xor_;
  std::vector<uint16_t> work_;
  std::string delta_;
  int64_t xor_bytes_ = 0;
};

void Run(const Row& row, TrainedWeights weights, ThreadPool* pool) {
  const size_t elements = weights.before.size();
  int64_t changed = 0;
  for (size_t i = 0; i < weights.before.size(); ++i) {
    changed += weights.before[i] != weights.after[i];
  }
  const double bound = EntropyBound(weights);
  Contest contest(std::move(weights), pool);
  std::vector<double> xor_encode, xor_apply, delta_encode, delta_apply;
  // The first round warms up and checks.
  for (int round = 0; round <= absl::GetFlag(FLAGS_rounds); ++round) {
    xor_encode.push_back(Seconds([&] { contest.XorEncode(); }));
    delta_encode.push_back(Seconds([&] { contest.DeltaEncode(); }));
    contest.Reset();
    xor_apply.push_back(Seconds([&] { contest.XorApply(); }));
    contest.Check();
    contest.Reset();
    std::string file = contest.delta();
    delta_apply.push_back(
        Seconds([&] { contest.DeltaApply(std::move(file)); }));
    contest.Check();
    if (round > 0) continue;
    for (auto* times : {&xor_encode, &xor_apply, &delta_encode, &delta_apply}) {
      times->clear();
    }
  }
  const double bytes = 2 * static_cast<double>(elements);
  const double xor_bytes = static_cast<double>(contest.xor_bytes());
  const double delta_bytes = static_cast<double>(contest.delta().size());
  auto rate = [&](const std::vector<double>& times) {
    return bytes / Median(times) * 1e-9;
  };
  auto range = [&](std::vector<double> times) {
    const auto [min, max] = std::minmax_element(times.begin(), times.end());
    return std::vector<double>{bytes / *max * 1e-9, bytes / *min * 1e-9};
  };
  const nlohmann::ordered_json line = {
      {"bench", "delta"},
      {"commit", absl::GetFlag(FLAGS_commit)},
      {"learning_rate", row.learning_rate},
      {"steps", row.steps},
      {"threads", absl::GetFlag(FLAGS_threads)},
      {"changed", static_cast<double>(changed) / (bytes / 2)},
      {"bound", bound},
      {"xor_ratio", bytes / xor_bytes},
      {"xor_encode_gbps", rate(xor_encode)},
      {"xor_apply_gbps", rate(xor_apply)},
      {"ratio", bytes / delta_bytes},
      {"encode_gbps", rate(delta_encode)},
      {"encode_min_max", range(delta_encode)},
      {"apply_gbps", rate(delta_apply)},
      {"apply_min_max", range(delta_apply)},
      {"of_bound", bound / (bytes / delta_bytes)},
      {"size_against_xor", xor_bytes / delta_bytes},
      {"encode_against_xor", rate(delta_encode) / rate(xor_encode)},
      {"apply_against_xor", rate(delta_apply) / rate(xor_apply)},
      {"sparse_ratio", bytes / static_cast<double>(contest.sparse_bytes())}};
  std::printf("%s\n", line.dump().c_str());
  std::fflush(stdout);
}

void Main() {
  const int threads = absl::GetFlag(FLAGS_threads);
  std::unique_ptr<ThreadPool> pool;
  if (threads > 1) pool = std::make_unique<ThreadPool>(threads);
  if (const std::string before = absl::GetFlag(FLAGS_before); !before.empty()) {
    Run({absl::GetFlag(FLAGS_learning_rate), absl::GetFlag(FLAGS_steps)},
        ReadSnapshots(before, absl::GetFlag(FLAGS_after)), pool.get());
    return;
  }
  int left = absl::GetFlag(FLAGS_rows);
  for (const Row& row : kRows) {
    if (left-- <= 0) break;
    Run(row, Train(absl::GetFlag(FLAGS_elements), row.learning_rate, row.steps),
        pool.get());
  }
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("the delta codec beside XOR + zstd");
  absl::ParseCommandLine(argc, argv);
  gradwire::Main();
  return 0;
}
