// SPDX-License-Identifier: Apache-2.0
#include "server/operation.h"

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "google/protobuf/util/time_util.h"

namespace gradwire {

google::protobuf::Timestamp WallNow() {
  return google::protobuf::util::TimeUtil::NanosecondsToTimestamp(
      absl::ToUnixNanos(absl::Now()));
}

std::string KindName(v1::OperationKind kind) {
  switch (kind) {
    case v1::OPERATION_KIND_FORWARD:
      return "forward";
    case v1::OPERATION_KIND_FORWARD_BACKWARD:
      return "forward_backward";
    case v1::OPERATION_KIND_BACKWARD:
      return "backward";
    case v1::OPERATION_KIND_OPTIM_STEP:
      return "optim_step";
    case v1::OPERATION_KIND_ZERO_GRAD:
      return "zero_grad";
    case v1::OPERATION_KIND_SAVE_SNAPSHOT:
      return "save_snapshot";
    case v1::OPERATION_KIND_SAVE_STATE:
      return "save_state";
    case v1::OPERATION_KIND_LOAD_STATE:
      return "load_state";
    case v1::OPERATION_KIND_UNLOAD_MODEL:
      return "unload_model";
    case v1::OPERATION_KIND_RELEASE_ACTIVATIONS:
      return "release_activations";
    default:
      return "unspecified";
  }
}

}  // namespace gradwire
