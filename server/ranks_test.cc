// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <numeric>
#include <random>
#include <set>

#include "base/error.h"
#include "server/rank_collect.h"
#include "server/rank_cpus.h"
#include "server/rank_errors.h"
#include "server/rank_hello.h"
#include "server/rank_share.h"
#include "server/rank_verdict.h"
#include "server/version.h"

namespace gradwire {
namespace {

ErrorDetail Detail(const absl::Status& status) {
  return GetErrorDetail(status).value_or(ErrorDetail());
}
std::string Reason(const absl::Status& status) { return Detail(status).reason; }
std::string Rank(const absl::Status& status) {
  return Detail(status).metadata["rank"];
}

// ---- ShareRequest ----------------------------------------------------------

// Datum i has the token i; two to a chunk.
OperationRequest Datums(int count) {
  OperationRequest request;
  for (int i = 0; i < count; ++i) {
    if (i % 2 == 0) request.datums.emplace_back();
    request.datums.back()
        .add_datums()
        ->add_chunks()
        ->mutable_text()
        ->set_tokens(std::to_string(i));
  }
  request.command.mutable_forward();
  return request;
}

std::vector<int> TokensOf(const std::vector<v1::RankCommand>& commands) {
  std::vector<int> tokens;
  for (const v1::RankCommand& command : commands) {
    EXPECT_TRUE(command.has_datums());
    EXPECT_GT(command.datums().datums_size(), 0);
    for (const v1::Datum& datum : command.datums().datums()) {
      tokens.push_back(std::stoi(datum.chunks(0).text().tokens()));
    }
  }
  return tokens;
}

TEST(ShareRequestTest, EveryRankGetsItsDatumsInOrder) {
  const std::vector<int> rank_of = {2, 0, 0, 2, 2};
  std::vector<DatumShape> shapes = {
      {10, 1}, {11, 2}, {12, 1}, {13, 1}, {14, 3}};
  const Dispatch out = ShareRequest(Datums(5), shapes, rank_of, 3, 7);
  ASSERT_EQ(out.own.size(), 3u);
  EXPECT_EQ(TokensOf(out.own[0]), (std::vector<int>{1, 2}));
  EXPECT_EQ(TokensOf(out.own[1]), (std::vector<int>{}));
  EXPECT_EQ(TokensOf(out.own[2]), (std::vector<int>{0, 3, 4}));
  EXPECT_EQ(out.command.command_id(), 7);
  const v1::RankForward& forward = out.command.forward();
  ASSERT_EQ(forward.rank_of_size(), 5);
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(forward.tokens(i), 10 + i);
    EXPECT_EQ(forward.k(i), shapes[static_cast<size_t>(i)].k);
    EXPECT_EQ(forward.rank_of(i), rank_of[static_cast<size_t>(i)]);
  }
  EXPECT_EQ(OwnDatums(forward.rank_of(), 2, 5),
            (std::vector<int64_t>{0, 3, 4}));
}

TEST(ShareRequestTest, OneRankGetsTheChunksAsTheyAre) {
  const Dispatch out = ShareRequest(Datums(3), {}, {}, 1, 7);
  ASSERT_EQ(out.own[0].size(), 2u);
  EXPECT_EQ(TokensOf(out.own[0]), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(out.command.forward().rank_of_size(), 0);
  EXPECT_EQ(OwnDatums({}, 0, 3), (std::vector<int64_t>{0, 1, 2}));
}

TEST(ShareRequestTest, GradientsGoWhereTheDatumIs) {
  OperationRequest request;
  v1::GradientChunk& chunk = request.gradients.emplace_back();
  for (const int64_t index : {4, 0, 3}) {
    chunk.add_items()->set_datum_index(index);
  }
  request.command.mutable_backward()->set_datum_count(5);
  const Dispatch out =
      ShareRequest(std::move(request), {}, {1, 0, 0, 1, 0}, 2, 8);
  ASSERT_EQ(out.own[0].size(), 1u);
  ASSERT_EQ(out.own[1].size(), 1u);
  EXPECT_EQ(out.own[0][0].gradients().items(0).datum_index(), 4);
  EXPECT_EQ(out.own[1][0].gradients().items(0).datum_index(), 0);
  EXPECT_EQ(out.own[1][0].gradients().items(1).datum_index(), 3);
  EXPECT_EQ(out.command.backward().rank_of_size(), 5);
}

// ---- Answers ---------------------------------------------------------------

v1::LogprobChunk Items(const std::vector<int64_t>& indices) {
  v1::LogprobChunk chunk;
  for (const int64_t index : indices) chunk.add_items()->set_datum_index(index);
  return chunk;
}

std::vector<int64_t> Add(DatumOrder& order,
                         const std::vector<int64_t>& indices) {
  v1::LogprobChunk chunk = Items(indices);
  std::vector<int64_t> out;
  for (const auto& item : order.Add(chunk)) out.push_back(item.datum_index());
  return out;
}

TEST(DatumOrderTest, ReleasesThePrefixThatIsWhole) {
  DatumOrder order;
  EXPECT_EQ(Add(order, {1, 3}), (std::vector<int64_t>{}));
  EXPECT_EQ(Add(order, {0}), (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(Add(order, {4, 2, 5}), (std::vector<int64_t>{2, 3, 4, 5}));
  EXPECT_EQ(Add(order, {2}), (std::vector<int64_t>{})) << "said twice";
  EXPECT_EQ(order.count(), 6);
}

TEST(DatumOrderTest, GivesAnyOrderInOrder) {
  std::mt19937 random(3);
  std::vector<int64_t> indices(40);
  std::iota(indices.begin(), indices.end(), 0);
  const std::vector<int64_t> sorted = indices;
  for (int round = 0; round < 50; ++round) {
    std::shuffle(indices.begin(), indices.end(), random);
    DatumOrder order;
    std::vector<int64_t> out;
    for (size_t i = 0; i < indices.size(); i += 4) {
      for (int64_t index :
           Add(order, {indices.begin() + static_cast<int64_t>(i),
                       indices.begin() + static_cast<int64_t>(i) + 4})) {
        out.push_back(index);
      }
    }
    ASSERT_EQ(out, sorted);
  }
}

v1::RankDone Done(int64_t version, const std::string& error = "") {
  v1::RankDone done;
  done.set_command_id(5);
  done.set_weight_version(version);
  if (error.empty()) {
    done.mutable_zero_grad();
  } else {
    done.mutable_error()->set_reason(error);
  }
  return done;
}

TEST(AnswersTest, AreRankZerosOnceAllHaveAnswered) {
  Answers answers(3);
  v1::RankDone first = Done(2);
  first.mutable_memory_use()->set_weights(10);
  v1::RankDone third = Done(2);
  third.mutable_memory_use()->set_weights(30);
  third.mutable_memory_use()->set_other(1);
  first.mutable_collective_use()->set_bytes_sent(100);
  first.mutable_collective_use()->set_wait_seconds(0.5);
  third.mutable_collective_use()->set_bytes_sent(20);
  third.mutable_collective_use()->set_busy_seconds(2);
  EXPECT_FALSE(answers.AddDone(2, third));
  EXPECT_FALSE(answers.AddDone(0, first));
  EXPECT_FALSE(answers.AddDone(0, first)) << "twice is once";
  EXPECT_TRUE(answers.AddDone(1, Done(2)));
  EXPECT_EQ(answers.MostMemory().weights(), 30);
  EXPECT_EQ(answers.MostMemory().other(), 1);
  EXPECT_EQ(answers.AllCollectives().bytes_sent(), 120);
  EXPECT_EQ(answers.AllCollectives().busy_seconds(), 2);
  EXPECT_EQ(answers.AllCollectives().wait_seconds(), 0.5);
  const auto done = answers.Take();
  ASSERT_TRUE(done.ok());
  EXPECT_TRUE(done->has_zero_grad());
  EXPECT_EQ(done->memory_use().weights(), 10);
}

TEST(AnswersTest, TheFirstErrorInRankOrderIsTheError) {
  Answers answers(3);
  answers.AddDone(2, Done(2, "C"));
  answers.AddDone(1, Done(2, "B"));
  EXPECT_TRUE(answers.AddDone(0, Done(2)));
  const auto done = answers.Take();
  ASSERT_TRUE(done.ok());
  EXPECT_EQ(done->error().reason(), "B");
  EXPECT_FALSE(done->has_zero_grad());
}

TEST(AnswersTest, RanksMustBeAtOneStep) {
  Answers answers(3);
  answers.AddDone(0, Done(2));
  answers.AddDone(1, Done(2));
  answers.AddDone(2, Done(3));
  const absl::Status status = answers.Take().status();
  EXPECT_EQ(Reason(status), "INVARIANT_VIOLATED");
  EXPECT_EQ(Detail(status).metadata["ranks"], "0,2");
}

TEST(AnswersTest, ADigestIsOfAllRanksStatesInTheirOrder) {
  const auto digest = [](const std::vector<std::string>& ranks) {
    Answers answers(static_cast<int>(ranks.size()));
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      v1::RankDone done = Done(2);
      done.set_state_digest(ranks[rank]);
      answers.AddDone(static_cast<int>(rank), done);
    }
    const auto done = answers.Take();
    return done.ok() ? done->state_digest() : Reason(done.status());
  };
  const std::string a(16, 'a'), b(16, 'b');
  std::set<std::string> seen;
  for (const std::vector<std::string>& ranks :
       {std::vector{a}, {a, a}, {a, b}, {b, a}, {b, b}, {a, a, b}}) {
    EXPECT_EQ(digest(ranks).size(), 16u);
    EXPECT_EQ(digest(ranks), digest(ranks));
    EXPECT_TRUE(seen.insert(digest(ranks)).second);
  }
  EXPECT_EQ(digest({"", ""}), "") << "most commands have none";
  EXPECT_EQ(digest({a, ""}), "INVARIANT_VIOLATED");
  EXPECT_EQ(digest({"", a}), "INVARIANT_VIOLATED");
  Answers failed(2);
  v1::RankDone done = Done(2);
  done.set_state_digest(a);
  failed.AddDone(0, done);
  failed.AddDone(1, Done(2, "B"));
  EXPECT_EQ(failed.Take()->state_digest(), "");
}

TEST(AnswersTest, EveryDatumMustHaveItsLogprobs) {
  Answers answers(2);
  v1::RankDone done = Done(0);
  done.mutable_forward()->set_datum_count(2);
  v1::LogprobChunk chunk = Items({0});
  answers.AddLogprobs(chunk);
  answers.AddDone(1, done);
  answers.AddDone(0, done);
  EXPECT_EQ(Reason(answers.Take().status()), "INVARIANT_VIOLATED");
}

TEST(AddressExchangeTest, AnswersWhenAllAreThereAndThenAgain) {
  AddressExchange exchange(2);
  v1::RankAddress a, b, other;
  a.set_address("a");
  b.set_address("b");
  other.set_group(1);
  for (int round = 0; round < 2; ++round) {
    EXPECT_FALSE(exchange.Add(1, b).has_value());
    EXPECT_FALSE(exchange.Add(1, other).has_value()) << "of another group";
    const auto all = exchange.Add(0, a);
    ASSERT_TRUE(all.has_value());
    ASSERT_EQ(all->address_size(), 2);
    EXPECT_EQ(all->address(0), "a");
    EXPECT_EQ(all->address(1), "b");
  }
}

// ---- Judge -----------------------------------------------------------------

using std::chrono::milliseconds;
using std::chrono::seconds;
constexpr Clock::time_point kNow{std::chrono::hours(1)};

std::vector<RankStanding> Healthy(size_t world) {
  std::vector<RankStanding> ranks(world);
  for (RankStanding& rank : ranks) {
    rank.watched = true;
    rank.last_seen = kNow;
  }
  return ranks;
}

void Accuse(RankStanding& by, int rank, milliseconds ago = milliseconds(0)) {
  by.report = ErrorBuilder(absl::StatusCode::kUnavailable, "COLLECTIVE_TIMEOUT")
                  .With("rank", rank)
                  .With("seconds", 5)
                  .Message("waited");
  by.reported = kNow - ago;
}

TEST(JudgeTest, HealthyRanksGoOn) {
  EXPECT_TRUE(Judge(Healthy(3), kNow + seconds(29), {}).ok());
}

TEST(JudgeTest, AnExitIsTheCauseAtOnce) {
  auto ranks = Healthy(3);
  Accuse(ranks[0], 1);
  ranks[2].exited = RankExited(2, SIGKILL);
  const absl::Status verdict = Judge(ranks, kNow, {});
  EXPECT_EQ(Reason(verdict), "RANK_EXITED");
  EXPECT_EQ(Rank(verdict), "2");
  EXPECT_EQ(Detail(verdict).metadata["signal"], "9");
}

TEST(JudgeTest, ASilentRankIsHung) {
  auto ranks = Healthy(2);
  ranks[1].last_seen = kNow - seconds(31);
  const absl::Status verdict = Judge(ranks, kNow, {});
  EXPECT_EQ(Reason(verdict), "RANK_HUNG");
  EXPECT_EQ(Rank(verdict), "1");
  ranks[1].watched = false;
  EXPECT_TRUE(Judge(ranks, kNow, {}).ok()) << "not here yet";
}

TEST(JudgeTest, ALostStreamWaitsForTheExitOfALocalRank) {
  auto ranks = Healthy(2);
  ranks[1].lost = true;
  ranks[1].lost_at = kNow;
  VerdictRules rules;
  EXPECT_TRUE(Judge(ranks, kNow + milliseconds(900), rules).ok());
  EXPECT_EQ(Reason(Judge(ranks, kNow + seconds(1), rules)), "RANK_LOST");
  rules.local = false;
  EXPECT_EQ(Rank(Judge(ranks, kNow, rules)), "1");
}

TEST(JudgeTest, ReportsAboutPeersWaitForWhatTellsMore) {
  auto ranks = Healthy(3);
  Accuse(ranks[0], 1);
  EXPECT_TRUE(Judge(ranks, kNow + milliseconds(900), {}).ok());
  const absl::Status verdict = Judge(ranks, kNow + seconds(1), {});
  EXPECT_EQ(Reason(verdict), "COLLECTIVE_TIMEOUT");
  EXPECT_EQ(verdict.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(Rank(verdict), "1");
  EXPECT_EQ(Detail(verdict).metadata["reported_by"], "0");
  EXPECT_EQ(Detail(verdict).metadata["seconds"], "5");
}

TEST(JudgeTest, TheRankNamedMostIsToBlame) {
  auto ranks = Healthy(4);
  Accuse(ranks[0], 1);  // waits itself
  Accuse(ranks[1], 3);
  Accuse(ranks[2], 3);
  Accuse(ranks[3], 2);
  EXPECT_EQ(Rank(Judge(ranks, kNow, {})), "3") << "all have spoken";
}

TEST(JudgeTest, SoonerTheOneThatHasSaidNothing) {
  auto ranks = Healthy(3);
  Accuse(ranks[0], 1, seconds(2));
  Accuse(ranks[1], 2, seconds(2));
  EXPECT_EQ(Rank(Judge(ranks, kNow, {})), "2");
}

TEST(JudgeTest, ABlamedRankThatMissedHeartbeatsIsHung) {
  auto ranks = Healthy(2);
  Accuse(ranks[0], 1, seconds(2));
  ranks[1].last_seen = kNow - seconds(4);
  const absl::Status verdict = Judge(ranks, kNow, {});
  EXPECT_EQ(Reason(verdict), "RANK_HUNG");
  EXPECT_EQ(Rank(verdict), "1");
}

TEST(JudgeTest, ARanksOwnFailureGoesBeforeItsPeers) {
  auto ranks = Healthy(3);
  Accuse(ranks[0], 2);
  ranks[1].report =
      ErrorBuilder(absl::StatusCode::kNotFound, "MODEL_FILE_NOT_FOUND")
          .Message("no");
  ranks[1].reported = kNow;
  Accuse(ranks[2], 0);
  const absl::Status verdict = Judge(ranks, kNow, {});
  EXPECT_EQ(Reason(verdict), "MODEL_FILE_NOT_FOUND");
  EXPECT_EQ(Rank(verdict), "1");
}

TEST(JudgeTest, AReportThatNamesNobodyIsStillTheEnd) {
  auto ranks = Healthy(2);
  Accuse(ranks[1], 9, seconds(2));
  const absl::Status verdict = Judge(ranks, kNow, {});
  EXPECT_EQ(Reason(verdict), "COLLECTIVE_TIMEOUT");
  EXPECT_EQ(Rank(verdict), "1");
}

TEST(RestartCauseTest, IsTheKindOfFailure) {
  v1::OperationError error;
  error.set_reason("RANK_EXITED");
  EXPECT_EQ(RestartCause(error), "rank_exit");
  (*error.mutable_metadata())["signal"] = "9";
  EXPECT_EQ(RestartCause(error), "rank_signal");
  const std::pair<const char*, const char*> rows[] = {
      {"RANK_HUNG", "hang"},        {"COLLECTIVE_TIMEOUT", "hang"},
      {"RANK_LOST", "node"},        {"MEMORY_PLAN_EXCEEDED", "oom"},
      {"STORAGE_ERROR", "storage"}, {"MODEL_UNSUPPORTED", "operator"}};
  for (const auto& [reason, cause] : rows) {
    error.set_reason(reason);
    EXPECT_EQ(RestartCause(error), cause);
  }
}

// ---- Hellos ----------------------------------------------------------------

v1::RankHello Hello() {
  v1::RankHello hello;
  hello.set_job_id("job");
  hello.set_rank(1);
  hello.set_world_size(2);
  hello.set_version(kVersion);
  hello.set_join_token("secret");
  return hello;
}

TEST(CheckHelloTest, EveryMistakeHasItsReason) {
  EXPECT_TRUE(CheckToken(Hello(), "secret").ok());
  EXPECT_TRUE(CheckHello(Hello(), 2).ok());
  for (const char* token : {"Secret", "secre", "secrets", ""}) {
    EXPECT_EQ(Reason(CheckToken(Hello(), token)), "RANK_TOKEN_WRONG");
  }
  v1::RankHello none = Hello();
  none.clear_join_token();
  EXPECT_EQ(Reason(CheckToken(none, "")), "RANK_TOKEN_WRONG");
  v1::RankHello hello = Hello();
  hello.set_version("0.0.9");
  EXPECT_EQ(Reason(CheckHello(hello, 2)), "RANK_VERSION_MISMATCH");
  EXPECT_EQ(Reason(CheckHello(Hello(), 3)), "RANK_WORLD_MISMATCH");
  for (const int rank : {-1, 2}) {
    hello = Hello();
    hello.set_rank(rank);
    EXPECT_EQ(Reason(CheckHello(hello, 2)), "RANK_OUT_OF_RANGE");
  }
}

TEST(ReadJoinTokenTest, RefusesWhatIsNoSecret) {
  const std::string path = testing::TempDir() + "/token";
  const auto read = [&](const std::string& text, mode_t mode) {
    std::ofstream(path) << text;
    chmod(path.c_str(), mode);
    return ReadJoinToken(path);
  };
  const std::string token(32, 'a');
  EXPECT_EQ(*read(token + "\n", 0600), token);
  EXPECT_EQ(*read(token, 0640), token);
  for (const mode_t mode : {0604, 0602, 0644}) {
    EXPECT_EQ(Reason(read(token, mode).status()), "JOIN_TOKEN_UNUSABLE");
  }
  EXPECT_EQ(Reason(read(token.substr(1) + "\n", 0600).status()),
            "JOIN_TOKEN_UNUSABLE");
  EXPECT_EQ(Reason(ReadJoinToken(path + "-none").status()),
            "JOIN_TOKEN_UNUSABLE");
}

// ---- CPUs ------------------------------------------------------------------

TEST(CpusOfRankTest, EqualPartsOneBehindTheOther) {
  const std::vector<int> cpus = {0, 1, 2, 5, 6, 7, 8};
  EXPECT_EQ(CpusOfRank(cpus, 0, 2, 3), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(CpusOfRank(cpus, 1, 2, 3), (std::vector<int>{5, 6, 7, 8}));
  EXPECT_TRUE(CpusOfRank(cpus, 0, 1, 7).empty()) << "one rank";
  EXPECT_TRUE(CpusOfRank(cpus, 0, 8, 1).empty()) << "too few CPUs";
  EXPECT_TRUE(CpusOfRank(cpus, 0, 2, 4).empty()) << "too many threads";
  std::vector<int> all;
  for (int rank = 0; rank < 3; ++rank) {
    for (int cpu : CpusOfRank(cpus, rank, 3, 2)) all.push_back(cpu);
  }
  EXPECT_EQ(all, cpus);
}

TEST(CpusOfRankTest, ThreadsAreAShareUnlessAsked) {
  EXPECT_EQ(ThreadsOfRank(0, 8, 3), 2);
  EXPECT_EQ(ThreadsOfRank(0, 2, 3), 1);
  EXPECT_EQ(ThreadsOfRank(5, 8, 3), 5);
  EXPECT_EQ(ThreadsOfRank(0, 8, 1), 0);
}

TEST(CpusOfRankTest, ListsAreChecked) {
  EXPECT_EQ(FormatCpus({0, 4}), "0,4");
  const std::vector<int> allowed = AllowedCpus();
  ASSERT_FALSE(allowed.empty());
  EXPECT_TRUE(PinToCpus("").ok());
  EXPECT_TRUE(PinToCpus(FormatCpus(allowed)).ok());
  EXPECT_EQ(AllowedCpus(), allowed);
  for (const char* list : {"a", "0,", "-1", "0-3", "100000"}) {
    EXPECT_FALSE(PinToCpus(list).ok()) << list;
  }
}

}  // namespace
}  // namespace gradwire
