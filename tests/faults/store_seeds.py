# SPDX-License-Identifier: Apache-2.0
"""Bugs of object storage, and of a whole server."""

from seed import Seed

RECOVERY = "tests/e2e/test_recovery.py"
INDEX = "tests/faults/test_fault_index.py::test_nothing_that_was_told_is_lost"
REMOTE = "//checkpoint/remote:remote_checkpoints_test"

REMOTE_SEEDS = (
    Seed(
        "copy_committed_first",
        "a copy is seen before its files are there",
        "checkpoint/remote/remote_checkpoints.cc",
        "  const auto store = [&]() -> absl::Status {\n",
        "  const auto store = [&]() -> absl::Status {\n"
        "    GW_RETURN_IF_ERROR(\n"
        '        store_.PutNew(key + kCommit, R"({})"));\n',
        (REMOTE,),
    ),
    Seed(
        "copy_digest_ignored",
        "what comes back is not what was stored",
        "checkpoint/remote/remote_checkpoints.cc",
        "if (*sha256 != file.sha256) {",
        "if (false) {",
        (REMOTE,),
    ),
    Seed(
        "fetched_file_not_synced",
        "what was fetched may go with the power",
        "checkpoint/remote/remote_checkpoints.cc",
        "    GW_RETURN_IF_ERROR(out->Sync());\n",
        "",
        (REMOTE,),
    ),
    Seed(
        "fetched_directory_not_synced",
        "files of what was fetched may go with the power",
        "checkpoint/remote/remote_checkpoints.cc",
        "return files_.SyncDirectory(into);",
        "return absl::OkStatus();",
        (REMOTE,),
    ),
    Seed(
        "fetched_name_not_synced",
        "what was fetched may go with the power, name and all",
        "checkpoint/remote/remote_checkpoints.cc",
        "  return files_.SyncDirectory(parent);\n",
        "  return absl::OkStatus();\n",
        (REMOTE,),
    ),
    Seed(
        "copy_names_a_way_out",
        "a copy writes outside of its directory",
        "checkpoint/remote/remote_checkpoints.cc",
        "if (!one.Done() || !IsFileName(file.name) ||",
        "if (!one.Done() ||",
        (REMOTE,),
    ),
    Seed(
        "sweep_takes_what_others_begin",
        "a server removes what another is storing",
        "checkpoint/remote/remote_checkpoints.cc",
        'if (!folder.starts_with(server_ + "-")) return false;',
        "if (folder.size() <= server_.size()) return false;",
        (REMOTE,),
    ),
    Seed(
        "sweep_takes_what_is_committed",
        "the next life of a server removes its copies",
        "checkpoint/remote/remote_checkpoints.cc",
        "if (commit.has_value() && commit->folder == folder) continue;",
        "",
        (REMOTE,),
    ),
    Seed(
        "another_copy_taken_for_this",
        "a checkpoint is called stored that is another server's",
        "checkpoint/remote/remote_checkpoints.cc",
        "if (there.digest == source.digest) return there;",
        "return there;",
        (REMOTE,),
    ),
    Seed(
        "copy_replaces_another",
        "a copy is written over one that was committed",
        "checkpoint/remote/s3_object_store.cc",
        '.headers = {{"If-None-Match", "*"}},',
        ".headers = {},",
        (
            "tests/e2e/test_object_storage.py::"
            "test_two_that_commit_at_once_are_told_apart",
        ),
    ),
    Seed(
        "body_not_in_the_signature",
        "a request that was changed on its way is taken",
        "checkpoint/remote/s3_request.cc",
        "(request.body.empty() ? kEmptySha256 : Sha256::Of(request.body)));",
        "std::string(kEmptySha256));",
        ("tests/e2e/test_object_storage.py",),
    ),
    Seed(
        "any_authority_may_vouch_for_the_store",
        "weights go to whoever has some certificate",
        "checkpoint/remote/s3_request.cc",
        "CURLOPT_CAINFO, options_.ca_file.c_str());",
        "CURLOPT_SSL_VERIFYPEER, 0L);",
        ("tests/e2e/test_object_storage.py::test_a_store_behind_tls",),
    ),
    Seed(
        "session_token_is_not_sent",
        "keys that were lent are refused",
        "checkpoint/remote/s3_request.cc",
        "if (!options_.session_token.empty()) {",
        "if (false) {",
        ("tests/e2e/test_object_storage.py::test_keys_for_a_session",),
    ),
    Seed(
        "delta_stored_before_its_parent",
        "a delta is seen whose chain is not there",
        "server/remote_store.cc",
        "if (!is_stored) GW_RETURN_IF_ERROR(Store(parent));",
        "(void)is_stored;",
        ("tests/e2e/test_object_storage.py",),
    ),
    Seed(
        "parent_goes_before_its_delta",
        "a copy is removed that another one needs",
        "server/remote_requests.cc",
        "  GW_RETURN_IF_ERROR(CheckNoChild(ref));\n"
        "  auto row = catalogue_.Delete(ref);",
        "  auto row = catalogue_.Delete(ref);",
        ("tests/e2e/test_object_storage.py",),
    ),
)

_RECORD_DELETION = (
    "  GW_RETURN_IF_ERROR(\n      environment_->metadata"
    '->SetJobState(id_, JobRow::kDeleted, ""));\n'
)
_END_DELETED = "  Apply({JobEvent::kDelete});\n"
WHOLE_SERVER_SEEDS = (
    Seed(
        "deletion_told_without_a_record",
        "a deleted job lives again after a restart, without its log",
        "server/job.cc",
        _RECORD_DELETION,
        "",
        (f"{INDEX}[delete-full]",),
    ),
    Seed(
        "deletion_recorded_last",
        "a deletion that is interrupted leaves a job without its log",
        "server/job.cc",
        _RECORD_DELETION + _END_DELETED,
        _END_DELETED + "  RemoveDurableState();\n" + _RECORD_DELETION,
        (f"{INDEX}[delete-kill]",),
    ),
    Seed(
        "deletion_not_finished",
        "files of a job whose deletion was interrupted stay for ever",
        "server/job_restore.cc",
        "    RemoveDurableState();\n    return;",
        "    return;",
        (f"{INDEX}[delete-kill]",),
    ),
    Seed(
        "creation_leaves_a_directory",
        "a job that could not be created leaves a directory of no job",
        "server/job.cc",
        "    RemoveDurableState();\n    environment_->metadata->ForgetJob",
        "    environment_->metadata->ForgetJob",
        (f"{INDEX}[create_once-error]",),
    ),
    Seed(
        "handle_known_before_its_beginning",
        "a handle that was refused takes over at the next start",
        "server/job_handles.cc",
        "  GW_ASSIGN_OR_RETURN(handle->reset->logged_at, Log(handle->reset));\n"
        "  GW_RETURN_IF_ERROR(environment_->metadata->AddHandle(id_, row));",
        "  GW_RETURN_IF_ERROR(environment_->metadata->AddHandle(id_, row));\n"
        "  GW_ASSIGN_OR_RETURN(handle->reset->logged_at, Log(handle->reset));",
        (f"{INDEX}[take_over-full]",),
    ),
    Seed(
        "handle_without_a_beginning",
        "a repeated CreateModel ends the server",
        "server/job_handles.cc",
        "if (reset == nullptr || (handle->fenced && !reset->Ended())) ",
        "if (handle->fenced && !reset->Ended()) ",
        (
            f"{RECOVERY}::test_of_a_handle_that_the_log_does_not_know_nothing"
            "_is_waited_for",
        ),
    ),
    Seed(
        "unread_called_damaged",
        "an I/O error is answered with the advice to restore a backup",
        "server/metadata/database.cc",
        "if (error == EIO) return true;",
        "(void)error;",
        (f"{INDEX}[create-no_input]",),
    ),
    Seed(
        "port_file_left",
        "what a killed server had begun to tell stays for ever",
        "server/state_dir.cc",
        'path + ".pending";',
        'path + ".pending." + std::to_string(getpid());',
        (f"{INDEX}[first_start-kill]",),
    ),
)
