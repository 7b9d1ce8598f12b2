// SPDX-License-Identifier: Apache-2.0
// Applying deltas to the weights of a receiver, in place.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "checkpoint/delta/delta_file.h"
#include "device/thread_pool.h"

namespace gradwire {

// A tensor's values, aligned to its elements. Null only if there are none.
struct MutableTensor {
  TensorInfo info;
  void* data = nullptr;
};

// Makes of `weights`, which are those of `weight_id`, the delta's new weights,
// and of `weight_id` theirs. `weights` are the tensors of the new weights, in
// any order; what fresh ones hold before does not matter.
//
// All or nothing: after an error the weights are what they were, but for fresh
// tensors. Undoing costs no copy, since subtracting undoes an addition; of raw
// chunks (other dtypes than 16-bit floats) the old bytes are kept meanwhile.
// Every chunk of a tensor that changed is checked by its CRC32C, so that a
// wrong base does not pass for the right one. Tensors that did not change are
// not read: that they are right is what `weight_id` says.
//
// Thread rule: nobody else may read or write the weights meanwhile. `pool`
// null: the calling thread alone.
//
// Errors: FAILED_PRECONDITION DELTA_PARENT_MISMATCH (expected, have) before
// anything is read. INVALID_ARGUMENT DELTA_INVALID: other tensors than the
// delta's, or a delta that contradicts itself. DATA_LOSS DELTA_CORRUPT (field):
// the new weights do not come out, so these are not the weights of `weight_id`.
absl::Status ApplyDelta(const DeltaFile& delta,
                        absl::Span<const MutableTensor> weights,
                        std::string& weight_id, ThreadPool* pool = nullptr);

}  // namespace gradwire
