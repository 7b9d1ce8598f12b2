# SPDX-License-Identifier: Apache-2.0
"""Bugs that would cost somebody a step, a result or a checkpoint, one change
each, and the tests that must see them. seeded_bugs.py plants them in turn."""

from call_seeds import CLIENT_SEEDS, QUEUE_SEEDS
from checkpoint_seeds import CHECKPOINT_SEEDS, SNAPSHOT_SEEDS
from fence_seeds import FENCE_SEEDS
from job_seeds import JOB_SEEDS
from kernel_seeds import KERNEL_SEEDS
from log_seeds import METADATA_SEEDS, OPLOG_SEEDS
from replace_seeds import REPLACE_SEEDS
from sharding_seeds import SHARDING_SEEDS
from store_seeds import REMOTE_SEEDS, WHOLE_SERVER_SEEDS

SEEDS = (
    *OPLOG_SEEDS,
    *CHECKPOINT_SEEDS,
    *SNAPSHOT_SEEDS,
    *METADATA_SEEDS,
    *QUEUE_SEEDS,
    *JOB_SEEDS,
    *CLIENT_SEEDS,
    *REMOTE_SEEDS,
    *WHOLE_SERVER_SEEDS,
    *KERNEL_SEEDS,
    *SHARDING_SEEDS,
    *REPLACE_SEEDS,
    *FENCE_SEEDS,
)
