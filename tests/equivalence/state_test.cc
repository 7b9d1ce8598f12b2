// SPDX-License-Identifier: Apache-2.0
// A training that is saved and loaded goes on as one that never stopped, bit
// for bit; on another number of ranks with the same weights and moments.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "tests/equivalence/sharded_job.h"
#include "trainer/trainer.h"

namespace gradwire {
namespace {

// A path that nothing has.
std::string Fresh(const std::string& name) {
  static int number = 0;
  const std::string path =
      testing::TempDir() + "/state_" + name + "_" + std::to_string(++number);
  std::filesystem::remove_all(path);
  return path;
}

SavedState Save(Job& job, const std::string& directory) {
  std::vector<SavedState> all(static_cast<size_t>(job.world()));
  job.OnAll([&](Rank& rank) {
    const auto saved = rank.trainer->SaveState(directory, {{"who", "a test"}});
    ASSERT_TRUE(saved.ok()) << saved.status();
    all[static_cast<size_t>(rank.rank)] = *saved;
  });
  return all[0];
}

// The reason on all ranks; "" if it was loaded.
std::string Load(Job& job, const std::string& directory, bool optimizer) {
  std::vector<std::string> all(static_cast<size_t>(job.world()));
  job.OnAll([&](Rank& rank) {
    const auto loaded = rank.trainer->LoadState(directory, optimizer);
    if (!loaded.ok()) {
      all[static_cast<size_t>(rank.rank)] = Reason(loaded.status());
    }
    EXPECT_TRUE(rank.trainer->is_valid());
  });
  for (const std::string& reason : all) EXPECT_EQ(reason, all[0]);
  return all[0];
}

OptimParams Params() {
  OptimParams params;
  params.learning_rate = 1e-2;
  params.weight_decay = 0.1;
  params.grad_clip_norm = 1;
  return params;
}

// Steps by number; the norms, which tell of all that was computed.
std::vector<double> Train(Job& job, uint32_t begin, uint32_t end) {
  std::vector<double> norms;
  for (uint32_t step = begin; step < end; ++step) {
    const auto data = Batch(job.config().vocab, step, kLengths);
    job.Forward(data, WithBackward());
    norms.push_back(job.Step(Params()).grad_norm);
  }
  return norms;
}

// Of each rank.
std::vector<std::string> Digests(Job& job) {
  std::vector<std::string> all(static_cast<size_t>(job.world()));
  job.OnAll([&](Rank& rank) {
    const auto digest = rank.trainer->StateDigest();
    ASSERT_TRUE(digest.ok()) << digest.status();
    EXPECT_EQ(digest->size(), 16u);
    all[static_cast<size_t>(rank.rank)] = *digest;
  });
  return all;
}

// (ranks, replicas, precision)
struct Shape {
  int world;
  int replicas;
  Precision precision;
  Precision moments;
};

class StateTest : public testing::TestWithParam<Shape> {
 protected:
  static TrainerOptions Options(const Shape& shape) {
    TrainerOptions options;
    options.precision = shape.precision;
    options.moment_precision = shape.moments;
    return options;
  }
  static Job New(const Shape& shape) {
    return Job("untied", shape.world, Options(shape), shape.replicas);
  }
};

TEST_P(StateTest, GoesOnAsIfItHadNeverStopped) {
  Job undisturbed = New(GetParam());
  const std::vector<double> want = Train(undisturbed, 0, 5);
  Job job = New(GetParam());
  Train(job, 0, 3);
  const std::string path = Fresh("middle");
  EXPECT_GT(Save(job, path).bytes, 0);
  // Elsewhere meanwhile; loading comes while the first units are gathered.
  Train(job, 10, 12);
  EXPECT_EQ(Load(job, path, true), "");
  EXPECT_EQ(job.trainer(0).optimizer_step(), 3);
  EXPECT_EQ(job.trainer(0).weight_version(), 3);
  EXPECT_EQ(Train(job, 3, 5),
            std::vector<double>(want.begin() + 3, want.end()));
  EXPECT_EQ(job.Weights(), undisturbed.Weights());
  // And in a job that was not there.
  Job other = New(GetParam());
  EXPECT_EQ(Load(other, path, true), "");
  Train(other, 3, 5);
  EXPECT_EQ(other.Weights(), undisturbed.Weights());
}

TEST_P(StateTest, ADigestTellsStatesApart) {
  Job job = New(GetParam()), same = New(GetParam());
  // What each step left behind, and before the first.
  std::vector<std::vector<std::string>> digests = {Digests(job)};
  EXPECT_EQ(Digests(same), digests[0]);
  const std::string path = Fresh("digest");
  for (uint32_t step = 0; step < 3; ++step) {
    Train(job, step, step + 1);
    Train(same, step, step + 1);
    digests.push_back(Digests(job));
    EXPECT_EQ(Digests(same), digests.back());
    if (step == 1) Save(job, path);
  }
  for (size_t i = 0; i < digests.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      for (size_t rank = 0; rank < digests[i].size(); ++rank) {
        EXPECT_NE(digests[i][rank], digests[j][rank]) << i << ", " << j;
      }
    }
  }
  // Neither a forward nor a skipped step changes the state.
  const auto data = Batch(job.config().vocab, 9, kLengths);
  job.Forward(data, WithBackward());
  EXPECT_EQ(Digests(job), digests[3]);
  job.OnAll([](Rank& rank) { rank.trainer->ZeroGrad(); });
  EXPECT_TRUE(job.Step(Params()).skipped);
  EXPECT_EQ(Digests(job), digests[3]);
  // A load takes it in a pass over what it has read.
  EXPECT_EQ(Load(job, path, true), "");
  EXPECT_EQ(Digests(job), digests[2]);
  Train(job, 2, 3);
  EXPECT_EQ(Digests(job), digests[3]);
  EXPECT_EQ(Load(job, path, false), "");
  EXPECT_NE(Digests(job), digests[2]) << "without its moments";
}

TEST_P(StateTest, AnotherNumberOfRanksLoadsTheSame) {
  Job job = New(GetParam());
  Train(job, 0, 2);
  const std::string path = Fresh("any");
  Save(job, path);
  for (const int world : {1, 2, 5}) {
    Shape shape = GetParam();
    shape.world = world;
    shape.replicas = 1;
    Job other = New(shape);
    EXPECT_EQ(Load(other, path, true), "");
    EXPECT_EQ(other.Weights(), job.Weights());
    // Back again: the moments were all there, too.
    const std::string again = Fresh("again");
    Save(other, again);
    Job back = New(GetParam());
    EXPECT_EQ(Load(back, again, true), "");
    Job direct = New(GetParam());
    EXPECT_EQ(Load(direct, path, true), "");
    EXPECT_EQ(Train(back, 2, 4), Train(direct, 2, 4));
    EXPECT_EQ(back.Weights(), direct.Weights());
  }
}

TEST_P(StateTest, WeightsAloneBeginWithNewMoments) {
  Job job = New(GetParam());
  Train(job, 0, 2);
  const std::string path = Fresh("weights");
  Save(job, path);
  Train(job, 2, 3);
  EXPECT_EQ(Load(job, path, false), "");
  EXPECT_EQ(job.trainer(0).optimizer_step(), 0);
  Job fresh = New(GetParam());
  EXPECT_EQ(Load(fresh, path, false), "");
  EXPECT_EQ(Train(job, 5, 7), Train(fresh, 5, 7));
  EXPECT_EQ(job.Weights(), fresh.Weights());
}

TEST_P(StateTest, WhatCannotBeLoadedChangesNothing) {
  Job job = New(GetParam());
  Train(job, 0, 1);
  const std::string path = Fresh("good");
  Save(job, path);
  const Values before = job.Weights();
  const auto data = Batch(job.config().vocab, 9, kLengths);
  job.Forward(data, WithBackward());
  const Values gradients = job.Gradients();

  EXPECT_EQ(Load(job, Fresh("nowhere"), true), "CHECKPOINT_NOT_FOUND");
  Job tied("tied", 1, Options(GetParam()));
  const std::string foreign = Fresh("foreign");
  Save(tied, foreign);
  EXPECT_EQ(Load(job, foreign, true), "CHECKPOINT_INCOMPATIBLE");
  // In the last file's last byte: only some of the ranks read it.
  const std::string damaged = Fresh("damaged");
  std::filesystem::copy(path, damaged);
  std::string last;
  for (const auto& entry : std::filesystem::directory_iterator(damaged)) {
    if (entry.path().extension() == ".data") {
      last = std::max(last, entry.path().string());
    }
  }
  std::fstream file(last, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(-1, std::ios::end);
  const char flipped = static_cast<char>(file.get() ^ 1);
  file.seekp(-1, std::ios::end);
  file.put(flipped);
  file.close();
  EXPECT_EQ(Load(job, damaged, true), "CHECKPOINT_CORRUPT");
  job.OnAll([&](Rank& rank) {
    EXPECT_EQ(Reason(rank.trainer->SaveState(path, {}).status()),
              "CHECKPOINT_EXISTS");
  });

  EXPECT_EQ(job.Weights(), before);
  EXPECT_EQ(job.Gradients(), gradients);
  EXPECT_EQ(job.trainer(0).optimizer_step(), 1);
  EXPECT_EQ(Load(job, path, true), "");
}

// One takes the place of another while ranks open it.
TEST_P(StateTest, AllRanksLoadTheSame) {
  Job job = New(GetParam());
  Train(job, 0, 1);
  const std::string one = Fresh("one"), other = Fresh("other");
  Save(job, one);
  Train(job, 1, 2);
  Save(job, other);
  Train(job, 2, 3);
  const Values before = job.Weights();
  std::vector<std::string> reasons(static_cast<size_t>(job.world()));
  job.OnAll([&](Rank& rank) {
    const bool last = rank.rank + 1 == job.world();
    const auto loaded = rank.trainer->LoadState(last ? one : other, true);
    reasons[static_cast<size_t>(rank.rank)] = Reason(loaded.status());
    EXPECT_TRUE(rank.trainer->is_valid());
  });
  const bool alone = job.world() == 1;
  for (const std::string& reason : reasons) {
    EXPECT_EQ(reason, alone ? "" : "CHECKPOINT_REPLACED");
  }
  EXPECT_EQ(job.Weights() == before, !alone);
}

TEST_P(StateTest, WhatWasRetainedIsReleased) {
  Job job = New(GetParam());
  Train(job, 0, 1);
  const std::string path = Fresh("retained");
  Save(job, path);
  const auto data = Batch(job.config().vocab, 9, kLengths);
  job.Forward(data, Retain("a"));
  job.Forward(data, WithBackward());
  job.OnAll([&](Rank& rank) {
    const auto dropped = rank.trainer->LoadState(path, true);
    ASSERT_TRUE(dropped.ok());
    EXPECT_EQ(*dropped, 1);
    BatchShare share;
    Values d(rank.Own(data, share).size());
    EXPECT_EQ(Reason(rank.trainer->Backward("a", d, true).status()),
              "ACTIVATIONS_EXPIRED");
    const auto step = rank.trainer->OptimStep(Params());
    ASSERT_TRUE(step.ok());
    EXPECT_TRUE(step->skipped);
  });
}

constexpr auto kF32 = Precision::kF32, kBF16 = Precision::kBF16;

INSTANTIATE_TEST_SUITE_P(All, StateTest,
                         testing::Values(Shape{1, 1, kF32, kF32},
                                         Shape{1, 1, kBF16, kBF16},
                                         Shape{3, 1, kF32, kF32},
                                         Shape{2, 1, kBF16, kF32},
                                         Shape{4, 2, kBF16, kBF16}),
                         [](const testing::TestParamInfo<Shape>& info) {
                           return std::to_string(info.param.world) + "ranks" +
                                  std::to_string(info.param.replicas) +
                                  "groups" + std::to_string(info.index);
                         });

}  // namespace
}  // namespace gradwire
