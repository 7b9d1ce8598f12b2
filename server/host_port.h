// SPDX-License-Identifier: Apache-2.0
// Addresses that people type: HOST:PORT.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace gradwire {

struct HostPort {
  std::string host;
  int port = 0;
};

// Splits "host:port" ("[::1]:80" for IPv6). Errors: INVALID_ARGUMENT
// ADDRESS_INVALID.
absl::StatusOr<HostPort> ParseHostPort(const std::string& address);

// Whether only this machine can reach it. A name that merely begins with "127."
// may be anybody's.
bool IsLoopback(const std::string& host);

}  // namespace gradwire
