// SPDX-License-Identifier: Apache-2.0
#include "kernels/conformance.h"

#include <cmath>
#include <cstring>
#include <sstream>
#include <utility>

#include "base/check.h"
#include "kernels/reference/linear.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

Tensor Shaped(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  return Tensor(data, dtype, shape);
}

// What lies on both sides of every device tensor. No op may touch it.
constexpr int64_t kGuardBytes = 256;
constexpr int32_t kGuardWord = 0x5ca1ab1e;

Tensor Guard(char* at) { return Tensor(at, DType::kBF16, {kGuardBytes / 2}); }
std::vector<int32_t> GuardContent() {
  return std::vector<int32_t>(kGuardBytes / 4, kGuardWord);
}

void Set(const Tensor& t, int64_t i, float value) {
  if (t.dtype() == DType::kBF16) {
    t.data<BFloat16>()[i] = BFloat16(value);
  } else if (t.dtype() == DType::kI16) {
    t.data<int16_t>()[i] =
        std::isnan(value) ? kGuardWord & 0x7fff : static_cast<int16_t>(value);
  } else if (t.dtype() == DType::kI32) {
    t.data<int32_t>()[i] =
        std::isnan(value) ? kGuardWord : static_cast<int32_t>(value);
  } else if (t.dtype() == DType::kI64) {
    t.data<int64_t>()[i] =
        std::isnan(value) ? kGuardWord : static_cast<int64_t>(value);
  } else if (t.dtype() == DType::kF64) {
    t.data<double>()[i] = value;
  } else {
    t.data<float>()[i] = value;
  }
}

}  // namespace

std::string CompareWithin(const Tensor& got, const std::vector<Tracked>& want) {
  if (got.num_elements() != static_cast<int64_t>(want.size())) {
    return "has " + std::to_string(got.num_elements()) + " elements, not " +
           std::to_string(want.size());
  }
  double worst = 1;
  int64_t worst_index = -1, wrong = 0;
  std::ostringstream message;
  for (int64_t i = 0; i < got.num_elements(); ++i) {
    const Tracked& w = want[static_cast<size_t>(i)];
    const double bound =
        w.error + UnitRoundoff(got.dtype()) * (std::abs(w.value) + w.error) +
        kF32Tiny;
    const double off = std::abs(At(got, i) - w.value) / bound;
    if (off <= 1) continue;  // false for NaN
    ++wrong;
    if (worst_index >= 0 && !(off > worst)) continue;
    worst = off;
    worst_index = i;
    message.str("");
    message << "element " << i << " of " << got.DebugString() << " is "
            << At(got, i) << ", not " << w.value << " +- " << bound;
  }
  if (wrong == 0) return "";
  message << " (" << wrong << " elements off)";
  return message.str();
}

KernelsConformanceTest::KernelsConformanceTest()
    : device_(GetParam().device()),
      kernels_(GetParam().kernels()),
      stream_(device_->NewStream()) {}

KernelsConformanceTest::~KernelsConformanceTest() {
  const std::vector<int32_t> want = GuardContent();
  for (const Tensor& guard : guards_) {
    std::vector<int32_t> got(want.size());
    device_->CopyToHost(*stream_, guard, got.data());
    EXPECT_EQ(got, want) << "an op wrote outside a tensor";
  }
  EXPECT_TRUE(stream_->Finish().ok());
}

Tensor KernelsConformanceTest::NewHost(DType dtype,
                                       std::initializer_list<int64_t> shape) {
  int64_t n = 1;
  for (const int64_t dim : shape) n *= dim;
  // One more, so that the address of an empty tensor is not null.
  host_memory_.emplace_back(static_cast<size_t>((n + 1) * DTypeBytes(dtype)));
  return Shaped(host_memory_.back().data(), dtype, shape);
}

Tensor KernelsConformanceTest::NewDevice(const Tensor& host) {
  auto buffer = device_->Allocate(host.bytes() + 2 * kGuardBytes);
  GW_CHECK(buffer.ok());
  device_memory_.push_back(*std::move(buffer));
  char* data = static_cast<char*>(device_memory_.back()->data()) + kGuardBytes;
  static const std::vector<int32_t> kContent = GuardContent();
  for (char* side : {data - kGuardBytes, data + host.bytes()}) {
    guards_.push_back(Guard(side));
    device_->CopyFromHost(*stream_, kContent.data(), guards_.back());
  }
  Tensor device;
  switch (host.rank()) {
    case 1:
      device = Shaped(data, host.dtype(), {host.dim(0)});
      break;
    case 2:
      device = Shaped(data, host.dtype(), {host.dim(0), host.dim(1)});
      break;
    default:
      GW_CHECK(false);
  }
  device_->CopyFromHost(*stream_, host.raw(), device);
  return device;
}

Operand KernelsConformanceTest::Normal(DType dtype,
                                       std::initializer_list<int64_t> shape,
                                       float deviation) {
  const Tensor host = NewHost(dtype, shape);
  std::normal_distribution<float> normal(0.0f, deviation);
  for (int64_t i = 0; i < host.num_elements(); ++i) {
    Set(host, i, normal(random_));
  }
  return {host, NewDevice(host)};
}

Operand KernelsConformanceTest::Unwritten(
    DType dtype, std::initializer_list<int64_t> shape) {
  const Tensor host = NewHost(dtype, shape);
  for (int64_t i = 0; i < host.num_elements(); ++i) Set(host, i, NAN);
  return {host, NewDevice(host)};
}

Operand KernelsConformanceTest::Ints(const std::vector<int32_t>& values,
                                     std::initializer_list<int64_t> shape) {
  const Tensor host = NewHost(DType::kI32, shape);
  GW_CHECK(host.num_elements() == static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), host.data<int32_t>());
  return {host, NewDevice(host)};
}

Operand KernelsConformanceTest::RandomInts(std::initializer_list<int64_t> shape,
                                           int32_t limit) {
  int64_t n = 1;
  for (const int64_t dim : shape) n *= dim;
  std::uniform_int_distribution<int32_t> uniform(0, limit - 1);
  std::vector<int32_t> values;
  for (int64_t i = 0; i < n; ++i) values.push_back(uniform(random_));
  return Ints(values, shape);
}

void KernelsConformanceTest::Upload(const Operand& operand) {
  device_->CopyFromHost(*stream_, operand.host.raw(), operand.device);
}

Tensor KernelsConformanceTest::Fetch(const Tensor& device) {
  const Tensor host = NewHost(device.dtype(), {device.num_elements()});
  device_->CopyToHost(*stream_, device, host.raw());
  return host;
}

void KernelsConformanceTest::ExpectWithin(const std::string& what,
                                          const Operand& got,
                                          const std::vector<Tracked>& want) {
  const std::string error = CompareWithin(Fetch(got.device), want);
  EXPECT_TRUE(error.empty()) << what << ": " << error;
}

void KernelsConformanceTest::ExpectSquares(const std::string& what,
                                           const Operand& matrix,
                                           const Operand& squares) {
  const Tensor x =
      Fetch(matrix.device).Reshape({matrix.host.dim(0), matrix.host.dim(1)});
  const Tensor got = Fetch(squares.device);
  const std::vector<double> want = reference::RowSquares(x);
  ASSERT_EQ(got.num_elements(), static_cast<int64_t>(want.size())) << what;
  constexpr double kRoundoff = 1.0 / (int64_t{1} << 53);
  for (int64_t i = 0; i < got.num_elements(); ++i) {
    const double sum = want[static_cast<size_t>(i)];
    ASSERT_NEAR(got.data<double>()[i], sum, kSquareBlock * kRoundoff * sum)
        << what << ": squares, " << i;
  }
}

void KernelsConformanceTest::ExpectSame(const std::string& what,
                                        const Tensor& a, const Tensor& b) {
  ASSERT_EQ(a.bytes(), b.bytes()) << what;
  for (int64_t i = 0; i < a.bytes(); ++i) {
    ASSERT_EQ(static_cast<const char*>(a.raw())[i],
              static_cast<const char*>(b.raw())[i])
        << what << ": byte " << i;
  }
}

}  // namespace gradwire
