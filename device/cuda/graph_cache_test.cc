// SPDX-License-Identifier: Apache-2.0
// On a GPU, or on the emulator, whichever runtime is linked.
#include "device/cuda/graph_cache.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "device/cuda/cuda_device.h"
#include "device/cuda/cuda_status.h"
#include "device/cuda/launch_record.h"
#include "device/cuda/test_device.h"

namespace gradwire {
namespace {

class GraphCacheTest : public testing::Test {
 protected:
  static constexpr int64_t kSize = 64;

  void SetUp() override {
    device_ = MakeTestDevice();
    if (device_ == nullptr) GTEST_SKIP();
    stream_ = std::make_unique<CudaStream>(true);
    auto buffer = device_->Allocate(1 << 20);
    ASSERT_TRUE(buffer.ok());
    buffer_ = *std::move(buffer);
  }

  // Before the buffer goes.
  void TearDown() override {
    if (stream_ == nullptr) return;
    EXPECT_TRUE(stream_->Finish().ok());
  }

  Tensor At(int64_t i) const {
    return Tensor(static_cast<float*>(buffer_->data()) + i * kSize, DType::kF32,
                  {kSize});
  }
  void Set(const Tensor& tensor, float value) {
    const std::vector<float> values(kSize, value);
    device_->CopyFromHost(*stream_, values.data(), tensor);
  }
  float Get(const Tensor& tensor) {
    std::vector<float> values(kSize);
    device_->CopyToHost(*stream_, tensor, values.data());
    EXPECT_EQ(values, std::vector<float>(kSize, values[0]));
    return values[0];
  }
  void Copy(const Tensor& from, const Tensor& to) {
    device_->Copy(*stream_, from, to);
  }
  GraphCache::Counts Counts() const { return stream_->graphs()->counts(); }
  void ExpectCounts(int64_t issued, int64_t captured, int64_t replayed,
                    int64_t refused = 0) const {
    EXPECT_EQ(Counts().issued, issued);
    EXPECT_EQ(Counts().captured, captured);
    EXPECT_EQ(Counts().replayed, replayed);
    EXPECT_EQ(Counts().refused, refused);
  }

  std::unique_ptr<CudaDevice> device_;
  std::unique_ptr<CudaStream> stream_;
  std::unique_ptr<DeviceBuffer> buffer_;
};

TEST_F(GraphCacheTest, WhatComesAgainIsAGraph) {
  for (int i = 0; i < 5; ++i) {
    Set(At(0), static_cast<float>(i + 1));
    Set(At(2), 9);
    stream_->Section([&] {
      Copy(At(0), At(1));
      device_->Zero(*stream_, At(2));
      Copy(At(1), At(3));
    });
    // What comes after a section waits for it.
    Copy(At(3), At(4));
    EXPECT_EQ(Get(At(1)), static_cast<float>(i + 1));
    EXPECT_EQ(Get(At(2)), 0);
    EXPECT_EQ(Get(At(4)), static_cast<float>(i + 1));
  }
  ExpectCounts(1, 1, 3);
  EXPECT_TRUE(stream_->Finish().ok());
}

TEST_F(GraphCacheTest, OtherMemoryIsAnotherSection) {
  for (int64_t i = 0; i < 4; ++i) Set(At(i), static_cast<float>(i));
  for (int round = 0; round < 3; ++round) {
    for (int64_t i = 0; i < 4; ++i) {
      device_->Zero(*stream_, At(4 + i));
      stream_->Section([&] { Copy(At(i), At(4 + i)); });
      EXPECT_EQ(Get(At(4 + i)), static_cast<float>(i));
    }
    // More of the same, and less.
    Set(At(9), 1);
    stream_->Section([&] {
      device_->Zero(*stream_, At(9).Rows(0, round == 1 ? kSize / 2 : kSize));
    });
    std::vector<float> values(kSize);
    device_->CopyToHost(*stream_, At(9), values.data());
    EXPECT_EQ(values[0], 0);
    EXPECT_EQ(values[kSize - 1], round == 1 ? 1 : 0);
  }
  ExpectCounts(6, 5, 4);
}

TEST_F(GraphCacheTest, TheOrderOfCallsCounts) {
  for (int i = 0; i < 6; ++i) {
    Set(At(0), 1);
    Set(At(1), 2);
    stream_->Section([&] {
      if (i % 2 == 0) {
        Copy(At(0), At(1));
        Copy(At(1), At(2));
      } else {
        Copy(At(1), At(2));
        Copy(At(0), At(1));
      }
    });
    EXPECT_EQ(Get(At(2)), i % 2 == 0 ? 1 : 2) << i;
  }
  ExpectCounts(2, 2, 2);
}

TEST_F(GraphCacheTest, MemoryOfTheHostIsReadEveryTime) {
  for (int i = 0; i < 4; ++i) {
    std::vector<float> values(kSize, static_cast<float>(i));
    stream_->Section([&] {
      stream_->Check(QueueCopyFromHost(At(0).raw(), values.data(),
                                       At(0).bytes(), stream_->get()),
                     "a test");
      // It has been taken.
      values.assign(kSize, -1);
      Copy(At(0), At(1));
    });
    EXPECT_EQ(Get(At(1)), static_cast<float>(i));
  }
  ExpectCounts(4, 0, 0);
}

TEST_F(GraphCacheTest, ASectionWithinASectionIsPartOfIt) {
  for (int i = 0; i < 3; ++i) {
    Set(At(0), static_cast<float>(i));
    stream_->Section([&] {
      Copy(At(0), At(1));
      stream_->Section([&] { Copy(At(1), At(2)); });
      Copy(At(2), At(3));
    });
    EXPECT_EQ(Get(At(3)), static_cast<float>(i));
  }
  ExpectCounts(1, 1, 1);
}

TEST_F(GraphCacheTest, AnEmptySectionIsNothing) {
  for (int i = 0; i < 3; ++i) stream_->Section([] {});
  EXPECT_EQ(Counts().captured, 0);
  EXPECT_TRUE(stream_->Finish().ok());
}

TEST_F(GraphCacheTest, WhatIsNotUsedMakesRoom) {
  constexpr int64_t kMost = GraphCache::kMostGraphs;
  const auto run = [&](int64_t i) {
    Set(At(i), static_cast<float>(i));
    stream_->Section([&] { Copy(At(i), At(1000)); });
    EXPECT_EQ(Get(At(1000)), static_cast<float>(i));
  };
  // Is used, and what comes last is not.
  const auto pass = [&](int64_t sections) {
    for (int64_t n = 0; n < sections; ++n) run(0);
  };
  for (int64_t i = 0; i < kMost; ++i) {
    run(i);
    run(i);
  }
  EXPECT_EQ(Counts().captured, kMost);
  // The others are not idle yet.
  for (int i = 0; i < 4; ++i) run(kMost);
  EXPECT_EQ(Counts().captured, kMost);
  pass(GraphCache::kIdle);
  run(kMost);
  EXPECT_EQ(Counts().captured, kMost + 1);
  // In place of the one that was used least.
  const int64_t replayed = Counts().replayed;
  run(kMost);
  run(0);
  run(2);
  EXPECT_EQ(Counts().replayed, replayed + 3);
  run(1);
  EXPECT_EQ(Counts().replayed, replayed + 3);
  run(1);
  EXPECT_EQ(Counts().captured, kMost + 2);
  EXPECT_TRUE(stream_->Finish().ok());
}

TEST_F(GraphCacheTest, OfWhatIsSeenOnceTheOldestIsForgotten) {
  const auto once = [&](int64_t n) {
    stream_->Section([&] {
      device_->Zero(*stream_, Tensor(buffer_->data(), DType::kF32, {n}));
    });
  };
  constexpr auto kMost = static_cast<int64_t>(GraphCache::kMostSeen);
  for (int64_t n = 1; n <= kMost + 1; ++n) once(n);
  once(1);
  EXPECT_EQ(Counts().captured, 0);
  once(kMost);
  EXPECT_EQ(Counts().captured, 1);
  EXPECT_TRUE(stream_->Finish().ok());
}

TEST_F(GraphCacheTest, ARunningGraphMayGo) {
  Set(At(0), 7);
  for (int i = 0; i < 3; ++i) {
    stream_->Section([&] {
      for (int64_t n = 0; n < 50; ++n) Copy(At(n), At(n + 1));
    });
  }
  ExpectCounts(1, 1, 1);
  cudaEvent_t end;
  ASSERT_EQ(cudaEventCreateWithFlags(&end, cudaEventDisableTiming),
            cudaSuccess);
  ASSERT_EQ(cudaEventRecord(end, stream_->get()), cudaSuccess);
  // With its stream.
  stream_ = std::make_unique<CudaStream>(true);
  ASSERT_EQ(cudaEventSynchronize(end), cudaSuccess);
  EXPECT_EQ(Get(At(50)), 7);
  EXPECT_EQ(cudaEventDestroy(end), cudaSuccess);
}

TEST_F(GraphCacheTest, WhatCudaDoesNotCaptureIsQueuedCallByCall) {
  for (int i = 0; i < 4; ++i) {
    Set(At(0), static_cast<float>(i));
    stream_->Section([&] {
      Copy(At(0), At(1));
      LaunchRecord::Of(stream_->get())
          ->Add(
              [](cudaStream_t to) {
                return CudaStatus(cudaStreamSynchronize(to), "a test");
              },
              LaunchRecord::kCopy, 1);
      Copy(At(1), At(2));
    });
    EXPECT_EQ(Get(At(2)), static_cast<float>(i));
  }
  ExpectCounts(4, 0, 0, 1);
  EXPECT_TRUE(stream_->Finish().ok());
  // And others are not refused for it.
  for (int i = 0; i < 3; ++i) {
    stream_->Section([&] { Copy(At(0), At(3)); });
  }
  ExpectCounts(5, 1, 1, 1);
}

TEST_F(GraphCacheTest, AFailureIsTheStreams) {
  const auto fail = [&] {
    stream_->Section([&] {
      LaunchRecord::Of(stream_->get())
          ->Add(
              [](cudaStream_t) {
                return CudaStatus(cudaErrorInvalidValue, "a test");
              },
              LaunchRecord::kCopy, 2);
      Copy(At(0), At(5));
    });
    const absl::Status status = stream_->Finish();
    EXPECT_NE(status.message().find("a test"), std::string::npos) << status;
  };
  for (int i = 0; i < 3; ++i) fail();
  // What was recorded before the body failed is queued all the same.
  Set(At(0), 3);
  stream_->Section([&] {
    Copy(At(0), At(1));
    stream_->Fail(absl::InternalError("of the body"));
  });
  EXPECT_EQ(stream_->Finish().message(), "of the body");
  EXPECT_EQ(Get(At(1)), 3);
}

TEST_F(GraphCacheTest, BehindAFailureMemoryOfTheHostIsCopied) {
  const std::vector<float> values(kSize, 6);
  Set(At(1), 1);
  stream_->Section([&] {
    LaunchRecord::Of(stream_->get())
        ->Add(
            [](cudaStream_t) {
              return CudaStatus(cudaErrorInvalidValue, "a test");
            },
            LaunchRecord::kCopy, 3);
    // Whoever asked for it has noted that it is there.
    stream_->Check(QueueCopyFromHost(At(0).raw(), values.data(), At(0).bytes(),
                                     stream_->get()),
                   "a copy");
    Copy(At(0), At(1));
  });
  EXPECT_NE(stream_->Finish().message().find("a test"), std::string::npos);
  EXPECT_EQ(Get(At(0)), 6);
  EXPECT_EQ(Get(At(1)), 1);
}

TEST_F(GraphCacheTest, WithoutItASectionIsItsBody) {
  const auto plain = std::make_unique<CudaStream>();
  EXPECT_EQ(plain->graphs(), nullptr);
  plain->Section([&] {
    EXPECT_EQ(LaunchRecord::Of(plain->get()), nullptr);
    device_->Copy(*plain, At(0), At(1));
  });
  EXPECT_TRUE(plain->Finish().ok());
}

TEST_F(GraphCacheTest, OtherStreamsAreNotRecorded) {
  const auto other = device_->NewStream();
  Set(At(0), 4);
  EXPECT_TRUE(stream_->Finish().ok());
  stream_->Section([&] {
    device_->Copy(*other, At(0), At(6));
    EXPECT_TRUE(other->Finish().ok());
  });
  EXPECT_EQ(Get(At(6)), 4);
}

}  // namespace
}  // namespace gradwire
