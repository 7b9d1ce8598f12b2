// SPDX-License-Identifier: Apache-2.0
// Counts every call by service, method and code.
#pragma once

#include <grpcpp/support/server_interceptor.h>

#include "server/metrics.h"

namespace gradwire {

class RpcMetricsFactory
    : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit RpcMetricsFactory(Metrics* metrics) : metrics_(metrics) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override;

 private:
  Metrics* const metrics_;
};

}  // namespace gradwire
