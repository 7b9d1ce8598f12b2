// SPDX-License-Identifier: Apache-2.0
#include "server/rank_tls.h"

#include <fstream>
#include <sstream>

#include "absl/strings/match.h"
#include "base/error.h"
#include "base/status.h"
#include "server/host_port.h"

namespace gradwire {
namespace {

absl::Status Unusable(const std::string& flag, const std::string& what) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "RANK_TLS_UNUSABLE")
      .With("field", flag)
      .Message("--" + flag + " " + what +
               ". --rank_tls_cert, --rank_tls_key and --rank_tls_ca name files "
               "in PEM form, and are given together.");
}

absl::StatusOr<std::string> ReadPem(const std::string& flag,
                                    const std::string& path) {
  if (path.empty()) return Unusable(flag, "is missing");
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file || !absl::StrContains(text.str(), "-----BEGIN ")) {
    return Unusable(flag, "cannot be read, or is not in PEM form");
  }
  return text.str();
}

struct Pem {
  std::string cert, key, ca;
};

// Empty: no TLS, and none is needed.
absl::StatusOr<Pem> Read(const std::string& address, const RankTls& tls) {
  if (!tls.cert.empty() || !tls.key.empty() || !tls.ca.empty()) {
    Pem pem;
    GW_ASSIGN_OR_RETURN(pem.cert, ReadPem("rank_tls_cert", tls.cert));
    GW_ASSIGN_OR_RETURN(pem.key, ReadPem("rank_tls_key", tls.key));
    GW_ASSIGN_OR_RETURN(pem.ca, ReadPem("rank_tls_ca", tls.ca));
    return pem;
  }
  if (absl::StartsWith(address, "unix:")) return Pem();
  GW_ASSIGN_OR_RETURN(HostPort where, ParseHostPort(address));
  if (IsLoopback(where.host) || tls.insecure) return Pem();
  return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                      "RANK_LISTEN_INSECURE")
      .With("value", address)
      .Message(address +
               " is on a network. Who can listen there would learn the join "
               "token and could be a rank: give --rank_tls_cert, "
               "--rank_tls_key and --rank_tls_ca, or --rank_insecure if nobody "
               "else can reach it.");
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> RankServerCredentials(
    const std::string& address, const RankTls& tls) {
  GW_RETURN_IF_ERROR(ParseHostPort(address).status());
  GW_ASSIGN_OR_RETURN(Pem pem, Read(address, tls));
  if (pem.cert.empty()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions options(
      GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  options.pem_root_certs = pem.ca;
  options.pem_key_cert_pairs.push_back({pem.key, pem.cert});
  return grpc::SslServerCredentials(options);
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>>
RankChannelCredentials(const std::string& address, const RankTls& tls) {
  GW_ASSIGN_OR_RETURN(Pem pem, Read(address, tls));
  if (pem.cert.empty()) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions options;
  options.pem_root_certs = pem.ca;
  options.pem_private_key = pem.key;
  options.pem_cert_chain = pem.cert;
  return grpc::SslCredentials(options);
}

}  // namespace gradwire
