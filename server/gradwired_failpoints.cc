// SPDX-License-Identifier: Apache-2.0
// gradwired for tests: ends itself, as if by SIGKILL, at the n-th pass of the
// place that GRADWIRE_FAILPOINT=<name>:<n> names.
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "server/failpoint.h"

namespace gradwire {
namespace {

struct Trap {
  std::string name;
  std::atomic<long> passes_left{0};
};

Trap& TheTrap() {
  static auto* const trap = new Trap;
  return *trap;
}

void Pass(const char* name) {
  Trap& trap = TheTrap();
  if (trap.name != name || trap.passes_left.fetch_sub(1) != 1) return;
  kill(getpid(), SIGKILL);
  pause();
}

// Before main, which is gradwired's own.
const bool is_set = [] {
  const char* value = std::getenv("GRADWIRE_FAILPOINT");
  if (value == nullptr) return false;
  const std::string text = value;
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos) return false;
  TheTrap().name = text.substr(0, colon);
  TheTrap().passes_left = std::strtol(text.c_str() + colon + 1, nullptr, 10);
  failpoint_hook = &Pass;
  return true;
}();

}  // namespace
}  // namespace gradwire
