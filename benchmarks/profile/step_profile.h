// SPDX-License-Identifier: Apache-2.0
// Where the wall time of a step goes: rows that add up to it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "benchmarks/kernels/ceilings.h"
#include "benchmarks/profile/profiling_kernels.h"

namespace gradwire {

struct ProfileRow {
  std::string op;
  int64_t calls = 0;                      // in a step; 0: not an op
  std::vector<double> step_seconds = {};  // all calls, for each step
  Work work = {};                         // of a step

  double MeanSeconds() const;
};

struct StepProfile {
  std::vector<ProfileRow> ops;  // the longest first
  ProfileRow outside;           // the step less its ops
  ProfileRow step;              // wall time; the work of all ops

  // A table for people; the rows of `step` and `outside` come last.
  std::string Table(const Ceilings& ceilings) const;
};

// A rate as a share of what bounds it: of the best product if there are FLOPs,
// else of the triad.
double ShareOfCeiling(const ProfileRow& row, const Ceilings& ceilings);

// One element for each step. REQUIRES: every step made the same calls.
StepProfile Summarize(const std::vector<std::map<std::string, OpTotal>>& totals,
                      const std::vector<double>& wall_seconds);

}  // namespace gradwire
