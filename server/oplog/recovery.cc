// SPDX-License-Identifier: Apache-2.0
#include "server/oplog/recovery.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/fence.h"
#include "server/oplog/format.h"
#include "server/oplog/segment_reader.h"

namespace gradwire {
namespace {

using Found = SegmentReader::Found;

// A segment's share of the judgement.
struct SegmentScan {
  int64_t end = 0;      // of its last good record
  bool torn = false;    // something else follows
  bool synced = false;  // what follows was synced: no legal torn tail
  int64_t durable = 0;  // largest durable_offset of the good records
};

absl::StatusOr<SegmentScan> Scan(FileSystem& files,
                                 const std::string& directory,
                                 const OplogFindings::Segment& segment,
                                 int64_t limit) {
  SegmentScan scan = {.end = segment.begin, .durable = segment.begin};
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<SegmentReader> reader,
                      SegmentReader::Open(files, directory, segment.name));
  if (!reader->valid()) {
    scan.torn = true;
    // The header was synced before anything was written behind it.
    scan.synced = reader->file_bytes() > kSegmentHeaderBytes;
    return scan;
  }
  bool sealed = false;
  for (;;) {
    RecordHeader record;
    scan.end = reader->offset();
    if (scan.end >= limit) return scan;
    GW_ASSIGN_OR_RETURN(const Found found, reader->Next(&record, nullptr));
    if (found == Found::kEnd) return scan;
    if (found == Found::kInvalid || sealed) break;
    scan.durable = std::max(scan.durable, record.durable_offset);
    sealed = record.type == OplogType::kSeal;
  }
  scan.torn = true;
  // Nothing is ever written behind a seal.
  if (sealed) scan.synced = true;
  if (!scan.synced) {
    GW_ASSIGN_OR_RETURN(const int64_t later, reader->LaterDurableOffset());
    scan.synced = later > scan.end;
  }
  return scan;
}

absl::StatusOr<OplogFindings> FindSegments(FileSystem& files,
                                           const std::string& directory,
                                           int64_t epoch) {
  OplogFindings findings;
  int64_t highest = 0;
  const auto names = files.List(directory);
  if (absl::IsNotFound(names.status())) return findings;
  GW_RETURN_IF_ERROR(names.status());
  for (const std::string& name : *names) {
    const auto named = ParseSegmentName(name);
    if (!named) continue;
    highest = std::max(highest, named->epoch);
    findings.segments.push_back(
        {.name = name, .begin = named->begin, .epoch = named->epoch});
  }
  if (epoch < highest) return EpochFenced(epoch, highest);
  return findings;
}

}  // namespace

absl::Status OplogCorrupt(const std::string& segment, int64_t offset,
                          const std::string& what) {
  return ErrorBuilder(absl::StatusCode::kDataLoss, "OPLOG_CORRUPT")
      .Server()
      .With("segment", segment)
      .With("offset", offset)
      .Message("The op-log is damaged at offset " + std::to_string(offset) +
               ": " + what +
               ", although it had been synced. Keep the directory for "
               "analysis, and restore the job from its last checkpoint.");
}

absl::StatusOr<OplogFindings> ExamineOplog(FileSystem& files,
                                           const std::string& directory,
                                           const OplogExpectation& expected) {
  GW_ASSIGN_OR_RETURN(OplogFindings findings,
                      FindSegments(files, directory, expected.epoch));
  const auto& segments = findings.segments;
  if (!segments.empty() && segments[0].begin > expected.begin) {
    return OplogCorrupt(segments[0].name, expected.begin,
                        "the log begins at " +
                            std::to_string(segments[0].begin) +
                            ", segments before are missing");
  }
  for (size_t i = 0; i < segments.size(); ++i) {
    // Names are in the order of epochs, and offsets must be in it, too.
    if (i > 0 && segments[i].begin != findings.end) {
      return OplogCorrupt(
          segments[i - 1].name, findings.end,
          "the next segment begins at " + std::to_string(segments[i].begin));
    }
    const bool last = i + 1 == segments.size();
    // Who has begun the next one had examined this up to there. What follows
    // was written after that, by one that had lost its lease and did not know
    // yet.
    const bool taken_over = !last && segments[i + 1].epoch > segments[i].epoch;
    GW_ASSIGN_OR_RETURN(const SegmentScan scan,
                        Scan(files, directory, segments[i],
                             taken_over ? segments[i + 1].begin : INT64_MAX));
    // The segments before the last were synced before the next was begun. (A
    // watermark above the cut is seen below.)
    if (scan.torn && (!last || scan.synced)) {
      return OplogCorrupt(segments[i].name, scan.end, "there is no record");
    }
    findings.end = scan.end;
    findings.known_durable = std::max(scan.durable, expected.watermark);
  }
  if (findings.end < std::max(expected.watermark, expected.begin)) {
    return OplogCorrupt(
        segments.empty() ? "" : segments.back().name, findings.end,
        "the log ends before " +
            std::to_string(std::max(expected.watermark, expected.begin)));
  }
  return findings;
}

absl::Status MendOplog(FileSystem& files, const std::string& directory,
                       OplogFindings* findings) {
  if (!findings->segments.empty()) {
    const OplogFindings::Segment& last = findings->segments.back();
    const std::string path = directory + "/" + last.name;
    if (findings->end == last.begin) {
      // The one before it is the last again, and ends where this began.
      if (findings->segments.size() > 1) {
        const auto& before = findings->segments[findings->segments.size() - 2];
        const int64_t bytes =
            kSegmentHeaderBytes + findings->end - before.begin;
        GW_ASSIGN_OR_RETURN(const std::unique_ptr<File> file,
                            files.Open(directory + "/" + before.name,
                                       FileSystem::Access::kReadWrite));
        GW_ASSIGN_OR_RETURN(const int64_t there, file->Size());
        if (there > bytes) {
          GW_RETURN_IF_ERROR(file->Truncate(bytes));
          GW_RETURN_IF_ERROR(file->Sync());
        }
      }
      // Without records it is of no use, and its name may be wanted again.
      GW_RETURN_IF_ERROR(files.Remove(path));
      findings->segments.pop_back();
    } else {
      GW_ASSIGN_OR_RETURN(const std::unique_ptr<File> file,
                          files.Open(path, FileSystem::Access::kReadWrite));
      const auto position = [&](int64_t offset) {
        return kSegmentHeaderBytes + offset - last.begin;
      };
      // Also where nothing is torn: an earlier process may have cut the file
      // and died before the sync.
      GW_RETURN_IF_ERROR(file->Truncate(position(findings->end)));
      // What was read may be in memory only, and if the sync of an earlier
      // process failed, the system does not intend to write it any more. So it
      // is written again, with the same bytes.
      std::string part;
      for (int64_t at = std::max(findings->known_durable, last.begin);
           at < findings->end; at += std::ssize(part)) {
        part.resize(static_cast<size_t>(
            std::min(findings->end - at, int64_t{1} << 20)));
        GW_ASSIGN_OR_RETURN(
            const int64_t got,
            file->ReadAt(position(at), std::ssize(part), part.data()));
        if (got < std::ssize(part)) {
          return OplogCorrupt(last.name, at + got, "the file has shrunk");
        }
        GW_RETURN_IF_ERROR(file->WriteAt(position(at), part));
      }
      GW_RETURN_IF_ERROR(file->Sync());
    }
  }
  // Also what an earlier process removed: it must not come back beside what is
  // written from here on.
  GW_RETURN_IF_ERROR(files.SyncDirectory(directory));
  findings->known_durable = findings->end;
  return absl::OkStatus();
}

}  // namespace gradwire
