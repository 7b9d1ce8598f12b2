// SPDX-License-Identifier: Apache-2.0
#include <grpcpp/alarm.h>

#include "base/error.h"
#include "base/log.h"
#include "base/status.h"
#include "server/grpc_status.h"
#include "server/rank_hello.h"
#include "server/services.h"

namespace gradwire {
namespace {

constexpr auto kHelloTimeout = std::chrono::seconds(10);

using RankRpc = grpc::ServerReaderWriter<v1::RankCommand, v1::RankEvent>;

class GrpcRankStream : public RankStream {
 public:
  GrpcRankStream(grpc::ServerContext* call, RankRpc* stream)
      : call_(call), stream_(stream) {}
  bool Write(const v1::RankCommand& command) override {
    return stream_->Write(command);
  }
  void Cancel() override { call_->TryCancel(); }

 private:
  grpc::ServerContext* const call_;
  RankRpc* const stream_;
};

// Ends a call that says nothing.
class HelloTimer {
 public:
  explicit HelloTimer(grpc::ServerContext* call)
      : state_(std::make_shared<State>()) {
    state_->call = call;
    alarm_.Set(std::chrono::system_clock::now() + kHelloTimeout,
               [state = state_](bool expired) {
                 absl::MutexLock lock(&state->mu);
                 if (expired && state->call != nullptr) {
                   state->call->TryCancel();
                 }
               });
  }
  void Stop() {
    absl::MutexLock lock(&state_->mu);
    state_->call = nullptr;
  }

 private:
  // Outlives the timer, whose callback may be late.
  struct State {
    absl::Mutex mu;
    grpc::ServerContext* call ABSL_GUARDED_BY(mu) = nullptr;
  };
  std::shared_ptr<State> state_;
  grpc::Alarm alarm_;
};

}  // namespace

absl::Status RankServiceImpl::Serve(grpc::ServerContext* call,
                                    RankRpc* stream) {
  v1::RankEvent event;
  HelloTimer timer(call);
  const bool hello_read = stream->Read(&event) && event.has_hello();
  timer.Stop();
  if (!hello_read) {
    return ErrorBuilder(absl::StatusCode::kPermissionDenied, "RANK_REFUSED")
        .Message("A rank's first message must be its hello.");
  }
  const v1::RankHello hello = std::move(*event.mutable_hello());
  // Strangers learn nothing of jobs.
  if (context_.environment->external) {
    GW_RETURN_IF_ERROR(CheckToken(hello, context_.environment->join_token));
  }
  auto job = context_.jobs->Get(hello.job_id());
  const std::shared_ptr<RankGroup> ranks = job.ok() ? (*job)->ranks() : nullptr;
  if (ranks == nullptr) return RankJobUnknown(hello);
  GrpcRankStream writer(call, stream);
  GW_RETURN_IF_ERROR(ranks->Join(hello, &writer));
  while (stream->Read(&event) &&
         ranks->OnEvent(hello.rank(), std::move(event))) {
  }
  return ranks->Leave(hello.rank());
}

grpc::Status RankServiceImpl::Connect(grpc::ServerContext* call,
                                      RankRpc* stream) {
  const absl::Status status = Serve(call, stream);
  if (const auto detail = GetErrorDetail(status)) {
    spdlog::warn("the stream of a rank at {} ends: {}: {}", call->peer(),
                 detail->reason, std::string(status.message()));
  }
  return ToGrpcStatus(status);
}

}  // namespace gradwire
