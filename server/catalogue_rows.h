// SPDX-License-Identifier: Apache-2.0
// What the files of the catalogue share: names, and times of rows.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "gradwire/v1/checkpoints.pb.h"

namespace gradwire {

// What can be read of a directory; none is as good as empty.
absl::StatusOr<std::vector<std::string>> NamesIn(FileSystem& files,
                                                 const std::string& directory);

int64_t MicrosOf(const google::protobuf::Timestamp& time);
// create_time: when the manifest was written, which is last.
void FillTime(v1::Checkpoint& row);
void SetTime(int64_t micros, google::protobuf::Timestamp& time);
// 0: never.
void SetExpiry(int64_t micros, v1::Checkpoint& row);
bool HasExpired(const v1::Checkpoint& row, int64_t now_micros);

}  // namespace gradwire
