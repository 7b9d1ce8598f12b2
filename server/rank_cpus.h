// SPDX-License-Identifier: Apache-2.0
// Which CPUs the ranks of one machine compute on.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace gradwire {

// Those that this process may run on, ascending.
std::vector<int> AllowedCpus();

// Threads of each of `world` ranks: what was asked for, or, for 0, an equal
// share of the CPUs, at least 1. 0 for one rank: it looks for itself.
int ThreadsOfRank(int asked, int num_cpus, int world);

// The CPUs that are a rank's own: one behind the other, as many for each as
// there are for all. None, which is no limit, if there is one rank, fewer CPUs
// than ranks, or more threads than CPUs of its own.
std::vector<int> CpusOfRank(const std::vector<int>& cpus, int rank, int world,
                            int threads);

// "0,1,4"
std::string FormatCpus(const std::vector<int>& cpus);

// Keeps the calling thread, and those that it starts, to the CPUs of such a
// list; an empty one is no limit.
// Errors: INVALID_ARGUMENT.
absl::Status PinToCpus(const std::string& list);

}  // namespace gradwire
