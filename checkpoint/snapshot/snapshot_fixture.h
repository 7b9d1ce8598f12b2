// SPDX-License-Identifier: Apache-2.0
// A job's snapshots on a disk in memory, for tests.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "checkpoint/crash_file_system.h"
#include "checkpoint/snapshot/snapshot_testing.h"

namespace gradwire {

inline DiskImage EmptyDisk() {
  return {.files = {}, .directories = {"/s", "/m"}};
}

class SnapshotTest : public testing::Test {
 protected:
  absl::StatusOr<SnapshotManifest> Save(const std::string& name,
                                        const TestWeights& weights,
                                        const TestSave& save = {}) {
    return SaveTestSnapshot(*files_, "/s/" + name, weights, save);
  }
  SnapshotManifest Must(const absl::StatusOr<SnapshotManifest>& saved) {
    EXPECT_TRUE(saved.ok()) << saved.status();
    return saved.ok() ? *saved : SnapshotManifest();
  }
  std::string Read(const std::string& name) {
    const auto file = ReadTestSnapshot(*files_, "/s", name);
    EXPECT_TRUE(file.ok()) << file.status();
    return file.value_or("");
  }
  std::string ReadReason(const std::string& name) {
    return ReasonOf(ReadTestSnapshot(*files_, "/s", name).status());
  }
  void Overwrite(const std::string& path, const std::string& content) {
    DiskImage image = files_->Latest();
    image.files[path] = content;
    Replace(image);
  }
  void Replace(const DiskImage& image) {
    files_ = std::make_unique<CrashFileSystem>(image);
  }
  std::string Content(const std::string& path) {
    return files_->Latest().files.at(path);
  }

  std::unique_ptr<CrashFileSystem> files_ =
      std::make_unique<CrashFileSystem>(EmptyDisk());
};

}  // namespace gradwire
