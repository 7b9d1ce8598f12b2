// SPDX-License-Identifier: Apache-2.0
#include "device/cuda/launch_record.h"

namespace gradwire {

cudaError_t QueueMemset(void* data, int value, int64_t bytes,
                        cudaStream_t stream) {
  const auto issue = [=](cudaStream_t to) {
    return cudaMemsetAsync(data, value, static_cast<size_t>(bytes), to);
  };
  return QueueOrRecord(stream, "zeroing", issue, LaunchRecord::kMemset, data,
                       value, bytes);
}

cudaError_t QueueCopy(void* to, const void* from, int64_t bytes,
                      cudaStream_t stream) {
  const auto issue = [=](cudaStream_t on) {
    return cudaMemcpyAsync(to, from, static_cast<size_t>(bytes),
                           cudaMemcpyDeviceToDevice, on);
  };
  return QueueOrRecord(stream, "a copy", issue, LaunchRecord::kCopy, to, from,
                       bytes);
}

cudaError_t QueueCopyFromHost(void* to, const void* from, int64_t bytes,
                              cudaStream_t stream) {
  const auto size = static_cast<size_t>(bytes);
  LaunchRecord* const record = LaunchRecord::Of(stream);
  if (record == nullptr) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyHostToDevice, stream);
  }
  const auto* const begin = static_cast<const char*>(from);
  record->AddOnce(
      [to, copy = std::vector<char>(begin, begin + size)](cudaStream_t on) {
        return CudaStatus(cudaMemcpyAsync(to, copy.data(), copy.size(),
                                          cudaMemcpyHostToDevice, on),
                          "a copy from the host");
      });
  return cudaSuccess;
}

}  // namespace gradwire
