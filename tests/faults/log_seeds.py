# SPDX-License-Identifier: Apache-2.0
"""Bugs of the op-log and of what is known of jobs."""

from seed import Seed

OPLOG_SEEDS = (
    Seed(
        "log_sync_left_out",
        "what was appended is called durable without a sync",
        "server/oplog/oplog.cc",
        "const absl::Status synced = file->Sync();\n    lock.lock();",
        "const absl::Status synced;\n    lock.lock();",
        ("//server/oplog:sync_test",),
    ),
    Seed(
        "log_directory_sync_left_out",
        "a new segment's name may go with the power",
        "server/oplog/oplog.cc",
        "if (synced.ok()) synced = files_.SyncDirectory(directory_);",
        "",
        ("//server/oplog:crash_test",),
    ),
    Seed(
        "log_header_sync_left_out",
        "records are written behind a header that may go",
        "server/oplog/oplog.cc",
        "absl::Status synced = file->Sync();\n  if",
        "absl::Status synced;\n  if",
        ("//server/oplog:crash_test",),
    ),
    Seed(
        "log_parent_sync_left_out",
        "the log's directory may go with the power",
        "server/oplog/oplog.cc",
        "GW_RETURN_IF_ERROR(files.SyncDirectory(DirectoryOf(directory)));",
        "",
        ("//server/oplog:seeded_bug_test",),
    ),
    Seed(
        "log_segment_before_the_last_is_synced",
        "a segment's presence proves nothing of those before it",
        "server/oplog/oplog.cc",
        "GW_RETURN_IF_ERROR(Sync(end()));\n  return BeginSegment();",
        "return BeginSegment();",
        ("//server/oplog:crash_test",),
    ),
    Seed(
        "log_cut_not_synced",
        "pages of a refused record come back within the next one",
        "server/oplog/oplog.cc",
        "if (cut.ok()) cut = file_->Sync();",
        "",
        ("//server/oplog:seeded_bug_test",),
    ),
    Seed(
        "log_refused_record_not_cut",
        "a record that was refused half written stays in the file",
        "server/oplog/oplog.cc",
        "GW_RETURN_IF_ERROR(CutTo(segment_end_));",
        "",
        ("//server/oplog:oplog_test", "//server/oplog:seeded_bug_test"),
    ),
    Seed(
        "log_trim_out_of_order",
        "removals that are not synced one by one leave a hole",
        "server/oplog/oplog.cc",
        "trim_failure_ = files_.SyncDirectory(directory_);",
        "",
        ("//server/oplog:crash_test",),
    ),
    Seed(
        "log_trims_its_end",
        "nothing durable is left that says where the log ends",
        "server/oplog/oplog.cc",
        "std::min(below, durable_offset() - 1)",
        "below",
        ("//server/oplog:crash_test",),
    ),
    Seed(
        "log_epoch_unchecked_on_append",
        "a server that has lost its lease appends",
        "server/oplog/oplog.cc",
        "if (entry.epoch != options_.expected.epoch) {",
        "if (entry.epoch < 0) {",
        ("//server/oplog:oplog_test",),
    ),
    Seed(
        "log_epoch_unchecked_on_open",
        "an older server opens the log of a newer one",
        "server/oplog/recovery.cc",
        "if (epoch < highest) return",
        "if (epoch < 0) return",
        ("//server/oplog:oplog_test",),
    ),
    Seed(
        "log_any_bad_record_cuts",
        "damage in what was synced is cut off like a torn tail",
        "server/oplog/recovery.cc",
        "if (scan.torn && (!last || scan.synced)) {",
        "if (scan.torn && !last) {",
        ("//server/oplog:damage_test",),
    ),
    Seed(
        "log_hole_accepted",
        "a log that lacks a segment is opened",
        "server/oplog/recovery.cc",
        "if (i > 0 && segments[i].begin != findings.end) {",
        "if (i > 0 && segments[i].begin < findings.end) {",
        ("//server/oplog:damage_test",),
    ),
    Seed(
        "log_bad_record_skipped",
        "a damaged record is passed over, and the next one taken",
        "server/oplog/segment_reader.cc",
        "if (digest != hash.Digest()) return Found::kInvalid;\n"
        "  offset_ += record->record_bytes();",
        "offset_ += record->record_bytes();\n"
        "  if (digest != hash.Digest()) return Next(record, payload);",
        ("//server/oplog:damage_test",),
    ),
    Seed(
        "log_trailer_ignored",
        "a payload is not compared with its digest",
        "server/oplog/segment_reader.cc",
        "if (digest != hash.Digest()) return",
        "if (digest.empty()) return",
        ("//server/oplog:damage_test",),
    ),
    Seed(
        "log_trailer_optional",
        "a digest that never reached the disk is taken for none",
        "server/oplog/segment_reader.cc",
        "if (digest != hash.Digest()) return",
        "if (digest != hash.Digest() && digest != std::string(16, '\\0')) "
        "return",
        ("//server/oplog:crash_test",),
    ),
    Seed(
        "log_record_valid_anywhere",
        "a client's copy of a record passes for one in another place",
        "server/oplog/format.cc",
        "Crc32c(&offset, sizeof(offset), segment.seed)",
        "segment.seed + 0 * static_cast<uint32_t>(offset)",
        ("//server/oplog:format_test",),
    ),
    Seed(
        "log_watermark_ignored",
        "a log that ends before what was acknowledged is opened",
        "server/oplog/recovery.cc",
        "if (findings.end < std::max(expected.watermark, expected.begin)) {",
        "if (findings.end < expected.begin) {",
        ("//server/oplog:oplog_test",),
    ),
    Seed(
        "log_not_written_again",
        "what a failed sync has forgotten is called durable",
        "server/oplog/recovery.cc",
        "GW_RETURN_IF_ERROR(file->WriteAt(position(at), part));",
        "",
        ("//server/oplog:crash_test",),
    ),
    Seed(
        "log_mending_not_synced",
        "a tail that was cut off comes back",
        "server/oplog/recovery.cc",
        "        GW_RETURN_IF_ERROR(file->WriteAt(position(at), part));\n"
        "      }\n"
        "      GW_RETURN_IF_ERROR(file->Sync());",
        "        GW_RETURN_IF_ERROR(file->WriteAt(position(at), part));\n"
        "      }",
        ("//server/oplog:crash_test",),
    ),
)

METADATA_SEEDS = (
    Seed(
        "epoch_unchecked_in_transactions",
        "a server that has lost its lease changes the database",
        "server/metadata/metadata.cc",
        "highest != epoch_) {",
        "highest < 0) {",
        ("//server/metadata:metadata_test",),
    ),
    Seed(
        "epoch_not_taken",
        "two servers have the same epoch",
        "server/metadata/metadata.cc",
        "UPDATE lease SET epoch = max(epoch, ?) + 1 RETURNING epoch",
        "UPDATE lease SET epoch = max(1, ?) RETURNING epoch",
        ("//server/metadata:metadata_test",),
    ),
    Seed(
        "database_not_synced",
        "a committed watermark may go with the power",
        "server/metadata/database.cc",
        "PRAGMA synchronous=FULL",
        "PRAGMA synchronous=NORMAL",
        ("//server/metadata:metadata_test",),
    ),
    Seed(
        "half_a_transaction",
        "outcomes are kept of a checkpoint that was not",
        "server/metadata/metadata.cc",
        "GW_RETURN_IF_ERROR(write());\n"
        '    return database_->Execute("COMMIT");',
        "const absl::Status written = write();\n"
        '    GW_RETURN_IF_ERROR(database_->Execute("COMMIT"));\n'
        "    return written;",
        ("//server/metadata:metadata_test",),
    ),
    Seed(
        "checkpoint_forgotten_too_soon",
        "of two checkpoints for recovery, the database knows one",
        "server/metadata/metadata.cc",
        '"WHERE job_id = ? AND number < ?"',
        '"WHERE job_id = ? AND number <= ? + 0"',
        ("//server/metadata:metadata_test",),
    ),
)
