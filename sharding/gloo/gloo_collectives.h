// SPDX-License-Identifier: Apache-2.0
// Collectives of CPU ranks over TCP, through gloo's transport.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "sharding/collectives.h"
#include "sharding/gloo/gloo_options.h"

namespace gradwire {

// One rank of a group. Returns when it is connected to all others; one rank
// alone needs no network, and exchanges nothing. Signals SIGPIPE are ignored
// from then on, unless the process handles them.
// REQUIRES: 0 <= rank < world; timeout > 0.
// Errors: INVALID_ARGUMENT ADDRESS_INVALID; those of `exchange` and of
// Collectives.
absl::StatusOr<std::unique_ptr<Collectives>> NewGlooCollectives(
    const GlooOptions& options, const ExchangeAddresses& exchange);

}  // namespace gradwire
