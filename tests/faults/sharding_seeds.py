# SPDX-License-Identifier: Apache-2.0
"""Bugs of gradients between ranks, which jobs of several ranks must see."""

from seed import Seed

_REPLICATED = ("//sharding/nccl:replicated_nccl_test",)
_RANKS = ("//tests/equivalence:sharded_test",)

SHARDING_SEEDS = (
    Seed(
        "embedding_row_at_the_end_of_a_shard_left_out",
        "of a row that lies on two ranks one half is added",
        "trainer/embedding_rows.cc",
        "for (int e = 0; e < 2; ++e) {",
        "for (int e = 0; e < 1; ++e) {",
        _RANKS,
    ),
    Seed(
        "embedding_rows_of_the_first_rank_only",
        "rows of the other ranks are handed out and not added",
        "trainer/embedding_rows.cc",
        "for (int r = 0; r < world; ++r) {\n    const auto& ids",
        "for (int r = 0; r < 1; ++r) {\n    const auto& ids",
        _RANKS,
    ),
    Seed(
        "embedding_rows_added_last_rank_first",
        "a gradient's sum is in another order than promised",
        "trainer/embedding_rows.cc",
        "for (int r = 0; r < world; ++r) {\n    const auto& ids",
        "for (int r = static_cast<int>(world) - 1; r >= 0; --r) {\n"
        "    const auto& ids",
        _RANKS,
    ),
    Seed(
        "embedding_rows_of_before_stay",
        "the first micro-batch after a step adds to the last step's rows",
        "trainer/embedding_rows.cc",
        "if (!options_.tied && !accumulate) {",
        "if (!options_.tied && accumulate && rank < 0) {",
        _RANKS,
    ),
    Seed(
        "head_rows_sent_before_they_are_made",
        "the last rows of a piece of the head's gradient are made too late",
        "trainer/train_step_head.cc",
        "piece * head_rows_ * hidden < end - first;",
        "(piece + 1) * head_rows_ * hidden < end - first;",
        _RANKS,
    ),
    Seed(
        "final_norm_sent_with_the_head",
        "a piece of the head's gradient takes along what is not made yet",
        "sharding/reduced_gradients.cc",
        "    if (!within) continue;\n",
        "    if (!within && to == from) continue;\n",
        _RANKS,
    ),
    Seed(
        "head_sent_twice",
        "pieces that a visit has sent are sent again after it",
        "sharding/reduced_gradients.cc",
        "    if (buffer.sent[static_cast<size_t>(p)]) continue;\n",
        "",
        _RANKS,
    ),
    Seed(
        "rank_that_fails_in_a_forward_leaves",
        "a rank whose device has failed takes no part in the backward, for "
        "which the others wait",
        "trainer/trainer_forward.cc",
        "if (!head.ok()) return join(head.status());",
        "if (!head.ok()) return head.status();",
        _RANKS,
    ),
    Seed(
        "parts_that_lie_apart_read_as_one_array",
        "of a sum's parts the first alone is where it should be",
        "sharding/gloo/gloo_collectives.cc",
        "return std::min(rank * stride, total);",
        "return std::min(rank * each, total);",
        ("//sharding/gloo:gloo_collectives_test",),
    ),
    Seed(
        "groups_add_before_they_have_summed",
        "replicas on GPUs exchange sums that their own group is still making",
        "sharding/nccl/replicated_nccl.cc",
        "    Follow(*groups_->shards, latest_.shards, lane);\n",
        "",
        _REPLICATED,
    ),
    Seed(
        "addition_not_waited_for",
        "a gradient is read before the sum over replicas was added to it",
        "sharding/nccl/replicated_nccl.cc",
        'cuda.Check(entry.added->HoldUp(cuda.get()), "waiting");',
        "",
        _REPLICATED,
    ),
    Seed(
        "ticket_covers_itself_alone",
        "of collectives before the one that is waited for not all are done",
        "sharding/nccl/replicated_nccl.cc",
        "    latest_.shards = ticket;\n    return Add(latest_);",
        "    latest_.shards = ticket;\n"
        "    return Add({ticket, 0, nullptr, false});",
        _REPLICATED,
    ),
    Seed(
        "other_group_not_told",
        "a failure in a group leaves the replicas waiting for it",
        "sharding/nccl/replicated_nccl.cc",
        "        groups->Abort(status);\n",
        "        (void)groups, (void)status;\n",
        _REPLICATED,
    ),
    Seed(
        "room_taken_before_it_is_free",
        "what the GPU has not copied yet is written over",
        "device/cuda/pinned_ring.cc",
        "if (used == cudaErrorNotReady) return false;",
        "",
        ("//device/cuda:pinned_ring_test",),
    ),
    Seed(
        "errors_name_ranks_of_a_group",
        "of replicas, another rank is blamed than the one that is lost",
        "sharding/gloo/gloo_mesh.h",
        "return names_.empty() ? rank : names_[static_cast<size_t>(rank)];",
        "return rank;",
        ("//sharding/gloo:gloo_collectives_test",),
    ),
)
