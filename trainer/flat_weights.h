// SPDX-License-Identifier: Apache-2.0
// The flat vector of weights, whole or split, written and read as float32 in
// pieces, so that no float32 copy of a model ever exists beside it.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "device/device.h"
#include "device/tensor.h"
#include "kernels/kernels.h"

namespace gradwire {

// Thread rule: one thread at a time, and the stream's.
class FlatWeights {
 public:
  // `weight` is f32, or bf16 with the lower halves of a split master in `low`:
  // i16, or null where nobody trains. Both must outlive this.
  static absl::StatusOr<FlatWeights> Create(const Tensor& weight,
                                            const Tensor& low, Device& device,
                                            Kernels& kernels, Stream& stream);

  // Elements [begin, begin + count), from and to the host. Without `low`
  // writing rounds, and reading gives what was rounded.
  absl::Status Write(int64_t begin, int64_t count, const float* from);
  absl::Status Read(int64_t begin, int64_t count, float* to);

 private:
  FlatWeights(const Tensor& weight, const Tensor& low, Device& device,
              Kernels& kernels, Stream& stream)
      : weight_(weight),
        low_(low),
        device_(device),
        kernels_(kernels),
        stream_(stream) {}

  const Tensor weight_, low_;
  Device& device_;
  Kernels& kernels_;
  Stream& stream_;
  // A piece as float32; null if the weights are float32 themselves.
  std::unique_ptr<DeviceBuffer> buffer_;
  Tensor piece_;
};

}  // namespace gradwire
