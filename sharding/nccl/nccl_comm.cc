// SPDX-License-Identifier: Apache-2.0
#include "sharding/nccl/nccl_comm.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "base/log.h"
#include "base/status.h"
#include "sharding/collective_error.h"

namespace gradwire {
namespace {

constexpr std::chrono::microseconds kLookUp{50};
// How long a rank that leaves waits until all it sent has gone.
constexpr absl::Duration kLeave = absl::Seconds(5);

bool IsError(ncclResult_t result) {
  return result != ncclSuccess && result != ncclInProgress;
}

}  // namespace

absl::StatusOr<std::unique_ptr<NcclComm>> NcclComm::Create(
    const ncclUniqueId& id, const Options& options) {
  std::unique_ptr<NcclComm> comm(new NcclComm(options));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  const ncclResult_t result = ncclCommInitRankConfig(
      &comm->comm_, options.world, id, options.rank, &config);
  absl::Status status = comm->ToStatus(result);
  if (status.ok()) status = comm->Settle();
  if (!status.ok()) {
    comm->Abort();
    return status;
  }
  return comm;
}

NcclComm::~NcclComm() {
  if (comm_ == nullptr) return;
  ncclResult_t result = ncclCommFinalize(comm_);
  const absl::Time end = absl::Now() + kLeave;
  while (!IsError(result) && absl::Now() < end) {
    if (IsError(ncclCommGetAsyncError(comm_, &result))) break;
    if (result == ncclSuccess) {
      ncclCommDestroy(comm_);
      return;
    }
    std::this_thread::sleep_for(kLookUp);
  }
  Abort();
}

absl::Status NcclComm::Run(
    const std::function<ncclResult_t(ncclComm_t)>& calls) {
  ncclResult_t result = ncclGroupStart();
  if (!IsError(result)) result = calls(comm_);
  const ncclResult_t ended = ncclGroupEnd();
  GW_RETURN_IF_ERROR(ToStatus(result));
  GW_RETURN_IF_ERROR(ToStatus(ended));
  return Settle();
}

absl::Status NcclComm::AsyncError() {
  ncclResult_t result = ncclSuccess;
  GW_RETURN_IF_ERROR(ToStatus(ncclCommGetAsyncError(comm_, &result)));
  return ToStatus(result);
}

void NcclComm::Abort() {
  if (comm_ == nullptr) return;
  const ncclResult_t result = ncclCommAbort(comm_);
  comm_ = nullptr;
  if (IsError(result)) {
    spdlog::warn("collectives: ncclCommAbort: {}", ncclGetErrorString(result));
  }
}

absl::Status NcclComm::Settle() {
  const absl::Time end = absl::Now() + options_.timeout;
  while (true) {
    ncclResult_t result = ncclSuccess;
    GW_RETURN_IF_ERROR(ToStatus(ncclCommGetAsyncError(comm_, &result)));
    if (result != ncclInProgress) return ToStatus(result);
    if (options_.given_up()) {
      return CollectiveFailed(options_.name, "it gave up waiting for NCCL");
    }
    if (absl::Now() > end) {
      return CollectiveFailed(options_.name,
                              "NCCL took more than " +
                                  absl::FormatDuration(options_.timeout) +
                                  " to connect it");
    }
    std::this_thread::sleep_for(kLookUp);
  }
}

absl::Status NcclComm::ToStatus(ncclResult_t result) const {
  if (!IsError(result)) return absl::OkStatus();
  const char* detail = ncclGetLastError(comm_);
  spdlog::warn("collectives: rank {}: NCCL: {} {}", options_.rank,
               ncclGetErrorString(result), detail == nullptr ? "" : detail);
  return CollectiveFailed(options_.name,
                          std::string("NCCL: ") + ncclGetErrorString(result));
}

}  // namespace gradwire
