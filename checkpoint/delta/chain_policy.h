// SPDX-License-Identifier: Apache-2.0
// When a chain of deltas ends. A receiver that starts late loads the base and
// every delta since; past a point a new base is the smaller download.
#pragma once

#include <cstdint>

namespace gradwire {

inline constexpr int64_t kMaxChainLength = 25;
inline constexpr double kMaxChainShare = 0.5;

struct ChainState {
  int64_t base_bytes = 0;
  int64_t delta_bytes = 0;   // of all deltas since the base
  int64_t chain_length = 0;  // how many they are
};

enum class NextSnapshot {
  kDelta,
  kFullChainLong,   // there are kMaxChainLength deltas
  kFullChainLarge,  // they are above kMaxChainShare of the base
};

// What to write after `chain`, and why.
constexpr NextSnapshot DecideNextSnapshot(const ChainState& chain) {
  if (chain.chain_length >= kMaxChainLength) {
    return NextSnapshot::kFullChainLong;
  }
  if (static_cast<double>(chain.delta_bytes) >
      kMaxChainShare * static_cast<double>(chain.base_bytes)) {
    return NextSnapshot::kFullChainLarge;
  }
  return NextSnapshot::kDelta;
}

}  // namespace gradwire
