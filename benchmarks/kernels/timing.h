// SPDX-License-Identifier: Apache-2.0
// Repeated timing of one function.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

namespace gradwire {

inline double NowSeconds() {
  return std::chrono::duration<double>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

struct Timing {
  double median = 0, min = 0, max = 0;  // seconds a call
};

// Calls run(0), run(1), ... : one call to warm up, then `rounds` timed rounds
// of as many calls as fill `round_seconds`, at least one.
inline Timing Time(const std::function<void(int call)>& run, int rounds,
                   double round_seconds) {
  int call = 0;
  const double start = NowSeconds();
  run(call++);
  const double once = NowSeconds() - start;
  const int calls =
      std::clamp(static_cast<int>(round_seconds / (once + 1e-9)), 1, 1000);
  std::vector<double> seconds;
  for (int round = 0; round < rounds; ++round) {
    const double begin = NowSeconds();
    for (int i = 0; i < calls; ++i) run(call++);
    seconds.push_back((NowSeconds() - begin) / calls);
  }
  std::sort(seconds.begin(), seconds.end());
  return {seconds[seconds.size() / 2], seconds.front(), seconds.back()};
}

}  // namespace gradwire
