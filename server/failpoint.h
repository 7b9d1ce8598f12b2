// SPDX-License-Identifier: Apache-2.0
// Places where a test may end the process, or have it wait: between what must
// be safe whichever of the two was the last thing done. In production nothing
// is set, and a place costs a load.
#pragma once

#include <atomic>

namespace gradwire {

using FailpointHook = void (*)(const char* name);
// Set once, before other threads start, by test binaries alone.
inline std::atomic<FailpointHook> failpoint_hook{nullptr};

inline void Failpoint(const char* name) {
  if (FailpointHook hook = failpoint_hook.load(std::memory_order_relaxed)) {
    hook(name);
  }
}

}  // namespace gradwire
