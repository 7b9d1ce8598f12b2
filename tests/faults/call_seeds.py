# SPDX-License-Identifier: Apache-2.0
"""Bugs of the queue, and of the client."""

from seed import Seed

BAD_INPUT = "tests/e2e/test_bad_input.py"
AWAY = "client/python/tests/test_server_away.py"

QUEUE_SEEDS = (
    Seed(
        "numbers_before_a_gap_are_durable",
        "what is not on the disk is said to be, as what follows it is",
        "server/op_queue.cc",
        "it->first != seq + 1 || !passes(*it->second)",
        "!passes(*it->second)",
        ("//server:states_test",),
    ),
    Seed(
        "seq_without_an_end",
        "a number behind which there is none is taken",
        "server/op_queue.cc",
        "if (seq < 1 || seq > kMaxSeq) {",
        "if (seq < 1) {",
        ("//server:states_test",),
    ),
    Seed(
        "dedup_off",
        "a repetition is an operation of its own",
        "server/op_queue.cc",
        "if (OperationPtr earlier = Find(op->seq); earlier != nullptr) {",
        "if (OperationPtr earlier = Find(op->seq);\n"
        "      earlier != nullptr && earlier->digest != op->digest) {",
        ("//server:states_test",),
    ),
    Seed(
        "gap_accepted",
        "an operation runs before those that come first",
        "server/op_queue.cc",
        "auto it = waiting_.find(next_seq_);",
        "auto it = waiting_.begin();",
        ("//server:states_test",),
    ),
    Seed(
        "run_before_logged",
        "an operation runs before it is in the log",
        "server/op_queue.cc",
        "if (it == waiting_.end() || it->second->logging) return nullptr;",
        "if (it == waiting_.end()) return nullptr;",
        ("//server:states_test",),
    ),
    Seed(
        "closed_number_taken",
        "a number that was given up is run late",
        "server/op_queue.cc",
        "if (seq < next_seq_ && all_.count(seq) == 0) {",
        "if (seq < 0) {",
        ("//server:states_test",),
    ),
    Seed(
        "commit_record_optional",
        "a batch that broke off is trained on",
        "server/batch_upload.cc",
        "absl::Status DatumUpload::Commit(const v1::CommitRecord& commit) {\n"
        "  GW_RETURN_IF_ERROR(digest_.Check(commit));",
        "absl::Status DatumUpload::Commit(const v1::CommitRecord& commit) {",
        (f"{BAD_INPUT}::test_a_commit_record_must_match_its_batch",),
    ),
    Seed(
        "nan_accepted",
        "a NaN of the client reaches the gradient",
        "server/decode_datum.cc",
        "if (finite.ok() && !std::isfinite(value)) {",
        "if (finite.ok() && value != value && value == value) {",
        ("//server:decode_datum_test",),
    ),
    Seed(
        "nan_applied",
        "a gradient that is not finite is applied",
        "trainer/optimizer.cc",
        "if (!std::isfinite(norm)) {",
        "if (norm < 0) {",
        (f"{BAD_INPUT}::test_a_gradient_that_overflows_changes_nothing",),
    ),
)

CLIENT_SEEDS = (
    Seed(
        "client_gives_no_number_back",
        "what follows a refused number waits for it",
        "client/python/gradwire/handle.py",
        "        for seq in abandoned:\n            self._fill(seq)\n",
        "",
        (AWAY,),
    ),
    Seed(
        "client_forgets_gradients",
        "gradients of a step that failed are not announced",
        "client/python/gradwire/handle.py",
        "                        window.go_on(following)\n",
        "                        pass\n",
        (AWAY,),
    ),
    Seed(
        "client_counts_a_failure_where_it_was",
        "what fails after its window's end has failed is counted still",
        "client/python/gradwire/window.py",
        "        while window._goes_on is not None:\n"
        "            window = window._goes_on\n",
        "",
        (AWAY,),
    ),
    Seed(
        "client_closes_at_once",
        "calls that are under way at the end are lost",
        "client/python/gradwire/training_client.py",
        "        if wait:\n            self.settle()\n",
        "",
        (AWAY,),
    ),
    Seed(
        "client_forgets_what_was_answered",
        "a request is let go that is not on the server's disk",
        "client/python/gradwire/handle.py",
        "through = operation.durable_through_seq\n",
        "through = operation.seq_id\n",
        (AWAY,),
    ),
    Seed(
        "client_keeps_nothing",
        "what a power loss has undone cannot be sent again",
        "client/python/gradwire/handle.py",
        "ended(keep=True)",
        "ended(keep=False)",
        (AWAY,),
    ),
    Seed(
        "client_lets_half_a_step_go",
        "of a custom step, the forward's number is enough",
        "client/python/gradwire/unsynced.py",
        "if first + request.width - 1 <= seq:",
        "if first <= seq:",
        (AWAY,),
    ),
    Seed(
        "client_leaves_the_first_out",
        "the request that the server misses is not sent again",
        "client/python/gradwire/unsynced.py",
        "if first + request.width > seq",
        "if first > seq",
        (AWAY,),
    ),
    Seed(
        "client_does_not_look_for_losses",
        "after an outage, nothing is sent again",
        "client/python/gradwire/handle.py",
        "self._outages = outages\n            if self._sending_again:",
        "return\n            if self._sending_again:",
        (AWAY,),
    ),
    Seed(
        "client_waits_behind_a_gap",
        "a loss that nobody noticed is waited for",
        "client/python/gradwire/handle.py",
        "hold = _MOMENT_SECONDS\n                self._send_lost()",
        "hold = _MOMENT_SECONDS",
        (f"{AWAY}::test_a_gap_shows_a_loss_that_nobody_noticed",),
    ),
    Seed(
        "client_repeats_a_recorded_failure",
        "an operation that has failed is tried again",
        "client/python/gradwire/patience.py",
        "    if error.final:\n        return False\n",
        "",
        (f"{AWAY}::test_a_recorded_failure_is_not_repeated",),
    ),
    Seed(
        "client_computes_the_loss_twice",
        "a connection that breaks gives another gradient",
        "client/python/gradwire/custom_stream.py",
        "if self._loss is not None or self._raised is not None:",
        "if self._raised is not None:",
        (f"{AWAY}::test_the_loss_is_computed_once",),
    ),
    Seed(
        "client_gives_up",
        "a call that meets no server is not made again",
        "client/python/gradwire/patience.py",
        "        is_away(error)\n        or error.code",
        "        error.code",
        (AWAY,),
    ),
)
