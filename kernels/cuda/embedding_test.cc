// SPDX-License-Identifier: Apache-2.0
// The order of the sums, which tolerances cannot see, over several turns.
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "base/check.h"
#include "device/cuda/cuda_device.h"
#include "kernels/cuda/cuda_kernels.h"

namespace gradwire {
namespace {

template <typename T>
class EmbeddingTest : public testing::Test {};
using Types = testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(EmbeddingTest, Types);

TYPED_TEST(EmbeddingTest, ARowsTermsAreAddedInTheOrderOfTheTokens) {
  auto device = CudaDevice::Create(0);
  ASSERT_TRUE(device.ok());
  auto kernels = NewCudaKernels(**device);
  ASSERT_TRUE(kernels.ok());
  const std::unique_ptr<Stream> stream = (*device)->NewStream();

  // More than one turn sorts; row 0 comes most of the time, row 2 never.
  constexpr int64_t kTokens = (1 << 17) + 3000, kVocab = 9;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<int32_t> tokens;
  std::vector<TypeParam> d_out;
  std::vector<float> want(kVocab), got(kVocab);
  for (float& element : want) element = normal(random);
  for (int64_t t = 0; t < kTokens; ++t) {
    const auto token = static_cast<int32_t>(random() % (2 * kVocab));
    tokens.push_back(token >= kVocab || token == 2 ? 0 : token);
    d_out.push_back(TypeParam(normal(random)));
  }

  std::vector<std::unique_ptr<DeviceBuffer>> memory;
  const auto upload = [&](const void* from, DType dtype,
                          std::initializer_list<int64_t> shape) {
    int64_t bytes = DTypeBytes(dtype);
    for (const int64_t dim : shape) bytes *= dim;
    auto buffer = (*device)->Allocate(bytes);
    GW_CHECK(buffer.ok());
    memory.push_back(*std::move(buffer));
    const Tensor tensor(memory.back()->data(), dtype, shape);
    (*device)->CopyFromHost(*stream, from, tensor);
    return tensor;
  };
  const Tensor d_table = upload(want.data(), DType::kF32, {kVocab, 1});
  (*kernels)->EmbeddingBackward(
      *stream, upload(tokens.data(), DType::kI32, {kTokens}),
      upload(d_out.data(), DTypeOf<TypeParam>::value, {kTokens, 1}), d_table,
      Tensor());
  (*device)->CopyToHost(*stream, d_table, got.data());
  ASSERT_TRUE(stream->Finish().ok());

  for (size_t t = 0; t < tokens.size(); ++t) {
    want[static_cast<size_t>(tokens[t])] += static_cast<float>(d_out[t]);
  }
  EXPECT_EQ(got, want);
}

}  // namespace
}  // namespace gradwire
