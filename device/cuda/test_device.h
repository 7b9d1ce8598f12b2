// SPDX-License-Identifier: Apache-2.0
// The GPU of tests that also run where there is none.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "base/check.h"
#include "device/cuda/cuda_device.h"

namespace gradwire {

// Null, and why, on a machine without a GPU; there must be one if
// GRADWIRE_NEEDS_GPU is set.
inline std::unique_ptr<CudaDevice> MakeTestDevice() {
  auto device = CudaDevice::Create(0);
  if (device.ok()) return *std::move(device);
  std::printf("skipped: %s\n", std::string(device.status().message()).c_str());
  GW_CHECK(std::getenv("GRADWIRE_NEEDS_GPU") == nullptr);
  return nullptr;
}

}  // namespace gradwire
