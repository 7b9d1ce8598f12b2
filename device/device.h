// SPDX-License-Identifier: Apache-2.0
// One compute device: its memory, its streams, copies to and from the host.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "device/stream.h"
#include "device/tensor.h"

namespace gradwire {

class ThreadPool;

// Memory of a device; freed when destroyed.
class DeviceBuffer {
 public:
  virtual ~DeviceBuffer() = default;
  virtual void* data() const = 0;
  virtual int64_t bytes() const = 0;
};

// Thread rule: all methods may be called from any thread.
class Device {
 public:
  virtual ~Device() = default;

  // "cpu", "cuda:0".
  virtual std::string name() const = 0;
  // Bytes that Allocate could still hand out now, an estimate.
  virtual int64_t AvailableBytes() const = 0;
  // Zero-filled memory, aligned to 4096 bytes.
  // Errors: RESOURCE_EXHAUSTED OUT_OF_MEMORY with the numbers.
  virtual absl::StatusOr<std::unique_ptr<DeviceBuffer>> Allocate(
      int64_t bytes) = 0;
  virtual std::unique_ptr<Stream> NewStream() = 0;

  // Copies between a tensor and host memory of tensor.bytes() bytes, in stream
  // order. The host memory must stay valid until the stream is synchronised;
  // CopyToHost has synchronised when it returns.
  virtual void CopyToHost(Stream& stream, const Tensor& from, void* to) = 0;
  virtual void CopyFromHost(Stream& stream, const void* from,
                            const Tensor& to) = 0;
  // Copies between tensors of as many bytes that do not overlap, in stream
  // order.
  virtual void Copy(Stream& stream, const Tensor& from, const Tensor& to) = 0;
  // Fills with zero bytes, in stream order.
  virtual void Zero(Stream& stream, const Tensor& tensor) = 0;

  // Whether the host reads and writes this memory where it lies.
  virtual bool IsHostMemory() const { return false; }
  // Threads of the host that compute what is queued, which are idle beside it;
  // null: the device needs none.
  virtual ThreadPool* host_threads() { return nullptr; }
};

}  // namespace gradwire
