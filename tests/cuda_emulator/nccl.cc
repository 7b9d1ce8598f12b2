// SPDX-License-Identifier: Apache-2.0
// The calls of NCCL that gradwire makes, between ranks that are threads of one
// process. As NCCL in its non-blocking mode, calls answer ncclInProgress now
// and then, a collective hangs for as long as a peer does not come, and only
// ncclCommAbort ends it.
#include <nccl.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/cuda_emulator/nccl_faults.h"
#include "tests/cuda_emulator/streams.h"

namespace {

// Memory that waits for the peer that copies it.
struct Message {
  const void* data = nullptr;
  size_t bytes = 0;
  bool taken = false;
};

// All ranks of a communicator meet here.
struct World {
  std::mutex mutex;
  std::condition_variable changed;
  int joined = 0;
  // By sender and receiver, in order.
  std::map<std::pair<int, int>, std::deque<std::shared_ptr<Message>>> mail;
};

struct Faults {
  std::mutex mutex;
  std::set<int> broken;
  std::set<int> aborted;
};

Faults& TheFaults() {
  static Faults* const faults = new Faults;
  return *faults;
}

std::shared_ptr<World> WorldOf(const ncclUniqueId& id) {
  static std::mutex mutex;
  static auto* const worlds = new std::map<std::string, std::weak_ptr<World>>;
  std::lock_guard<std::mutex> lock(mutex);
  std::weak_ptr<World>& entry =
      (*worlds)[std::string(id.internal, sizeof(id.internal))];
  std::shared_ptr<World> world = entry.lock();
  if (!world) entry = world = std::make_shared<World>();
  return world;
}

size_t BytesOf(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    default:
      return 8;
  }
}

}  // namespace

struct ncclComm {
  std::shared_ptr<World> world;
  int rank = 0;
  int size = 1;
  bool aborted = false;  // under the world's mutex
  std::atomic<int> calls{0};
  // Answers that are still owed an ncclInProgress.
  std::atomic<int> pending{0};
  // Of the last collective, which refers to this.
  cudaStream_t stream = nullptr;
};

namespace {

struct Transfer {
  bool receive;
  int peer;
  const void* from;  // of a send
  void* to;          // of a receive
  size_t bytes;
};

// A group that is being put together, or the one call outside of a group.
struct Group {
  int depth = 0;
  ncclComm_t comm = nullptr;
  cudaStream_t stream = nullptr;
  std::vector<Transfer> transfers;
};

thread_local Group group;

bool IsBroken(int rank) {
  Faults& faults = TheFaults();
  std::lock_guard<std::mutex> lock(faults.mutex);
  return faults.broken.count(rank) > 0;
}

// On the stream's thread.
void Exchange(ncclComm_t comm, const std::vector<Transfer>& transfers) {
  World& world = *comm->world;
  std::unique_lock<std::mutex> lock(world.mutex);
  std::vector<std::pair<int, std::shared_ptr<Message>>> sent;
  for (const Transfer& t : transfers) {
    if (t.receive) continue;
    auto message = std::make_shared<Message>(Message{t.from, t.bytes, false});
    world.mail[{comm->rank, t.peer}].push_back(message);
    sent.emplace_back(t.peer, message);
  }
  world.changed.notify_all();
  const auto wait = [&](const auto& done) {
    world.changed.wait(lock, [&] {
      return comm->aborted || (done() && !IsBroken(comm->rank));
    });
    return !comm->aborted;
  };
  for (const Transfer& t : transfers) {
    if (!t.receive) continue;
    auto& box = world.mail[{t.peer, comm->rank}];
    if (!wait([&] { return !box.empty(); })) break;
    const std::shared_ptr<Message> message = box.front();
    box.pop_front();
    if (t.bytes != message->bytes) std::abort();  // a broken caller
    std::memcpy(t.to, message->data, t.bytes);
    message->taken = true;
    world.changed.notify_all();
  }
  for (const auto& [peer, message] : sent) {
    wait([&] { return message->taken; });
    if (message->taken) continue;
    // Aborted: nobody may read the memory from here on.
    auto& box = world.mail[{comm->rank, peer}];
    std::erase(box, message);
  }
}

ncclResult_t Submit() {
  ncclComm_t comm = group.comm;
  if (comm == nullptr) return ncclSuccess;
  comm->stream = group.stream;
  gradwire::cuda_emulator::StreamOf(group.stream)
      .Add([comm, transfers = std::move(group.transfers)] {
        Exchange(comm, transfers);
      });
  group = {};
  if (++comm->calls % 3 != 0) return ncclSuccess;
  comm->pending = 2;
  return ncclInProgress;
}

void Add(ncclComm_t comm, cudaStream_t stream, Transfer transfer) {
  group.comm = comm;
  group.stream = stream;
  group.transfers.push_back(transfer);
}

ncclResult_t EndOfCall() { return group.depth > 0 ? ncclSuccess : Submit(); }

}  // namespace

namespace gradwire::cuda_emulator {

void BreakNccl(int rank) {
  Faults& faults = TheFaults();
  std::lock_guard<std::mutex> lock(faults.mutex);
  faults.broken.insert(rank);
}

bool WasAborted(int rank) {
  Faults& faults = TheFaults();
  std::lock_guard<std::mutex> lock(faults.mutex);
  return faults.aborted.count(rank) > 0;
}

}  // namespace gradwire::cuda_emulator

extern "C" {

const char* ncclGetErrorString(ncclResult_t result) {
  return result == ncclRemoteError ? "remote process exited or network error"
                                   : "an error of the emulator";
}

const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<uint64_t> last{0};
  std::memset(id, 0, sizeof(*id));
  const uint64_t value = ++last;
  std::memcpy(id->internal, &value, sizeof(value));
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks,
                                    ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  if (config->blocking != 0) return ncclInvalidArgument;
  {
    Faults& faults = TheFaults();
    std::lock_guard<std::mutex> lock(faults.mutex);
    faults.broken.erase(rank);
    faults.aborted.erase(rank);
  }
  *comm = new ncclComm;
  (*comm)->world = WorldOf(id);
  (*comm)->rank = rank;
  (*comm)->size = ranks;
  std::lock_guard<std::mutex> lock((*comm)->world->mutex);
  ++(*comm)->world->joined;
  return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* result) {
  World& world = *comm->world;
  std::lock_guard<std::mutex> lock(world.mutex);
  if (IsBroken(comm->rank)) {
    *result = ncclRemoteError;
  } else if (world.joined < comm->size || comm->pending.fetch_sub(1) > 0) {
    *result = ncclInProgress;
  } else {
    comm->pending = 0;
    *result = ncclSuccess;
  }
  return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  {
    Faults& faults = TheFaults();
    std::lock_guard<std::mutex> lock(faults.mutex);
    faults.aborted.insert(comm->rank);
  }
  {
    std::lock_guard<std::mutex> lock(comm->world->mutex);
    comm->aborted = true;
    comm->world->changed.notify_all();
  }
  if (comm->stream != nullptr) comm->stream->Synchronize();
  delete comm;
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  if (comm->stream != nullptr) comm->stream->Synchronize();
  return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  delete comm;
  return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
  ++group.depth;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  --group.depth;
  return EndOfCall();
}

ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type,
                      int peer, ncclComm_t comm, cudaStream_t stream) {
  Add(comm, stream, {false, peer, data, nullptr, count * BytesOf(type)});
  return EndOfCall();
}

ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
  Add(comm, stream, {true, peer, nullptr, data, count * BytesOf(type)});
  return EndOfCall();
}

ncclResult_t ncclAllGather(const void* from, void* to, size_t count,
                           ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  const size_t bytes = count * BytesOf(type);
  char* const all = static_cast<char*>(to);
  for (int peer = 0; peer < comm->size; ++peer) {
    char* const place = all + static_cast<size_t>(peer) * bytes;
    if (peer == comm->rank) {
      if (place == from) continue;
      gradwire::cuda_emulator::StreamOf(stream).Add(
          [=] { std::memcpy(place, from, bytes); });
      continue;
    }
    Add(comm, stream, {false, peer, from, nullptr, bytes});
    Add(comm, stream, {true, peer, nullptr, place, bytes});
  }
  return EndOfCall();
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t count,
                           ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  const size_t bytes = count * BytesOf(type);
  if (comm->rank != root) {
    Add(comm, stream, {true, root, nullptr, to, bytes});
    return EndOfCall();
  }
  for (int peer = 0; peer < comm->size; ++peer) {
    if (peer != root) Add(comm, stream, {false, peer, from, nullptr, bytes});
  }
  if (to != from && bytes > 0) {
    gradwire::cuda_emulator::StreamOf(stream).Add(
        [=] { std::memcpy(to, from, bytes); });
  }
  return EndOfCall();
}

}  // extern "C"
