// SPDX-License-Identifier: Apache-2.0
// What the segments of a log say after a crash: first the judgement, which
// changes nothing, then the mending. The rule is in docs/oplog.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"

namespace gradwire {

// What the owner of a log knows of it.
struct OplogExpectation {
  int64_t epoch = 1;      // its own: the number of its lease
  int64_t watermark = 0;  // the log was synced up to here
  int64_t begin = 0;      // nothing below is needed any more
};

struct OplogFindings {
  struct Segment {
    std::string name;
    int64_t begin = 0;  // log offset
    int64_t epoch = 0;
  };
  std::vector<Segment> segments;  // in the log's order
  // Of the last good record. Bytes of the last segment's file behind it, if
  // there are any, are a torn tail.
  int64_t end = 0;
  int64_t known_durable = 0;  // up to here the log was synced
};

// Reads all of the log in `directory`; a directory without segments is an empty
// log. Errors:
//   FAILED_PRECONDITION EPOCH_FENCED (epoch, highest): somebody with a newer
//     lease has opened this log;
//   DATA_LOSS OPLOG_CORRUPT (segment, offset): something that was synced is
//     damaged or missing;
//   FAILED_PRECONDITION STATE_VERSION; the file system's.
absl::StatusOr<OplogFindings> ExamineOplog(FileSystem& files,
                                           const std::string& directory,
                                           const OplogExpectation& expected);

// Cuts a torn tail off and makes all that is left durable. Afterwards
// `findings` describe what is there. May be repeated after an error, or after a
// crash, from ExamineOplog on.
absl::Status MendOplog(FileSystem& files, const std::string& directory,
                       OplogFindings* findings);

// Also for damage that is found later.
absl::Status OplogCorrupt(const std::string& segment, int64_t offset,
                          const std::string& what);

}  // namespace gradwire
