// SPDX-License-Identifier: Apache-2.0
// How the connections of a rank come to be. gloo listens at one port for each
// peer; the addresses of all of them are what ranks exchange.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <csignal>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/error.h"
#include "base/log.h"
#include "base/status.h"
#include "gloo/transport/device.h"
#include "gloo/transport/tcp/device.h"
#include "sharding/collective_error.h"
#include "sharding/gloo/gloo_mesh.h"

namespace gradwire {
namespace {

absl::Status AddressInvalid(const std::string& address,
                            const std::string& why) {
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "ADDRESS_INVALID")
      .With("field", "bind_address")
      .With("value", address)
      .Message("bind_address " + why +
               "; give an IP address of this machine at which the other ranks "
               "reach it");
}

// What gloo would find out, too, but with a leak and a less clear answer.
absl::Status CheckAddress(const std::string& text) {
  sockaddr_in v4 = {};
  sockaddr_in6 v6 = {};
  sockaddr* address = reinterpret_cast<sockaddr*>(&v4);
  socklen_t bytes = sizeof(v4);
  v4.sin_family = AF_INET;
  v6.sin6_family = AF_INET6;
  if (inet_pton(AF_INET, text.c_str(), &v4.sin_addr) != 1) {
    if (inet_pton(AF_INET6, text.c_str(), &v6.sin6_addr) != 1) {
      return AddressInvalid(text, "is not an IP address");
    }
    address = reinterpret_cast<sockaddr*>(&v6);
    bytes = sizeof(v6);
  }
  if (address->sa_family == AF_INET ? v4.sin_addr.s_addr == INADDR_ANY
                                    : IN6_IS_ADDR_UNSPECIFIED(&v6.sin6_addr)) {
    return AddressInvalid(text, "stands for all addresses of the machine");
  }
  const int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const bool bound = fd >= 0 && bind(fd, address, bytes) == 0;
  if (fd >= 0) close(fd);
  return bound ? absl::OkStatus()
               : AddressInvalid(text, "is not an address of this machine");
}

// gloo writes to sockets that peers may have closed.
void IgnoreSigpipe() {
  struct sigaction action;
  if (sigaction(SIGPIPE, nullptr, &action) == 0 &&
      action.sa_handler == SIG_DFL) {
    std::signal(SIGPIPE, SIG_IGN);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<GlooMesh>> GlooMesh::Connect(
    const GlooOptions& options, const ExchangeAddresses& exchange) {
  GW_CHECK(0 <= options.rank && options.rank < options.world);
  GW_CHECK(options.timeout > absl::ZeroDuration());
  std::unique_ptr<GlooMesh> mesh(new GlooMesh(options));
  if (options.world == 1) return mesh;
  GW_RETURN_IF_ERROR(CheckAddress(options.bind_address));
  IgnoreSigpipe();
  gloo::transport::tcp::attr attr;
  attr.hostname = options.bind_address;
  std::shared_ptr<gloo::transport::Device> device;
  try {
    device = gloo::transport::tcp::CreateDevice(attr);
  } catch (const std::exception& e) {
    spdlog::warn("collectives: {}", e.what());
    return AddressInvalid(options.bind_address, "cannot be listened at");
  }
  mesh->context_ = device->createContext(options.rank, options.world);
  GW_RETURN_IF_ERROR(mesh->ConnectAll(exchange));
  return mesh;
}

absl::Status GlooMesh::ConnectAll(const ExchangeAddresses& exchange) {
  // A pair waits five times as long as its context says for its connection.
  context_->setTimeout(std::max(absl::ToChronoMilliseconds(timeout_ / 5),
                                std::chrono::milliseconds(1)));
  absl::Time start = absl::Now();
  int rank = rank_;  // whose fault an exception is
  try {
    std::vector<std::vector<char>> mine(static_cast<size_t>(world_));
    size_t address_bytes = 0;
    for (int other = 0; other < world_; ++other) {
      if (other == rank_) continue;
      std::vector<char>& address = mine[static_cast<size_t>(other)];
      address = context_->createPair(other)->address().bytes();
      address_bytes = address.size();
    }
    std::string all_mine;
    for (std::vector<char>& address : mine) {
      address.resize(address_bytes);
      all_mine.append(address.begin(), address.end());
    }
    GW_ASSIGN_OR_RETURN(const std::vector<std::string> theirs,
                        exchange(all_mine));
    if (theirs.size() != static_cast<size_t>(world_)) {
      return CollectiveFailed(NameOf(rank_), "it got the addresses of " +
                                                 std::to_string(theirs.size()) +
                                                 " ranks, not of " +
                                                 std::to_string(world_));
    }
    for (rank = 0; rank < world_; ++rank) {
      if (rank == rank_) continue;
      start = absl::Now();
      const std::string& addresses = theirs[static_cast<size_t>(rank)];
      if (addresses.size() != all_mine.size()) {
        return CollectiveFailed(
            NameOf(rank), "its addresses have " +
                              std::to_string(addresses.size()) +
                              " bytes, not " + std::to_string(all_mine.size()));
      }
      const auto begin = addresses.begin() +
                         static_cast<std::ptrdiff_t>(address_bytes) * rank_;
      context_->getPair(rank)->connect(std::vector<char>(
          begin, begin + static_cast<std::ptrdiff_t>(address_bytes)));
    }
    rank = rank_;
    StartThreads();
  } catch (const std::exception& e) {
    spdlog::warn("collectives: rank {} cannot connect to rank {}: {}", rank_,
                 rank, e.what());
    return absl::Now() - start < timeout_
               ? CollectiveFailed(NameOf(rank), "no connection")
               : CollectiveTimeout(NameOf(rank), timeout_);
  }
  return absl::OkStatus();
}

}  // namespace gradwire
