// SPDX-License-Identifier: Apache-2.0
// Broken invariants end the process: a rank dies, its supervisor lives on.
#pragma once

namespace gradwire {

// Writes one line to standard error and aborts.
[[noreturn]] void CheckFailed(const char* file, int line, const char* what);

}  // namespace gradwire

#define GW_CHECK(condition)                                    \
  do {                                                         \
    if (!(condition)) [[unlikely]]                             \
      ::gradwire::CheckFailed(__FILE__, __LINE__, #condition); \
  } while (false)
