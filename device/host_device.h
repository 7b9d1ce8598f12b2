// SPDX-License-Identifier: Apache-2.0
// GW_HOST_DEVICE: of functions that kernels of a .cu file call, too.
#pragma once

#ifdef __CUDACC__
#define GW_HOST_DEVICE __host__ __device__
#else
#define GW_HOST_DEVICE
#endif
