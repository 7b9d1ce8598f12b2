// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "absl/status/statusor.h"
#include "server/rank_backend.h"

namespace gradwire {

// Defined by cuda_backend.cc, or by without_cuda.cc where the program is built
// without CUDA, which refuses.
absl::StatusOr<RankBackend> MakeCudaBackend(int index);

}  // namespace gradwire
