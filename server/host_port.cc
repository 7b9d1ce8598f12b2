// SPDX-License-Identifier: Apache-2.0
#include "server/host_port.h"

#include <arpa/inet.h>

#include "absl/strings/numbers.h"
#include "base/error.h"

namespace gradwire {

absl::StatusOr<HostPort> ParseHostPort(const std::string& address) {
  HostPort out;
  const size_t colon = address.rfind(':');
  if (colon != std::string::npos) out.host = address.substr(0, colon);
  if (colon == std::string::npos || out.host.empty() ||
      !absl::SimpleAtoi(address.substr(colon + 1), &out.port) || out.port < 0 ||
      out.port > 65535) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "ADDRESS_INVALID")
        .With("value", address.substr(0, 128))
        .Message("'" + address.substr(0, 128) +
                 "' is no address; give HOST:PORT, as in 127.0.0.1:7700.");
  }
  return out;
}

bool IsLoopback(const std::string& host) {
  in_addr ip;
  return host == "localhost" || host == "[::1]" ||
         (inet_pton(AF_INET, host.c_str(), &ip) == 1 &&
          ntohl(ip.s_addr) >> 24 == 127);
}

}  // namespace gradwire
