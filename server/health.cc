// SPDX-License-Identifier: Apache-2.0
#include "server/health.h"

#include "base/error.h"
#include "server/grpc_status.h"

namespace gradwire {
namespace {

constexpr absl::Duration kPoll = absl::Milliseconds(200);

}  // namespace

void HealthService::Set(const std::string& service, bool serving) {
  absl::MutexLock lock(&mu_);
  serving_[service] = serving && !shutdown_;
  changed_.SignalAll();
}

void HealthService::Remove(const std::string& service) {
  absl::MutexLock lock(&mu_);
  serving_.erase(service);
  changed_.SignalAll();
}

void HealthService::Shutdown() {
  absl::MutexLock lock(&mu_);
  shutdown_ = true;
  for (auto& [service, serving] : serving_) serving = false;
  changed_.SignalAll();
}

grpc::Status HealthService::Check(
    grpc::ServerContext*, const grpc::health::v1::HealthCheckRequest* request,
    Response* reply) {
  absl::MutexLock lock(&mu_);
  auto it = serving_.find(request->service());
  if (it == serving_.end()) {
    return ToGrpcStatus(
        ErrorBuilder(absl::StatusCode::kNotFound, "SERVICE_UNKNOWN")
            .With("field", "service")
            .With("value", request->service().substr(0, 128))
            .Message("There is no such service."));
  }
  reply->set_status(it->second ? Response::SERVING : Response::NOT_SERVING);
  return grpc::Status::OK;
}

grpc::Status HealthService::Watch(
    grpc::ServerContext* call,
    const grpc::health::v1::HealthCheckRequest* request,
    grpc::ServerWriter<Response>* writer) {
  int last = -1;
  while (!call->IsCancelled()) {
    Response reply;
    {
      absl::MutexLock lock(&mu_);
      const auto status = [&] {
        auto it = serving_.find(request->service());
        return it == serving_.end() ? Response::SERVICE_UNKNOWN
               : it->second         ? Response::SERVING
                                    : Response::NOT_SERVING;
      };
      if (status() == last) changed_.WaitWithTimeout(&mu_, kPoll);
      reply.set_status(status());
    }
    if (reply.status() == last) continue;
    last = reply.status();
    if (!writer->Write(reply)) break;
  }
  return grpc::Status::OK;
}

}  // namespace gradwire
