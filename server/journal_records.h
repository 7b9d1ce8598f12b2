// SPDX-License-Identifier: Apache-2.0
// What of an operation is in the records of its job's log, and an operation
// again from them. Pure.
#pragma once

#include "gradwire/v1/journal.pb.h"
#include "server/operation.h"

namespace gradwire {

// Of one that has ended. Arrays are most of it; without them FetchResult of a
// later process says RESULT_EXPIRED.
v1::JournalOutcome OutcomeOf(const Operation& op, bool with_arrays);

// Both to one operation, in any order.
void TakeOp(const v1::JournalOp& logged, Operation& op);
// Leaves `outcome` with the arrays alone.
void TakeOutcome(v1::JournalOutcome& outcome, Operation& op);

// Whether it has a result with arrays.
bool HasArrays(const Operation& op);

}  // namespace gradwire
