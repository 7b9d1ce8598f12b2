// SPDX-License-Identifier: Apache-2.0
#include "server/rank_cpus.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace gradwire {

std::vector<int> AllowedCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return {0};
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

int ThreadsOfRank(int asked, int num_cpus, int world) {
  if (asked > 0 || world == 1) return asked;
  return std::max(1, num_cpus / world);
}

std::vector<int> CpusOfRank(const std::vector<int>& cpus, int rank, int world,
                            int threads) {
  const auto count = static_cast<int64_t>(cpus.size());
  const int64_t begin = count * rank / world, end = count * (rank + 1) / world;
  if (world == 1 || count < world || threads > end - begin) return {};
  return {cpus.begin() + begin, cpus.begin() + end};
}

std::string FormatCpus(const std::vector<int>& cpus) {
  return absl::StrJoin(cpus, ",");
}

absl::Status PinToCpus(const std::string& list) {
  if (list.empty()) return absl::OkStatus();
  cpu_set_t set;
  CPU_ZERO(&set);
  for (absl::string_view text : absl::StrSplit(list, ',')) {
    int cpu = -1;
    if (!absl::SimpleAtoi(text, &cpu) || cpu < 0 || cpu >= CPU_SETSIZE) {
      return absl::InvalidArgumentError("--cpus=" + list +
                                        " is no list such as 0,1,4");
    }
    CPU_SET(cpu, &set);
  }
  if (sched_setaffinity(0, sizeof(set), &set) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError("--cpus=" + list + ": " + strerror(errno));
}

}  // namespace gradwire
