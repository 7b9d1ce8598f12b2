// SPDX-License-Identifier: Apache-2.0
// What the catalogue does with the weights of snapshots.
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "base/error.h"
#include "base/status.h"
#include "checkpoint/delta/interop.h"
#include "checkpoint/snapshot/diff.h"
#include "checkpoint/snapshot/image.h"
#include "checkpoint/snapshot/promote.h"
#include "device/cpu_device.h"
#include "server/checkpoint_catalogue.h"

namespace gradwire {
namespace {

absl::Status CheckSnapshot(const CheckpointRef& ref, const std::string& field) {
  if (ref.snapshot) return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                      "CHECKPOINT_KIND_MISMATCH")
      .With("field", field)
      .With("value", ref.path())
      .With("limit", "jobs/JOB/snapshots/NAME")
      .Message(
          "A training's checkpoint is not for inference; give a snapshot that "
          "save_weights_for_sampler returned.");
}

// Two sets of weights.
struct Pair {
  std::unique_ptr<SnapshotImage> from, to;
  std::string from_base_id;
  int64_t step = 0;
  std::string job;
};

absl::StatusOr<Pair> ReadPair(FileSystem& files,
                              const CheckpointCatalogue& catalogue,
                              const CheckpointRef& from,
                              const CheckpointRef& to, CpuDevice& device) {
  GW_RETURN_IF_ERROR(CheckSnapshot(from, "from"));
  GW_RETURN_IF_ERROR(CheckSnapshot(to, "to"));
  Pair pair;
  for (const auto& [ref, image] :
       {std::pair(&from, &pair.from), std::pair(&to, &pair.to)}) {
    const std::string directory = DirectoryOf(catalogue.DirectoryOf(*ref));
    GW_ASSIGN_OR_RETURN(const auto chain,
                        ReadChain(files, directory, ref->name));
    // Again for each: the first one has taken some of it.
    GW_ASSIGN_OR_RETURN(
        *image, SnapshotImage::Read(files, directory, chain,
                                    device.AvailableBytes(), &device.pool()));
    if (ref == &from) pair.from_base_id = chain.front().weight_id;
    pair.step = chain.back().optimizer_step;
    pair.job = chain.back().job;
  }
  return pair;
}

absl::StatusOr<std::string> Encode(const Pair& pair, v1::DiffFormat format,
                                   ThreadPool* pool) {
  const std::vector<TensorView> before = pair.from->tensors();
  const std::vector<TensorView> after = pair.to->tensors();
  if (format == v1::DIFF_FORMAT_XOR) return EncodeXorDelta(before, after);
  if (format == v1::DIFF_FORMAT_SPARSE) {
    return EncodeSparseDelta(before, after);
  }
  DeltaOptions options;
  options.model = pair.job;
  options.step = pair.step;
  options.prev_id = pair.from->weight_id();
  options.base_id = pair.from_base_id;
  options.pool = pool;
  return EncodeDelta(before, after, options);
}

}  // namespace

absl::Status CheckpointCatalogue::VerifySnapshot(
    const CheckpointRef& ref) const {
  const std::string directory = SnapshotsOf(ref.job_id);
  GW_ASSIGN_OR_RETURN(const auto chain,
                      ReadChain(*files_, directory, ref.name));
  for (const SnapshotManifest& each : chain) {
    for (const SnapshotFile& file : each.files) {
      if (NamesWeights(file.name)) continue;  // below
      const auto content =
          ReadSnapshotFile(*files_, directory + "/" + each.name, file);
      if (!content.ok()) {
        return WithErrorMetadata(content.status(), "snapshot", each.name);
      }
    }
  }
  CpuDevice device(0);
  return SnapshotImage::Read(*files_, directory, chain, device.AvailableBytes(),
                             &device.pool())
      .status();
}

absl::StatusOr<v1::PromotedModel> CheckpointCatalogue::Promote(
    const CheckpointRef& ref, const std::string& model_id,
    int64_t shard_bytes) const {
  GW_RETURN_IF_ERROR(CheckSnapshot(ref, "path"));
  GW_RETURN_IF_ERROR(CheckModelId(model_id));
  const std::lock_guard<std::mutex> lock(Removals());
  CpuDevice device(0);
  PromoteRequest request;
  request.directory = SnapshotsOf(ref.job_id);
  request.name = ref.name;
  request.source = "gradwire://" + ref.path();
  request.models_directory = gradwire::DirectoryOf(jobs_directory_) + "/models";
  request.model_id = model_id;
  request.now_micros = absl::ToUnixMicros(absl::Now());
  request.memory_bytes = device.AvailableBytes();
  request.shard_bytes = shard_bytes;
  request.pool = &device.pool();
  GW_ASSIGN_OR_RETURN(const SnapshotManifest manifest,
                      PromoteSnapshot(*files_, request));
  v1::PromotedModel model;
  model.set_model_id(model_id);
  model.set_local_path(request.models_directory + "/" + model_id);
  model.set_source(request.source);
  model.set_weight_id(manifest.weight_id);
  model.set_bytes(manifest.bytes());
  model.mutable_create_time()->set_seconds(manifest.created_micros / 1'000'000);
  model.mutable_create_time()->set_nanos(
      static_cast<int32_t>(manifest.created_micros % 1'000'000 * 1000));
  return model;
}

absl::StatusOr<v1::CheckpointDiff> CheckpointCatalogue::Diff(
    const CheckpointRef& from, const CheckpointRef& to) const {
  CpuDevice device(0);
  GW_ASSIGN_OR_RETURN(const Pair pair,
                      ReadPair(*files_, *this, from, to, device));
  const SnapshotDiff diff =
      DiffTensors(pair.from->tensors(), pair.to->tensors());
  v1::CheckpointDiff reply;
  for (const TensorChange& tensor : diff.tensors) {
    if (tensor.changed == 0 && !tensor.fresh) continue;
    v1::TensorDiff& out = *reply.add_tensors();
    out.set_name(tensor.info.name);
    out.set_dtype(tensor.info.dtype);
    for (const int64_t dim : tensor.info.shape) out.add_shape(dim);
    out.set_elements(tensor.info.num_elements());
    out.set_changed(tensor.changed);
    out.set_fresh(tensor.fresh);
  }
  for (const std::string& name : diff.removed) reply.add_removed(name);
  reply.set_elements(diff.elements);
  reply.set_changed(diff.changed);
  GW_ASSIGN_OR_RETURN(const std::string file,
                      Encode(pair, v1::DIFF_FORMAT_DLT1, &device.pool()));
  reply.set_delta_bytes(std::ssize(file));
  reply.set_full_bytes(pair.to->bytes());
  reply.set_from_weight_id(pair.from->weight_id());
  reply.set_to_weight_id(pair.to->weight_id());
  return reply;
}

absl::StatusOr<std::string> CheckpointCatalogue::ExportDiff(
    const CheckpointRef& from, const CheckpointRef& to,
    v1::DiffFormat format) const {
  CpuDevice device(0);
  GW_ASSIGN_OR_RETURN(const Pair pair,
                      ReadPair(*files_, *this, from, to, device));
  return Encode(pair, format, &device.pool());
}

}  // namespace gradwire
