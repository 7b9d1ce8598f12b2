// SPDX-License-Identifier: Apache-2.0
// One NVIDIA GPU as a compute device.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "device/cuda/graph_cache.h"
#include "device/cuda/pinned_ring.h"
#include "device/device.h"

namespace gradwire {

// Work is queued when an op returns. What CUDA refuses makes the stream fail.
class CudaStream : public Stream {
 public:
  // `graphs`: sections become graphs. REQUIRES: the device is the thread's
  // current one.
  explicit CudaStream(bool graphs = false);
  ~CudaStream() override;

  cudaStream_t get() const { return stream_; }

  // A section within another is part of it.
  void Section(const std::function<void()>& body) override;
  // Null: sections are queued call by call.
  const GraphCache* graphs() const { return graphs_.get(); }

  // Keeps the first failure of a call of CUDA's runtime.
  void Check(cudaError_t error, const char* operation);

  // To be asked once, when the stream is next synchronised: whether something
  // that the stream waited for has gone well. It must not use the stream.
  void AskWhenSynchronized(std::function<absl::Status()> question) {
    questions_.push_back(std::move(question));
  }
  // Somebody else asks what was to be asked.
  void ForgetQuestions() { questions_.clear(); }

 protected:
  void Synchronize() override;

 private:
  cudaStream_t stream_ = nullptr;
  const std::unique_ptr<GraphCache> graphs_;
  std::vector<std::function<absl::Status()>> questions_;
};

class CudaDevice : public Device {
 public:
  // Errors: FAILED_PRECONDITION DEVICE_NOT_FOUND (device, count): no such GPU,
  // or no driver; those of PinnedRing.
  static absl::StatusOr<std::unique_ptr<CudaDevice>> Create(int index);

  ~CudaDevice() override;

  // "cuda:0"
  std::string name() const override;
  int64_t AvailableBytes() const override;
  absl::StatusOr<std::unique_ptr<DeviceBuffer>> Allocate(
      int64_t bytes) override;
  // With GRADWIRE_CUDA_GRAPHS in the environment its sections become graphs.
  std::unique_ptr<Stream> NewStream() override;
  void CopyToHost(Stream& stream, const Tensor& from, void* to) override;
  void CopyFromHost(Stream& stream, const void* from,
                    const Tensor& to) override;
  void Copy(Stream& stream, const Tensor& from, const Tensor& to) override;
  void Zero(Stream& stream, const Tensor& tensor) override;

  int index() const { return index_; }
  // Makes this the thread's current device: what CUDA's own calls work on.
  void MakeCurrent() const;

 private:
  explicit CudaDevice(int index) : index_(index) {}

  const int index_;
  std::unique_ptr<PinnedRing> from_host_, to_host_;
};

}  // namespace gradwire
