// SPDX-License-Identifier: Apache-2.0
// How a supervisor and ranks on other machines know each other: mutual TLS, or
// somebody's word that the network is safe. docs/sharding.md.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace gradwire {

// Files in PEM form, all three or none.
struct RankTls {
  std::string cert, key;
  // Of the authority that has signed the other side's certificate.
  std::string ca;
  // Without TLS, beyond this machine.
  bool insecure = false;
};

// For the supervisor's listener at `address`, HOST:PORT.
// Errors: INVALID_ARGUMENT ADDRESS_INVALID, RANK_LISTEN_INSECURE;
// FAILED_PRECONDITION RANK_TLS_UNUSABLE.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> RankServerCredentials(
    const std::string& address, const RankTls& tls);

// For a rank that dials `address`, HOST:PORT or "unix:...". Errors: as above.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>>
RankChannelCredentials(const std::string& address, const RankTls& tls);

}  // namespace gradwire
