// SPDX-License-Identifier: Apache-2.0
// grpc.health.v1 over the synchronous API.
#pragma once

#include <grpcpp/grpcpp.h>

#include <map>
#include <string>

#include "absl/synchronization/mutex.h"
#include "grpc/health/v1/health.grpc.pb.h"

namespace gradwire {

class HealthService final : public grpc::health::v1::Health::Service {
 public:
  using Response = grpc::health::v1::HealthCheckResponse;

  // "" is the server as a whole.
  void Set(const std::string& service, bool serving);
  void Remove(const std::string& service);
  // From now on nothing serves, whatever Set says.
  void Shutdown();

  grpc::Status Check(grpc::ServerContext* call,
                     const grpc::health::v1::HealthCheckRequest* request,
                     Response* reply) override;
  grpc::Status Watch(grpc::ServerContext* call,
                     const grpc::health::v1::HealthCheckRequest* request,
                     grpc::ServerWriter<Response>* writer) override;

 private:
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::map<std::string, bool> serving_;
  bool shutdown_ = false;
};

}  // namespace gradwire
