// SPDX-License-Identifier: Apache-2.0
// What the conformance suite does not see of products: strides, failures, and
// that a product's algorithm is chosen once and can be carried over.
#include "kernels/cuda/gemm.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "base/crc32c.h"
#include "base/error.h"
#include "device/cuda/cuda_device.h"
#include "tests/cuda_emulator/cublas_faults.h"

namespace gradwire {
namespace {

using cuda_emulator::NumHeuristics;

// With its checksum made right again.
std::string Sealed(std::string blob) {
  blob.resize(blob.size() - 4);
  const uint32_t crc = Crc32c(blob.data(), static_cast<int64_t>(blob.size()));
  blob.append(reinterpret_cast<const char*>(&crc), sizeof(crc));
  return blob;
}

class GemmTest : public testing::Test {
 protected:
  GemmTest()
      : device_(*CudaDevice::Create(0)),
        memory_(*device_->Allocate(kGemmWorkspaceBytes)),
        stream_(device_->NewStream()),
        gemm_(New("a device")) {}

  std::unique_ptr<CudaGemm> New(const std::string& device) {
    return *CudaGemm::Create(device, memory_->data());
  }
  CudaStream& stream() { return static_cast<CudaStream&>(*stream_); }

  Tensor Floats(const std::vector<float>& values) {
    buffers_.push_back(
        *device_->Allocate(static_cast<int64_t>(values.size()) * 4));
    const Tensor tensor(buffers_.back()->data(), DType::kF32,
                        {static_cast<int64_t>(values.size())});
    device_->CopyFromHost(*stream_, values.data(), tensor);
    EXPECT_TRUE(stream_->Finish().ok());
    return tensor;
  }
  std::vector<float> Fetch(const Tensor& tensor) {
    std::vector<float> values(static_cast<size_t>(tensor.num_elements()));
    device_->CopyToHost(*stream_, tensor, values.data());
    return values;
  }

  // A product whose bits show in which order its terms are added: the terms are
  // large, -large, and small ones in between.
  std::vector<float> OrderedSum(CudaGemm& gemm, int64_t k = 4) {
    std::vector<float> terms(static_cast<size_t>(k), 0.25f);
    terms.front() = 16777216.0f;
    terms[terms.size() - 2] = -16777216.0f;
    const Tensor a = Floats(terms);
    const Tensor b = Floats(std::vector<float>(terms.size(), 1.0f));
    const Tensor c = Floats({0});
    gemm.Run(stream(),
             {.m = 1, .n = 1, .k = k, .a_row = k, .b_row = 1, .c_row = 1},
             a.raw(), b.raw(), c.raw());
    return Fetch(c);
  }

  // Of two products.
  std::string SomeBlob() {
    OrderedSum(*gemm_, 4);
    OrderedSum(*gemm_, 6);
    return gemm_->TakeNewAlgorithms();
  }

  std::unique_ptr<CudaDevice> device_;
  std::unique_ptr<DeviceBuffer> memory_;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<CudaGemm> gemm_;
};

// a [2, 3] and b [3, 2], each stored either way in rows of 4, c in rows of 3.
TEST_F(GemmTest, TakesRowsThatLieApart) {
  const std::vector<float> a = {1, 2, 3, -1, 4, 5, 6, -1};
  const std::vector<float> a_t = {1, 4, -1, -1, 2, 5, -1, -1, 3, 6, -1, -1};
  const std::vector<float> b = {7, 8, -1, -1, 9, 10, -1, -1, 11, 12, -1, -1};
  const std::vector<float> b_t = {7, 9, 11, -1, 8, 10, 12, -1};
  for (const bool a_transposed : {false, true}) {
    for (const bool b_transposed : {false, true}) {
      for (const bool accumulate : {false, true}) {
        const Tensor c = Floats({100, 200, 5, 300, 400, 5});
        gemm_->Run(stream(),
                   {.m = 2,
                    .n = 2,
                    .k = 3,
                    .a_transposed = a_transposed,
                    .b_transposed = b_transposed,
                    .a_row = 4,
                    .b_row = 4,
                    .c_row = 3,
                    .accumulate = accumulate},
                   Floats(a_transposed ? a_t : a).raw(),
                   Floats(b_transposed ? b_t : b).raw(), c.raw());
        std::vector<float> want = {58, 64, 5, 139, 154, 5};
        if (accumulate) want = {158, 264, 5, 439, 554, 5};
        EXPECT_EQ(Fetch(c), want) << a_transposed << b_transposed;
      }
    }
  }
}

TEST_F(GemmTest, OtherFactorsAreAnotherGraph) {
  const auto graphs = std::make_unique<CudaStream>(true);
  const CudaGemmShape shape = {
      .m = 1, .n = 1, .k = 1, .a_row = 1, .b_row = 1, .c_row = 1};
  const Tensor a = Floats({2}), b = Floats({3}), other = Floats({5});
  const Tensor c = Floats({0}), d = Floats({0});
  const auto run = [&](const Tensor& x, const Tensor& y, const Tensor& to) {
    graphs->Section(
        [&] { gemm_->Run(*graphs, shape, x.raw(), y.raw(), to.raw()); });
    EXPECT_TRUE(graphs->Finish().ok());
    return Fetch(to)[0];
  };
  for (int round = 0; round < 3; ++round) {
    EXPECT_EQ(run(a, b, c), 6);
    EXPECT_EQ(run(other, b, c), 15);
    EXPECT_EQ(run(a, other, c), 10);
    EXPECT_EQ(run(a, b, d), 6);
  }
  EXPECT_EQ(graphs->graphs()->counts().captured, 4);
  EXPECT_EQ(graphs->graphs()->counts().replayed, 4);
}

TEST_F(GemmTest, ASumWithoutTermsIsZero) {
  const Tensor c = Floats({1, 2, 3, 4});
  CudaGemmShape shape = {.m = 2, .n = 2, .a_row = 1, .b_row = 2, .c_row = 2};
  shape.accumulate = true;
  gemm_->Run(stream(), shape, nullptr, nullptr, c.raw());
  EXPECT_EQ(Fetch(c), (std::vector<float>{1, 2, 3, 4}));
  shape.accumulate = false;
  gemm_->Run(stream(), shape, nullptr, nullptr, c.raw());
  EXPECT_EQ(Fetch(c), (std::vector<float>{0, 0, 0, 0}));
}

TEST_F(GemmTest, ChoosesAnAlgorithmOnceForAShape) {
  const int64_t before = NumHeuristics();
  OrderedSum(*gemm_, 4);
  OrderedSum(*gemm_, 4);
  EXPECT_EQ(NumHeuristics(), before + 1);
  OrderedSum(*gemm_, 5);
  EXPECT_EQ(NumHeuristics(), before + 2);
}

TEST_F(GemmTest, ARefusedProductFailsTheStream) {
  cuda_emulator::FailNextMatmul(CUBLAS_STATUS_EXECUTION_FAILED);
  OrderedSum(*gemm_);
  const absl::Status status = stream_->Finish();
  ASSERT_TRUE(GetErrorDetail(status).has_value()) << status;
  EXPECT_EQ(GetErrorDetail(status)->reason, "DEVICE_FAILED");
  EXPECT_EQ(GetErrorDetail(status)->metadata.at("operation"), "a product");
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
}

// The emulator refuses it, as a GPU would fault.
TEST_F(GemmTest, HostMemoryFailsTheStream) {
  const Tensor b = Floats({1});
  const float a = 1;
  gemm_->Run(stream(),
             {.m = 1, .n = 1, .k = 1, .a_row = 1, .b_row = 1, .c_row = 1}, &a,
             b.raw(), b.raw());
  EXPECT_FALSE(stream_->Finish().ok());
}

TEST_F(GemmTest, RefusesADamagedBlob) {
  const std::string blob = SomeBlob();
  const auto other = New("a device");
  for (size_t n = 0; n < blob.size(); ++n) {
    EXPECT_EQ(other->AdoptAlgorithms(blob.substr(0, n)).code(),
              absl::StatusCode::kDataLoss)
        << n << " bytes";
  }
  for (size_t i = 0; i < blob.size(); ++i) {
    std::string flipped = blob;
    flipped[i] = static_cast<char>(flipped[i] ^ 4);
    EXPECT_EQ(other->AdoptAlgorithms(flipped).code(),
              absl::StatusCode::kDataLoss)
        << "byte " << i;
  }
  EXPECT_EQ(other->AdoptAlgorithms(Sealed(blob + "12345678")).code(),
            absl::StatusCode::kDataLoss);
  // Nothing of these was taken.
  const int64_t before = NumHeuristics();
  OrderedSum(*other, 4);
  EXPECT_EQ(NumHeuristics(), before + 1);
  EXPECT_TRUE(other->AdoptAlgorithms(blob).ok());
}

// Right by its checksum, but written by something else.
TEST_F(GemmTest, RefusesEntriesThatNoProductHas) {
  const std::string blob = SomeBlob();
  constexpr size_t kEntry = 120;
  const size_t first = blob.size() - 4 - 2 * kEntry;
  const auto import = [&](const std::string& changed) {
    return New("a device")->AdoptAlgorithms(Sealed(changed)).code();
  };
  EXPECT_EQ(import(blob), absl::StatusCode::kOk);
  // Every byte of the shape, flags and alignments.
  for (size_t i = 0; i < 56; ++i) {
    std::string changed = blob;
    changed[first + i] = static_cast<char>(0x83);
    EXPECT_EQ(import(changed), absl::StatusCode::kDataLoss) << "byte " << i;
  }
  std::string swapped = blob;
  std::swap_ranges(swapped.begin() + static_cast<long>(first),
                   swapped.begin() + static_cast<long>(first + kEntry),
                   swapped.begin() + static_cast<long>(first + kEntry));
  EXPECT_EQ(import(swapped), absl::StatusCode::kDataLoss);
  // The other product's algorithm.
  std::string wrong = blob;
  std::copy_n(blob.begin() + static_cast<long>(first + kEntry + 56), 64,
              wrong.begin() + static_cast<long>(first + 56));
  EXPECT_EQ(import(wrong), absl::StatusCode::kDataLoss);
}

TEST_F(GemmTest, RefusesTheAlgorithmsOfAnotherDeviceOrVersion) {
  const std::string blob = SomeBlob();
  EXPECT_EQ(New("another one")->AdoptAlgorithms(blob).code(),
            absl::StatusCode::kFailedPrecondition);
  std::string newer = blob;
  newer[8] = static_cast<char>(newer[8] + 1);
  EXPECT_EQ(New("a device")->AdoptAlgorithms(Sealed(newer)).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(GemmTest, AdoptedAlgorithmsGiveTheSameBits) {
  const std::vector<float> bits = OrderedSum(*gemm_);
  const std::string blob = gemm_->TakeNewAlgorithms();
  EXPECT_EQ(gemm_->TakeNewAlgorithms(), "");
  cuda_emulator::ChooseParts(2);
  const auto fresh = New("a device"), adopted = New("a device");
  const std::vector<float> others = OrderedSum(*fresh);
  EXPECT_NE(others, bits);
  ASSERT_TRUE(adopted->AdoptAlgorithms(blob).ok());
  const int64_t before = NumHeuristics();
  EXPECT_EQ(OrderedSum(*adopted), bits);
  EXPECT_EQ(NumHeuristics(), before);
  // They are known where they come from.
  EXPECT_EQ(adopted->TakeNewAlgorithms(), "");
  // What was chosen stays.
  ASSERT_TRUE(fresh->AdoptAlgorithms(blob).ok());
  EXPECT_EQ(OrderedSum(*fresh), others);
  // What was not adopted is chosen, and told.
  OrderedSum(*adopted, 6);
  const std::string rest = adopted->TakeNewAlgorithms();
  EXPECT_EQ(rest.size(), blob.size());
  EXPECT_TRUE(New("a device")->AdoptAlgorithms(rest).ok());
  cuda_emulator::ChooseParts(1);
}

// One algorithm for all numbers of tokens that round to the same one.
TEST_F(GemmTest, AsksOnceForNumbersOfTokensOfOneSize) {
  const Tensor a = Floats(std::vector<float>(40, 1.0f));
  const Tensor b = Floats(std::vector<float>(40, 1.0f));
  const Tensor c = Floats(std::vector<float>(40, 0.0f));
  const auto run = [&](int64_t tokens) {
    gemm_->Run(
        stream(),
        {.m = tokens, .n = 1, .k = 1, .a_row = 1, .b_row = 1, .c_row = 1},
        a.raw(), b.raw(), c.raw());
    gemm_->Run(stream(),
               {.m = 1,
                .n = 1,
                .k = tokens,
                .a_transposed = true,
                .a_row = 1,
                .b_row = 1,
                .c_row = 1},
               a.raw(), b.raw(), c.raw());
    EXPECT_EQ(Fetch(c)[0], static_cast<float>(tokens));
  };
  const int64_t before = NumHeuristics();
  run(33);
  EXPECT_EQ(NumHeuristics(), before + 2);
  for (const int64_t tokens : {34, 35, 36, 33}) run(tokens);
  EXPECT_EQ(NumHeuristics(), before + 2);
  run(37);
  EXPECT_EQ(NumHeuristics(), before + 4);
  // What the rounded one's algorithm does not suit has its own, told as well.
  gemm_->TakeNewAlgorithms();
  cuda_emulator::BindToSizes(true);
  run(38);
  run(38);
  EXPECT_EQ(NumHeuristics(), before + 6);
  const std::string blob = gemm_->TakeNewAlgorithms();
  const auto other = New("a device");
  ASSERT_TRUE(other->AdoptAlgorithms(blob).ok());
  cuda_emulator::BindToSizes(false);
}

TEST(RoundedShapeTest, RoundsTokensUpInEightStepsForEachOctave) {
  const auto rounded = [](int64_t n) {
    return RoundedShape({.m = n, .n = 5, .k = 7}).m;
  };
  for (int64_t n = 1; n <= 16; ++n) EXPECT_EQ(rounded(n), n);
  EXPECT_EQ(rounded(17), 18);
  EXPECT_EQ(rounded(32), 32);
  EXPECT_EQ(rounded(33), 36);
  EXPECT_EQ(rounded(3969), 4096);
  EXPECT_EQ(rounded(4096), 4096);
  EXPECT_EQ(rounded(4097), 4608);
  for (int64_t n = 17; n < 100'000; ++n) {
    const int64_t up = rounded(n);
    ASSERT_GE(up, n);
    ASSERT_LT(8 * (up - n), n) << n;
    ASSERT_EQ(rounded(up), up) << n;
  }
  CudaGemmShape weights = {.m = 99, .n = 99, .k = 99, .a_transposed = true};
  EXPECT_EQ(RoundedShape(weights).m, 99);
  EXPECT_EQ(RoundedShape(weights).k, 104);
  weights.b_transposed = true;
  EXPECT_EQ(RoundedShape(weights), weights);
}

}  // namespace
}  // namespace gradwire
