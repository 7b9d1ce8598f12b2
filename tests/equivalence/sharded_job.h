// SPDX-License-Identifier: Apache-2.0
// Jobs of several ranks, each a thread with a trainer of its own, on tiny
// random models: what the tests of sharded training share.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "device/device.h"
#include "kernels/kernels.h"
#include "model/config.h"
#include "model/param_table.h"
#include "tests/equivalence/job_backend.h"
#include "trainer/rank_plan.h"
#include "trainer/trainer.h"

namespace gradwire {

// Models with more blocks than there are places for gathered ones. The first's
// embedding and head are larger than a block, and share a place; the others'
// are one, and they have biases. The second's embedding is small beside a
// micro-batch of several ranks: its gradient is summed as a table, not handed
// round by rows. The third's embedding fills its unit to the last element, the
// first's head does not.
struct Model {
  const char* name;
  const char* config;
};
inline constexpr Model kModels[] = {
    {"untied", R"({
      "model_type": "llama", "architectures": ["LlamaForCausalLM"],
      "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
      "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1301,
      "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
      "rope_theta": 10000.0, "hidden_act": "silu",
      "tie_word_embeddings": false})"},
    {"tied", R"({
      "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
      "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
      "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 61,
      "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
      "rope_theta": 10000.0, "hidden_act": "silu",
      "tie_word_embeddings": true})"},
    {"wide", R"({
      "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
      "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
      "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 1600,
      "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
      "rope_theta": 10000.0, "hidden_act": "silu",
      "tie_word_embeddings": true})"},
};

// Of a model whose name begins with this, the embedding of kBadToken is no
// number.
inline constexpr char kBroken[] = "broken ";
inline constexpr int32_t kBadToken = 7;

// Of a tied model whose name begins with this, the head has a table of its own,
// of the same values.
inline constexpr char kUntied[] = "untied ";

// Its directory, with random weights, made once.
std::string Directory(const std::string& name);

// Of a job; how the supervisor computes it does not matter here.
inline constexpr double kQuadratic = 0.01;

using Values = std::vector<std::vector<float>>;

// Odd lengths from 1 up, some weights 0 and some negative.
std::vector<TrainDatum> Batch(int64_t vocab, uint32_t seed,
                              const std::vector<int64_t>& lengths);
inline const std::vector<int64_t> kLengths = {7, 1, 13, 4, 31, 2, 5, 9};

// One rank's end of a job: what a test does with it runs on all ranks at once.
struct Rank {
  int rank = 0;
  int world = 1;
  Trainer* trainer = nullptr;

  // This rank's datums of a call, and how all of them are spread.
  std::vector<TrainDatum> Own(const std::vector<TrainDatum>& data,
                              BatchShare& share) const {
    std::vector<TrainDatum> own;
    share = BatchShare();
    for (const TrainDatum& datum : data) {
      share.tokens.push_back(static_cast<int64_t>(datum.tokens.size()));
      share.k.push_back(datum.k);
    }
    share.rank_of = AssignRanks(share.tokens, kQuadratic, world);
    for (size_t i = 0; i < data.size(); ++i) {
      if (share.rank_of[i] == rank) own.push_back(data[i]);
    }
    return own;
  }
};

// Another device, which fails when it is told to.
class FragileDevice : public Device {
 public:
  explicit FragileDevice(std::unique_ptr<Device> device)
      : device_(std::move(device)) {}

  Device& device() { return *device_; }
  // In the next forward, before it computes.
  void FailOnce() { fails_ = true; }

  std::string name() const override { return device_->name(); }
  int64_t AvailableBytes() const override { return device_->AvailableBytes(); }
  absl::StatusOr<std::unique_ptr<DeviceBuffer>> Allocate(
      int64_t bytes) override {
    return device_->Allocate(bytes);
  }
  std::unique_ptr<Stream> NewStream() override { return device_->NewStream(); }
  void CopyToHost(Stream& stream, const Tensor& from, void* to) override {
    device_->CopyToHost(stream, from, to);
  }
  void CopyFromHost(Stream& stream, const void* from,
                    const Tensor& to) override {
    device_->CopyFromHost(stream, from, to);
    // Of ids, which ranks do not agree by.
    if (!fails_ || to.dtype() != DType::kI32) return;
    fails_ = false;
    stream.Fail(absl::InternalError("this device has failed"));
  }
  void Copy(Stream& stream, const Tensor& from, const Tensor& to) override {
    device_->Copy(stream, from, to);
  }
  void Zero(Stream& stream, const Tensor& tensor) override {
    device_->Zero(stream, tensor);
  }
  bool IsHostMemory() const override { return device_->IsHostMemory(); }
  ThreadPool* host_threads() override { return device_->host_threads(); }

 private:
  const std::unique_ptr<Device> device_;
  bool fails_ = false;
};

class Job {
 public:
  // `replicas`: groups of ranks that each hold all of the model. `new_kernels`:
  // in place of the backend's.
  Job(const std::string& model, int world, TrainerOptions options,
      int replicas = 1, std::unique_ptr<Kernels> (*new_kernels)() = nullptr) {
    options.model_directory = Directory(model);
    ranks_.resize(static_cast<size_t>(world));
    members_.resize(ranks_.size());
    std::vector<Device*> devices;
    for (int r = 0; r < world; ++r) {
      devices_.push_back(std::make_unique<FragileDevice>(NewJobDevice()));
      devices.push_back(&devices_.back()->device());
    }
    collectives_ = NewJobCollectives(devices);
    if (replicas > 1) MakeGroups(world / replicas, replicas, devices);
    OnAll([&](Rank& rank) {
      Member& member = members_[static_cast<size_t>(rank.rank)];
      FragileDevice& device = this->device(rank.rank);
      member.kernels = new_kernels != nullptr ? new_kernels()
                                              : NewJobKernels(device.device());
      TrainerOptions own = options;
      own.collectives = collectives_[static_cast<size_t>(rank.rank)].get();
      if (!shards_.empty()) {
        own.shards = shards_[static_cast<size_t>(rank.rank)].get();
      }
      auto trainer = Trainer::Create(
          own, device, *member.kernels, [](const MemoryPlan&) {},
          [](double) {});
      ASSERT_TRUE(trainer.ok()) << trainer.status();
      member.trainer = *std::move(trainer);
      rank.trainer = member.trainer.get();
    });
  }

  int world() const { return static_cast<int>(ranks_.size()); }
  const ModelConfig& config() const { return members_[0].trainer->config(); }
  Trainer& trainer(int rank) {
    return *members_[static_cast<size_t>(rank)].trainer;
  }

  FragileDevice& device(int rank) {
    return *devices_[static_cast<size_t>(rank)];
  }

  void OnAll(const std::function<void(Rank&)>& body) {
    std::vector<std::thread> threads;
    for (int r = 0; r < world(); ++r) {
      Rank& rank = ranks_[static_cast<size_t>(r)];
      rank.rank = r;
      rank.world = world();
      threads.emplace_back([&body, &rank] { body(rank); });
    }
    for (std::thread& thread : threads) thread.join();
  }

  // The call's logprobs, by datum, and the metrics, which all ranks agree on.
  Values Forward(const std::vector<TrainDatum>& data,
                 const ForwardOptions& options,
                 std::map<std::string, double>* metrics = nullptr) {
    Values out(data.size());
    std::vector<std::map<std::string, double>> all(ranks_.size());
    OnAll([&](Rank& rank) {
      ForwardOptions own = options;
      const auto mine = rank.Own(data, own.share);
      auto outcome = rank.trainer->Forward(mine, own, [&](DatumLogprobs done) {
        EXPECT_EQ(own.share.rank_of[static_cast<size_t>(done.index)],
                  rank.rank);
        out[static_cast<size_t>(done.index)] = std::move(done.logprobs);
      });
      ASSERT_TRUE(outcome.ok()) << outcome.status();
      all[static_cast<size_t>(rank.rank)] = outcome->metrics;
    });
    for (const auto& one : all) EXPECT_EQ(one, all[0]);
    if (metrics != nullptr) *metrics = all[0];
    return out;
  }

  void Backward(const std::string& id, const std::vector<TrainDatum>& data,
                const Values& d_logprobs, bool* recomputed = nullptr) {
    std::vector<int> all(ranks_.size());
    OnAll([&](Rank& rank) {
      BatchShare share;
      rank.Own(data, share);
      Values own;
      for (size_t i = 0; i < data.size(); ++i) {
        if (share.rank_of[i] == rank.rank) own.push_back(d_logprobs[i]);
      }
      auto outcome = rank.trainer->Backward(id, own, false);
      ASSERT_TRUE(outcome.ok()) << outcome.status();
      all[static_cast<size_t>(rank.rank)] = outcome->recomputed ? 1 : 0;
    });
    EXPECT_EQ(all, std::vector<int>(all.size(), all[0]));
    if (recomputed != nullptr) *recomputed = all[0] != 0;
  }

  OptimOutcome Step(const OptimParams& params) {
    std::vector<OptimOutcome> all(ranks_.size());
    OnAll([&](Rank& rank) {
      auto outcome = rank.trainer->OptimStep(params);
      ASSERT_TRUE(outcome.ok()) << outcome.status();
      all[static_cast<size_t>(rank.rank)] = *outcome;
    });
    for (const OptimOutcome& one : all) EXPECT_EQ(one.metrics, all[0].metrics);
    return all[0];
  }

  // As rank `of` says it.
  Values Collect(
      absl::StatusOr<std::vector<float>> (Trainer::*get)(const std::string&),
      int of = 0) {
    const ParamTable table(config());
    Values out(table.rows().size());
    OnAll([&](Rank& rank) {
      for (size_t i = 0; i < out.size(); ++i) {
        auto values = (rank.trainer->*get)(table.rows()[i].hf_name);
        ASSERT_TRUE(values.ok()) << values.status();
        if (rank.rank == of) out[i] = *std::move(values);
      }
    });
    return out;
  }
  Values Gradients() { return Collect(&Trainer::Gradient); }
  Values Weights() { return Collect(&Trainer::Weight); }
  // By the first rank, since the beginning.
  int64_t BytesSent() const { return collectives_[0]->statistics().bytes_sent; }

 private:
  struct Member {
    std::unique_ptr<Kernels> kernels;
    std::unique_ptr<Trainer> trainer;
  };
  // Neighbours hold a model together.
  void MakeGroups(int shards, int replicas,
                  const std::vector<Device*>& devices) {
    std::vector<std::vector<std::unique_ptr<Collectives>>> across;
    for (int s = 0; s < shards; ++s) {
      std::vector<Device*> own;
      for (int r = 0; r < replicas; ++r) {
        own.push_back(devices[static_cast<size_t>(r * shards + s)]);
      }
      across.push_back(NewJobCollectives(own));
    }
    for (int r = 0; r < replicas; ++r) {
      const auto first = devices.begin() + r * shards;
      auto group = NewJobCollectives({first, first + shards});
      for (int s = 0; s < shards; ++s) {
        shards_.push_back(NewJobReplicated(
            *devices[static_cast<size_t>(r * shards + s)],
            std::move(group[static_cast<size_t>(s)]),
            std::move(across[static_cast<size_t>(s)][static_cast<size_t>(r)])));
      }
    }
  }

  // Destroyed from the last on: trainers before what they use.
  std::vector<std::unique_ptr<FragileDevice>> devices_;
  std::vector<std::unique_ptr<Collectives>> collectives_, shards_;
  std::vector<Member> members_;
  std::vector<Rank> ranks_;
};

// The gradient of the weighted sum of negative logprobs.
Values Negated(const std::vector<TrainDatum>& data);

ForwardOptions WithBackward();
ForwardOptions Retain(const std::string& id);

std::string Reason(const absl::Status& status);

}  // namespace gradwire
