// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"

#include <gtest/gtest.h>

namespace gradwire {
namespace {

TEST(ErrorTest, DetailSurvivesTheStatus) {
  absl::Status status =
      ErrorBuilder(absl::StatusCode::kInvalidArgument, "SHAPE_MISMATCH")
          .With("field", "weights")
          .With("value", int64_t{3})
          .With("limit", 4)
          .Message("weights has 3 entries");
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  std::optional<ErrorDetail> detail = GetErrorDetail(status);
  ASSERT_TRUE(detail.has_value());
  EXPECT_EQ(detail->reason, "SHAPE_MISMATCH");
  EXPECT_EQ(detail->category, ErrorCategory::kUser);
  EXPECT_EQ(detail->metadata.at("field"), "weights");
  EXPECT_EQ(detail->metadata.at("value"), "3");
  EXPECT_EQ(detail->metadata.at("limit"), "4");
}

TEST(ErrorTest, MetadataCanBeAddedOnTheWayUp) {
  absl::Status status = ErrorBuilder(absl::StatusCode::kInternal, "X")
                            .Server()
                            .With("empty", "")
                            .Message("m");
  status = WithErrorMetadata(status, "datum_index", "7");
  std::optional<ErrorDetail> detail = GetErrorDetail(status);
  ASSERT_TRUE(detail.has_value());
  EXPECT_EQ(detail->category, ErrorCategory::kServer);
  EXPECT_EQ(detail->metadata.at("datum_index"), "7");
  EXPECT_EQ(detail->metadata.at("empty"), "");
}

TEST(ErrorTest, GoesThroughBytesAndBack) {
  const absl::Status status = ErrorBuilder(absl::StatusCode::kAborted, "X")
                                  .Server()
                                  .With("empty", "")
                                  .With("rank", 3)
                                  .Message("all of it");
  EXPECT_EQ(StatusFromBytes(StatusToBytes(status)), status);
  const absl::Status plain = absl::NotFoundError("");
  EXPECT_EQ(StatusFromBytes(StatusToBytes(plain)), plain);
  for (const std::string& bytes :
       {std::string(), std::string("1"), std::string("0\0x\0", 4),
        std::string("77\0x\0", 5), std::string("a\0x\0", 4)}) {
    EXPECT_EQ(StatusFromBytes(bytes).code(), absl::StatusCode::kInternal);
  }
}

TEST(ErrorTest, OtherStatusesHaveNoDetail) {
  EXPECT_FALSE(GetErrorDetail(absl::InternalError("x")).has_value());
  EXPECT_FALSE(GetErrorDetail(absl::OkStatus()).has_value());
}

}  // namespace
}  // namespace gradwire
