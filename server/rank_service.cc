// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "server/grpc_status.h"
#include "server/services.h"

namespace gradwire {
namespace {

using RankRpc = grpc::ServerReaderWriter<v1::RankCommand, v1::RankEvent>;

class GrpcRankStream : public RankStream {
 public:
  explicit GrpcRankStream(RankRpc* stream) : stream_(stream) {}
  bool Write(const v1::RankCommand& command) override {
    return stream_->Write(command);
  }

 private:
  RankRpc* const stream_;
};

}  // namespace

grpc::Status RankServiceImpl::Connect(grpc::ServerContext*, RankRpc* stream) {
  v1::RankEvent event;
  const bool hello = stream->Read(&event) && event.has_hello();
  auto job = context_.jobs->Get(event.hello().job_id());
  GrpcRankStream writer(stream);
  if (!hello || !job.ok() ||
      !(*job)->Connect(event.hello().join_token(), event.hello().pid(),
                       &writer)) {
    return ToGrpcStatus(
        ErrorBuilder(absl::StatusCode::kPermissionDenied, "RANK_REFUSED")
            .Message("This rank was not started for a job of this server."));
  }
  while (stream->Read(&event)) (*job)->OnRankEvent(event);
  (*job)->Disconnect();
  return grpc::Status::OK;
}

}  // namespace gradwire
