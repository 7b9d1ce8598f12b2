// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/cpu_kernels.h"

#include <memory>
#include <string>

#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/gemm.h"

namespace gradwire {

CpuKernels::CpuKernels() : gemm_(std::make_unique<Gemm>()) {}
CpuKernels::~CpuKernels() = default;

std::string CpuKernels::description() const { return "cpu " + Gemm::Isa(); }

bool CpuKernels::RowsHaveTheirOwnBits(DType act) const {
  return gemm_->IsOwn(act);
}

std::unique_ptr<Kernels> NewCpuKernels() {
  return std::make_unique<CpuKernels>();
}

}  // namespace gradwire
