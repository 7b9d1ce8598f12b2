// SPDX-License-Identifier: Apache-2.0
#include "server/describe_device.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>

#include <fstream>
#include <string>

#include "absl/time/clock.h"
#include "base/error.h"

namespace gradwire {
namespace {

// A program in place of a rank's.
std::string Program(const std::string& name, const std::string& script) {
  std::string path = testing::TempDir() + "/" + name;
  std::ofstream(path) << "#!/bin/sh\n" << script << "\n";
  chmod(path.c_str(), 0755);
  return path;
}

TEST(DescribeDeviceTest, IsWhatTheProgramSays) {
  const auto said = DescribeDevice(
      Program("says", "echo a warning >&2; echo '{\"device\": \"cuda x\"}'"),
      "cuda");
  ASSERT_TRUE(said.ok()) << said.status();
  EXPECT_EQ(*said, "cuda x");
}

TEST(DescribeDeviceTest, AProgramThatFailsSaysWhy) {
  for (const std::string script :
       {"echo no driver here >&2; exit 1", "echo no driver here",
        "echo '{\"device\": \"no driver here\"}'; exit 3"}) {
    const auto said = DescribeDevice(Program("fails", script), "cuda");
    const auto detail = GetErrorDetail(said.status());
    ASSERT_TRUE(detail.has_value()) << said.status();
    EXPECT_EQ(detail->reason, "DEVICE_NOT_FOUND");
    EXPECT_NE(said.status().message().find("no driver here"),
              std::string::npos);
  }
  EXPECT_FALSE(DescribeDevice("/none", "cuda").ok());
}

// While it says nothing, and when it has said all but does not end.
TEST(DescribeDeviceTest, AProgramThatHangsIsKilled) {
  for (const std::string before : {"", "echo '{\"device\": \"cuda\"}'; "}) {
    const std::string pid =
        testing::TempDir() + "/pid" + std::to_string(before.size());
    const absl::Time begin = absl::Now();
    const auto said =
        DescribeDevice(Program("hangs", before + "echo hm; echo $$ > " + pid +
                                            "; exec sleep 100"),
                       "cuda", absl::Seconds(3));
    EXPECT_LT(absl::Now() - begin, absl::Seconds(50));
    EXPECT_NE(said.status().message().find("did not answer within 3s"),
              std::string::npos)
        << said.status();
    int number = 0;
    std::ifstream(pid) >> number;
    ASSERT_GT(number, 0);
    EXPECT_EQ(kill(number, 0), -1);
  }
  // It closes what it writes to.
  const auto said =
      DescribeDevice(Program("closes", "exec >&- 2>&-; exec sleep 100"), "cuda",
                     absl::Milliseconds(500));
  EXPECT_FALSE(said.ok());
}

}  // namespace
}  // namespace gradwire
