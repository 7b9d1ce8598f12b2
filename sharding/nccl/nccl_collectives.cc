// SPDX-License-Identifier: Apache-2.0
#include "sharding/nccl/nccl_collectives.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status.h"
#include "device/cuda/cuda_event.h"
#include "device/cuda/cuda_status.h"
#include "sharding/collective_error.h"
#include "sharding/gloo/gloo_mesh.h"
#include "sharding/nccl/nccl_comm.h"
#include "sharding/nccl/nccl_transfers.h"
#include "sharding/nccl/rank_progress.h"

namespace gradwire {
namespace {

// How often a collective that runs is looked at.
constexpr std::chrono::microseconds kLookUp{500};
// How long a collective may still need peers that have left: they have done
// their part, or never will.
constexpr absl::Duration kAfterLeft = absl::Seconds(2);
// How long a failure of NCCL waits for the news of a lost peer that explains
// it.
constexpr absl::Duration kExplain = absl::Milliseconds(500);

// A collective that was queued and is not known to be done.
struct Running {
  CudaEvent ready;                  // what it reads is written
  CudaEvent begun{/*timed=*/true};  // and its turn has come
  CudaEvent done{/*timed=*/true};
  CudaEvent waited{/*timed=*/true};  // somebody began to wait
  bool is_waited_for = false;
  // When the device was seen to have begun it.
  std::optional<absl::Time> since;
};

class NcclCollectives : public NcclGroup {
 public:
  NcclCollectives(CudaDevice& device, const NcclOptions& options,
                  std::unique_ptr<GlooMesh> mesh)
      : device_(device),
        timeout_(options.control.timeout),
        staging_bytes_(options.staging_bytes),
        mesh_(std::move(mesh)),
        progress_(std::make_shared<RankProgress>()) {}

  ~NcclCollectives() override {
    if (watcher_.joinable()) Leave();
    // NCCL still looks at the stream that it was given.
    comm_.reset();
  }

  // Connects and begins to watch.
  absl::Status Start() {
    ncclUniqueId id = {};
    if (rank() == 0 && ncclGetUniqueId(&id) != ncclSuccess) {
      return CollectiveFailed(name(), "NCCL finds no network interface");
    }
    GW_RETURN_IF_ERROR(mesh_->Begin());
    GW_RETURN_IF_ERROR(Spread(&id, sizeof(id)));
    device_.MakeCurrent();
    GW_ASSIGN_OR_RETURN(
        comm_,
        NcclComm::Create(id, {.rank = rank(),
                              .world = world(),
                              .name = mesh_->NameOf(rank()),
                              .timeout = timeout_,
                              .given_up = [this] { return GivenUp(); }}));
    GW_ASSIGN_OR_RETURN(transfers_,
                        NcclTransfers::Create(device_, *comm_, rank(), world(),
                                              staging_bytes_));
    watcher_ = std::thread([this] { Watch(); });
    return absl::OkStatus();
  }

  int rank() const override { return mesh_->rank(); }
  int world() const override { return mesh_->world(); }
  int name() const override { return mesh_->NameOf(rank()); }

  Ticket AllGather(Stream& stream, const Tensor& shard,
                   const Tensor& full) override {
    GW_CHECK(shard.dtype() == full.dtype());
    GW_CHECK(full.num_elements() == world() * shard.num_elements());
    return Add(stream, [&] { return transfers_->AllGather(shard, full); });
  }

  Ticket ReduceScatterParts(Stream& stream, const Tensor& full, int64_t stride,
                            const Tensor& shard, bool accumulate) override {
    const int64_t n = shard.num_elements();
    GW_CHECK(full.dtype() == DType::kF32 && shard.dtype() == DType::kF32);
    GW_CHECK(stride >= n && full.num_elements() == (world() - 1) * stride + n);
    return Add(stream, [&] {
      return transfers_->ReduceScatter(full, stride, shard, accumulate);
    });
  }

  Ticket AllReduce(Stream& stream, const Tensor& values) override {
    GW_CHECK(values.dtype() == DType::kF32 || values.dtype() == DType::kF64);
    return Add(stream, [&] { return transfers_->AllReduce(values); });
  }

  Ticket Broadcast(Stream& stream, const Tensor& values, int root) override {
    GW_CHECK(0 <= root && root < world());
    return Add(stream, [&] { return transfers_->Broadcast(values, root); });
  }

  absl::Status Wait(Stream& stream, Ticket ticket) override {
    return Await(stream, ticket, /*counted=*/true);
  }
  absl::Status Follow(Stream& stream, Ticket ticket) override {
    return Await(stream, ticket, /*counted=*/false);
  }

  void WhenFailed(std::function<void(const absl::Status&)> told) override {
    Lock lock(progress_->mutex);
    told_ = std::move(told);
    Tell(lock);
  }

  absl::Status Await(Stream& stream, Ticket ticket, bool counted) {
    {
      std::lock_guard<std::mutex> lock(progress_->mutex);
      GW_CHECK(0 < ticket && ticket <= progress_->last);
      if (ticket <= progress_->completed) return absl::OkStatus();
      const Ticket index = ticket - progress_->completed - 1;
      if (progress_->failure.ok() &&
          index < static_cast<Ticket>(running_.size())) {
        return HoldUp(static_cast<CudaStream&>(stream), ticket, counted,
                      running_[static_cast<size_t>(index)]);
      }
    }
    return progress_->ResultOf(ticket);
  }

  void Abort(const absl::Status& status) override {
    GW_CHECK(!status.ok());
    // Whoever holds the lock and waits for NCCL lets go.
    aborting_ = true;
    std::lock_guard<std::mutex> lock(progress_->mutex);
    if (progress_->failure.ok()) progress_->failure = status;
    mesh_->Interrupt();
    progress_->changed.notify_all();
  }

  Statistics statistics() const override {
    std::lock_guard<std::mutex> lock(progress_->mutex);
    Statistics statistics = statistics_;
    statistics.bytes_sent = transfers_->bytes_sent();
    return statistics;
  }

 private:
  using Lock = std::unique_lock<std::mutex>;

  bool GivenUp() const { return aborting_ || mesh_->HasVerdict(); }

  // Gives all ranks the bytes of rank 0.
  absl::Status Spread(void* data, int64_t bytes) {
    std::vector<GlooTransfer> transfers;
    for (int peer = 0; peer < world(); ++peer) {
      if (peer == rank() || (rank() != 0 && peer != 0)) continue;
      transfers.emplace_back(mesh_.get(), peer, data, bytes);
      if (rank() == 0) {
        transfers.back().Send(0, bytes);
      } else {
        transfers.back().Receive(0, bytes);
      }
    }
    for (GlooTransfer& transfer : transfers) {
      GW_RETURN_IF_ERROR(transfer.Wait());
    }
    return absl::OkStatus();
  }

  Ticket Add(Stream& stream, const std::function<absl::Status()>& collective) {
    Lock lock(progress_->mutex);
    const Ticket ticket = ++progress_->last;
    // The watcher finds out why, and ends the group.
    if (progress_->failure.ok() && !mesh_->HasVerdict()) {
      const absl::Status status =
          Queue(static_cast<CudaStream&>(stream), collective);
      // What others have ended says more than what NCCL made of it.
      if (!status.ok() && !GivenUp()) progress_->failure = status;
    }
    progress_->changed.notify_all();
    return ticket;
  }

  // REQUIRES: the lock.
  absl::Status Queue(CudaStream& stream,
                     const std::function<absl::Status()>& collective) {
    const auto check = [](cudaError_t error) {
      return CudaStatus(error, "queueing a collective");
    };
    device_.MakeCurrent();
    Running running;
    if (!spare_.empty()) {
      running = std::move(spare_.back());
      spare_.pop_back();
    }
    running.is_waited_for = false;
    running.since.reset();
    GW_RETURN_IF_ERROR(check(running.ready.Record(stream.get())));
    GW_RETURN_IF_ERROR(check(running.ready.HoldUp(transfers_->stream())));
    GW_RETURN_IF_ERROR(check(running.begun.Record(transfers_->stream())));
    GW_RETURN_IF_ERROR(collective());
    GW_RETURN_IF_ERROR(check(running.done.Record(transfers_->stream())));
    running_.push_back(std::move(running));
    return absl::OkStatus();
  }

  // REQUIRES: the lock.
  absl::Status HoldUp(CudaStream& stream, Ticket ticket, bool counted,
                      Running& running) {
    device_.MakeCurrent();
    if (counted && !running.is_waited_for) {
      stream.Check(running.waited.Record(stream.get()), "waiting");
      running.is_waited_for = true;
    }
    stream.Check(running.done.HoldUp(stream.get()), "waiting");
    stream.AskWhenSynchronized(
        [progress = progress_, ticket] { return progress->ResultOf(ticket); });
    return absl::OkStatus();
  }

  // The watcher's thread: takes note of what is done, and ends the group when
  // it must.
  void Watch() {
    device_.MakeCurrent();
    Lock lock(progress_->mutex);
    while (!stop_) {
      if (progress_->ended) {
        progress_->changed.wait(lock);
        continue;
      }
      if (progress_->failure.ok()) Retire();
      if (progress_->failure.ok()) FindFailure(lock);
      if (!progress_->failure.ok()) {
        End(lock);
      } else if (running_.empty() && !stop_) {
        // A peer's farewell is found by the next collective.
        if (!mesh_->HasVerdict()) progress_->changed.wait(lock);
      } else {
        progress_->changed.wait_for(lock, kLookUp);
      }
    }
  }

  // REQUIRES: the lock; no failure. Takes note of what the device has done.
  void Retire() {
    while (!running_.empty() && progress_->failure.ok()) {
      Running& first = running_.front();
      const cudaError_t done = first.done.Query();
      if (done == cudaErrorNotReady) {
        if (!first.since && first.begun.Query() == cudaSuccess) {
          first.since = absl::Now();
        }
        return;
      }
      if (done != cudaSuccess) {
        progress_->failure = CudaStatus(done, "a collective");
        mesh_->Interrupt();
        return;
      }
      ++progress_->completed;
      ++statistics_.collectives;
      statistics_.busy_seconds += first.done.SecondsSince(first.begun);
      if (first.is_waited_for) {
        statistics_.wait_seconds +=
            std::max(0.0, first.done.SecondsSince(first.waited));
      }
      spare_.push_back(std::move(first));
      running_.pop_front();
      progress_->changed.notify_all();
    }
  }

  // REQUIRES: no failure. Lets go of the lock while it asks others.
  void FindFailure(Lock& lock) {
    if (mesh_->HasVerdict()) {
      lock.unlock();
      Fail(lock, mesh_->End());
      return;
    }
    if (running_.empty()) return;
    const absl::Status nccl = comm_->AsyncError();
    if (!nccl.ok()) {
      lock.unlock();
      Fail(lock, Explain(nccl));
      return;
    }
    const std::optional<absl::Time> since = running_.front().since;
    if (!since) return;
    const absl::Time now = absl::Now();
    if (now - *since >= timeout_) {
      lock.unlock();
      Fail(lock, CallTheRoll());
      return;
    }
    const int left = mesh_->FirstLeft();
    if (left < 0) return;
    if (!left_since_) left_since_ = now;
    if (now - std::max(*since, *left_since_) >= kAfterLeft) {
      lock.unlock();
      Fail(lock, mesh_->EndFor(left));
    }
  }

  void Fail(Lock& lock, const absl::Status& status) {
    lock.lock();
    if (progress_->failure.ok()) progress_->failure = status;
  }

  // A peer that is lost breaks NCCL's connections as well as the mesh's.
  absl::Status Explain(const absl::Status& nccl) {
    const absl::Time end = absl::Now() + kExplain;
    while (!mesh_->HasVerdict() && absl::Now() < end) {
      absl::SleepFor(absl::Milliseconds(5));
    }
    if (mesh_->HasVerdict()) return mesh_->End();
    mesh_->Interrupt();
    (void)mesh_->End();
    return nccl;
  }

  // Some rank is late. All that wait for it ask all others how far they are:
  // it does not answer, or it is the one that is behind.
  absl::Status CallTheRoll() {
    GW_RETURN_IF_ERROR(mesh_->Begin());
    Ticket mine;
    {
      std::lock_guard<std::mutex> lock(progress_->mutex);
      mine = progress_->completed;
    }
    std::vector<Ticket> completed(static_cast<size_t>(world()), mine);
    std::vector<GlooTransfer> transfers;
    for (int peer = 0; peer < world(); ++peer) {
      if (peer == rank()) continue;
      transfers.emplace_back(mesh_.get(), peer,
                             &completed[static_cast<size_t>(peer)],
                             int64_t{sizeof(Ticket)});
      transfers.back().Receive(0, sizeof(Ticket));
    }
    for (int peer = 0; peer < world(); ++peer) {
      if (peer == rank()) continue;
      transfers.emplace_back(mesh_.get(), peer, &mine, int64_t{sizeof(Ticket)});
      transfers.back().Send(0, sizeof(Ticket));
    }
    for (GlooTransfer& transfer : transfers) {
      GW_RETURN_IF_ERROR(transfer.Wait());
    }
    mesh_->Blame(
        static_cast<int>(std::min_element(completed.begin(), completed.end()) -
                         completed.begin()));
    return mesh_->End();
  }

  // Lets go of the lock where there is somebody to tell of a failure.
  void Tell(Lock& lock) {
    if (progress_->failure.ok() || told_ == nullptr) return;
    const auto told = std::exchange(told_, nullptr);
    const absl::Status failure = progress_->failure;
    lock.unlock();
    told(failure);
    lock.lock();
  }

  // Ends the group for `failure`: nothing touches memory any more.
  void End(Lock& lock) {
    Tell(lock);
    lock.unlock();
    mesh_->Interrupt();  // in vain if there is a verdict
    (void)mesh_->End();
    lock.lock();
    // Nobody queues any more: there is a failure.
    lock.unlock();
    comm_->Abort();
    transfers_->Drain();
    lock.lock();
    running_.clear();
    progress_->ended = true;
    progress_->changed.notify_all();
  }

  void Leave() {
    {
      Lock lock(progress_->mutex);
      if (progress_->failure.ok()) Retire();
      const bool busy = !running_.empty();
      if (busy && progress_->failure.ok()) {
        progress_->failure = CollectiveFailed(name(), "it left the group");
        aborting_ = true;
        mesh_->Interrupt();
      }
      progress_->changed.notify_all();
      // A failure is seen to its end: memory is left alone from here on.
      progress_->changed.wait(
          lock, [&] { return progress_->failure.ok() || progress_->ended; });
      stop_ = true;
      progress_->changed.notify_all();
    }
    watcher_.join();
    Lock lock(progress_->mutex);
    // For streams that still ask.
    if (progress_->failure.ok()) {
      progress_->failure = CollectiveFailed(name(), "it left the group");
    }
    progress_->ended = true;
    progress_->changed.notify_all();
  }

  CudaDevice& device_;
  const absl::Duration timeout_;
  const int64_t staging_bytes_;
  // Of the watcher's thread, once it runs, but for what any may call.
  const std::unique_ptr<GlooMesh> mesh_;
  std::atomic<bool> aborting_{false};

  // Its mutex guards all of what follows.
  const std::shared_ptr<RankProgress> progress_;
  std::unique_ptr<NcclComm> comm_;
  std::unique_ptr<NcclTransfers> transfers_;
  // Those after `completed`, in order.
  std::deque<Running> running_;
  std::vector<Running> spare_;
  std::optional<absl::Time> left_since_;
  std::function<void(const absl::Status&)> told_;
  Statistics statistics_;
  bool stop_ = false;

  std::thread watcher_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<NcclGroup>> NewNcclCollectives(
    CudaDevice& device, const NcclOptions& options,
    const ExchangeAddresses& exchange) {
  GW_ASSIGN_OR_RETURN(std::unique_ptr<GlooMesh> mesh,
                      GlooMesh::Connect(options.control, exchange));
  auto made =
      std::make_unique<NcclCollectives>(device, options, std::move(mesh));
  GW_RETURN_IF_ERROR(made->Start());
  return made;
}

}  // namespace gradwire
