// SPDX-License-Identifier: Apache-2.0
// The process log: one line an event on standard error, through spdlog.
#pragma once

#include <spdlog/spdlog.h>

#include <string>

namespace gradwire {

// Sets the format and the process name that every line carries. Call once, at
// the start of main().
void InitLog(const std::string& process_name);

}  // namespace gradwire
