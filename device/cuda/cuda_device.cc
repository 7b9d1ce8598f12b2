// SPDX-License-Identifier: Apache-2.0
#include "device/cuda/cuda_device.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/environment.h"
#include "base/error.h"
#include "base/status.h"
#include "device/cuda/cuda_status.h"
#include "device/cuda/launch_record.h"

namespace gradwire {
namespace {

constexpr int64_t kAlignment = 4096;
// What a step hands to the device, several times over; and pieces that are
// large enough to keep the bus busy.
constexpr int64_t kFromHostBytes = int64_t{16} << 20;
constexpr int64_t kToHostBytes = int64_t{32} << 20;
// Below it a copy to the host is waited for no longer without page-locked
// memory, and other threads' copies not at all.
constexpr int64_t kSmallCopyBytes = int64_t{256} << 10;

class CudaBuffer : public DeviceBuffer {
 public:
  CudaBuffer(void* allocated, int64_t bytes)
      : allocated_(allocated), bytes_(bytes) {}
  // Freeing waits for what the device still does.
  ~CudaBuffer() override { cudaFree(allocated_); }

  void* data() const override {
    const auto address = reinterpret_cast<uintptr_t>(allocated_);
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment *
                                   kAlignment);
  }
  int64_t bytes() const override { return bytes_; }

 private:
  void* allocated_;
  int64_t bytes_;
};

absl::Status NoDevice(int index, int count, const std::string& why) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "DEVICE_NOT_FOUND")
      .Server()
      .With("field", "device")
      .With("value", "cuda:" + std::to_string(index))
      .With("limit", count)
      .Message("there is no device cuda:" + std::to_string(index) + ": " + why +
               "; nvidia-smi lists what this machine has, and "
               "CUDA_VISIBLE_DEVICES what the process may see of it");
}

cudaStream_t Of(Stream& stream) {
  return static_cast<CudaStream&>(stream).get();
}

}  // namespace

CudaStream::CudaStream(bool graphs)
    : graphs_(graphs ? std::make_unique<GraphCache>() : nullptr) {
  Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking),
        "making a stream");
}

CudaStream::~CudaStream() {
  // A stream that is destroyed goes on with what was queued.
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

void CudaStream::Section(const std::function<void()>& body) {
  if (graphs_ == nullptr || !ok() || LaunchRecord::Of(stream_) != nullptr) {
    body();
    return;
  }
  LaunchRecord record(stream_);
  record.Take(body);
  // Even of a body that has failed, as its calls would have been queued.
  Fail(graphs_->Run(stream_, record));
}

void CudaStream::Check(cudaError_t error, const char* operation) {
  if (error != cudaSuccess) Fail(CudaStatus(error, operation));
}

void CudaStream::Synchronize() {
  Check(cudaStreamSynchronize(stream_), "queued work");
  for (const auto& question : std::exchange(questions_, {})) Fail(question());
}

absl::StatusOr<std::unique_ptr<CudaDevice>> CudaDevice::Create(int index) {
  GW_CHECK(index >= 0);
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess) {
    return NoDevice(index, 0, cudaGetErrorString(found));
  }
  if (index >= count) {
    return NoDevice(index, count, "CUDA sees " + std::to_string(count));
  }
  GW_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(index), "taking the device"));
  std::unique_ptr<CudaDevice> device(new CudaDevice(index));
  GW_ASSIGN_OR_RETURN(device->from_host_, PinnedRing::Create(kFromHostBytes));
  GW_ASSIGN_OR_RETURN(device->to_host_, PinnedRing::Create(kToHostBytes));
  return device;
}

CudaDevice::~CudaDevice() { MakeCurrent(); }

std::string CudaDevice::name() const {
  return "cuda:" + std::to_string(index_);
}

void CudaDevice::MakeCurrent() const { cudaSetDevice(index_); }

int64_t CudaDevice::AvailableBytes() const {
  MakeCurrent();
  size_t available = 0, total = 0;
  if (cudaMemGetInfo(&available, &total) != cudaSuccess) return 0;
  return static_cast<int64_t>(available);
}

absl::StatusOr<std::unique_ptr<DeviceBuffer>> CudaDevice::Allocate(
    int64_t bytes) {
  GW_CHECK(bytes >= 0);
  if (bytes == 0) return std::make_unique<CudaBuffer>(nullptr, 0);
  MakeCurrent();
  void* data = nullptr;
  const auto rounded = static_cast<size_t>(bytes + kAlignment);
  const cudaError_t error = cudaMalloc(&data, rounded);
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // It is told here, not by the next call.
    return ErrorBuilder(absl::StatusCode::kResourceExhausted, "OUT_OF_MEMORY")
        .Server()
        .With("value", bytes)
        .With("limit", AvailableBytes())
        .Message(name() + " refused " + std::to_string(bytes) +
                 " bytes of memory; use a smaller model, context or "
                 "activation budget, or more ranks");
  }
  GW_RETURN_IF_ERROR(CudaStatus(error, "allocating memory"));
  auto buffer = std::make_unique<CudaBuffer>(data, bytes);
  GW_RETURN_IF_ERROR(
      CudaStatus(cudaMemset(data, 0, rounded), "zeroing memory"));
  // Streams do not wait for the default one, where that was queued.
  GW_RETURN_IF_ERROR(
      CudaStatus(cudaStreamSynchronize(nullptr), "zeroing memory"));
  return buffer;
}

std::unique_ptr<Stream> CudaDevice::NewStream() {
  MakeCurrent();
  return std::make_unique<CudaStream>(IsSwitchedOn("GRADWIRE_CUDA_GRAPHS"));
}

void CudaDevice::CopyToHost(Stream& stream, const Tensor& from, void* to) {
  if (!stream.ok() || from.bytes() == 0) return;
  MakeCurrent();
  auto& cuda = static_cast<CudaStream&>(stream);
  if (from.bytes() > kSmallCopyBytes) {
    to_host_->CopyToHost(cuda, from.raw(), to, from.bytes());
    return;
  }
  cuda.Check(cudaMemcpyAsync(to, from.raw(), static_cast<size_t>(from.bytes()),
                             cudaMemcpyDeviceToHost, cuda.get()),
             "a copy to the host");
  cuda.Check(cudaStreamSynchronize(cuda.get()), "a copy to the host");
}

void CudaDevice::CopyFromHost(Stream& stream, const void* from,
                              const Tensor& to) {
  if (!stream.ok() || to.bytes() == 0) return;
  MakeCurrent();
  from_host_->CopyFromHost(static_cast<CudaStream&>(stream), from, to.raw(),
                           to.bytes());
}

void CudaDevice::Copy(Stream& stream, const Tensor& from, const Tensor& to) {
  GW_CHECK(from.bytes() == to.bytes());
  if (!stream.ok() || to.bytes() == 0) return;
  MakeCurrent();
  static_cast<CudaStream&>(stream).Check(
      QueueCopy(to.raw(), from.raw(), to.bytes(), Of(stream)), "a copy");
}

void CudaDevice::Zero(Stream& stream, const Tensor& tensor) {
  if (!stream.ok() || tensor.bytes() == 0) return;
  MakeCurrent();
  static_cast<CudaStream&>(stream).Check(
      QueueMemset(tensor.raw(), 0, tensor.bytes(), Of(stream)), "zeroing");
}

}  // namespace gradwire
