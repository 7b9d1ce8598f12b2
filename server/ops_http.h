// SPDX-License-Identifier: Apache-2.0
// The operators' HTTP listener: /livez, /readyz, /startupz, /metrics.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

struct mg_context;
struct mg_connection;

namespace gradwire {

class OpsHttp {
 public:
  struct Handlers {
    // Names of the checks that fail; empty: ready.
    std::function<std::vector<std::string>()> failed_checks;
    std::function<std::string()> metrics;
  };

  // `address` is "host:port"; port 0 takes a free one.
  // Errors: INVALID_ARGUMENT ADDRESS_INVALID; UNAVAILABLE PORT_TAKEN.
  static absl::StatusOr<std::unique_ptr<OpsHttp>> Start(
      const std::string& address, Handlers handlers);
  ~OpsHttp();

  // "host:port" that it listens on.
  const std::string& address() const { return address_; }

 private:
  OpsHttp() = default;
  static int Handle(mg_connection* connection, void* self);

  Handlers handlers_;
  mg_context* context_ = nullptr;
  std::string address_;
};

}  // namespace gradwire
