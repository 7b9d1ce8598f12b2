// SPDX-License-Identifier: Apache-2.0
// Names what this process computes with: two processes of the same name give
// the same bits.
#pragma once

#include <string>

namespace gradwire {

// `device` (instruction set and threads), the version, and a digest of the
// build ids that the linker has left in the program and in every library that
// is loaded; of one without a build id, its file's size and time.
std::string KernelsId(const std::string& device);

}  // namespace gradwire
