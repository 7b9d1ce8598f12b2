// SPDX-License-Identifier: Apache-2.0
// From the options of a request (loss, top-k, AdamW) to what a trainer takes.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gradwire/v1/training.pb.h"
#include "server/decode_datum.h"
#include "trainer/losses.h"
#include "trainer/trainer.h"

namespace gradwire {

// An empty loss_fn is cross_entropy. With `top_k`, cross_entropy's key of that
// name is taken where *top_k is 0. Errors: those of CheckLossSpec;
// TOP_K_OUT_OF_RANGE.
absl::StatusOr<LossSpec> DecodeLoss(const v1::LossConfig& config,
                                    int32_t* top_k);

// Errors: INVALID_ARGUMENT TOP_K_OUT_OF_RANGE.
absl::Status CheckTopK(int32_t top_k, const RequestLimits& limits);

// Absent fields take their defaults. Errors: INVALID_ARGUMENT
// OPTIM_PARAM_OUT_OF_RANGE.
absl::StatusOr<OptimParams> DecodeAdamParams(const v1::AdamParams& params);
v1::AdamParams EncodeAdamParams(const OptimParams& params);

}  // namespace gradwire
