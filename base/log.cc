// SPDX-License-Identifier: Apache-2.0
#include "base/log.h"

#include <spdlog/sinks/stdout_sinks.h>

#include <string>

namespace gradwire {

void InitLog(const std::string& process_name) {
  spdlog::set_default_logger(spdlog::stderr_logger_mt(process_name));
  spdlog::set_pattern("%Y-%m-%dT%H:%M:%S.%fZ %l %n: %v",
                      spdlog::pattern_time_type::utc);
  spdlog::flush_on(spdlog::level::info);
}

}  // namespace gradwire
