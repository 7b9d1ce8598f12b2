// SPDX-License-Identifier: Apache-2.0
// From the datums of a request to what a trainer takes; everything is checked
// on the way, and sizes before anything of that size is allocated. Errors name
// datum_index, field, position, value and limit.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "gradwire/v1/training.pb.h"
#include "trainer/losses.h"
#include "trainer/trainer.h"

namespace gradwire {

struct RequestLimits {
  int64_t vocab = 0;
  int64_t max_context = 0;
  int32_t max_top_k = 64;
};

// Errors: UNIMPLEMENTED MODALITY_UNSUPPORTED; INVALID_ARGUMENT SHAPE_MISMATCH,
// SEQUENCE_TOO_LONG, TOKEN_OUT_OF_RANGE, MISSING_LOSS_INPUT,
// UNKNOWN_LOSS_INPUT, DTYPE_MISMATCH, CSR_INVALID, NONFINITE_INPUT,
// LOSS_CONFIG_OUT_OF_RANGE (thresholds of a position).
absl::StatusOr<TrainDatum> DecodeDatum(const v1::Datum& datum,
                                       int64_t datum_index,
                                       const LossInfo& loss,
                                       const RequestLimits& limits);
// Also checks a threshold that a datum gives against the other one of the
// loss's config, where the datum does not give both. REQUIRES:
// CheckLossSpec(loss) is OK.
absl::StatusOr<TrainDatum> DecodeDatum(const v1::Datum& datum,
                                       int64_t datum_index,
                                       const LossSpec& loss,
                                       const RequestLimits& limits);

// [n, k]. Errors: INVALID_ARGUMENT SHAPE_MISMATCH, DTYPE_MISMATCH,
// NONFINITE_INPUT.
absl::StatusOr<std::vector<float>> DecodeGradient(const v1::GradientItem& item,
                                                  int64_t n, int64_t k);

}  // namespace gradwire
