# SPDX-License-Identifier: Apache-2.0
"""Bugs of the lease, and of what the database says of checkpoints."""

from seed import Seed

FENCE = "//checkpoint:fence_test"
METADATA = "//server/metadata:metadata_test"
FENCING = "tests/e2e/test_fencing.py"
SNAPSHOTS = "tests/e2e/test_snapshots.py"
TTL = f"{SNAPSHOTS}::test_when_something_expires_can_be_changed"
REPLAY = "tests/e2e/test_replay.py"
STORAGE = "tests/e2e/test_object_storage.py"

FENCE_SEEDS = (
    Seed(
        "epoch_unchecked_on_publish",
        "who has lost the lease publishes and deletes all the same",
        "checkpoint/fence.cc",
        "return highest <= epoch ? absl::OkStatus() :",
        "return epoch > 0 ? absl::OkStatus() :",
        (FENCE, FENCING),
    ),
    Seed(
        "epoch_unknown_to_ranks",
        "a rank publishes for a server that was taken over",
        "server/rank_load.cc",
        "  options.files = files_.get();\n",
        "",
        (FENCING,),
    ),
    Seed(
        "epoch_not_synced",
        "a power loss gives the lease back to who had it before",
        "checkpoint/fence.cc",
        "  GW_RETURN_IF_ERROR(files.SyncDirectory(directory));\n"
        "  GW_RETURN_IF_ERROR(CheckEpoch",
        "  GW_RETURN_IF_ERROR(CheckEpoch",
        (FENCE,),
    ),
    Seed(
        "checkpoint_older_than_its_predecessor",
        "after the clock went back, a job is resumed from an older checkpoint",
        "server/metadata/metadata_checkpoints.cc",
        "std::max(row.created_microseconds, newest.Int(0) + 1);",
        "std::max(row.created_microseconds, int64_t{0});",
        (METADATA,),
    ),
    Seed(
        "fetched_as_new",
        "what is fetched is the newest of its job",
        "server/remote_requests.cc",
        "                                          commit->created_micros));",
        "                                          int64_t{9} << 50));",
        (STORAGE,),
    ),
    Seed(
        "changed_ttl_ignored",
        "what was to stay is deleted",
        "server/checkpoint_catalogue.cc",
        "  FillKnownTimes(known, row);\n}\n\nabsl::Status "
        "CheckpointCatalogue::ListStatesOf(",
        "  (void)known;\n}\n\nabsl::Status CheckpointCatalogue::ListStatesOf(",
        (TTL,),
    ),
    Seed(
        "removal_forgotten",
        "copies of what has expired stay in the store for ever",
        "server/remote_store.cc",
        '  TakeRemovals("");\n',
        "",
        (STORAGE,),
    ),
    Seed(
        "replaced_copy_comes_back",
        "the copy of what was replaced outlives what has replaced it",
        "server/metadata/metadata_checkpoints.cc",
        "if (!remember_replaced_ || !replaced) return absl::OkStatus();",
        "if (!remember_replaced_ || replaced || !replaced) "
        "return absl::OkStatus();",
        (
            f"{STORAGE}::test_what_was_replaced_does_not_come_back_when_its_"
            "successor_expires[False]",
        ),
    ),
    Seed(
        "stored_while_it_is_removed",
        "files of a copy go with those of the one that had its name",
        "server/remote_store.cc",
        "return end_ || removing_ != ref.path(); });\n    storing_ =",
        "return end_ || true; });\n    storing_ =",
        (f"{STORAGE}::test_a_name_is_not_stored_while_what_had_it_is_removed",),
    ),
    Seed(
        "removed_while_it_is_stored",
        "a copy without some of its files is taken for whole",
        "server/remote_requests.cc",
        "begins = storing_ != ref.path();",
        "begins = true;",
        (
            f"{STORAGE}::test_what_is_removed_while_it_is_stored_is_no_half_"
            "copy",
        ),
    ),
    Seed(
        "copy_of_another_server_removed",
        "a copy goes before there is another one, and with its server",
        "server/remote_store.cc",
        "if (there.ok() && !ref.snapshot && commit.ok() && "
        "commit->has_value()) {",
        "if (there.ok() && !ref.snapshot && commit.ok() && "
        "commit->has_value() && remote_.IsOwn(**commit)) {",
        (
            f"{STORAGE}::test_what_another_server_stored_is_not_replaced_by_"
            "what_replaces_it_here",
        ),
    ),
    Seed(
        "save_before_a_gap_is_closed",
        "a save that ran when the server died ends with numbers behind it",
        "server/job_restore.cc",
        "(op->ran || op->closed_below > 0)",
        "op->ran",
        (
            f"{REPLAY}::test_a_save_before_numbers_that_were_closed_is_made_"
            "again",
        ),
    ),
    Seed(
        "log_of_who_was_taken_over_is_read",
        "what a server appends that had lost its lease breaks the log",
        "server/oplog/recovery.cc",
        "             taken_over ? segments[i + 1].begin : INT64_MAX));",
        "             taken_over ? INT64_MAX : INT64_MAX));",
        (FENCING,),
    ),
    Seed(
        "reserve_kept",
        "on a full disk, what has run is not told",
        "server/job_journal.cc",
        "    if (environment_->reserve->Release()) continue;\n",
        "",
        ("tests/e2e/test_replay.py::test_a_full_disk_only_makes_it_longer",),
    ),
    Seed(
        "reserve_not_made_again",
        "on a full disk, what cannot be told is begun",
        "server/job_operations.cc",
        "      absl::IsResourceExhausted(room) ? room : Log(op);",
        "      absl::IsAborted(room) ? room : Log(op);",
        ("tests/e2e/test_replay.py::test_a_full_disk_only_makes_it_longer",),
    ),
    Seed(
        "equal_checkpoint_keeps_its_time",
        "what is saved again goes when the one before would have",
        "server/catalogue_times.cc",
        "  return metadata_->AddCheckpoint(known);",
        "  return metadata_->LearnCheckpoint(known);",
        ("tests/e2e/test_overwrite.py::test_pages_go_on_where_they_were",),
    ),
)
