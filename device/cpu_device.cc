// SPDX-License-Identifier: Apache-2.0
#include "device/cpu_device.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <utility>

#include "base/error.h"

namespace gradwire {
namespace {

int NumThreads(int requested) {
  if (requested > 0) return requested;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

// Anonymous pages, zero until touched; huge pages where the kernel has them.
class MappedBuffer : public DeviceBuffer {
 public:
  MappedBuffer(void* data, int64_t bytes) : data_(data), bytes_(bytes) {}
  ~MappedBuffer() override {
    if (bytes_ > 0) munmap(data_, static_cast<size_t>(bytes_));
  }
  void* data() const override { return data_; }
  int64_t bytes() const override { return bytes_; }

 private:
  void* data_;
  int64_t bytes_;
};

// The number in a one-line file, or -1 ("max", absent).
int64_t ReadNumber(const char* path) {
  std::ifstream file(path);
  int64_t value = -1;
  return file >> value ? value : -1;
}

}  // namespace

CpuDevice::CpuDevice(int num_threads) : pool_(NumThreads(num_threads)) {}

int64_t CpuDevice::AvailableBytes() const { return AvailableHostBytes(); }

int64_t AvailableHostBytes() {
  int64_t available = 0;
  std::ifstream meminfo("/proc/meminfo");
  std::string key, unit;
  int64_t kib = 0;
  while (meminfo >> key >> kib) {
    std::getline(meminfo, unit);
    if (key == "MemAvailable:") available = kib * 1024;
  }
  const int64_t limit = ReadNumber("/sys/fs/cgroup/memory.max");
  const int64_t used = ReadNumber("/sys/fs/cgroup/memory.current");
  if (limit >= 0 && used >= 0) {
    available = std::min(available, std::max<int64_t>(0, limit - used));
  }
  return available;
}

absl::StatusOr<std::unique_ptr<DeviceBuffer>> CpuDevice::Allocate(
    int64_t bytes) {
  GW_CHECK(bytes >= 0);
  if (bytes == 0) return std::make_unique<MappedBuffer>(nullptr, 0);
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return ErrorBuilder(absl::StatusCode::kResourceExhausted, "OUT_OF_MEMORY")
        .Server()
        .With("value", bytes)
        .With("limit", AvailableBytes())
        .Message("the machine refused " + std::to_string(bytes) +
                 " bytes of memory; use a smaller model, context or "
                 "activation budget");
  }
  madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  return std::make_unique<MappedBuffer>(data, bytes);
}

std::unique_ptr<Stream> CpuDevice::NewStream() {
  return std::make_unique<CpuStream>(&pool_);
}

void CpuDevice::CopyToHost(Stream& stream, const Tensor& from, void* to) {
  if (!stream.ok() || from.bytes() == 0) return;
  std::memcpy(to, from.raw(), static_cast<size_t>(from.bytes()));
}

void CpuDevice::CopyFromHost(Stream& stream, const void* from,
                             const Tensor& to) {
  if (!stream.ok() || to.bytes() == 0) return;
  std::memcpy(to.raw(), from, static_cast<size_t>(to.bytes()));
}

void CpuDevice::Copy(Stream& stream, const Tensor& from, const Tensor& to) {
  GW_CHECK(from.bytes() == to.bytes());
  if (!stream.ok() || to.bytes() == 0) return;
  const char* source = static_cast<const char*>(from.raw());
  char* target = static_cast<char*>(to.raw());
  pool_.ParallelFor(to.bytes(), 1 << 20, [&](int64_t begin, int64_t end) {
    std::memcpy(target + begin, source + begin,
                static_cast<size_t>(end - begin));
  });
}

void CpuDevice::Zero(Stream& stream, const Tensor& tensor) {
  if (!stream.ok() || tensor.bytes() == 0) return;
  char* data = static_cast<char*>(tensor.raw());
  pool_.ParallelFor(tensor.bytes(), 1 << 20, [&](int64_t begin, int64_t end) {
    std::memset(data + begin, 0, static_cast<size_t>(end - begin));
  });
}

}  // namespace gradwire
