// SPDX-License-Identifier: Apache-2.0
#include "server/job_errors.h"

#include "base/error.h"

namespace gradwire {

absl::Status Fenced() {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "HANDLE_FENCED")
      .Message(
          "A newer handle has taken over this model, or its job was "
          "restarted. Create a model with take_over to get it back.");
}

absl::Status Unloaded() {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "MODEL_UNLOADED")
      .Message("The model was unloaded through this handle. Create another.");
}

absl::Status SequenceGap(int64_t seq, int64_t missing) {
  ErrorBuilder error(absl::StatusCode::kAborted, "SEQUENCE_GAP");
  error.With("field", "seq_id").With("value", seq);
  if (missing > 0) error.With("missing", missing);
  return error.Message(
      (missing > 0 ? "seq_id " + std::to_string(missing)
                   : std::string("A number before it")) +
      " never arrived, so what came after it was dropped. Send it again with "
      "the next free numbers.");
}

absl::Status ServerStopping() {
  return ErrorBuilder(absl::StatusCode::kUnavailable, "SERVER_STOPPED")
      .Server()
      .With("retry_after_seconds", 1.0)
      .Message(
          "The server stopped before the operation ended. It is recorded, and "
          "runs when the server is back: ask again then.");
}

}  // namespace gradwire
