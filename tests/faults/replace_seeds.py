# SPDX-License-Identifier: Apache-2.0
"""Bugs of checkpoints that take the place of others, of what is loaded, and of
jobs that begin with one."""

from seed import Seed

REPLACE = "//checkpoint:state_replace_test"
REMOTE = "//checkpoint/remote:remote_checkpoints_test"
OVERWRITE = "tests/e2e/test_overwrite.py"
INIT = "tests/e2e/test_init_from.py"
REPLAY = "tests/e2e/test_replay.py"
STORAGE = "tests/e2e/test_object_storage.py"
NEEDED = f"{STORAGE}::test_what_a_delta_in_the_store_needs_stays_there"

REPLACE_SEEDS = (
    Seed(
        "replaced_before_it_is_synced",
        "a power loss brings back what has lost its files",
        "checkpoint/pending_state.cc",
        "  pending_.clear();\n"
        "  GW_RETURN_IF_ERROR(files_->SyncDirectory(parent));",
        "  pending_.clear();",
        (REPLACE,),
    ),
    Seed(
        "replaced_leftover_not_synced",
        "a save clears away what a power loss brings back",
        "checkpoint/pending_state.cc",
        "    GW_RETURN_IF_ERROR(files.SyncDirectory(DirectoryOf(directory)));\n"
        "    GW_RETURN_IF_ERROR(RemoveIfThere(files, pending));",
        "    GW_RETURN_IF_ERROR(RemoveIfThere(files, pending));",
        (REPLACE,),
    ),
    Seed(
        "replaced_not_put_back",
        "between two steps of a replacement, both are lost",
        "checkpoint/pending_state.cc",
        "if (!name.starts_with('.') || !name.ends_with(kAsideEnd)) continue;",
        'if (name != "") continue;',
        (REPLACE,),
    ),
    Seed(
        "expired_after_it_was_replaced",
        "what takes the place of an expired checkpoint is deleted for it",
        "checkpoint/pending_state.cc",
        "if (!holds(from)) {",
        "if (!holds(from) && false) {",
        ("//checkpoint:state_remove_test",),
    ),
    Seed(
        "opened_while_replaced",
        "a reader has the manifest of one checkpoint and tables of another",
        "checkpoint/state_reader.cc",
        "if (tries < kMostReplacements && !reader->manifest_digest_.empty()) {",
        "if (tries > kMostReplacements) {",
        (REPLACE,),
    ),
    Seed(
        "read_while_replaced",
        "a reader takes another checkpoint's elements for damage",
        "checkpoint/state_reader.cc",
        "  if (!there) {\n    return ErrorBuilder(absl::StatusCode::kAborted",
        "  if (!there && rank < 0) {\n"
        "    return ErrorBuilder(absl::StatusCode::kAborted",
        (REPLACE,),
    ),
    Seed(
        "linked_while_replaced",
        "what is kept of a load is of two checkpoints",
        "checkpoint/link_state.cc",
        "return there == here ? Linked::kAll : Linked::kReplaced;",
        "return there == here ? Linked::kAll : Linked::kAll;",
        (REPLACE,),
    ),
    Seed(
        "always_overwritten",
        "a save takes the place of another one unasked",
        "server/training_service.cc",
        "save.set_replaces(request->overwrite());",
        "save.set_replaces(true);",
        (f"{OVERWRITE}::test_the_newest_has_the_name",),
    ),
    Seed(
        "replaced_before_others_are_recorded",
        "an operation that is run again finds another checkpoint",
        "server/job_rank.cc",
        "if (MayEndSave(*save)) return EndSave(*save);",
        "if (save->end.has_value()) return EndSave(*save);",
        (f"{REPLAY}::test_what_is_replaced_is_of_no_more_use",),
    ),
    Seed(
        "save_after_who_took_over",
        "an interrupted save is of the state that another handle made",
        "server/job_recovery.cc",
        "std::pair(save->handle, save->seq) > std::pair(op->handle, op->seq)",
        "save->handle != op->handle || save->seq > op->seq",
        (f"{REPLAY}::test_a_save_of_who_was_taken_over_is_of_its_place",),
    ),
    Seed(
        "log_without_a_checkpoint",
        "a long log lets go what there is no checkpoint of",
        "server/job_points.cc",
        "if (op->outcome_at >= 0 && op->outcome_at < replay_from) continue;",
        "if (op->outcome_at < std::max(from, replay_from)) continue;",
        (f"{REPLAY}::test_the_log_keeps_what_no_checkpoint_has",),
    ),
    Seed(
        "save_before_the_log",
        "a power loss leaves a checkpoint that the log knows nothing of",
        "server/job_rank.cc",
        "if (next.request.command.has_end_save()) {",
        "if (next.request.command.has_end_save() && next.load) {",
        (
            f"{REPLAY}::test_what_appears_on_the_disk_is_known_after_a_power"
            "_loss",
        ),
    ),
    Seed(
        "load_not_kept",
        "what was loaded is gone with its name",
        "server/job_rank.cc",
        "if (op->loads) next.kept_at = KeptAt(*op);",
        "",
        (f"{OVERWRITE}::test_what_was_loaded_is_loaded_again",),
    ),
    Seed(
        "kept_load_not_used",
        "a replay loads what has the name by then",
        "server/job_loads.cc",
        "if (files.Stat(kept).ok()) load.set_directory(kept);",
        "",
        (f"{OVERWRITE}::test_what_was_loaded_is_loaded_again",),
    ),
    Seed(
        "kept_load_removed",
        "the next server removes what it has to load",
        "server/job_loads.cc",
        "for (const OperationPtr& op : history_) add(*op);",
        "",
        (f"{OVERWRITE}::test_what_was_loaded_is_loaded_again",),
    ),
    Seed(
        "kept_load_stays",
        "what was loaded takes its space for ever",
        "server/job_loads.cc",
        "if (in_use.count(each) > 0) continue;",
        "if (in_use.count(each) == 0) continue;",
        (f"{OVERWRITE}::test_what_was_loaded_is_loaded_again",),
    ),
    Seed(
        "ranks_load_two_checkpoints",
        "ranks load shards of two checkpoints",
        "trainer/trainer_state.cc",
        "if (sums[i] == own[i] * world()) continue;",
        "if (sums[i] == own[i] * world() || world() > 1) continue;",
        ("//tests/equivalence:state_test",),
    ),
    Seed(
        "begun_again",
        "a script that is started again finds its training undone",
        "server/job_handles.cc",
        "return !handle.attached && !handle.request.init_from().ref().empty();",
        "return !handle.request.init_from().ref().empty();",
        (f"{INIT}::test_attaching_again_finds_what_has_become_of_it",),
    ),
    Seed(
        "begun_otherwise",
        "a job is taken for one that began with another checkpoint",
        "server/job_handles.cc",
        "if (!other && had.optimizer() == init.optimizer()) return "
        "absl::OkStatus();",
        "return absl::OkStatus();",
        (f"{INIT}::test_a_job_that_has_begun_does_not_begin_again",),
    ),
    Seed(
        "beginning_not_replayed",
        "after a restart of the server, a job is back at its base model",
        "server/job_recovery.cc",
        "if (handle.ok()) next.request = "
        "std::move(ResetOf(**handle)->request);",
        "",
        (f"{INIT}::test_the_next_server_begins_as_this_one_did",),
    ),
    Seed(
        "beginning_let_go",
        "once the log is long, a frozen reference is back at its base model",
        "server/job_restore.cc",
        "    history_.push_front(begins);\n",
        "",
        (f"{REPLAY}::test_the_log_may_let_the_beginning_go",),
    ),
    Seed(
        "failed_beginning_counts",
        "a job whose checkpoint could not be loaded can begin with none",
        "server/job_handles.cc",
        "if (has_ended && reset->final_state != v1::OPERATION_STATE_DONE) "
        "continue;",
        "",
        (f"{INIT}::test_what_cannot_be_loaded_makes_no_model",),
    ),
    Seed(
        "copy_not_replaced",
        "the store keeps a checkpoint that was replaced",
        "server/remote_store.cc",
        "    saved_.insert(ref.path());\n    stored_.erase(ref.path());\n",
        "    saved_.insert(ref.path());\n",
        (f"{STORAGE}::test_what_is_replaced_here_is_replaced_there",),
    ),
    Seed(
        "copy_of_two",
        "a copy is committed that is half of another checkpoint",
        "checkpoint/remote/remote_checkpoints.cc",
        "    GW_RETURN_IF_ERROR(source.check());\n",
        "",
        (REMOTE,),
    ),
    Seed(
        "copy_committed_late",
        "a commit that is taken after its time names files that are gone",
        "checkpoint/remote/remote_checkpoints.cc",
        "if (!is_there && (is_another || is_final)) DeleteFiles(key, commit);",
        "if (!is_there || is_final) DeleteFiles(key, commit);",
        (REMOTE,),
    ),
    Seed(
        "copy_replaced_by_an_older_life",
        "a state directory from a backup replaces what came after it",
        "checkpoint/remote/remote_checkpoints.cc",
        'return commit.folder.starts_with(server_ + "-") && '
        "commit.epoch <= epoch_;",
        'return commit.folder.starts_with(server_ + "-");',
        (REMOTE,),
    ),
    Seed(
        "parent_of_a_copied_delta_expires",
        "a copy of a base goes when it has expired, whatever needs it",
        "server/remote_store.cc",
        "  GW_RETURN_IF_ERROR(alone);\n  return RemoveCopy(",
        "  return RemoveCopy(",
        (NEEDED,),
    ),
    Seed(
        "expired_results_cannot_be_run_again",
        "the shapes of datums go with the results, though a rank that dies "
        "needs them",
        "server/job_operations.cc",
        "if (has(history_) || has(unreferenced_)) return false;",
        "if (!has(history_) && has(unreferenced_)) return false;",
        (
            "tests/e2e/test_recovery.py::"
            "test_steps_whose_results_have_expired_are_run_again",
        ),
    ),
)
