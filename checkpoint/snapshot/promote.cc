// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/snapshot/promote.h"

#include <utility>
#include <vector>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/publish.h"
#include "checkpoint/sealed_text.h"
#include "checkpoint/snapshot/image.h"

namespace gradwire {
namespace {

absl::Status ModelExists(const std::string& model_id) {
  return ErrorBuilder(absl::StatusCode::kAlreadyExists, "MODEL_EXISTS")
      .With("field", "model_id")
      .With("value", model_id)
      .Message("there is already a model " + model_id +
               ", of another snapshot; choose another id");
}

absl::StatusOr<std::vector<SnapshotFile>> WriteWeights(
    FileSystem& files, PendingDirectory& pending, const SnapshotImage& image,
    const PromoteRequest& request) {
  const std::vector<TensorView> tensors = image.tensors();
  std::vector<TensorInfo> infos;
  for (const TensorView& tensor : tensors) infos.push_back(tensor.info);
  GW_ASSIGN_OR_RETURN(const auto writer,
                      BaseWriter::Create(files, pending, std::move(infos),
                                         request.shard_bytes));
  for (const auto& [info, data] : tensors) {
    writer->Append(data, info.num_elements() * DeltaElementBytes(info.dtype));
  }
  GW_RETURN_IF_ERROR(writer->Finish());
  return writer->files();
}

}  // namespace

absl::StatusOr<SnapshotManifest> PromoteSnapshot(
    FileSystem& files, const PromoteRequest& request) {
  const std::string target = request.models_directory + "/" + request.model_id;
  auto chain = ReadChain(files, request.directory, request.name);
  const auto there = files.Stat(target);
  if (!there.ok() && !absl::IsNotFound(there.status())) return there.status();
  if (there.ok()) {
    auto model =
        ReadSnapshot(files, request.models_directory, request.model_id);
    if (!model.ok() || model->operation != request.source ||
        (chain.ok() && chain->back().weight_id != model->weight_id)) {
      return ModelExists(request.model_id);
    }
    // The last sync of the process that made it may not have happened.
    GW_RETURN_IF_ERROR(files.SyncDirectory(request.models_directory));
    return model;
  }
  GW_RETURN_IF_ERROR(chain.status());
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<SnapshotImage> image,
                      SnapshotImage::Read(files, request.directory, *chain,
                                          request.memory_bytes, request.pool));
  SnapshotManifest model = chain->back();
  model.name = request.model_id;
  model.is_delta = false;
  model.operation = request.source;
  model.created_micros = request.now_micros;
  model.expires_micros = 0;
  GW_ASSIGN_OR_RETURN(PendingDirectory pending,
                      PendingDirectory::Create(files, target));
  GW_ASSIGN_OR_RETURN(model.files,
                      WriteWeights(files, pending, *image, request));
  const SnapshotManifest& base = chain->front();
  for (const SnapshotFile& file : base.files) {
    if (NamesWeights(file.name)) continue;
    GW_ASSIGN_OR_RETURN(
        const std::string content,
        ReadSnapshotFile(files, request.directory + "/" + base.name, file));
    GW_RETURN_IF_ERROR(pending.Write(file.name, content));
    model.files.push_back(file);
  }
  const std::string text = SnapshotText(model);
  GW_ASSIGN_OR_RETURN(model, ParseSnapshot(text));
  GW_RETURN_IF_ERROR(pending.Write(kSnapshotManifest, text));
  GW_RETURN_IF_ERROR(pending.Publish());
  return model;
}

}  // namespace gradwire
