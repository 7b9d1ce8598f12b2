// SPDX-License-Identifier: Apache-2.0
// Propagation of absl::Status.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns the status of `expr` from the enclosing function unless it is OK.
#define GW_RETURN_IF_ERROR(expr)                                            \
  do {                                                                      \
    if (absl::Status gw_status = (expr); !gw_status.ok()) return gw_status; \
  } while (false)

#define GW_STATUS_CONCAT_INNER(a, b) a##b
#define GW_STATUS_CONCAT(a, b) GW_STATUS_CONCAT_INNER(a, b)

// Evaluates `expr` (a StatusOr); returns its status if not OK, else moves its
// value into `lhs`, which may be a declaration.
#define GW_ASSIGN_OR_RETURN(lhs, expr) \
  GW_ASSIGN_OR_RETURN_IMPL(GW_STATUS_CONCAT(gw_statusor_, __LINE__), lhs, expr)
#define GW_ASSIGN_OR_RETURN_IMPL(statusor, lhs, expr) \
  auto statusor = (expr);                             \
  if (!statusor.ok()) return statusor.status();       \
  lhs = *std::move(statusor)
