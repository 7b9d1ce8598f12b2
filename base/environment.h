// SPDX-License-Identifier: Apache-2.0
// Switches in the environment.
#pragma once

#include <cstdlib>
#include <string_view>

namespace gradwire {

// Whether the variable is there, neither empty nor "0".
inline bool IsSwitchedOn(const char* variable) {
  const char* const value = std::getenv(variable);
  return value != nullptr && *value != '\0' && std::string_view(value) != "0";
}

}  // namespace gradwire
