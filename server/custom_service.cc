// SPDX-License-Identifier: Apache-2.0
// ForwardBackwardCustom: Forward(retain) and Backward composed on one stream.
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "server/batch_upload.h"
#include "server/grpc_status.h"
#include "server/job_errors.h"
#include "server/services.h"
#include "trainer/losses.h"

namespace gradwire {
namespace {

constexpr absl::Duration kPoll = absl::Milliseconds(200);
constexpr size_t kChunkBytes = 1 << 20;

using CustomStream =
    grpc::ServerReaderWriter<v1::CustomResponse, v1::CustomRequest>;

absl::Status Unexpected(const std::string& wanted) {
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "MESSAGE_UNEXPECTED")
      .With("field", "message")
      .With("limit", wanted)
      .Message("The stream's next message must be " + wanted + ".");
}

absl::Status ClientGone() {
  return ErrorBuilder(absl::StatusCode::kCancelled, "CANCELLED")
      .Message("The client has gone.");
}

// One stream. Its backward's number is held until the end, so that the gap
// does not time out while the client computes.
class CustomCall {
 public:
  CustomCall(const ServiceContext& context, grpc::ServerContext* call,
             CustomStream* stream)
      : context_(context), call_(*call), stream_(*stream) {}
  ~CustomCall() {
    if (held_) {
      target_.job->Unhold(header_.model_id(), header_.backward_seq_id(),
                          activation_id_);
    }
  }

  absl::Status Run() {
    if (absl::Status status = ReadHeader(); !status.ok()) {
      return EndBoth(status);
    }
    if (absl::Status status = ReceiveDatums(); !status.ok()) {
      return EndBoth(status);
    }
    GW_RETURN_IF_ERROR(SendLogprobs());
    bool aborted = false;
    if (absl::Status status = ReceiveGradients(aborted); !status.ok()) {
      if (IsFinalRefusal(status)) EndBackward(status);
      return status;
    }
    if (aborted) return absl::OkStatus();
    return SendBackward();
  }

 private:
  absl::Status ReadHeader() {
    v1::CustomRequest message;
    if (!stream_.Read(&message) || !message.has_header()) {
      return Unexpected("the header");
    }
    // Up to 2 MiB, with its datums.
    header_ = std::move(*message.mutable_header());
    if (header_.backward_seq_id() <= header_.forward_seq_id()) {
      return ErrorBuilder(absl::StatusCode::kInvalidArgument, "SEQ_INVALID")
          .With("field", "backward_seq_id")
          .With("value", header_.backward_seq_id())
          .With("limit", header_.forward_seq_id() + 1)
          .Message("backward_seq_id must be above forward_seq_id.");
    }
    if (!(header_.retain_ttl_seconds() >= 0 &&
          header_.retain_ttl_seconds() <= 86400)) {
      return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                          "OPTION_OUT_OF_RANGE")
          .With("field", "retain_ttl_seconds")
          .With("value", header_.retain_ttl_seconds())
          .With("limit", 86400)
          .Message("retain_ttl_seconds must be from 0 to 86400.");
    }
    // What a forward-only handle may not do is known before its datums.
    GW_RETURN_IF_ERROR(FindTarget(context_, header_.model_id(),
                                  header_.backward_seq_id(),
                                  v1::OPERATION_KIND_BACKWARD)
                           .status());
    GW_ASSIGN_OR_RETURN(target_, FindTarget(context_, header_.model_id(),
                                            header_.forward_seq_id(),
                                            v1::OPERATION_KIND_FORWARD));
    activation_id_ = "act." + header_.model_id() + "." +
                     std::to_string(header_.forward_seq_id());
    return absl::OkStatus();
  }

  absl::Status ReceiveDatums() {
    DatumUpload upload(LossSpec{}, target_.limits, context_.limits);
    v1::CustomRequest message;
    GW_ASSIGN_OR_RETURN(bool committed, upload.TakeFrom(header_));
    while (!committed) {
      if (!stream_.Read(&message)) return CommitMissing();
      if (message.has_datums()) {
        GW_RETURN_IF_ERROR(upload.Add(std::move(*message.mutable_datums())));
      } else if (message.has_datums_commit()) {
        GW_RETURN_IF_ERROR(upload.Commit(message.datums_commit()));
        committed = true;
      } else {
        return Unexpected("datums or their commit record");
      }
    }
    shapes_ = upload.TakeShapes();
    OperationRequest request = upload.TakeRequest();
    v1::RankForward& command = *request.command.mutable_forward();
    command.set_retain(true);
    command.set_activation_id(activation_id_);
    v1::CustomHeader identity = header_;
    identity.clear_retain_ttl_seconds();
    request.digest =
        RequestDigest(v1::OPERATION_KIND_FORWARD, identity, request.digest);
    GW_ASSIGN_OR_RETURN(
        forward_, target_.job->Submit(
                      header_.model_id(), header_.forward_seq_id(),
                      v1::OPERATION_KIND_FORWARD, std::move(request),
                      activation_id_, header_.retain_ttl_seconds(), shapes_));
    target_.job->Hold(header_.model_id(), header_.backward_seq_id(),
                      activation_id_);
    held_ = true;
    v1::CustomResponse reply;
    Refer(forward_, reply.mutable_forward_accepted());
    return Write(reply);
  }

  absl::Status SendLogprobs() {
    GW_RETURN_IF_ERROR(target_.job->LoadItems(forward_));
    size_t sent = 0;
    while (true) {
      if (call_.IsCancelled()) return ClientGone();
      const Job::Items items = target_.job->ReadItems(forward_, sent, kPoll);
      if (items.expired) {
        return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                            "RESULT_EXPIRED")
            .With("seq_id", header_.forward_seq_id())
            .Message(
                "The forward's logprobs are gone. Send the batch again "
                "with the next free numbers.");
      }
      v1::CustomResponse reply;
      size_t bytes = 0;
      for (const v1::LogprobItem& item : items.items) {
        *reply.mutable_logprobs()->add_items() = item;
        bytes += item.ByteSizeLong();
        if (bytes < kChunkBytes) continue;
        GW_RETURN_IF_ERROR(Write(reply));
        reply.Clear();
        bytes = 0;
      }
      if (bytes > 0) GW_RETURN_IF_ERROR(Write(reply));
      sent += items.items.size();
      if (items.final) break;
      if (target_.job->stopping()) return ServerStopping();
    }
    const v1::Operation done = target_.job->Describe(forward_);
    if (done.state() != v1::OPERATION_STATE_DONE) {
      EndBackward(WithoutForward());
      return FromOperationError(done.error());
    }
    v1::CustomResponse reply;
    *reply.mutable_logprobs_commit() = target_.job->ItemsCommit(forward_);
    GW_RETURN_IF_ERROR(Write(reply));
    *reply.mutable_forward_done() = done;
    return Write(reply);
  }

  absl::Status ReceiveGradients(bool& aborted) {
    GradientUpload upload(shapes_, context_.limits);
    v1::CustomRequest message;
    while (true) {
      if (!stream_.Read(&message)) return CommitMissing();
      if (message.has_gradients()) {
        GW_RETURN_IF_ERROR(upload.Add(std::move(*message.mutable_gradients())));
      } else if (message.has_gradients_commit()) {
        GW_RETURN_IF_ERROR(upload.Commit(message.gradients_commit()));
        break;
      } else if (message.has_abort()) {
        aborted = true;
        return Abort(message.abort());
      } else {
        return Unexpected("gradients, their commit record or an abort");
      }
    }
    OperationRequest request = upload.TakeRequest();
    v1::RankBackward& command = *request.command.mutable_backward();
    command.set_activation_id(activation_id_);
    command.set_datum_count(request.datum_count);
    // As the RPC Backward would have it: either may repeat the other.
    v1::BackwardHeader identity;
    identity.set_model_id(header_.model_id());
    identity.set_seq_id(header_.backward_seq_id());
    identity.set_activation_id(activation_id_);
    request.digest =
        RequestDigest(v1::OPERATION_KIND_BACKWARD, identity, request.digest);
    GW_ASSIGN_OR_RETURN(
        backward_,
        target_.job->Submit(header_.model_id(), header_.backward_seq_id(),
                            v1::OPERATION_KIND_BACKWARD, std::move(request),
                            activation_id_, 0, shapes_));
    return absl::OkStatus();
  }

  // The client's loss failed: nothing is accumulated.
  absl::Status Abort(const v1::CustomAbort& abort) {
    EndBackward(
        ErrorBuilder(absl::StatusCode::kCancelled, "OPERATION_CANCELLED")
            .With("seq_id", header_.backward_seq_id())
            .Message("The client gave the custom step up: " +
                     abort.reason().substr(0, 128)));
    return absl::OkStatus();
  }

  absl::Status WithoutForward() const {
    return ErrorBuilder(absl::StatusCode::kCancelled, "OPERATION_CANCELLED")
        .With("seq_id", header_.backward_seq_id())
        .Message(
            "The forward of this custom step failed, so it has no "
            "backward.");
  }

  // The backward's number ends without a run, its activations are released.
  void EndBackward(const absl::Status& status) {
    if (held_) {
      target_.job->Unhold(header_.model_id(), header_.backward_seq_id(),
                          activation_id_);
      held_ = false;
    }
    target_.job->DropActivations(activation_id_);
    target_.job->EndSeq(header_.model_id(), header_.backward_seq_id(),
                        v1::OPERATION_KIND_BACKWARD, status);
  }

  // A final refusal before the forward ends both numbers.
  absl::Status EndBoth(const absl::Status& status) {
    if (!IsFinalRefusal(status)) return status;
    if (target_.job == nullptr) {
      auto job = context_.jobs->OfModel(header_.model_id());
      if (!job.ok()) return status;
      target_.job = *job;
    }
    target_.job->EndSeq(header_.model_id(), header_.forward_seq_id(),
                        v1::OPERATION_KIND_FORWARD, status);
    EndBackward(WithoutForward());
    return status;
  }

  absl::Status SendBackward() {
    v1::CustomResponse reply;
    Refer(backward_, reply.mutable_backward_accepted());
    GW_RETURN_IF_ERROR(Write(reply));
    while (true) {
      const v1::Operation done = target_.job->Wait(backward_, kPoll);
      if (done.state() == v1::OPERATION_STATE_FAILED ||
          done.state() == v1::OPERATION_STATE_CANCELLED) {
        return FromOperationError(done.error());
      }
      if (done.state() == v1::OPERATION_STATE_DONE) {
        *reply.mutable_backward_done() = done;
        return Write(reply);
      }
      if (call_.IsCancelled()) return ClientGone();
      if (target_.job->stopping()) return ServerStopping();
    }
  }

  void Refer(const OperationPtr& op, v1::OperationRef* reply) {
    reply->set_op_id(op->op_id);
    reply->set_seq_id(op->seq);
    reply->set_queue_position(target_.job->Describe(op).queue_position());
  }

  absl::Status Write(const v1::CustomResponse& reply) {
    return stream_.Write(reply) ? absl::OkStatus() : ClientGone();
  }

  const ServiceContext& context_;
  grpc::ServerContext& call_;
  CustomStream& stream_;
  v1::CustomHeader header_;
  Target target_;
  std::string activation_id_;
  std::vector<DatumShape> shapes_;
  OperationPtr forward_, backward_;
  bool held_ = false;
};

}  // namespace

grpc::Status TrainingServiceImpl::ForwardBackwardCustom(
    grpc::ServerContext* call, CustomStream* stream) {
  return ToGrpcStatus(CustomCall(context_, call, stream).Run());
}

}  // namespace gradwire
