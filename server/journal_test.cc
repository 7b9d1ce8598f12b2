// SPDX-License-Identifier: Apache-2.0
#include "server/journal.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <memory>
#include <string>

#include "checkpoint/crash_file_system.h"

namespace gradwire {
namespace {

class JournalTest : public testing::Test {
 protected:
  JournalTest() {
    char folder[] = "/tmp/journal-XXXXXX";
    folder_ = mkdtemp(folder);
    metadata_ = Metadata::Open(folder_ + "/gradwire.db").value();
    JobRow job;
    job.job_id = "job";
    EXPECT_TRUE(metadata_->AddJob(job).ok());
    journal_ = Journal::Open(files_, metadata_.get(), job, "/job/log").value();
  }
  ~JournalTest() override { std::filesystem::remove_all(folder_); }

  int64_t watermark() const {
    return metadata_->Jobs().value().at(0).log_watermark;
  }

  std::string folder_;
  CrashFileSystem files_;
  std::unique_ptr<Metadata> metadata_;
  std::unique_ptr<Journal> journal_;
};

// Else the log would be taken for damaged after a power loss.
TEST_F(JournalTest, TheMetadataVouchForWhatWasSyncedAndNoMore) {
  const int64_t durable = journal_->durable();
  ASSERT_TRUE(journal_->AppendOp(1, 1, v1::JournalOp()).ok());
  ASSERT_TRUE(journal_->SetWatermark().ok());
  EXPECT_EQ(watermark(), durable);
  EXPECT_LT(watermark(), journal_->end());
  ASSERT_TRUE(journal_->Sync().ok());
  EXPECT_EQ(watermark(), durable);
  ASSERT_TRUE(journal_->SetWatermark().ok());
  EXPECT_EQ(watermark(), journal_->end());
}

TEST_F(JournalTest, WhatWasTrimmedIsSaidToBe) {
  const auto appended = journal_->AppendOp(1, 1, v1::JournalOp());
  ASSERT_TRUE(appended.ok());
  EXPECT_EQ(journal_->Read(appended->begin)->seq, 1);
  JobRow job = metadata_->Jobs().value().at(0);
  // A server begins a segment of its own.
  const auto next =
      Journal::Open(files_, metadata_.get(), job, "/job/log").value();
  EXPECT_EQ(next->Read(appended->begin)->seq, 1);
  ASSERT_TRUE(next->Trim(next->end()).ok());
  EXPECT_TRUE(absl::IsNotFound(next->Read(appended->begin).status()));
}

}  // namespace
}  // namespace gradwire
