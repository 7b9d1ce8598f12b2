// SPDX-License-Identifier: Apache-2.0
// What the machine can do at most, measured in the same run as the ops.
#pragma once

#include "device/cpu_device.h"
#include "device/dtype.h"
#include "kernels/kernels.h"

namespace gradwire {

struct Ceilings {
  double gemm_flops = 0;   // the best product, FLOP/s
  double triad_bytes = 0;  // a[i] = b[i] + s c[i] from memory, bytes/s
};

Ceilings MeasureCeilings(CpuDevice& device, Kernels& kernels, DType act);

}  // namespace gradwire
