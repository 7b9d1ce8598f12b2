// SPDX-License-Identifier: Apache-2.0
// An op-log whose last segment is the input, but for its first two bytes: these
// say what else the owner knows and has. What recovery says of it is compared
// with the rule of docs/oplog.md, which is written here once more, for one
// segment in memory.
#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "checkpoint/crash_file_system.h"
#include "server/oplog/format.h"
#include "server/oplog/oplog.h"
#include "server/oplog/payload_hash.h"
#include "server/oplog/recovery.h"
#include "server/oplog/testing.h"
#include "tests/fuzz/fuzz.h"

namespace gradwire {
namespace {

constexpr size_t kControlBytes = 2;
constexpr int64_t kEpoch = 2;  // of the segment

std::string DigestOf(std::string_view payload) {
  PayloadHash hash;
  hash.Update(payload);
  return hash.Digest();
}

std::string Record(const RecordHeader& header, const SegmentHeader& segment,
                   int64_t offset, const std::string& payload) {
  return EncodeRecordHeader(header, segment, offset) + payload +
         DigestOf(payload);
}

// A segment that was full, before the one of the input.
struct Predecessor {
  Predecessor() {
    const SegmentHeader segment = {.epoch = 1, .tag = 5, .seed = 6};
    RecordHeader header = {.type = OplogType::kEpoch, .epoch = 1};
    content = EncodeSegmentHeader(segment);
    content += Record(header, segment, 0, "");
    end = header.record_bytes();
    header.type = OplogType::kSeal;
    content += Record(header, segment, end, "");
    end += header.record_bytes();
  }
  std::string content;
  int64_t end = 0;
};

const Predecessor& Before() {
  static const Predecessor predecessor;
  return predecessor;
}

// What the two bytes say.
struct Setting {
  bool has_predecessor = false;
  OplogExpectation expected;

  int64_t begin() const { return has_predecessor ? Before().end : 0; }
};

Setting SettingOf(const std::string& input) {
  Setting setting;
  const auto first = static_cast<uint8_t>(input[0]);
  const auto second = static_cast<uint8_t>(input[1]);
  setting.has_predecessor = first & 1;
  setting.expected.epoch = first & 2 ? 3 : first & 4 ? 1 : kEpoch;
  if (first & 8) setting.expected.watermark = second * 8;
  if (first & 16) setting.expected.begin = second * 8;
  return setting;
}

// What recovery has to say.
struct Verdict {
  enum class Kind { kGood, kDamaged, kOtherVersion, kFenced };
  Kind kind = Kind::kGood;
  int64_t end = 0;  // of the log, or where it is damaged
  std::vector<LogRecord> records;
};

// The record at log offset `at` of a segment that begins at `begin`.
struct Place {
  HeaderState state = HeaderState::kInvalid;
  RecordHeader header;
  bool whole = false;
};

Place Look(std::string_view bytes, const SegmentHeader& segment, int64_t at) {
  Place place;
  const std::string_view rest = bytes.substr(
      static_cast<size_t>(kSegmentHeaderBytes + at - segment.begin));
  int version = 0;
  place.state = DecodeRecordHeader(rest.substr(0, kRecordHeaderBytes), segment,
                                   at, &place.header, &version);
  if (place.state != HeaderState::kValid) return place;
  if (place.header.record_bytes() > std::ssize(rest)) return place;
  const auto payload_bytes = static_cast<size_t>(place.header.payload_bytes);
  place.whole =
      DigestOf(rest.substr(kRecordHeaderBytes, payload_bytes)) ==
      rest.substr(kRecordHeaderBytes + payload_bytes, kRecordDigestBytes);
  return place;
}

// By the rule, of the segment alone.
Verdict JudgeSegment(std::string_view bytes, int64_t begin) {
  using Kind = Verdict::Kind;
  Verdict verdict = {.end = begin, .records = {}};
  SegmentHeader segment;
  int version = 0;
  const HeaderState state = DecodeSegmentHeader(
      bytes.substr(0, kSegmentHeaderBytes), &segment, &version);
  if (state == HeaderState::kNewerVersion) {
    verdict.kind = Kind::kOtherVersion;
    return verdict;
  }
  if (state == HeaderState::kInvalid || segment.epoch != kEpoch ||
      segment.begin != begin) {
    if (std::ssize(bytes) > kSegmentHeaderBytes) verdict.kind = Kind::kDamaged;
    return verdict;
  }
  const int64_t file_end = begin + std::ssize(bytes) - kSegmentHeaderBytes;
  bool sealed = false;
  while (verdict.end < file_end) {
    const Place place = Look(bytes, segment, verdict.end);
    if (place.state == HeaderState::kNewerVersion) {
      verdict.kind = Kind::kOtherVersion;
      return verdict;
    }
    if (sealed) {
      verdict.kind = Kind::kDamaged;
      return verdict;
    }
    if (!place.whole) break;
    LogRecord& record = verdict.records.emplace_back();
    record = {.type = place.header.type,
              .handle = place.header.handle,
              .seq_id = place.header.seq_id,
              .begin = verdict.end,
              .end = verdict.end + place.header.record_bytes(),
              .payload = {}};
    record.payload = bytes.substr(
        static_cast<size_t>(kSegmentHeaderBytes + kRecordHeaderBytes +
                            verdict.end - begin),
        static_cast<size_t>(place.header.payload_bytes));
    verdict.end = record.end;
    sealed = record.type == OplogType::kSeal;
  }
  for (int64_t at = verdict.end + 1; at < file_end; ++at) {
    if (bytes[static_cast<size_t>(kSegmentHeaderBytes + at - begin)] != 'G') {
      continue;
    }
    const Place place = Look(bytes, segment, at);
    if (place.state == HeaderState::kNewerVersion) {
      verdict.kind = Kind::kOtherVersion;
      return verdict;
    }
    if (place.state == HeaderState::kValid &&
        place.header.durable_offset > verdict.end) {
      verdict.kind = Kind::kDamaged;
    }
  }
  return verdict;
}

Verdict Judge(std::string_view bytes, const Setting& setting) {
  Verdict verdict = JudgeSegment(bytes, setting.begin());
  const OplogExpectation& expected = setting.expected;
  if (expected.epoch < kEpoch) {
    verdict.kind = Verdict::Kind::kFenced;
  } else if (verdict.kind == Verdict::Kind::kGood &&
             verdict.end < std::max(expected.watermark, expected.begin)) {
    verdict.kind = Verdict::Kind::kDamaged;
  }
  return verdict;
}

void CheckSame(const absl::Status& status, const Verdict& verdict) {
  using Kind = Verdict::Kind;
  GW_CHECK(status.ok() == (verdict.kind == Kind::kGood));
  if (status.ok()) return;
  CheckRefusal(status);
  const std::string reason = ReasonOf(status);
  GW_CHECK((reason == "EPOCH_FENCED") == (verdict.kind == Kind::kFenced));
  GW_CHECK((reason == "STATE_VERSION") ==
           (verdict.kind == Kind::kOtherVersion));
  GW_CHECK((reason == "OPLOG_CORRUPT") == (verdict.kind == Kind::kDamaged));
  if (verdict.kind == Kind::kDamaged) {
    GW_CHECK(MetadataOf(status, "offset") == std::to_string(verdict.end));
  }
}

// Opens the log, and returns its records without the one that Open appends.
std::vector<LogRecord> OpenAndRead(FileSystem& files, const Setting& setting,
                                   int64_t epoch) {
  OplogOptions options = SmallOptions(epoch, 1 << 20);
  options.expected.watermark = setting.expected.watermark;
  options.expected.begin = setting.expected.begin;
  const auto log = Oplog::Open(files, kLogDirectory, options);
  GW_CHECK(log.ok());
  auto records = AllRecordsOf(**log);
  GW_CHECK(records.ok());
  GW_CHECK((*log)->durable_offset() == (*log)->end());
  GW_CHECK(records->back().type == OplogType::kEpoch &&
           records->back().end == (*log)->end());
  const LogRecord& middle = (*records)[records->size() / 2];
  std::string payload;
  const auto one = (*log)->ReadOne(middle.begin, &payload);
  GW_CHECK(one.ok() && one->end == middle.end && payload == middle.payload);
  records->pop_back();
  return *std::move(records);
}

// A segment in parts, as the mutator takes it.
struct Parts {
  struct Piece {
    RecordHeader header;
    std::string payload;
    std::string broken;  // in place of the record, if not empty
  };
  SegmentHeader segment;
  std::vector<Piece> pieces;
  std::string tail;
};

Parts Split(const std::string& bytes) {
  Parts parts;
  int version = 0;
  DecodeSegmentHeader(std::string_view(bytes).substr(0, kSegmentHeaderBytes),
                      &parts.segment, &version);
  int64_t offset = parts.segment.begin;
  size_t at = std::min<size_t>(bytes.size(), kSegmentHeaderBytes);
  while (at < bytes.size()) {
    Parts::Piece piece;
    if (DecodeRecordHeader(
            std::string_view(bytes).substr(at, kRecordHeaderBytes),
            parts.segment, offset, &piece.header,
            &version) != HeaderState::kValid ||
        piece.header.record_bytes() >
            std::ssize(bytes) - static_cast<int64_t>(at)) {
      break;
    }
    piece.payload =
        bytes.substr(at + kRecordHeaderBytes,
                     static_cast<size_t>(piece.header.payload_bytes));
    at += static_cast<size_t>(piece.header.record_bytes());
    offset += piece.header.record_bytes();
    parts.pieces.push_back(std::move(piece));
  }
  parts.tail = bytes.substr(at);
  return parts;
}

// With checksums and digests for where everything now is.
std::string Join(const Parts& parts) {
  std::string bytes = EncodeSegmentHeader(parts.segment);
  for (const Parts::Piece& piece : parts.pieces) {
    if (!piece.broken.empty()) {
      bytes += piece.broken;
      continue;
    }
    bytes +=
        Record(piece.header, parts.segment,
               parts.segment.begin + std::ssize(bytes) - kSegmentHeaderBytes,
               piece.payload);
  }
  return bytes + parts.tail;
}

int64_t AnyNumber(int64_t near, Dice& dice) {
  switch (dice.Below(6)) {
    case 0:
      return dice.Below(2000);
    case 1:
      return -1;
    case 2:
      return static_cast<int64_t>((uint64_t{1} << dice.Below(64)) - 1);
    default:
      return static_cast<int64_t>(static_cast<uint64_t>(near) +
                                  static_cast<uint64_t>(dice.Below(5)) - 2);
  }
}

void MutateHeader(RecordHeader& header, Dice& dice) {
  switch (dice.Below(6)) {
    case 0:
      header.type = static_cast<OplogType>(dice.Below(8));
      break;
    case 1:
      header.payload_bytes = AnyNumber(header.payload_bytes, dice);
      break;
    case 2:
      header.handle = AnyNumber(header.handle, dice);
      break;
    case 3:
      header.epoch = AnyNumber(header.epoch, dice);
      break;
    case 4:
      header.seq_id = AnyNumber(header.seq_id, dice);
      break;
    default:
      header.durable_offset = AnyNumber(header.durable_offset, dice);
  }
}

void MutatePieces(Parts& parts, Dice& dice) {
  auto& pieces = parts.pieces;
  const auto at = static_cast<size_t>(dice.Below(std::ssize(pieces)));
  const auto here = pieces.begin() + static_cast<ptrdiff_t>(at);
  switch (dice.Below(7)) {
    case 0:
      pieces.erase(here);
      return;
    case 1:
      pieces.insert(here, Parts::Piece(pieces[at]));
      return;
    case 2:
      MutateHeader(pieces[at].header, dice);
      return;
    case 3:
      MutatePart(pieces[at].payload, dice);
      pieces[at].header.payload_bytes = std::ssize(pieces[at].payload);
      return;
    case 4: {
      // Something where this record was, and good ones behind.
      Parts alone = parts;
      alone.pieces.resize(at + 1);
      alone.tail.clear();
      const std::string bytes = Join(alone);
      alone.pieces.pop_back();
      pieces[at].broken = bytes.substr(Join(alone).size());
      MutatePart(pieces[at].broken, dice);
      return;
    }
    case 5: {
      // A record within a payload, valid where it stands.
      Parts before = parts;
      before.pieces.resize(at);
      before.tail.clear();
      RecordHeader inner = pieces[at].header;
      MutateHeader(inner, dice);
      const int64_t offset = parts.segment.begin + std::ssize(Join(before)) -
                             kSegmentHeaderBytes + kRecordHeaderBytes;
      pieces[at].payload = EncodeRecordHeader(inner, parts.segment, offset);
      pieces[at].header.payload_bytes = std::ssize(pieces[at].payload);
      if (dice.OneIn(2)) pieces[at].header.payload_bytes += 1;
      return;
    }
    default: {
      // Of another place.
      const Parts::Piece last = pieces.back();
      parts.tail +=
          Record(last.header, parts.segment, AnyNumber(0, dice), last.payload);
    }
  }
}

}  // namespace

std::string FuzzSeed(Dice& dice) {
  std::string input = {static_cast<char>(dice.Below(4)), 0};
  Parts parts;
  parts.segment = {.epoch = kEpoch,
                   .begin = SettingOf(input).begin(),
                   .tag = 0x01020304,
                   .seed = 7};
  int64_t end = parts.segment.begin;
  for (int64_t i = dice.Below(5); i >= 0; --i) {
    Parts::Piece piece;
    piece.payload = std::string(static_cast<size_t>(dice.Below(60)), 'p');
    piece.header = {.type = static_cast<OplogType>(1 + dice.Below(5)),
                    .payload_bytes = std::ssize(piece.payload),
                    .handle = dice.Below(9),
                    .seq_id = dice.Below(9),
                    .epoch = kEpoch,
                    .durable_offset = dice.OneIn(2) ? end : 0};
    end += piece.header.record_bytes();
    parts.pieces.push_back(std::move(piece));
  }
  if (dice.OneIn(4)) parts.pieces.back().header.type = OplogType::kSeal;
  if (dice.OneIn(4)) parts.tail = std::string(20, '\0');
  return input + Join(parts);
}

void FuzzMutate(std::string& input, Dice& dice) {
  if (input.size() < kControlBytes || dice.OneIn(8)) {
    MutatePart(input, dice);
    return;
  }
  std::string bytes = input.substr(kControlBytes);
  input.resize(kControlBytes);
  if (dice.OneIn(10)) {
    input[static_cast<size_t>(dice.Below(2))] =
        static_cast<char>(dice.Below(256));
  }
  if (dice.OneIn(8)) {
    bytes.resize(dice.Position(bytes));
  } else {
    Parts parts = Split(bytes);
    if (dice.OneIn(8)) parts.segment.begin = SettingOf(input).begin();
    if (dice.OneIn(30)) parts.segment.epoch = AnyNumber(kEpoch, dice);
    for (int64_t i = dice.Changes(); i > 0; --i) {
      if (parts.pieces.empty() || dice.OneIn(8)) {
        MutatePart(parts.tail, dice);
      } else {
        MutatePieces(parts, dice);
      }
    }
    bytes = Join(parts);
  }
  input += bytes;
}

void FuzzOne(const std::string& input) {
  if (input.size() < kControlBytes) return;
  const Setting setting = SettingOf(input);
  const std::string bytes = input.substr(kControlBytes);
  const Verdict verdict = Judge(bytes, setting);

  DiskImage image = {.files = {}, .directories = {kLogDirectory}};
  const auto path = [](int64_t epoch, int64_t begin) {
    return std::string(kLogDirectory) + "/" + SegmentName(epoch, begin);
  };
  if (setting.has_predecessor) image.files[path(1, 0)] = Before().content;
  image.files[path(kEpoch, setting.begin())] = bytes;
  CrashFileSystem files(image);

  absl::StatusOr<OplogFindings> findings;
  {
    // Two windows, of a segment each, and no payload by what it declares.
    const BoundedMemory bound(20'000, 40, input.size());
    findings = ExamineOplog(files, kLogDirectory, setting.expected);
  }
  GW_CHECK(files.num_events() == 0);
  CheckSame(findings.status(), verdict);
  if (!findings.ok()) {
    OplogOptions options;
    options.expected = setting.expected;
    CheckSame(Oplog::Open(files, kLogDirectory, options).status(), verdict);
    // What is damaged is kept as it is.
    GW_CHECK(files.num_events() == 0);
    return;
  }
  CountAccepted();
  GW_CHECK(findings->end == verdict.end);
  GW_CHECK(findings->known_durable <= findings->end);

  // The records, and the same ones however often the log is opened.
  const size_t before = setting.has_predecessor ? 2 : 0;
  std::vector<LogRecord> records = OpenAndRead(files, setting, 3);
  GW_CHECK(records.size() == before + verdict.records.size());
  GW_CHECK(std::equal(verdict.records.begin(), verdict.records.end(),
                      records.begin() + static_cast<ptrdiff_t>(before)));
  std::vector<LogRecord> again = OpenAndRead(files, setting, 4);
  GW_CHECK(again.back().type == OplogType::kEpoch);
  again.pop_back();
  GW_CHECK(again == records);
}

}  // namespace gradwire
