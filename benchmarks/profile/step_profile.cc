// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/profile/step_profile.h"

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "base/check.h"

namespace gradwire {
namespace {

std::string Line(const ProfileRow& row, double wall, const Ceilings& ceilings) {
  const double seconds = row.MeanSeconds();
  char text[160];
  std::snprintf(text, sizeof(text), "%-34s %6s %10.2f %6.1f%%", row.op.c_str(),
                row.calls == 0 ? "" : std::to_string(row.calls).c_str(),
                1e3 * seconds, 100 * seconds / wall);
  std::string line = text;
  if (row.work.bytes > 0) {
    const bool products = row.work.flops > 0;
    std::snprintf(text, sizeof(text), " %8.1f %-7s %6.2f",
                  1e-9 * (products ? row.work.flops : row.work.bytes) / seconds,
                  products ? "GFLOP/s" : "GB/s", ShareOfCeiling(row, ceilings));
    line += text;
  }
  return line + "\n";
}

}  // namespace

double ProfileRow::MeanSeconds() const {
  return std::accumulate(step_seconds.begin(), step_seconds.end(), 0.0) /
         static_cast<double>(step_seconds.size());
}

double ShareOfCeiling(const ProfileRow& row, const Ceilings& ceilings) {
  const double seconds = row.MeanSeconds();
  return row.work.flops > 0 ? row.work.flops / seconds / ceilings.gemm_flops
                            : row.work.bytes / seconds / ceilings.triad_bytes;
}

StepProfile Summarize(const std::vector<std::map<std::string, OpTotal>>& totals,
                      const std::vector<double>& wall_seconds) {
  GW_CHECK(!totals.empty() && totals.size() == wall_seconds.size());
  StepProfile profile;
  profile.step = {.op = "step", .step_seconds = wall_seconds};
  profile.outside = {.op = "outside ops", .step_seconds = wall_seconds};
  for (const auto& [name, first] : totals.front()) {
    ProfileRow row = {.op = name, .calls = first.calls, .work = first.work};
    for (size_t s = 0; s < totals.size(); ++s) {
      GW_CHECK(totals[s].size() == totals.front().size());
      const auto of_step = totals[s].find(name);
      GW_CHECK(of_step != totals[s].end());
      GW_CHECK(of_step->second.calls == first.calls);
      row.step_seconds.push_back(of_step->second.seconds);
      profile.outside.step_seconds[s] -= of_step->second.seconds;
    }
    profile.step.work.flops += row.work.flops;
    profile.step.work.bytes += row.work.bytes;
    profile.ops.push_back(std::move(row));
  }
  std::stable_sort(profile.ops.begin(), profile.ops.end(),
                   [](const ProfileRow& a, const ProfileRow& b) {
                     return a.MeanSeconds() > b.MeanSeconds();
                   });
  return profile;
}

std::string StepProfile::Table(const Ceilings& ceilings) const {
  const double wall = step.MeanSeconds();
  char header[160];
  std::snprintf(header, sizeof(header), "%-34s %6s %10s %7s %8s %-7s %6s\n",
                "op", "calls", "ms", "share", "rate", "", "of ceiling");
  std::string text = header;
  for (const ProfileRow& row : ops) text += Line(row, wall, ceilings);
  return text + Line(outside, wall, ceilings) + Line(step, wall, ceilings);
}

}  // namespace gradwire
