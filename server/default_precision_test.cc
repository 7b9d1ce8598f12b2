// SPDX-License-Identifier: Apache-2.0
#include "server/default_precision.h"

#include "gtest/gtest.h"

namespace gradwire {
namespace {

TEST(ChoosePrecisionTest, TheDefaultIsBf16WhereItIsMultiplied) {
  for (const char* device : {"cpu amx_bf16", "cpu avx512_bf16"}) {
    const PrecisionChoice choice = ChoosePrecision("", device);
    EXPECT_EQ(choice.precision, Precision::kBF16) << device;
    EXPECT_NE(choice.reason.find(InstructionSet(device)), std::string::npos);
  }
  for (const char* device : {"cpu avx512", "cpu avx2", "cpu generic"}) {
    const PrecisionChoice choice = ChoosePrecision("", device);
    EXPECT_EQ(choice.precision, Precision::kF32) << device;
    EXPECT_NE(choice.reason.find("no bf16 products"), std::string::npos);
  }
}

TEST(ChoosePrecisionTest, WhatIsAskedForIsTaken) {
  for (const char* device : {"cpu amx_bf16", "cpu avx2"}) {
    EXPECT_EQ(ChoosePrecision("f32", device).precision, Precision::kF32);
    EXPECT_EQ(ChoosePrecision("bf16", device).precision, Precision::kBF16);
  }
  EXPECT_NE(ChoosePrecision("bf16", "cpu avx2").reason.find("widened"),
            std::string::npos);
  EXPECT_EQ(ChoosePrecision("bf16", "cpu amx_bf16").reason.find("widened"),
            std::string::npos);
}

}  // namespace
}  // namespace gradwire
