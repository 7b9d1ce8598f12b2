// SPDX-License-Identifier: Apache-2.0
#include <string>

#include "base/error.h"
#include "server/cuda_backend.h"

namespace gradwire {

absl::StatusOr<RankBackend> MakeCudaBackend(int index) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "DEVICE_NOT_SUPPORTED")
      .Server()
      .With("field", "device")
      .With("value", "cuda:" + std::to_string(index))
      .Message(
          "this program was built without CUDA; use gradwire_rank_cuda (bazel "
          "build --config=cuda //server:gradwire_rank_cuda, where there is a "
          "CUDA toolkit), or --device=cpu");
}

}  // namespace gradwire
