// SPDX-License-Identifier: Apache-2.0
// Memory and streams for tests of the emulator.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <vector>

namespace gradwire {

// Device memory of n elements, and what kernels made of it.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : n_(values.size()) {
    EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&data_), n_ * sizeof(T)),
              cudaSuccess);
    cudaMemcpyAsync(data_, values.data(), n_ * sizeof(T), cudaMemcpyDefault,
                    nullptr);
    cudaStreamSynchronize(nullptr);
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* data() const { return data_; }
  std::vector<T> Fetch() const {
    std::vector<T> values(n_);
    cudaStreamSynchronize(nullptr);
    cudaMemcpyAsync(values.data(), data_, n_ * sizeof(T), cudaMemcpyDefault,
                    nullptr);
    cudaStreamSynchronize(nullptr);
    return values;
  }

 private:
  size_t n_;
  T* data_ = nullptr;
};

// launch(stream) on a stream of its own, until it is done.
template <typename Function>
void OnStream(const Function& launch) {
  cudaStream_t stream;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, 0), cudaSuccess);
  ASSERT_EQ(launch(stream), cudaSuccess);
  cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
}

}  // namespace gradwire
