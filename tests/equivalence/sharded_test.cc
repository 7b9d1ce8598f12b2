// SPDX-License-Identifier: Apache-2.0
// N ranks give what one rank gives: the same logprobs, gradients and weights
// within a computed tolerance; and the same bits in every run.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "kernels/reference/reference_kernels.h"
#include "model/param_table.h"
#include "sharding/layout.h"
#include "tests/equivalence/sharded_job.h"
#include "trainer/rank_plan.h"
#include "trainer/trainer.h"

namespace gradwire {
namespace {

// to = or += from.
void Add(const Values& from, bool first, Values& to) {
  if (first) {
    to = from;
    return;
  }
  for (size_t p = 0; p < to.size(); ++p) {
    for (size_t i = 0; i < to[p].size(); ++i) to[p][i] += from[p][i];
  }
}

// What `world` ranks must compute, made by one rank alone: each rank's
// micro-batches one after the other, and the sums over ranks and micro-batches
// in the order that is promised. The embedding's gradient is not summed but
// added to, rank by rank and row by row, as one rank does.
struct Expected {
  Values logprobs, gradients;
};
Expected ByHand(Job& one, int world, int64_t budget,
                const std::vector<TrainDatum>& data, int replicas = 1) {
  std::vector<int64_t> tokens;
  for (const TrainDatum& datum : data) {
    tokens.push_back(static_cast<int64_t>(datum.tokens.size()));
  }
  const std::vector<int> rank_of = AssignRanks(tokens, kQuadratic, world);
  // By rank: the indices of its datums, by micro-batch.
  std::vector<std::vector<std::vector<size_t>>> plans(
      static_cast<size_t>(world));
  size_t most = 0;
  for (int r = 0; r < world; ++r) {
    auto& plan = plans[static_cast<size_t>(r)];
    int64_t room = 0;
    for (size_t i = 0; i < data.size(); ++i) {
      if (rank_of[i] != r) continue;
      if (plan.empty() || tokens[i] > room) {
        plan.emplace_back();
        room = budget;
      }
      plan.back().push_back(i);
      room -= tokens[i];
    }
    most = std::max(most, plan.size());
  }
  Expected expected;
  expected.logprobs.resize(data.size());
  for (size_t m = 0; m < most; ++m) {
    Values sum, group;
    for (int r = 0; r < world; ++r) {
      Values gradients;
      one.OnAll([](Rank& rank) { rank.trainer->ZeroGrad(); });
      if (m < plans[static_cast<size_t>(r)].size()) {
        std::vector<TrainDatum> part;
        const auto& indices = plans[static_cast<size_t>(r)][m];
        for (const size_t i : indices) part.push_back(data[i]);
        const Values logprobs = one.Forward(part, WithBackward());
        for (size_t i = 0; i < indices.size(); ++i) {
          expected.logprobs[indices[i]] = logprobs[i];
        }
      }
      gradients = one.Gradients();
      const int shards = world / replicas;
      Add(gradients, r % shards == 0, group);
      if (r % shards == shards - 1) Add(group, r < shards, sum);
    }
    Add(sum, m == 0, expected.gradients);
  }
  if (replicas > 1 || one.config().tied_embeddings) return expected;
  one.OnAll([](Rank& rank) { rank.trainer->ZeroGrad(); });
  for (size_t m = 0; m < most; ++m) {
    for (const auto& plan : plans) {
      if (m >= plan.size()) continue;
      std::vector<TrainDatum> part;
      for (const size_t i : plan[m]) part.push_back(data[i]);
      one.Forward(part, WithBackward());
    }
  }
  expected.gradients[0] = one.Gradients()[0];
  return expected;
}

// The same, bit for bit; of a tied embedding, whose rows are added to the sum
// of the head's gradients, as near as sums of the same terms in another order
// are, if none of the `terms` is larger than the largest sum.
void ExpectSummed(const Values& got, const Values& want, bool tied,
                  double terms) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t p = tied ? 1 : 0; p < got.size(); ++p) {
    EXPECT_EQ(got[p], want[p]) << "parameter " << p;
  }
  if (!tied) return;
  ASSERT_EQ(got[0].size(), want[0].size());
  double largest = 0;
  for (const float g : want[0]) {
    largest = std::max(largest, std::abs(double{g}));
  }
  const double bound = terms * std::ldexp(largest, -24);
  for (size_t i = 0; i < got[0].size(); ++i) {
    ASSERT_NEAR(got[0][i], want[0][i], bound) << i;
  }
}

// |a - b| / |b|, of all elements together.
double Distance(const Values& a, const Values& b) {
  double difference = 0, norm = 0;
  for (size_t p = 0; p < b.size(); ++p) {
    for (size_t i = 0; i < b[p].size(); ++i) {
      const double off = double{a[p][i]} - b[p][i];
      difference += off * off;
      norm += double{b[p][i]} * b[p][i];
    }
  }
  return std::sqrt(difference / norm);
}

// Of the errors of two gradients, each of which is a sum of results that were
// rounded on their own way, a dozen in a block: they add like a random walk.
double Sigma(const ModelConfig& config, Precision precision) {
  const bool f32 = precision == Precision::kF32;
  const double layers = static_cast<double>(config.layers);
  const double terms = f32 ? static_cast<double>(config.ffn) : 1;
  return std::ldexp(1.0, f32 ? -24 : -8) *
         std::sqrt(2 * 12 * (2 * layers + 2) * terms);
}

constexpr int64_t kBudget = 16;

// Micro-batches of 16 tokens, one datum beyond it.
TrainerOptions Options(Precision precision,
                       int64_t activation_bytes = 16 << 20) {
  TrainerOptions options;
  options.precision = precision;
  options.micro_batch_tokens = kBudget;
  options.max_context = 32;
  options.activation_bytes = activation_bytes;
  return options;
}

class ShardedTest
    : public testing::TestWithParam<std::tuple<std::string, Precision, int>> {
 protected:
  std::string model() const { return std::get<0>(GetParam()); }
  Precision precision() const { return std::get<1>(GetParam()); }
  int world() const { return std::get<2>(GetParam()); }
  std::unique_ptr<Job> Make(int world, const TrainerOptions& options) const {
    return std::make_unique<Job>(model(), world, options);
  }
  std::unique_ptr<Job> Make(int world) const {
    return Make(world, Options(precision()));
  }
};

TEST_P(ShardedTest, SumsItsRanksGradientsInOrder) {
  auto one = Make(1), many = Make(world());
  const auto data = Batch(one->config().vocab, 1, kLengths);
  const Expected expected = ByHand(*one, world(), kBudget, data);
  EXPECT_EQ(many->Forward(data, {}), expected.logprobs);
  EXPECT_EQ(many->Forward(data, WithBackward()), expected.logprobs);
  // A rank's head adds a term in each of at most three micro-batches.
  const double tokens = std::accumulate(kLengths.begin(), kLengths.end(), 0.0);
  ExpectSummed(many->Gradients(), expected.gradients,
               one->config().tied_embeddings, tokens + 3 * world());
}

// The same tokens on all ranks, so that rows of the embedding's gradient have
// terms of all of them; also those where a rank's shard ends.
TEST_P(ShardedTest, AddsEqualTokensInOrder) {
  auto one = Make(1), many = Make(world());
  auto data = Batch(one->config().vocab, 1, std::vector<int64_t>(12, 5));
  const ParamTable table(one->config());
  const ShardLayout layout(table.unit_begins(), table.num_elements(), world());
  const auto end = static_cast<int32_t>(std::min(
      layout.unit(0).shard / one->config().hidden, one->config().vocab - 1));
  for (TrainDatum& datum : data) {
    datum.tokens = {end, 1, end, 0,
                    static_cast<int32_t>(one->config().vocab - 1)};
  }
  const Expected expected = ByHand(*one, world(), kBudget, data);
  many->Forward(data, WithBackward());
  ExpectSummed(many->Gradients(), expected.gradients,
               one->config().tied_embeddings, 5 * 12 + 3 * world());
}

class TiedRowsTest : public ShardedTest {};

// Bit for bit: rows of all ranks, behind the sum of the head's gradients. These
// are known apart by a model of the same values whose head is another table.
TEST_P(TiedRowsTest, AddsRowsBehindTheHeadsSum) {
  const auto many = Make(world());
  Job apart(kUntied + model(), 1, Options(precision()));
  const ParamTable table(many->config());
  const ShardLayout layout(table.unit_begins(), table.num_elements(), world());
  const int64_t vocab = many->config().vocab;
  // Two micro-batches of a datum for each rank, all of the same tokens, each of
  // which comes once: the embedding's gradient of a datum is its rows.
  auto data =
      Batch(vocab, 1,
            std::vector<int64_t>(static_cast<size_t>(2 * world()), kBudget));
  const std::vector<int64_t> tokens(data.size(), kBudget);
  for (TrainDatum& datum : data) {
    std::iota(datum.tokens.begin(), datum.tokens.end(), 5);
    datum.tokens[0] =
        static_cast<int32_t>(layout.unit(0).shard / many->config().hidden);
    datum.tokens[1] = static_cast<int32_t>(vocab - 1);
  }
  const std::vector<int> rank_of = AssignRanks(tokens, kQuadratic, world());
  std::vector<std::vector<size_t>> of_rank(static_cast<size_t>(world()));
  for (size_t i = 0; i < data.size(); ++i) {
    of_rank[static_cast<size_t>(rank_of[i])].push_back(i);
  }
  const ParamTable two_tables(apart.config());
  size_t head = 0;
  while (two_tables.rows()[head].group != ParamGroup::kHead) ++head;
  Values want;  // of the embedding only
  for (size_t m = 0; m < 2; ++m) {
    Values heads, rows;
    for (const auto& indices : of_rank) {
      ASSERT_EQ(indices.size(), 2u);
      apart.OnAll([](Rank& rank) { rank.trainer->ZeroGrad(); });
      apart.Forward({data[indices[m]]}, WithBackward());
      const Values gradients = apart.Gradients();
      Add({gradients[head]}, heads.empty(), heads);
      rows.push_back(gradients[0]);
    }
    Add(heads, m == 0, want);
    for (const auto& row : rows) Add({row}, false, want);
  }
  many->Forward(data, WithBackward());
  EXPECT_EQ(many->Gradients()[0], want[0]);
}

// Of so many tokens that their rows are more than the table: the sum of tables.
// Of few the rows, behind it in the same accumulation.
TEST_P(ShardedTest, SendsTablesOrRowsWhicheverIsLess) {
  TrainerOptions options = Options(precision());
  options.max_context = 64;
  options.micro_batch_tokens = 1 << 16;
  auto one = Make(1, options), many = Make(world(), options);
  const int64_t vocab = one->config().vocab;
  // Twice this is a table.
  const int64_t rows = vocab * 4 / (precision() == Precision::kF32 ? 4 : 2);
  const auto large = Batch(
      vocab, 1, std::vector<int64_t>(static_cast<size_t>(rows / 60 + 4), 60));
  const auto small = Batch(vocab, 2, {3, 4});
  std::vector<int64_t> sent = {many->BytesSent()};
  for (const auto& data : {large, small}) {
    one->Forward(data, WithBackward());
    many->Forward(data, WithBackward());
    sent.push_back(many->BytesSent());
  }
  const int64_t table = vocab * one->config().hidden * 4;
  EXPECT_GT(sent[1] - sent[0],
            sent[2] - sent[1] + table * (world() - 1) / world() / 2);
  EXPECT_LE(Distance(many->Gradients(), one->Gradients()),
            4 * Sigma(one->config(), precision()));
}

// Groups that each hold all of the model: the same, but for the order of sums.
TEST_P(ShardedTest, ReplicasSumTheirGroupsGradientsInOrder) {
  auto one = Make(1);
  for (const int shards : {1, 2}) {
    const int all = shards * world();
    for (const int64_t activation_bytes : {int64_t{16} << 20, int64_t{1}}) {
      Job many(model(), all, Options(precision(), activation_bytes), world());
      const auto data = Batch(one->config().vocab, 1, kLengths);
      const Expected expected = ByHand(*one, all, kBudget, data, world());
      EXPECT_EQ(many.Forward(data, WithBackward()), expected.logprobs);
      EXPECT_EQ(many.Gradients(), expected.gradients);
      OptimParams params;
      params.norm_metrics = GradientNormMetrics::kDetailed;
      const double norm = many.Step(params).grad_norm;
      double squares = 0;
      for (const auto& gradient : expected.gradients) {
        for (const float g : gradient) squares += double{g} * g;
      }
      EXPECT_NEAR(norm, std::sqrt(squares), 1e-12 * norm);
      many.Forward(data, Retain("a"));
      many.Backward("a", data, Negated(data));
      many.Step(params);
      // Every group holds the same weights.
      EXPECT_EQ(many.Collect(&Trainer::Weight, 0),
                many.Collect(&Trainer::Weight, all - 1));
    }
  }
}

// The rest of the ranks have nothing to do, and nothing to add.
TEST_P(ShardedTest, WithOneDatumEqualsOneRankBitForBit) {
  for (const Precision moments : {Precision::kF32, Precision::kBF16}) {
    TrainerOptions options = Options(precision());
    options.moment_precision = moments;
    auto one = Make(1, options), many = Make(world(), options);
    const auto data = Batch(one->config().vocab, 1, {9});
    OptimParams params;
    params.learning_rate = 1e-3;
    params.weight_decay = 0.1;
    for (int step = 0; step < 10; ++step) {
      ASSERT_EQ(many->Forward(data, WithBackward()),
                one->Forward(data, WithBackward()))
          << step;
      const OptimOutcome got = many->Step(params), want = one->Step(params);
      // In another order, in float64.
      EXPECT_NEAR(got.grad_norm, want.grad_norm, 1e-12 * want.grad_norm);
    }
    EXPECT_EQ(many->Weights(), one->Weights());
  }
}

TEST_P(ShardedTest, TrainsAsOneRankDoes) {
  auto one = Make(1), many = Make(world()), again = Make(world());
  const int64_t vocab = one->config().vocab;
  const double sigma = Sigma(one->config(), precision());
  OptimParams params;
  params.learning_rate = 1e-3;
  params.grad_clip_norm = 0.5;
  params.norm_metrics = GradientNormMetrics::kDetailed;
  // Steps as long as the gradient is large: no element's step is its
  // gradient's sign, which noise could turn.
  params.eps = 1.0;
  params.normalization = GradientNormalization::kNumLossTokens;
  const Values before = one->Weights();
  for (uint32_t step = 0; step < 10; ++step) {
    // Accumulates two calls, one of them a custom step.
    const auto first = Batch(vocab, 1 + 2 * step, kLengths);
    const auto second = Batch(vocab, 2 + 2 * step, {5, 3, 8});
    OptimOutcome want;
    for (Job* job : {one.get(), many.get(), again.get()}) {
      job->Forward(first, WithBackward());
      job->Forward(second, Retain("a"));
      job->Backward("a", second, Negated(second));
      if (job == one.get() || step > 0) continue;
      EXPECT_LE(Distance(job->Gradients(), one->Gradients()), 4 * sigma);
    }
    EXPECT_EQ(many->Gradients(), again->Gradients());
    for (Job* job : {one.get(), many.get(), again.get()}) {
      const OptimOutcome outcome = job->Step(params);
      if (job == one.get()) want = outcome;
      EXPECT_EQ(outcome.loss_tokens, want.loss_tokens);
      EXPECT_EQ(outcome.sequences, want.sequences);
      for (const auto& [name, value] : want.metrics) {
        ASSERT_NEAR(outcome.metrics.at(name), value,
                    4 * sigma * std::abs(value))
            << name;
      }
      if (step == 0) {
        EXPECT_LT(outcome.clip_factor, 1);
      }
    }
  }
  EXPECT_EQ(many->Weights(), again->Weights());
  // Of what training has changed, not of the weights.
  Values got = many->Weights(), want = one->Weights();
  for (size_t p = 0; p < before.size(); ++p) {
    for (size_t i = 0; i < before[p].size(); ++i) {
      got[p][i] -= before[p][i];
      want[p][i] -= before[p][i];
    }
  }
  // The steps' errors, and the rounding of a weight once a step.
  double norm = 0, weights = 0;
  for (size_t p = 0; p < before.size(); ++p) {
    for (size_t i = 0; i < before[p].size(); ++i) {
      norm += double{want[p][i]} * want[p][i];
      weights += double{before[p][i]} * before[p][i];
    }
  }
  EXPECT_GT(norm, 0);
  EXPECT_LE(Distance(got, want),
            4 * sigma * std::sqrt(10.0) +
                std::ldexp(1.0, -24) * std::sqrt(10 * weights / norm));
}

TEST_P(ShardedTest, RetainedRecomputedAndKeptGatheredAreTheSame) {
  auto fused = Make(world());
  const auto data = Batch(fused->config().vocab, 3, kLengths);
  const Values logprobs = fused->Forward(data, WithBackward());
  const Values expected = fused->Gradients();
  TrainerOptions gathered = Options(precision());
  gathered.reshard_after_forward = false;
  // Room for the inputs of one micro-batch's layers: the longest datum's rank
  // keeps it, or another's; the others make theirs again.
  for (const auto& [options, recomputed] :
       {std::pair(Options(precision()), false),
        {gathered, false},
        {Options(precision(), 1), true}}) {
    auto job = Make(world(), options);
    for (int round = 0; round < 2; ++round) {
      EXPECT_EQ(job->Forward(data, Retain("a")), logprobs);
      bool again = false;
      job->Backward("a", data, Negated(data), &again);
      EXPECT_EQ(again, recomputed);
      EXPECT_EQ(job->Gradients(), expected);
      job->OnAll([](Rank& rank) { rank.trainer->ZeroGrad(); });
    }
    // Only one rank has something to compute, and again.
    job->Forward({data[4]}, Retain("b"));
    bool again = false;
    job->Backward("b", {data[4]}, Negated({data[4]}), &again);
    EXPECT_EQ(again, recomputed);
  }
}

// A call with fewer datums than ranks, with none, and with gradients of zero.
TEST_P(ShardedTest, RanksWithoutWorkTakePart) {
  auto one = Make(1), many = Make(world());
  auto data = Batch(one->config().vocab, 4, {3, 5});
  const Expected expected = ByHand(*one, world(), kBudget, data);
  EXPECT_EQ(many->Forward({}, {}), Values());
  EXPECT_EQ(many->Forward({}, WithBackward()), Values());
  EXPECT_EQ(many->Forward(data, Retain("a")), expected.logprobs);
  many->Backward("a", data, {{}, {}});
  many->Forward(data, Retain("b"));
  many->Backward("b", data, Negated(data));
  for (TrainDatum& datum : data) {
    std::fill(datum.weights.begin(), datum.weights.end(), 0.0f);
  }
  many->Forward(data, WithBackward());
  ExpectSummed(many->Gradients(), expected.gradients,
               one->config().tied_embeddings, 8 + 2 * world());
}

// What one rank finds, all of them say, and go on.
TEST_P(ShardedTest, AnErrorOfOneRankIsOneOfAll) {
  auto job = Make(world());
  const auto data = Batch(job->config().vocab, 5, kLengths);
  job->Forward(data, Retain("a"));
  job->OnAll([&](Rank& rank) {
    BatchShare share;
    Values d(rank.Own(data, share).size());
    // Only the last rank's gradients have a wrong shape.
    if (rank.rank == rank.world - 1) d.at(0).resize(1000, 1.0f);
    const auto outcome = rank.trainer->Backward("a", d, false);
    EXPECT_EQ(Reason(outcome.status()), "SHAPE_MISMATCH");
    EXPECT_EQ(GetErrorDetail(outcome.status())->metadata.at("value"), "1000");
    // Of a rank that has lost what the others still have.
    if (rank.rank == 0) rank.trainer->Release("a");
    const auto gone = rank.trainer->Backward(
        "a", Values(rank.Own(data, share).size()), false);
    EXPECT_EQ(Reason(gone.status()), "ACTIVATIONS_EXPIRED");
    OptimParams params;
    params.expected_ops = 7;
    EXPECT_EQ(Reason(rank.trainer->OptimStep(params).status()),
              "ACCUMULATION_MISMATCH");
  });
  auto fresh = Make(world());
  job->Forward(data, WithBackward());
  fresh->Forward(data, WithBackward());
  EXPECT_EQ(job->Gradients(), fresh->Gradients());
}

// A rank's device fails in a forward, at once or where it is made again: nobody
// waits, all tell of it, and the next call is as ever.
TEST_P(ShardedTest, ADeviceThatFailsFailsTheCall) {
  for (const int64_t activation_bytes : {int64_t{16} << 20, int64_t{1}}) {
    Job job(model(), world(), Options(precision(), activation_bytes));
    const auto data = Batch(job.config().vocab, 11, kLengths);
    const Values good = job.Forward(data, WithBackward());
    const Values expected = job.Gradients();
    job.Forward(data, Retain("a"));
    job.OnAll([&](Rank& rank) {
      const bool fails = rank.rank == rank.world - 1;
      ForwardOptions options = WithBackward();
      const auto own = rank.Own(data, options.share);
      if (fails) job.device(rank.rank).FailOnce();
      EXPECT_EQ(Reason(rank.trainer->Forward(own, options, [](DatumLogprobs) {})
                           .status()),
                "this device has failed");
      if (fails) job.device(rank.rank).FailOnce();
      Values d(own.size());
      for (size_t i = 0; i < own.size(); ++i) {
        d[i].assign(own[i].tokens.size(), 1.0f);
      }
      EXPECT_EQ(Reason(rank.trainer->Backward("a", d, false).status()),
                "this device has failed");
      EXPECT_EQ(Reason(rank.trainer->OptimStep({}).status()),
                "GRADIENTS_TAINTED");
    });
    EXPECT_EQ(job.Forward(data, WithBackward()), good);
    EXPECT_EQ(job.Gradients(), expected);
  }
}

// As a GPU's do, the reference's kernels keep no exponentials of the head.
TEST_P(ShardedTest, KernelsThatKeepNothing) {
  Job one(model(), 1, Options(precision()), 1, NewReferenceKernels);
  Job many(model(), world(), Options(precision()), 1, NewReferenceKernels);
  const auto data = Batch(one.config().vocab, 1, {7, 1, 13, 4});
  const Expected expected = ByHand(one, world(), kBudget, data);
  EXPECT_EQ(many.Forward(data, WithBackward()), expected.logprobs);
  ExpectSummed(many.Gradients(), expected.gradients,
               one.config().tied_embeddings, 25.0 + 3 * world());
}

// Not of a tied head, all of whose logits would be broken.
class BrokenModelTest : public ShardedTest {};

// A rank's forward gives no numbers: in a call of several micro-batches, and
// where activations are made again.
TEST_P(BrokenModelTest, AFailureHalfWayIsOneOfAll) {
  for (const int64_t activation_bytes : {int64_t{16} << 20, int64_t{1}}) {
    Job job(kBroken + model(), world(), Options(precision(), activation_bytes));
    auto data = Batch(job.config().vocab, 8, kLengths);
    for (TrainDatum& datum : data) {
      std::replace(datum.tokens.begin(), datum.tokens.end(), kBadToken, 8);
    }
    const Values good = job.Forward(data, WithBackward());
    const Values expected = job.Gradients();
    auto bad = data;
    bad[2].tokens[3] = kBadToken;
    job.OnAll([&](Rank& rank) {
      for (const bool backward : {true, false}) {
        ForwardOptions options = backward ? WithBackward() : Retain("a");
        const auto own = rank.Own(bad, options.share);
        const auto outcome =
            rank.trainer->Forward(own, options, [](DatumLogprobs) {});
        EXPECT_EQ(Reason(outcome.status()), "NONFINITE_OUTPUT");
        EXPECT_EQ(GetErrorDetail(outcome.status())->metadata.at("datum_index"),
                  "2");
      }
      EXPECT_EQ(Reason(rank.trainer->OptimStep({}).status()),
                "GRADIENTS_TAINTED");
    });
    EXPECT_EQ(job.Forward(data, WithBackward()), good);
    EXPECT_EQ(job.Gradients(), expected);
  }
}

TEST_P(ShardedTest, ExportsTheSameBytes) {
  auto one = Make(1), many = Make(world());
  const auto data = Batch(one->config().vocab, 6, {9});
  std::vector<std::string> digests;
  for (Job* job : {one.get(), many.get()}) {
    job->Forward(data, WithBackward());
    job->Step({});
    const std::string directory = std::string(testing::TempDir()) + "/export" +
                                  std::to_string(job->world());
    std::filesystem::remove_all(directory);
    job->OnAll([&](Rank& rank) {
      auto outcome = rank.trainer->Export(directory);
      ASSERT_TRUE(outcome.ok()) << outcome.status();
      if (rank.rank == 0) digests.push_back(outcome->digest);
    });
    // And again where it cannot be written: all ranks say so, and live on.
    job->OnAll([&](Rank& rank) {
      EXPECT_FALSE(rank.trainer->Export("/proc/none/export").ok());
    });
    EXPECT_TRUE(std::filesystem::exists(directory + "/config.json"));
  }
  EXPECT_EQ(digests[0], digests[1]);
}

TEST_P(ShardedTest, ExportsTheSameFilesOfALargeModel) {
  TrainerOptions options = Options(precision());
  options.snapshot_shard_bytes = 1000;
  auto one = Make(1, options), many = Make(world(), options);
  std::vector<std::string> digests;
  for (Job* job : {one.get(), many.get()}) {
    const std::string directory = std::string(testing::TempDir()) + "/shards" +
                                  std::to_string(job->world());
    std::filesystem::remove_all(directory);
    job->OnAll([&](Rank& rank) {
      auto outcome = rank.trainer->Export(directory);
      ASSERT_TRUE(outcome.ok()) << outcome.status();
      if (rank.rank == 0) digests.push_back(outcome->digest);
    });
    EXPECT_TRUE(
        std::filesystem::exists(directory + "/model.safetensors.index.json"));
  }
  EXPECT_EQ(digests[0], digests[1]);
}

// A chain of deltas is the same files, whatever the number of ranks; and what
// an operation has made before is found by all of them.
TEST_P(ShardedTest, SavesTheSameDeltas) {
  auto one = Make(1), many = Make(world());
  std::vector<std::vector<ExportOutcome>> outcomes;
  for (Job* job : {one.get(), many.get()}) {
    const std::string directory = std::string(testing::TempDir()) + "/deltas" +
                                  std::to_string(job->world());
    std::filesystem::remove_all(directory);
    std::vector<ExportOutcome>& mine = outcomes.emplace_back();
    const auto save = [&](const std::string& name, const std::string& operation,
                          const std::string& want) {
      job->OnAll([&](Rank& rank) {
        SnapshotOptions options;
        options.directory = directory + "/" + name;
        options.type = SnapshotType::kAuto;
        options.operation = operation;
        auto outcome = rank.trainer->SaveSnapshot(options);
        const auto detail = GetErrorDetail(outcome.status());
        ASSERT_EQ(detail ? detail->reason : "", want) << outcome.status();
        if (rank.rank == 0 && outcome.ok()) mine.push_back(*outcome);
      });
    };
    save("a", "1", "");
    save("b", "2", "");
    save("b", "2", "");
    save("b", "3", "SNAPSHOT_EXISTS");
    ASSERT_EQ(mine.size(), 3u);
    EXPECT_EQ(mine[0].type, "base");
    EXPECT_EQ(mine[1].type, "delta");
    EXPECT_EQ(mine[1].parent, "a");
    EXPECT_EQ(mine[2].digest, mine[1].digest);
    EXPECT_NE(mine[2].reason, mine[1].reason);
  }
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(outcomes[0][i].digest, outcomes[1][i].digest);
    EXPECT_EQ(outcomes[0][i].weight_id, outcomes[1][i].weight_id);
  }
}

// Parameters, gradients and optimizer state of a rank are its share, no more.
TEST_P(ShardedTest, HoldsItsShare) {
  TrainerOptions options = Options(precision());
  auto one = Make(1, options), many = Make(world(), options);
  const MemoryPlan& whole = one->trainer(0).plan();
  for (int r = 0; r < world(); ++r) {
    const MemoryPlan& plan = many->trainer(r).plan();
    const auto state = [](const MemoryPlan& p) {
      return static_cast<double>(p.weights + p.gradients + p.optimizer);
    };
    EXPECT_LE(state(plan), 1.1 * state(whole) / world());
  }
}

TEST_P(ShardedTest, ForwardOnly) {
  TrainerOptions options = Options(precision());
  auto full = Make(world(), options);
  options.forward_only = true;
  auto job = Make(world(), options);
  const auto data = Batch(job->config().vocab, 7, kLengths);
  EXPECT_EQ(job->Forward(data, {}), full->Forward(data, {}));
}

std::string Name(
    const testing::TestParamInfo<std::tuple<std::string, Precision, int>>&
        info) {
  const auto& [model, precision, world] = info.param;
  return model + (precision == Precision::kF32 ? "F32On" : "BF16On") +
         std::to_string(world);
}

INSTANTIATE_TEST_SUITE_P(All, BrokenModelTest,
                         testing::Combine(testing::Values("untied"),
                                          testing::Values(Precision::kF32,
                                                          Precision::kBF16),
                                          testing::Values(2, 3, 4)),
                         Name);

INSTANTIATE_TEST_SUITE_P(All, TiedRowsTest,
                         testing::Combine(testing::Values("wide"),
                                          testing::Values(Precision::kF32,
                                                          Precision::kBF16),
                                          testing::Values(2, 3, 4)),
                         Name);

INSTANTIATE_TEST_SUITE_P(
    All, ShardedTest,
    testing::Combine(testing::Values("untied", "tied", "wide"),
                     testing::Values(Precision::kF32, Precision::kBF16),
                     testing::Values(2, 3, 4)),
    Name);

}  // namespace
}  // namespace gradwire
