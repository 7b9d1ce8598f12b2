// SPDX-License-Identifier: Apache-2.0
// The host as a compute device: synchronous streams over one thread pool.
#pragma once

#include <memory>
#include <string>

#include "device/device.h"
#include "device/thread_pool.h"

namespace gradwire {

// Work is done when the op returns.
class CpuStream : public Stream {
 public:
  explicit CpuStream(ThreadPool* pool) : pool_(pool) {}
  ThreadPool& pool() { return *pool_; }

 protected:
  void Synchronize() override {}

 private:
  ThreadPool* pool_;
};

class CpuDevice : public Device {
 public:
  // `num_threads` 0 means one for each core the process may run on.
  explicit CpuDevice(int num_threads);

  std::string name() const override { return "cpu"; }
  // AvailableHostBytes.
  int64_t AvailableBytes() const override;
  absl::StatusOr<std::unique_ptr<DeviceBuffer>> Allocate(
      int64_t bytes) override;
  std::unique_ptr<Stream> NewStream() override;
  void CopyToHost(Stream& stream, const Tensor& from, void* to) override;
  void CopyFromHost(Stream& stream, const void* from,
                    const Tensor& to) override;
  void Copy(Stream& stream, const Tensor& from, const Tensor& to) override;
  void Zero(Stream& stream, const Tensor& tensor) override;

  bool IsHostMemory() const override { return true; }
  ThreadPool* host_threads() override { return &pool_; }

  ThreadPool& pool() { return pool_; }

 private:
  ThreadPool pool_;
};

// MemAvailable of the machine, cut by the cgroup's limit if there is one.
int64_t AvailableHostBytes();

}  // namespace gradwire
