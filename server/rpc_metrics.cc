// SPDX-License-Identifier: Apache-2.0
#include "server/rpc_metrics.h"

#include <string>

namespace gradwire {
namespace {

using grpc::experimental::InterceptionHookPoints;
using grpc::experimental::InterceptorBatchMethods;
using grpc::experimental::ServerRpcInfo;

const char* CodeName(grpc::StatusCode code) {
  static constexpr const char* kNames[] = {"OK",
                                           "Cancelled",
                                           "Unknown",
                                           "InvalidArgument",
                                           "DeadlineExceeded",
                                           "NotFound",
                                           "AlreadyExists",
                                           "PermissionDenied",
                                           "ResourceExhausted",
                                           "FailedPrecondition",
                                           "Aborted",
                                           "OutOfRange",
                                           "Unimplemented",
                                           "Internal",
                                           "Unavailable",
                                           "DataLoss",
                                           "Unauthenticated"};
  return code >= 0 && code <= 16 ? kNames[code] : "Unknown";
}

const char* TypeName(ServerRpcInfo::Type type) {
  switch (type) {
    case ServerRpcInfo::Type::UNARY:
      return "unary";
    case ServerRpcInfo::Type::CLIENT_STREAMING:
      return "client_stream";
    case ServerRpcInfo::Type::SERVER_STREAMING:
      return "server_stream";
    default:
      return "bidi_stream";
  }
}

class RpcMetrics : public grpc::experimental::Interceptor {
 public:
  RpcMetrics(Metrics* metrics, ServerRpcInfo* info)
      : metrics_(metrics), type_(TypeName(info->type())) {
    // "/package.Service/Method"
    const std::string path = info->method();
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos) {  // a method that there is not
      service_ = method_ = type_ = "unknown";
    } else {
      service_ = path.substr(1, slash - 1);
      method_ = path.substr(slash + 1);
    }
    metrics_->RpcStarted(service_, method_, type_);
  }
  ~RpcMetrics() override {
    metrics_->RpcHandled(service_, method_, type_, code_);
  }
  void Intercept(InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(
            InterceptionHookPoints::PRE_SEND_STATUS)) {
      code_ = CodeName(methods->GetSendStatus().error_code());
    }
    methods->Proceed();
  }

 private:
  Metrics* const metrics_;
  std::string type_, service_, method_;
  // Of a call that never got to a status.
  std::string code_ = "Cancelled";
};

}  // namespace

grpc::experimental::Interceptor* RpcMetricsFactory::CreateServerInterceptor(
    ServerRpcInfo* info) {
  return new RpcMetrics(metrics_, info);
}

}  // namespace gradwire
