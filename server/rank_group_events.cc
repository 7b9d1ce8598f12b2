// SPDX-License-Identifier: Apache-2.0
// What ranks are sent and what they say, while their group lives.
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_join.h"
#include "base/log.h"
#include "server/grpc_status.h"
#include "server/rank_errors.h"
#include "server/rank_group.h"

namespace gradwire {

void RankGroup::Write(int rank, const v1::RankCommand& command) {
  Seat& seat = this->seat(rank);
  absl::MutexLock lock(&seat.write_mu);
  // A broken stream is followed by the end of the group.
  if (seat.writer != nullptr) seat.writer->Write(command);
}

void RankGroup::Send(const Dispatch& dispatch) {
  for (int rank = 0; rank < options_.world_size; ++rank) {
    for (const auto& command : dispatch.own[static_cast<size_t>(rank)]) {
      Write(rank, command);
    }
    if (dispatch.command.command_case() != v1::RankCommand::COMMAND_NOT_SET) {
      Write(rank, dispatch.command);
    }
  }
}

bool RankGroup::OnEvent(int rank, v1::RankEvent event) {
  std::optional<v1::RankAddresses> addresses;
  {
    absl::MutexLock lock(&mu_);
    if (ending_) return false;
    seat(rank).standing.last_seen = Clock::now();
    switch (event.event_case()) {
      case v1::RankEvent::kProgress:
        if (rank != 0) break;
        outbox_.push_back({.kind = GroupEvent::kProgress,
                           .progress = std::move(*event.mutable_progress())});
        break;
      case v1::RankEvent::kChoices:
        outbox_.push_back({.kind = GroupEvent::kChoices,
                           .rank = rank,
                           .choices = std::move(
                               *event.mutable_choices()->mutable_choices())});
        break;
      case v1::RankEvent::kReady:
        OnReady(rank, std::move(*event.mutable_ready()));
        break;
      case v1::RankEvent::kFailed:
        Report(rank, FromOperationError(event.failed()));
        break;
      case v1::RankEvent::kLogprobs:
        OnLogprobs(std::move(*event.mutable_logprobs()));
        break;
      case v1::RankEvent::kDone:
        OnDone(rank, std::move(*event.mutable_done()));
        break;
      case v1::RankEvent::kAddress:
        addresses = addresses_.Add(rank, event.address());
        break;
      default:
        break;
    }
  }
  if (addresses.has_value()) {
    v1::RankCommand command;
    *command.mutable_addresses() = *std::move(addresses);
    for (int to = 0; to < options_.world_size; ++to) Write(to, command);
  }
  Deliver();
  return true;
}

void RankGroup::Report(int rank, absl::Status status) {
  RankStanding& standing = seat(rank).standing;
  if (!standing.report.ok()) return;
  spdlog::warn("job {}: rank {} says: {}", options_.job_id, rank,
               std::string(status.message()));
  standing.report = std::move(status);
  standing.reported = Clock::now();
  JudgeNow();
}

void RankGroup::OnReady(int rank, v1::RankReady ready) {
  seat(rank).ready = true;
  seat(rank).kernels = ready.kernels();
  if (rank == 0) ready_ = std::move(ready);
  std::vector<std::string> kernels;
  for (const std::unique_ptr<Seat>& seat : seats_) {
    if (!seat->ready) return;
    if (kernels.empty() || kernels.back() != seat->kernels) {
      kernels.push_back(seat->kernels);
    }
  }
  ready_.set_kernels(absl::StrJoin(kernels, "; "));
  outbox_.push_back({.kind = GroupEvent::kReady, .ready = ready_});
}

Answers& RankGroup::AnswersTo(int64_t command_id) {
  return answers_.try_emplace(command_id, options_.world_size).first->second;
}

void RankGroup::OnLogprobs(v1::RankLogprobs logprobs) {
  const int64_t id = logprobs.command_id();
  auto due = AnswersTo(id).AddLogprobs(*logprobs.mutable_chunk());
  if (due.empty()) return;
  outbox_.push_back({.kind = GroupEvent::kLogprobs,
                     .command_id = id,
                     .logprobs = std::move(due)});
}

void RankGroup::OnDone(int rank, v1::RankDone done) {
  if (done.has_error()) {
    // Not the operation has failed but the group.
    const absl::Status error = FromOperationError(done.error());
    if (IsCollectiveFailure(error)) {
      Report(rank, error);
      return;
    }
  }
  const int64_t id = done.command_id();
  Answers& answers = AnswersTo(id);
  if (!answers.AddDone(rank, std::move(done))) return;
  const v1::MemoryUse most = answers.MostMemory();
  const v1::CollectiveUse collectives = answers.AllCollectives();
  absl::StatusOr<v1::RankDone> answer = answers.Take();
  answers_.erase(id);
  if (!answer.ok()) {
    Fail(answer.status());
    return;
  }
  outbox_.push_back({.kind = GroupEvent::kDone,
                     .done = *std::move(answer),
                     .most_memory = most,
                     .collectives = collectives});
}

void RankGroup::Deliver() {
  mu_.Lock();
  if (!delivering_) {
    delivering_ = true;
    while (!outbox_.empty()) {
      GroupEvent event = std::move(outbox_.front());
      outbox_.pop_front();
      mu_.Unlock();
      on_event_(std::move(event));
      mu_.Lock();
    }
    delivering_ = false;
  }
  mu_.Unlock();
}

}  // namespace gradwire
