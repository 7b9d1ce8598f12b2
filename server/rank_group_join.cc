// SPDX-License-Identifier: Apache-2.0
#include "server/rank_group_join.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "device/device.h"
#include "server/host_port.h"
#include "xxhash.h"

namespace gradwire {
namespace {

// The meshes of a job.
enum Mesh { kWorld, kShards, kReplicas };

// The ranks of one mesh, which this one is of.
absl::StatusOr<std::unique_ptr<Collectives>> Connect(
    const RankGroupJoin& join, Mesh mesh, const std::vector<int>& ranks) {
  GlooOptions options;
  options.world = static_cast<int>(ranks.size());
  options.rank = static_cast<int>(
      std::find(ranks.begin(), ranks.end(), join.rank) - ranks.begin());
  // Whoever reads of a failure knows the ranks of the job.
  options.names = ranks;
  options.bind_address = join.address;
  options.timeout = join.timeout;
  return join.backend->connect(
      options,
      [&](const std::string& mine) -> absl::StatusOr<std::vector<std::string>> {
        GW_ASSIGN_OR_RETURN(std::vector<std::string> all,
                            join.exchange(mesh, mine));
        std::vector<std::string> of_ranks;
        for (const int rank : ranks) {
          of_ranks.push_back(all.at(static_cast<size_t>(rank)));
        }
        return of_ranks;
      });
}

// Of this machine as it runs now; containers of one machine differ, whose
// memory is not one.
int64_t HostId() {
  char name[256] = {};
  gethostname(name, sizeof(name) - 1);
  std::ifstream boot("/proc/sys/kernel/random/boot_id");
  std::string id;
  boot >> id;
  id += name;
  return static_cast<int64_t>(XXH3_64bits(id.data(), id.size()));
}

absl::StatusOr<int> RanksOnHost(Device& device, Collectives& world) {
  const int64_t mine = HostId();
  std::vector<int64_t> all(static_cast<size_t>(world.world()));
  GW_ASSIGN_OR_RETURN(
      const std::unique_ptr<DeviceBuffer> memory,
      device.Allocate((1 + world.world()) * DTypeBytes(DType::kI64)));
  const Tensor tensor(memory->data(), DType::kI64, {1 + world.world()});
  const Tensor own = tensor.Rows(0, 1);
  const Tensor gathered = tensor.Rows(1, 1 + world.world());
  const std::unique_ptr<Stream> stream = device.NewStream();
  device.CopyFromHost(*stream, &mine, own);
  GW_RETURN_IF_ERROR(
      world.Wait(*stream, world.AllGather(*stream, own, gathered)));
  device.CopyToHost(*stream, gathered, all.data());
  GW_RETURN_IF_ERROR(stream->Finish());
  return static_cast<int>(std::count(all.begin(), all.end(), mine));
}

}  // namespace

absl::StatusOr<RankGroupMember> JoinRankGroup(const RankGroupJoin& join) {
  RankGroupMember member;
  if (join.world == 1) return member;
  const int shards = join.world / join.replicas;
  std::vector<int> all, group, across;
  for (int rank = 0; rank < join.world; ++rank) {
    all.push_back(rank);
    if (rank / shards == join.rank / shards) group.push_back(rank);
    if (rank % shards == join.rank % shards) across.push_back(rank);
  }
  GW_ASSIGN_OR_RETURN(member.world, Connect(join, kWorld, all));
  if (join.replicas > 1) {
    GW_ASSIGN_OR_RETURN(auto in_group, Connect(join, kShards, group));
    GW_ASSIGN_OR_RETURN(auto of_groups, Connect(join, kReplicas, across));
    GW_ASSIGN_OR_RETURN(
        member.shards,
        join.backend->replicate(std::move(in_group), std::move(of_groups)));
  }
  GW_ASSIGN_OR_RETURN(member.ranks_on_host,
                      RanksOnHost(*join.backend->device, *member.world));
  return member;
}

absl::StatusOr<std::string> AddressTowards(const std::string& supervisor) {
  if (supervisor.rfind("unix:", 0) == 0) return std::string("127.0.0.1");
  const auto unknown = [&](const std::string& why) {
    return ErrorBuilder(absl::StatusCode::kUnavailable, "ADDRESS_UNKNOWN")
        .Server()
        .With("field", "supervisor")
        .With("value", supervisor)
        .Message("This machine's address cannot be told: " + why +
                 ". Name it with --collective_address.");
  };
  GW_ASSIGN_OR_RETURN(const HostPort host, ParseHostPort(supervisor));
  addrinfo hints = {};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  if (const int failure = getaddrinfo(
          host.host.c_str(), std::to_string(host.port).c_str(), &hints, &found);
      failure != 0) {
    return unknown(gai_strerror(failure));
  }
  // Nothing is sent: the kernel only looks up the way.
  const int fd = socket(found->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  sockaddr_storage address = {};
  socklen_t length = sizeof(address);
  char text[INET6_ADDRSTRLEN] = {};
  const bool ok =
      fd >= 0 && connect(fd, found->ai_addr, found->ai_addrlen) == 0 &&
      getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0 &&
      getnameinfo(reinterpret_cast<sockaddr*>(&address), length, text,
                  sizeof(text), nullptr, 0, NI_NUMERICHOST) == 0;
  if (fd >= 0) close(fd);
  freeaddrinfo(found);
  if (!ok) return unknown("there is no way to the supervisor");
  return std::string(text);
}

}  // namespace gradwire
