// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>

#include "base/error.h"
#include "base/status.h"
#include "server/batch_upload.h"
#include "server/decode_options.h"
#include "server/grpc_status.h"
#include "server/names.h"
#include "server/services.h"
#include "server/version.h"

namespace gradwire {
namespace {

void Fill(const JobPtr& job, const OperationPtr& op, v1::OperationRef* reply) {
  reply->set_op_id(op->op_id);
  reply->set_seq_id(op->seq);
  reply->set_queue_position(job->Describe(op).queue_position());
}

absl::Status HeaderMissing() {
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "HEADER_MISSING")
      .With("field", "header")
      .Message(
          "The first message of the stream must be its header, and only "
          "the first.");
}

// Reads chunks and the commit record of a streamed request into `upload`.
// `committed`: that record has come before.
template <typename Request, typename Upload>
absl::Status Receive(grpc::ServerReader<Request>* reader, Upload& upload,
                     bool committed = false) {
  Request message;
  while (reader->Read(&message)) {
    if (committed) {
      return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                          "MESSAGE_UNEXPECTED")
          .With("field", "commit")
          .Message("The commit record must be the last message.");
    }
    if (message.has_chunk()) {
      GW_RETURN_IF_ERROR(upload.Add(std::move(*message.mutable_chunk())));
    } else if (message.has_commit()) {
      GW_RETURN_IF_ERROR(upload.Commit(message.commit()));
      committed = true;
    } else {
      return HeaderMissing();
    }
  }
  return committed ? absl::OkStatus() : CommitMissing();
}

// What comes with a header, or behind it. Takes it out of the header, so that
// both ways are the same request.
template <typename Request, typename Header>
absl::Status ReceiveBatch(grpc::ServerReader<Request>* reader, Header& header,
                          DatumUpload& upload) {
  GW_ASSIGN_OR_RETURN(const bool whole, upload.TakeFrom(header));
  return Receive(reader, upload, whole);
}

// The reply to a request whose outcome is `status`; a final refusal ends its
// number.
grpc::Status Answer(const ServiceContext& context, const std::string& model_id,
                    int64_t seq, v1::OperationKind kind,
                    const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  if (detail && detail->reason == "BATCH_TOO_LARGE") {
    context.environment->metrics->CountRejected("too_large");
  }
  if (IsFinalRefusal(status)) {
    if (auto job = context.jobs->OfModel(model_id); job.ok()) {
      (*job)->EndSeq(model_id, seq, kind, status);
    }
  }
  return ToGrpcStatus(status);
}

// Operations without a batch; `valid` is what the request's own fields are
// worth.
grpc::Status SubmitSimple(const ServiceContext& context,
                          const std::string& model_id, int64_t seq,
                          v1::OperationKind kind,
                          const google::protobuf::Message& header,
                          v1::RankCommand command,
                          const std::string& activation_id,
                          const absl::Status& valid, v1::OperationRef* reply) {
  auto target = FindTarget(context, model_id, seq, kind);
  if (!target.ok()) {
    return Answer(context, model_id, seq, kind, target.status());
  }
  if (!valid.ok()) return Answer(context, model_id, seq, kind, valid);
  OperationRequest request;
  request.command = std::move(command);
  request.digest = RequestDigest(kind, header, "");
  auto op = target->job->Submit(model_id, seq, kind, std::move(request),
                                activation_id);
  if (!op.ok()) return ToGrpcStatus(op.status());
  Fill(target->job, *op, reply);
  return grpc::Status::OK;
}

absl::Status Unsupported(const char* field, const std::string& value,
                         const char* limit) {
  return ErrorBuilder(absl::StatusCode::kUnimplemented, "UNSUPPORTED_OPTION")
      .With("field", field)
      .With("value", value)
      .With("limit", limit)
      .Message(std::string(field) + " = " + value +
               " is not supported by this server; use " + limit + ".");
}

absl::Status CheckUserMetadata(
    const google::protobuf::Map<std::string, std::string>& metadata) {
  constexpr size_t kMostNames = 64, kMostName = 128, kMostBytes = 16 << 10;
  size_t bytes = 0, longest = 0;
  bool unnamed = false;
  for (const auto& [name, value] : metadata) {
    bytes += name.size() + value.size();
    longest = std::max(longest, name.size());
    unnamed = unnamed || name.empty();
  }
  const auto refuse = [](size_t value, size_t limit, const std::string& what) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                        "OPTION_OUT_OF_RANGE")
        .With("field", "user_metadata")
        .With("value", static_cast<int64_t>(value))
        .With("limit", static_cast<int64_t>(limit))
        .Message("user_metadata " + what + "; keep what is large elsewhere.");
  };
  if (metadata.size() > kMostNames) {
    return refuse(metadata.size(), kMostNames, "has more than 64 names");
  }
  if (unnamed || longest > kMostName) {
    return refuse(longest, kMostName,
                  "has a name that is not 1 to 128 bytes long");
  }
  if (bytes > kMostBytes) {
    return refuse(bytes, kMostBytes, "has more than 16 KiB");
  }
  return absl::OkStatus();
}

absl::Status CheckSaveState(const v1::SaveStateRequest& request) {
  GW_RETURN_IF_ERROR(CheckNewName(request.name(), "name"));
  GW_RETURN_IF_ERROR(CheckUserMetadata(request.user_metadata()));
  return CheckTtl(request.ttl_seconds());
}

std::string JobOfModel(const std::string& model_id) {
  return model_id.substr(0, model_id.find('.'));
}

std::string DirectoryOf(const ServiceContext& context,
                        const CheckpointRef& ref) {
  return context.environment->catalogue().DirectoryOf(ref);
}

absl::Status CheckSnapshot(const v1::SaveSnapshotRequest& request) {
  GW_RETURN_IF_ERROR(CheckNewName(request.name(), "name"));
  const v1::SnapshotKind kind = request.kind();
  const bool delta =
      kind == v1::SNAPSHOT_KIND_DELTA || kind == v1::SNAPSHOT_KIND_AUTO;
  if (!delta && kind != v1::SNAPSHOT_KIND_UNSPECIFIED &&
      kind != v1::SNAPSHOT_KIND_BASE) {
    return Unsupported("kind", std::to_string(kind), "base, delta or auto");
  }
  if (!request.parent().empty()) {
    if (!delta) {
      return Unsupported("parent", request.parent().substr(0, 128),
                         "none with a base, or kind delta");
    }
    GW_RETURN_IF_ERROR(
        ParseParent(request.parent(), JobOfModel(request.model_id())).status());
  }
  return CheckTtl(request.ttl_seconds());
}

}  // namespace

grpc::Status TrainingServiceImpl::CreateModel(
    grpc::ServerContext*, const v1::CreateModelRequest* request,
    v1::CreateModelResponse* reply) {
  auto job = context_.jobs->Get(request->job_id());
  if (!job.ok()) return ToGrpcStatus(job.status());
  v1::CreateModelRequest resolved = *request;
  if (const absl::Status init = ResolveInit(**job, resolved); !init.ok()) {
    return ToGrpcStatus(init);
  }
  auto created = (*job)->CreateModel(resolved);
  if (!created.ok()) return ToGrpcStatus(created.status());
  *reply = *std::move(created);
  return grpc::Status::OK;
}

absl::Status TrainingServiceImpl::ResolveInit(const Job& job,
                                              v1::CreateModelRequest& request) {
  if (!request.has_init_from()) return absl::OkStatus();
  GW_ASSIGN_OR_RETURN(
      const CheckpointRef ref,
      ParseCheckpointRef(request.init_from().ref(), job.id(), "init_from.ref"));
  request.mutable_init_from()->set_ref("gradwire://" + ref.path());
  if (context_.remote == nullptr || job.has_begun()) return absl::OkStatus();
  const absl::Status fetched = context_.remote->Fetch(ref);
  // Of what is not there either, the disk's answer.
  return absl::IsNotFound(fetched) ? absl::OkStatus() : fetched;
}

grpc::Status TrainingServiceImpl::GetModelInfo(
    grpc::ServerContext*, const v1::GetModelInfoRequest* request,
    v1::ModelInfo* reply) {
  auto job = context_.jobs->OfModel(request->model_id());
  if (!job.ok()) return ToGrpcStatus(job.status());
  auto info = (*job)->GetModelInfo(request->model_id());
  if (!info.ok()) return ToGrpcStatus(info.status());
  *reply = *std::move(info);
  return grpc::Status::OK;
}

grpc::Status TrainingServiceImpl::UnloadModel(
    grpc::ServerContext*, const v1::SequencedRequest* request,
    v1::OperationRef* reply) {
  v1::RankCommand command;
  command.mutable_reset();
  return SubmitSimple(context_, request->model_id(), request->seq_id(),
                      v1::OPERATION_KIND_UNLOAD_MODEL, *request, command, "",
                      absl::OkStatus(), reply);
}

grpc::Status TrainingServiceImpl::ZeroGrad(grpc::ServerContext*,
                                           const v1::SequencedRequest* request,
                                           v1::OperationRef* reply) {
  v1::RankCommand command;
  command.mutable_zero_grad();
  return SubmitSimple(context_, request->model_id(), request->seq_id(),
                      v1::OPERATION_KIND_ZERO_GRAD, *request, command, "",
                      absl::OkStatus(), reply);
}

grpc::Status TrainingServiceImpl::ReleaseActivations(
    grpc::ServerContext*, const v1::ReleaseActivationsRequest* request,
    v1::OperationRef* reply) {
  v1::RankCommand command;
  command.set_release_activation_id(request->activation_id());
  return SubmitSimple(context_, request->model_id(), request->seq_id(),
                      v1::OPERATION_KIND_RELEASE_ACTIVATIONS, *request, command,
                      request->activation_id(), absl::OkStatus(), reply);
}

grpc::Status TrainingServiceImpl::OptimStep(grpc::ServerContext*,
                                            const v1::OptimStepRequest* request,
                                            v1::OperationRef* reply) {
  v1::RankCommand command;
  *command.mutable_optim_step() = request->params();
  return SubmitSimple(context_, request->model_id(), request->seq_id(),
                      v1::OPERATION_KIND_OPTIM_STEP, *request, command, "",
                      DecodeAdamParams(request->params()).status(), reply);
}

grpc::Status TrainingServiceImpl::SaveSnapshot(
    grpc::ServerContext*, const v1::SaveSnapshotRequest* request,
    v1::OperationRef* reply) {
  const std::string job_id = JobOfModel(request->model_id());
  const CheckpointRef ref = {job_id, request->name(), /*snapshot=*/true};
  v1::RankCommand command;
  v1::RankSaveSnapshot& save = *command.mutable_save_snapshot();
  save.set_directory(DirectoryOf(context_, ref));
  save.set_path("gradwire://" + ref.path());
  save.set_kind(request->kind());
  if (auto parent = ParseParent(request->parent(), job_id); parent.ok()) {
    save.set_parent(*parent);
  }
  save.set_operation(request->model_id() + "." +
                     std::to_string(request->seq_id()));
  save.set_ttl_seconds(request->ttl_seconds());
  save.set_job_id(job_id);
  if (auto job = context_.jobs->OfModel(request->model_id()); job.ok()) {
    save.set_base_model((*job)->spec().base_model());
  }
  return SubmitSimple(context_, request->model_id(), request->seq_id(),
                      v1::OPERATION_KIND_SAVE_SNAPSHOT, *request, command, "",
                      CheckSnapshot(*request), reply);
}

grpc::Status TrainingServiceImpl::SaveState(grpc::ServerContext*,
                                            const v1::SaveStateRequest* request,
                                            v1::OperationRef* reply) {
  const CheckpointRef ref = {JobOfModel(request->model_id()), request->name()};
  v1::RankCommand command;
  v1::RankSaveState& save = *command.mutable_save_state();
  save.set_directory(DirectoryOf(context_, ref));
  save.set_path("gradwire://" + ref.path());
  if (auto job = context_.jobs->OfModel(request->model_id()); job.ok()) {
    const v1::JobSpec spec = (*job)->Get().spec();
    auto& attributes = *save.mutable_attributes();
    attributes["base_model"] = spec.base_model();
    attributes["precision"] = spec.precision();
    attributes["version"] = kVersion;
  }
  auto& attributes = *save.mutable_attributes();
  if (request->ttl_seconds() > 0) {
    attributes[kTtlAttribute] = std::to_string(request->ttl_seconds());
  }
  for (const auto& [name, value] : request->user_metadata()) {
    attributes[kUserAttribute + name] = value;
  }
  save.set_replaces(request->overwrite());
  return SubmitSimple(context_, request->model_id(), request->seq_id(),
                      v1::OPERATION_KIND_SAVE_STATE, *request, command, "",
                      CheckSaveState(*request), reply);
}

absl::Status TrainingServiceImpl::FetchState(
    const v1::LoadStateRequest& request, const CheckpointRef& ref) {
  constexpr auto kKind = v1::OPERATION_KIND_LOAD_STATE;
  if (context_.remote == nullptr) return absl::OkStatus();
  const auto target =
      FindTarget(context_, request.model_id(), request.seq_id(), kKind);
  if (!target.ok()) return absl::OkStatus();  // which is said in its turn
  const absl::Status fetched = context_.remote->Fetch(ref);
  // Of what is not there either, the ranks say so.
  if (absl::IsNotFound(fetched)) return absl::OkStatus();
  const bool may_pass =
      absl::IsUnavailable(fetched) || absl::IsResourceExhausted(fetched);
  if (!fetched.ok() && !may_pass) {
    target->job->EndSeq(request.model_id(), request.seq_id(), kKind, fetched);
  }
  return fetched;
}

grpc::Status TrainingServiceImpl::LoadState(grpc::ServerContext*,
                                            const v1::LoadStateRequest* request,
                                            v1::OperationRef* reply) {
  const auto ref = ParseCheckpointRef(request->ref(),
                                      JobOfModel(request->model_id()), "ref");
  v1::RankCommand command;
  v1::RankLoadState& load = *command.mutable_load_state();
  if (ref.ok()) {
    load.set_directory(DirectoryOf(context_, *ref));
    load.set_path("gradwire://" + ref->path());
    if (const absl::Status there = FetchState(*request, *ref); !there.ok()) {
      return ToGrpcStatus(there);
    }
  }
  load.set_optimizer(request->optimizer());
  return SubmitSimple(context_, request->model_id(), request->seq_id(),
                      v1::OPERATION_KIND_LOAD_STATE, *request, command, "",
                      ref.status(), reply);
}

grpc::Status TrainingServiceImpl::Forward(
    grpc::ServerContext*, grpc::ServerReader<v1::ForwardRequest>* reader,
    v1::OperationRef* reply) {
  v1::ForwardRequest first;
  if (!reader->Read(&first) || !first.has_header()) {
    return ToGrpcStatus(HeaderMissing());
  }
  v1::ForwardHeader& header = *first.mutable_header();
  const auto run = [&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(Target target,
                        FindTarget(context_, header.model_id(), header.seq_id(),
                                   v1::OPERATION_KIND_FORWARD));
    int32_t top_k = header.top_k();
    GW_ASSIGN_OR_RETURN(LossSpec loss, DecodeLoss(header.loss(), &top_k));
    GW_RETURN_IF_ERROR(CheckTopK(top_k, target.limits));
    if (!(header.retain_ttl_seconds() >= 0 &&
          header.retain_ttl_seconds() <= 86400)) {
      return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                          "OPTION_OUT_OF_RANGE")
          .With("field", "retain_ttl_seconds")
          .With("value", header.retain_ttl_seconds())
          .With("limit", 86400)
          .Message("retain_ttl_seconds must be from 0 to 86400.");
    }
    DatumUpload upload(std::move(loss), target.limits, context_.limits);
    GW_RETURN_IF_ERROR(ReceiveBatch(reader, header, upload));
    OperationRequest request = upload.TakeRequest();
    v1::RankForward& command = *request.command.mutable_forward();
    *command.mutable_loss() = header.loss();
    command.set_top_k(top_k);
    command.set_retain(header.retain());
    const std::string activation_id =
        header.retain()
            ? "act." + header.model_id() + "." + std::to_string(header.seq_id())
            : "";
    command.set_activation_id(activation_id);
    request.digest =
        RequestDigest(v1::OPERATION_KIND_FORWARD, header, request.digest);
    GW_ASSIGN_OR_RETURN(
        OperationPtr op,
        target.job->Submit(header.model_id(), header.seq_id(),
                           v1::OPERATION_KIND_FORWARD, std::move(request),
                           activation_id, header.retain_ttl_seconds(),
                           upload.TakeShapes()));
    Fill(target.job, op, reply);
    return absl::OkStatus();
  };
  return Answer(context_, header.model_id(), header.seq_id(),
                v1::OPERATION_KIND_FORWARD, run());
}

grpc::Status TrainingServiceImpl::ForwardBackward(
    grpc::ServerContext*,
    grpc::ServerReader<v1::ForwardBackwardRequest>* reader,
    v1::OperationRef* reply) {
  v1::ForwardBackwardRequest first;
  if (!reader->Read(&first) || !first.has_header()) {
    return ToGrpcStatus(HeaderMissing());
  }
  v1::ForwardBackwardHeader& header = *first.mutable_header();
  const auto run = [&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(Target target,
                        FindTarget(context_, header.model_id(), header.seq_id(),
                                   v1::OPERATION_KIND_FORWARD_BACKWARD));
    GW_ASSIGN_OR_RETURN(LossSpec loss, DecodeLoss(header.loss(), nullptr));
    DatumUpload upload(std::move(loss), target.limits, context_.limits);
    GW_RETURN_IF_ERROR(ReceiveBatch(reader, header, upload));
    OperationRequest request = upload.TakeRequest();
    *request.command.mutable_forward()->mutable_loss() = header.loss();
    request.command.mutable_forward()->set_backward(true);
    request.digest = RequestDigest(v1::OPERATION_KIND_FORWARD_BACKWARD, header,
                                   request.digest);
    GW_ASSIGN_OR_RETURN(
        OperationPtr op,
        target.job->Submit(header.model_id(), header.seq_id(),
                           v1::OPERATION_KIND_FORWARD_BACKWARD,
                           std::move(request), "", 0, upload.TakeShapes()));
    Fill(target.job, op, reply);
    return absl::OkStatus();
  };
  return Answer(context_, header.model_id(), header.seq_id(),
                v1::OPERATION_KIND_FORWARD_BACKWARD, run());
}

grpc::Status TrainingServiceImpl::Backward(
    grpc::ServerContext*, grpc::ServerReader<v1::BackwardRequest>* reader,
    v1::OperationRef* reply) {
  v1::BackwardRequest first;
  if (!reader->Read(&first) || !first.has_header()) {
    return ToGrpcStatus(HeaderMissing());
  }
  const v1::BackwardHeader& header = first.header();
  const auto run = [&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(Target target,
                        FindTarget(context_, header.model_id(), header.seq_id(),
                                   v1::OPERATION_KIND_BACKWARD));
    std::vector<DatumShape> shapes;
    OperationPtr earlier =
        target.job->FindOperation(header.model_id(), header.seq_id());
    if (earlier != nullptr &&
        earlier->activation_id == header.activation_id()) {
      shapes = earlier->shapes;  // a repetition: the id may be used up
    } else {
      GW_ASSIGN_OR_RETURN(shapes,
                          target.job->ActivationShapes(header.model_id(),
                                                       header.activation_id()));
    }
    GradientUpload upload(shapes, context_.limits);
    GW_RETURN_IF_ERROR(Receive(reader, upload));
    OperationRequest request = upload.TakeRequest();
    v1::RankBackward& command = *request.command.mutable_backward();
    command.set_activation_id(header.activation_id());
    command.set_allow_stale(header.allow_stale());
    command.set_datum_count(request.datum_count);
    request.digest =
        RequestDigest(v1::OPERATION_KIND_BACKWARD, header, request.digest);
    GW_ASSIGN_OR_RETURN(
        OperationPtr op,
        target.job->Submit(header.model_id(), header.seq_id(),
                           v1::OPERATION_KIND_BACKWARD, std::move(request),
                           header.activation_id(), 0, std::move(shapes)));
    Fill(target.job, op, reply);
    return absl::OkStatus();
  };
  return Answer(context_, header.model_id(), header.seq_id(),
                v1::OPERATION_KIND_BACKWARD, run());
}

}  // namespace gradwire
