// SPDX-License-Identifier: Apache-2.0
#include "device/tensor.h"

#include <string>

namespace gradwire {

std::string Tensor::DebugString() const {
  std::string out = DTypeName(dtype_);
  out += "[";
  for (int i = 0; i < rank_; ++i) {
    if (i > 0) out += ", ";
    out += std::to_string(shape_[i]);
  }
  return out + "]";
}

}  // namespace gradwire
