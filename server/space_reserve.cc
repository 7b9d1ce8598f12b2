// SPDX-License-Identifier: Apache-2.0
#include "server/space_reserve.h"

#include <algorithm>
#include <memory>
#include <random>
#include <utility>

#include "base/error.h"
#include "base/status.h"

namespace gradwire {
namespace {

constexpr int64_t kMostBytes = 1 << 20, kLeastBytes = 16 << 10;
// Of what is free on a small disk, one in so many.
constexpr int64_t kShare = 32;

}  // namespace

SpaceReserve::SpaceReserve(FileSystem& files, std::string path)
    : files_(files), path_(std::move(path)), bytes_(kMostBytes) {
  if (const auto free = files_.FreeBytes(DirectoryOf(path_)); free.ok()) {
    bytes_ = std::clamp(*free / kShare, kLeastBytes, kMostBytes);
  }
}

absl::Status SpaceReserve::Make() {
  GW_RETURN_IF_ERROR(RemoveIfThere(files_, path_));
  // To try it would take, for a moment, what others need.
  GW_ASSIGN_OR_RETURN(const int64_t free, files_.FreeBytes(DirectoryOf(path_)));
  if (free < 2 * bytes_) {
    return ErrorBuilder(absl::StatusCode::kResourceExhausted, "STORAGE_FULL")
        .Server()
        .With("path", path_)
        .With("needed", 2 * bytes_)
        .With("free", free)
        .Message("the server's disk is full: " + std::to_string(2 * bytes_) +
                 " bytes are needed, so that what is begun can be recorded, "
                 "and " +
                 std::to_string(free) +
                 " are free: make space on the state volume, then try again");
  }
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<File> file, files_.Create(path_));
  // A file system that compresses would keep nothing for zeros.
  std::minstd_rand random(1);
  std::string noise(static_cast<size_t>(bytes_), '\0');
  for (char& byte : noise) byte = static_cast<char>(random() >> 8);
  GW_RETURN_IF_ERROR(file->WriteAt(0, noise));
  return file->Sync();
}

absl::Status SpaceReserve::Hold() {
  if (held_) return absl::OkStatus();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (held_) return absl::OkStatus();
  const absl::Status made = Make();
  if (made.ok()) {
    held_ = true;
  } else {
    RemoveIfThere(files_, path_).IgnoreError();
  }
  return made;
}

bool SpaceReserve::Release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return held_.exchange(false) && RemoveIfThere(files_, path_).ok();
}

}  // namespace gradwire
