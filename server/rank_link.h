// SPDX-License-Identifier: Apache-2.0
// The rank's end of its stream: joins, beats, and keeps what comes in.
// docs/sharding.md.
#pragma once

#include <grpcpp/grpcpp.h>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "gradwire/v1/rank.grpc.pb.h"

namespace gradwire {

struct RankLinkOptions {
  // "unix:..." or HOST:PORT.
  std::string supervisor;
  std::shared_ptr<grpc::ChannelCredentials> credentials;
  v1::RankHello hello;
  // How long to try while the supervisor, or the job, is not there yet.
  absl::Duration dial_timeout;
};

// Thread rule: all methods from any thread. When the stream ends, so does the
// process, whatever its threads are in the middle of: without a supervisor
// there is nobody to work for.
class RankLink {
 public:
  // Joins the job's group. Errors: what the supervisor says.
  static absl::StatusOr<std::unique_ptr<RankLink>> Dial(
      const RankLinkOptions& options);

  void Send(const v1::RankEvent& event);
  // The next command; waits for it. Those that a running command waits for,
  // such as addresses, are not among them.
  v1::RankCommand NextCommand();
  // Gives this rank's address to the ranks of `group`, and returns those of
  // all, in rank order. Errors: UNAVAILABLE COLLECTIVE_TIMEOUT.
  absl::StatusOr<std::vector<std::string>> ExchangeAddresses(
      int group, const std::string& mine, absl::Duration timeout);
  // There is nothing more to do; the supervisor ends the stream.
  [[noreturn]] void AwaitEnd();

 private:
  explicit RankLink(const RankLinkOptions& options);
  absl::Status Join(const v1::RankHello& hello);
  void Read();
  void Beat();

  std::unique_ptr<v1::RankService::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::RankEvent, v1::RankCommand>>
      stream_;

  absl::Mutex write_mu_;
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::deque<v1::RankCommand> commands_ ABSL_GUARDED_BY(mu_);
  std::map<int, v1::RankAddresses> addresses_ ABSL_GUARDED_BY(mu_);

  // They end with the process.
  std::thread reader_, beater_;
};

}  // namespace gradwire
