// SPDX-License-Identifier: Apache-2.0
// Which kind a snapshot will be.
#include <algorithm>
#include <map>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/delta/chain_policy.h"
#include "checkpoint/sealed_text.h"
#include "checkpoint/snapshot/list.h"
#include "checkpoint/snapshot/writer.h"

namespace gradwire {
namespace {

std::string ReasonOf(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : std::string("UNKNOWN");
}

absl::Status Unavailable(const std::string& parent, const std::string& cause) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "DELTA_PARENT_UNAVAILABLE")
      .With("field", "parent")
      .With("value", parent)
      .With("cause", cause)
      .Message(parent.empty()
                   ? std::string("the job has no snapshot that a delta could "
                                 "be made to; save a base first")
                   : "the parent " + parent + " cannot be used (" + cause +
                         "); give another one of this job, or save a base");
}

// What the request asks for, if it was here before.
absl::StatusOr<std::optional<SnapshotManifest>> FindExisting(
    FileSystem& files, const SnapshotRequest& request) {
  const std::string siblings = DirectoryOf(request.directory);
  const std::string name = LastSegment(request.directory);
  auto found = ReadSnapshot(files, siblings, name);
  if (absl::IsNotFound(found.status())) return std::nullopt;
  if (found.ok() && !request.operation.empty() &&
      found->operation == request.operation &&
      found->weight_version == request.weight_version &&
      found->optimizer_step == request.optimizer_step) {
    // The last sync of the process that made it may not have happened.
    GW_RETURN_IF_ERROR(files.SyncDirectory(siblings));
    return std::optional(*std::move(found));
  }
  if (!found.ok() && !absl::IsDataLoss(found.status()) &&
      ReasonOf(found.status()) != "STATE_VERSION") {
    return found.status();
  }
  return ErrorBuilder(absl::StatusCode::kAlreadyExists, "SNAPSHOT_EXISTS")
      .With("field", "name")
      .With("value", name)
      .Message("there is already a snapshot " + name +
               "; names are used once, choose another");
}

// That the parent has the same tensors, or which one differs.
absl::Status CheckTensors(const SnapshotPlan& plan) {
  std::map<std::string, const TensorInfo*> now;
  for (const TensorInfo& info : plan.request.tensors) now[info.name] = &info;
  const auto mismatch = [&](const std::string& tensor) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                        "DELTA_PARENT_MISMATCH")
        .With("field", "parent")
        .With("value", plan.parent->name)
        .With("tensor", tensor.substr(0, 200))
        .Message("the parent " + plan.parent->name + " has another " +
                 tensor.substr(0, 200) +
                 " than the model (dtype or shape); save a base");
  };
  const std::vector<TensorView> before = plan.image->tensors();
  for (const TensorView& tensor : before) {
    const auto found = now.find(tensor.info.name);
    if (found == now.end() || *found->second != tensor.info) {
      return mismatch(tensor.info.name);
    }
  }
  if (before.size() == now.size()) return absl::OkStatus();
  for (const TensorView& tensor : before) now.erase(tensor.info.name);
  return mismatch(now.begin()->first);
}

// The parent's weights, into the plan.
absl::Status LoadParent(FileSystem& files,
                        const std::vector<SnapshotManifest>& chain,
                        SnapshotPlan& plan, ThreadPool* pool) {
  GW_ASSIGN_OR_RETURN(
      plan.image,
      SnapshotImage::Read(files, DirectoryOf(plan.request.directory), chain,
                          plan.request.memory_bytes, pool));
  plan.parent = chain.back();
  plan.base_id = chain.front().weight_id;
  return CheckTensors(plan);
}

ChainState StateOf(const std::vector<SnapshotManifest>& chain) {
  ChainState state;
  state.base_bytes = chain.front().weight_bytes();
  for (const SnapshotManifest& each : chain) {
    if (each.is_delta) state.delta_bytes += each.weight_bytes();
  }
  state.chain_length = std::ssize(chain) - 1;
  return state;
}

// What speaks against a delta, of a request that leaves it open; "" if nothing.
// Errors: the file system's.
absl::StatusOr<std::string> PlanAuto(FileSystem& files,
                                     const std::string& parent,
                                     SnapshotPlan& plan, ThreadPool* pool) {
  if (parent.empty()) return std::string("the first snapshot");
  const auto chain =
      ReadChain(files, DirectoryOf(plan.request.directory), parent);
  absl::Status status = chain.status();
  if (status.ok()) {
    switch (DecideNextSnapshot(StateOf(*chain))) {
      case NextSnapshot::kFullChainLong:
        return "the chain has " + std::to_string(kMaxChainLength) + " deltas";
      case NextSnapshot::kFullChainLarge:
        return std::string("the chain's deltas exceed half of its base");
      case NextSnapshot::kDelta:
        break;
    }
    status = LoadParent(files, *chain, plan, pool);
  }
  if (status.ok()) return std::string();
  plan.parent.reset();
  plan.image.reset();
  const std::string reason = ReasonOf(status);
  // A disk that fails is no reason to write more to it.
  const bool parents = reason.starts_with("DELTA_PARENT_") ||
                       reason.starts_with("CHECKPOINT_") ||
                       reason == "STATE_VERSION" || reason == "OUT_OF_MEMORY";
  if (!parents) return status;
  return "the parent " + parent + " cannot be used (" + reason + ")";
}

}  // namespace

absl::StatusOr<SnapshotPlan> PlanSnapshot(FileSystem& files,
                                          SnapshotRequest request,
                                          ThreadPool* pool) {
  SnapshotPlan plan;
  plan.request = std::move(request);
  const SnapshotRequest& wanted = plan.request;
  GW_ASSIGN_OR_RETURN(plan.existing, FindExisting(files, wanted));
  if (plan.existing) return plan;
  GW_ASSIGN_OR_RETURN(const std::vector<ListedSnapshot> others,
                      ListSnapshots(files, DirectoryOf(wanted.directory)));
  std::string parent = wanted.parent;
  for (const ListedSnapshot& other : others) {
    if (!other.manifest.ok()) continue;
    if (other.manifest->created_micros <= plan.newest_micros) continue;
    plan.newest_micros = other.manifest->created_micros;
    if (wanted.parent.empty()) parent = other.name;
  }
  if (wanted.kind == SnapshotKind::kBase) {
    plan.reason = "asked for";
    return plan;
  }
  if (wanted.kind == SnapshotKind::kAuto) {
    GW_ASSIGN_OR_RETURN(plan.reason, PlanAuto(files, parent, plan, pool));
    if (plan.reason.empty()) plan.reason = "smaller than a base";
    return plan;
  }
  if (parent.empty()) return Unavailable("", "NONE");
  auto chain = ReadChain(files, DirectoryOf(wanted.directory), parent);
  absl::Status status = chain.status();
  if (status.ok()) status = LoadParent(files, *chain, plan, pool);
  if (absl::IsNotFound(status) || absl::IsDataLoss(status) ||
      ReasonOf(status) == "STATE_VERSION") {
    return Unavailable(parent, ReasonOf(status));
  }
  GW_RETURN_IF_ERROR(status);
  plan.reason = "asked for";
  return plan;
}

}  // namespace gradwire
