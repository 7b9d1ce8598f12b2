// SPDX-License-Identifier: Apache-2.0
// On a GPU, or on the emulator, whichever runtime is linked.
#include "device/cuda/cuda_device.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/error.h"
#include "device/cuda/test_device.h"

namespace gradwire {
namespace {

class CudaDeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    device_ = MakeTestDevice();
    if (device_ == nullptr) GTEST_SKIP();
    stream_ = device_->NewStream();
  }

  std::unique_ptr<CudaDevice> device_;
  std::unique_ptr<Stream> stream_;
};

TEST_F(CudaDeviceTest, MemoryIsZeroAlignedAndCopied) {
  EXPECT_EQ(device_->name(), "cuda:0");
  for (const int64_t n : {1, 3, 1000, 1 << 20, (11 << 20) + 1}) {
    const auto buffer = device_->Allocate(n * 4);
    ASSERT_TRUE(buffer.ok());
    EXPECT_EQ((*buffer)->bytes(), n * 4);
    EXPECT_EQ(reinterpret_cast<uintptr_t>((*buffer)->data()) % 4096, 0u);
    const Tensor tensor((*buffer)->data(), DType::kF32, {n});
    std::vector<float> values(static_cast<size_t>(n), 1.0f);
    device_->CopyToHost(*stream_, tensor, values.data());
    EXPECT_EQ(values, std::vector<float>(values.size(), 0.0f));
    std::iota(values.begin(), values.end(), 1.0f);
    device_->CopyFromHost(*stream_, values.data(), tensor);
    std::vector<float> back(values.size());
    device_->CopyToHost(*stream_, tensor, back.data());
    EXPECT_EQ(back, values);
    const auto other = device_->Allocate(n * 4);
    ASSERT_TRUE(other.ok());
    const Tensor copy((*other)->data(), DType::kF32, {n});
    device_->Copy(*stream_, tensor, copy);
    device_->CopyToHost(*stream_, copy, back.data());
    EXPECT_EQ(back, values);
    device_->Zero(*stream_, tensor.Rows(0, n / 2));
    device_->CopyToHost(*stream_, tensor, back.data());
    std::fill(values.begin(), values.begin() + n / 2, 0.0f);
    EXPECT_EQ(back, values);
    EXPECT_TRUE(stream_->Finish().ok());
  }
  EXPECT_TRUE(device_->Allocate(0).ok());
  EXPECT_GT(device_->AvailableBytes(), 0);
}

TEST_F(CudaDeviceTest, MoreThanThereIsIsRefusedWithTheNumbers) {
  const int64_t bytes = int64_t{1} << 50;
  const auto buffer = device_->Allocate(bytes);
  EXPECT_EQ(buffer.status().code(), absl::StatusCode::kResourceExhausted);
  const auto detail = GetErrorDetail(buffer.status());
  ASSERT_TRUE(detail.has_value());
  EXPECT_EQ(detail->reason, "OUT_OF_MEMORY");
  EXPECT_EQ(detail->metadata.at("value"), std::to_string(bytes));
  // And nothing is left of it.
  EXPECT_TRUE(device_->Allocate(4).ok());
  EXPECT_TRUE(stream_->Finish().ok());
}

TEST_F(CudaDeviceTest, AFailedStreamDoesNothingMore) {
  const auto buffer = device_->Allocate(4);
  ASSERT_TRUE(buffer.ok());
  const Tensor tensor((*buffer)->data(), DType::kF32, {1});
  stream_->Fail(absl::InternalError("an op failed"));
  const float one = 1.0f;
  device_->CopyFromHost(*stream_, &one, tensor);
  EXPECT_EQ(stream_->Finish().message(), "an op failed");
  float value = 2.0f;
  device_->CopyToHost(*stream_, tensor, &value);
  EXPECT_EQ(value, 0.0f);
  EXPECT_TRUE(stream_->Finish().ok());
}

TEST_F(CudaDeviceTest, AnErrorIsOfItsStreamAlone) {
  auto& stream = static_cast<CudaStream&>(*stream_);
  stream.Check(cudaSetDevice(1000), "a call");
  EXPECT_FALSE(stream.Finish().ok());
  // Or the next launch, of whatever stream, would fail.
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(CudaDeviceTest, QuestionsAreAskedOnceAndInOrder) {
  auto& stream = static_cast<CudaStream&>(*stream_);
  std::string asked;
  stream.AskWhenSynchronized([&] {
    asked += "a";
    return absl::OkStatus();
  });
  stream.AskWhenSynchronized([&] {
    asked += "b";
    return absl::CancelledError("no more");
  });
  stream.AskWhenSynchronized([&] {
    asked += "c";
    return absl::InternalError("later");
  });
  EXPECT_EQ(asked, "");
  EXPECT_EQ(stream.Finish().message(), "no more");
  EXPECT_EQ(asked, "abc");
  EXPECT_TRUE(stream.Finish().ok());
  EXPECT_EQ(asked, "abc");
}

TEST(CudaDeviceCreateTest, ADeviceThatIsNotThereIsRefused) {
  const auto made = CudaDevice::Create(1000);
  EXPECT_EQ(made.status().code(), absl::StatusCode::kFailedPrecondition);
  const auto detail = GetErrorDetail(made.status());
  ASSERT_TRUE(detail.has_value());
  EXPECT_EQ(detail->reason, "DEVICE_NOT_FOUND");
  EXPECT_EQ(detail->metadata.at("value"), "cuda:1000");
}

}  // namespace
}  // namespace gradwire
