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
  model.files.clear();
  GW_ASSIGN_OR_RETURN(PendingDirectory pending,
                      PendingDirectory::Create(files, target));
  const auto add = [&](const std::string& name,
                       const std::string& content) -> absl::Status {
    model.files.push_back({name, std::ssize(content), DigestOf(content)});
    return pending.Write(name, content);
  };
  GW_RETURN_IF_ERROR(add(kBaseWeights, image->bytes()));
  const SnapshotManifest& base = chain->front();
  for (const SnapshotFile& file : base.files) {
    if (file.name == kBaseWeights) continue;
    GW_ASSIGN_OR_RETURN(
        const std::string content,
        ReadSnapshotFile(files, request.directory + "/" + base.name, file));
    GW_RETURN_IF_ERROR(add(file.name, content));
  }
  const std::string text = SnapshotText(model);
  GW_ASSIGN_OR_RETURN(model, ParseSnapshot(text));
  GW_RETURN_IF_ERROR(pending.Write(kSnapshotManifest, text));
  GW_RETURN_IF_ERROR(pending.Publish());
  return model;
}

}  // namespace gradwire
