// SPDX-License-Identifier: Apache-2.0
#include "base/crc32c.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace gradwire {
namespace {

uint32_t Of(const std::string& bytes) {
  return Crc32c(bytes.data(), static_cast<int64_t>(bytes.size()));
}

// One bit after the other, from the polynomial.
uint32_t BitByBit(const std::string& bytes) {
  uint32_t crc = 0xffffffff;
  for (const char byte : bytes) {
    crc ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78u : 0);
    }
  }
  return ~crc;
}

// RFC 3720, B.4.
TEST(Crc32cTest, GivesTheValuesOfTheStandard) {
  EXPECT_EQ(Of(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(Of(std::string(32, '\xff')), 0x62a8ab43u);
  std::string ascending;
  for (char c = 0; c < 32; ++c) ascending.push_back(c);
  EXPECT_EQ(Of(ascending), 0x46dd794eu);
  EXPECT_EQ(Of(std::string(ascending.rbegin(), ascending.rend())), 0x113fdb5cu);
  EXPECT_EQ(Of("123456789"), 0xe3069283u);
  EXPECT_EQ(Of(""), 0u);
}

TEST(Crc32cTest, AgreesBitByBitAtAnyLengthAndPlace) {
  std::mt19937 random(1);
  std::string bytes(3000, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  for (size_t length = 0; length < 1200; ++length) {
    const std::string part = bytes.substr(length % 67, length);
    ASSERT_EQ(Of(part), BitByBit(part)) << length;
  }
}

TEST(Crc32cTest, GoesOnWhereItStopped) {
  const std::string bytes = "per-token gradients come back";
  for (size_t cut = 0; cut <= bytes.size(); ++cut) {
    EXPECT_EQ(
        Crc32c(bytes.data() + cut, static_cast<int64_t>(bytes.size() - cut),
               Of(bytes.substr(0, cut))),
        Of(bytes));
  }
}

}  // namespace
}  // namespace gradwire
