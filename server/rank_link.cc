// SPDX-License-Identifier: Apache-2.0
#include "server/rank_link.h"

#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "absl/time/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/status.h"
#include "server/grpc_status.h"

namespace gradwire {
namespace {

constexpr absl::Duration kBeat = absl::Seconds(1);

}  // namespace

RankLink::RankLink(const RankLinkOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  stub_ = v1::RankService::NewStub(grpc::CreateCustomChannel(
      options.supervisor, grpc::InsecureChannelCredentials(), arguments));
  stream_ = stub_->Connect(&context_);
}

absl::StatusOr<std::unique_ptr<RankLink>> RankLink::Dial(
    const RankLinkOptions& options) {
  std::unique_ptr<RankLink> link(new RankLink(options));
  GW_RETURN_IF_ERROR(link->Join(options.hello));
  link->reader_ = std::thread([l = link.get()] { l->Read(); });
  link->beater_ = std::thread([l = link.get()] { l->Beat(); });
  return link;
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
