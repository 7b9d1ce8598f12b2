// SPDX-License-Identifier: Apache-2.0
#include "server/rank_link.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/status.h"
#include "server/grpc_status.h"

namespace gradwire {
namespace {

constexpr absl::Duration kBeat = absl::Seconds(1);
constexpr absl::Duration kFirstPause = absl::Milliseconds(100);
constexpr absl::Duration kLongestPause = absl::Seconds(5);

// Schedulers start things in any order.
bool MayComeLater(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return absl::IsUnavailable(status) ||
         (detail && (detail->reason == "RANK_JOB_UNKNOWN" ||
                     detail->reason == "RANK_GROUP_ENDED"));
}

}  // namespace

RankLink::RankLink(const RankLinkOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  // Else a new channel inherits the backoff of one that failed before.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  if (!absl::StartsWith(options.supervisor, "unix:")) {
    // A supervisor whose machine is gone says no goodbye.
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10000);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000);
  }
  stub_ = v1::RankService::NewStub(grpc::CreateCustomChannel(
      options.supervisor, options.credentials, arguments));
  stream_ = stub_->Connect(&context_);
}

absl::StatusOr<std::unique_ptr<RankLink>> RankLink::Dial(
    const RankLinkOptions& options) {
  const absl::Time deadline = absl::Now() + options.dial_timeout;
  absl::Duration pause = kFirstPause;
  std::string said;
  while (true) {
    std::unique_ptr<RankLink> link(new RankLink(options));
    const absl::Status status = link->Join(options.hello);
    if (status.ok()) {
      link->reader_ = std::thread([l = link.get()] { l->Read(); });
      link->beater_ = std::thread([l = link.get()] { l->Beat(); });
      return link;
    }
    if (!MayComeLater(status) || absl::Now() + pause > deadline) return status;
    if (const std::string why(status.message()); why != said) {
      spdlog::info("not yet: {}", why);
      said = why;
    }
    absl::SleepFor(pause);
    pause = std::min(2 * pause, kLongestPause);
  }
}

absl::Status RankLink::Join(const v1::RankHello& hello) {
  v1::RankEvent event;
  *event.mutable_hello() = hello;
  v1::RankCommand command;
  if (stream_->Write(event) && stream_->Read(&command) &&
      command.has_joined()) {
    spdlog::info("rank {} of job {} has joined; {} of {}", hello.rank(),
                 hello.job_id(), command.joined().joined(),
                 command.joined().world_size());
    return absl::OkStatus();
  }
  return FromGrpcStatus(stream_->Finish());
}

void RankLink::Read() {
  v1::RankCommand command;
  while (stream_->Read(&command)) {
    absl::MutexLock lock(&mu_);
    if (command.has_addresses()) {
      const int group = command.addresses().group();
      addresses_[group] = std::move(*command.mutable_addresses());
    } else {
      commands_.push_back(std::move(command));
    }
    changed_.SignalAll();
  }
  const absl::Status end = FromGrpcStatus(stream_->Finish());
  if (end.ok()) {
    spdlog::info("the supervisor has ended the stream");
  } else {
    spdlog::error("the stream has ended: {}", std::string(end.message()));
  }
  _exit(end.ok() ? EXIT_SUCCESS : EXIT_FAILURE);
}

void RankLink::Beat() {
  v1::RankEvent event;
  event.mutable_heartbeat();
  while (true) {
    absl::SleepFor(kBeat);
    Send(event);
  }
}

void RankLink::Send(const v1::RankEvent& event) {
  absl::MutexLock lock(&write_mu_);
  // The end of the stream is seen by the reader.
  stream_->Write(event);
}

v1::RankCommand RankLink::NextCommand() {
  absl::MutexLock lock(&mu_);
  while (commands_.empty()) changed_.Wait(&mu_);
  v1::RankCommand command = std::move(commands_.front());
  commands_.pop_front();
  return command;
}

absl::StatusOr<std::vector<std::string>> RankLink::ExchangeAddresses(
    int group, const std::string& mine, absl::Duration timeout) {
  v1::RankEvent event;
  event.mutable_address()->set_group(group);
  event.mutable_address()->set_address(mine);
  Send(event);
  const absl::Time deadline = absl::Now() + timeout;
  absl::MutexLock lock(&mu_);
  while (addresses_.count(group) == 0) {
    if (!changed_.WaitWithDeadline(&mu_, deadline)) continue;
    return ErrorBuilder(absl::StatusCode::kUnavailable, "COLLECTIVE_TIMEOUT")
        .Server()
        .With("seconds", absl::ToDoubleSeconds(timeout))
        .Message("Not all ranks have told their addresses.");
  }
  const v1::RankAddresses all = std::move(addresses_[group]);
  addresses_.erase(group);
  return std::vector<std::string>(all.address().begin(), all.address().end());
}

void RankLink::AwaitEnd() {
  reader_.join();
  std::abort();  // The reader does not return.
}

}  // namespace gradwire
