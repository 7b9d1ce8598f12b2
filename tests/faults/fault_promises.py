# SPDX-License-Identifier: Apache-2.0
"""What a server has promised its client, and whether the next one keeps it."""

import contextlib
import dataclasses
import sqlite3

import numpy as np
from file_faults import Broken, calls
from gradwire import Datum
from gradwire._proto.gradwire.v1 import jobs_pb2, training_pb2

JOB = "job"
STEPS = 6
VOCAB = 97
# What a failing disk may be called.
REASONS = {"STORAGE_FULL", "STORAGE_IO"}
FAILED = jobs_pb2.JOB_STATE_FAILED
# server/metadata/metadata.h
DELETED_ROW = 2


@dataclasses.dataclass
class Told:
    """What the server has acknowledged to its client."""

    job: jobs_pb2.Job = None
    deleted: bool = False
    session: str = ""
    model_id: str = ""
    first: int = 0  # step of this handle
    seq: int = 0  # the last one of this handle
    steps: int = 0  # of the job
    # By their place among those of all steps.
    outcomes: dict = dataclasses.field(default_factory=dict)


def batch(step):
    rng = np.random.default_rng(step)
    return calls.batch(
        [
            Datum.from_tokens(rng.integers(VOCAB, size=n))
            for n in rng.integers(3, 12, size=2)
        ]
    )


def operations(model, step, seq):
    """The calls of a step, the first of which has the number `seq`."""
    return (
        lambda: model.forward_backward(batch(step), seq=seq),
        lambda: model.optim_step(seq=seq + 1, learning_rate=0.01 / (1 + step)),
    )


def outcome(operation):
    """Its result, in a form in which equal means equal in every bit."""
    kind = operation.WhichOneof("result")
    result = getattr(operation, kind)
    return kind, result.SerializeToString(deterministic=True)


def train(model, first, last, seq):
    """The outcomes."""
    sent = [
        operate()
        for step in range(first, last)
        for operate in operations(model, step, seq + 2 * (step - first))
    ]
    return [outcome(model.result(ref)) for ref in sent]


def logprobs_now(model):
    ref = model.forward(batch(STEPS))
    return [x.tobytes() for x in model.logprobs(ref, 2)]


def settled(job):
    return job.ready or job.state == FAILED


def create(stubs, spec):
    return stubs.jobs.CreateJob(
        jobs_pb2.CreateJobRequest(job_id=JOB, spec=jobs_pb2.JobSpec(**spec))
    )


def go_on(stubs, told, want):
    """Trains to the end, with what was told still there."""
    results, logprobs = want
    for at, told_then in told.outcomes.items():
        if results[at] != told_then:
            raise Broken(f"operation {at} had another result: {told_then}")
    job = stubs.watch(JOB, settled)
    model = calls.Model(stubs, told.model_id)
    if job.state == FAILED:
        # Its log broke, and that was recorded. Examined, it can go on.
        if job.error.reason not in REASONS:
            raise Broken(f"the job has failed: {job.error}")
        stubs.restart_job(JOB)
        job = stubs.watch(JOB, settled)
        # All handles were fenced.
        model.model_id = ""
        told.session = ""
    if not job.ready:
        raise Broken(f"the job does not come back: {job}")
    recovery = job.last_recovery
    if recovery.replayed_ops and (
        recovery.fidelity != jobs_pb2.REPLAY_FIDELITY_BIT_IDENTICAL
    ):
        raise Broken(f"it came back as another: {recovery}")
    if job.optimizer_step < told.steps:
        raise Broken(f"{told.steps} steps were told, {job.optimizer_step} are")
    if model.model_id:
        if model.due() <= told.seq:
            raise Broken(f"number {told.seq} was told, {model.due()} is due")
        first = told.first
    else:
        reply = attach(stubs, told.session or stubs.new_session())
        model.model_id = reply.model_id
        first = reply.optimizer_step
        if first < told.steps:
            raise Broken(f"{told.steps} steps were told, {first} are")
    # What there is already, is told again.
    if train(model, first, STEPS, 1) != results[2 * first :]:
        raise Broken("results differ")
    if logprobs_now(model) != logprobs:
        raise Broken("weights differ")


def attach(stubs, session):
    return stubs.training.CreateModel(
        training_pb2.CreateModelRequest(
            session_id=session, model_seq_id=1, job_id=JOB, take_over=True
        )
    )


def query(state, sql):
    with contextlib.closing(sqlite3.connect(state / "gradwire.db")) as database:
        return database.execute(sql).fetchall()


def check_jobs(state):
    """What must be in order as soon as the next server serves."""
    jobs = dict(query(state, f"SELECT job_id, state = {DELETED_ROW} FROM jobs"))
    for table in ("handles", "operations", "recovery_points"):
        for (job,) in query(state, f"SELECT job_id FROM {table}"):
            if jobs.get(job, True):
                raise Broken(f"{table} has rows of {job}, which is gone")
    for job in (state / "jobs").iterdir():
        if job.name not in jobs:
            raise Broken(f"{job.name} is the directory of no job")
        for left in (job / "log", job / "recovery"):
            if jobs[job.name] and left.exists():
                raise Broken(f"{left} of a deleted job is left")


def check_files(state):
    """And once it has come and gone."""
    check_jobs(state)
    ((whole,),) = query(state, "PRAGMA integrity_check")
    if whole != "ok":
        raise Broken(f"the database is damaged: {whole}")
    known = set(query(state, "SELECT job_id, number FROM recovery_points"))
    for point in (state / "jobs").glob("*/recovery/[0-9]*"):
        if (point.parts[-3], int(point.name)) not in known:
            raise Broken(f"{point} is no checkpoint that is known")
    for path in state.rglob("*"):
        if "pending" in path.name or "tmp" in path.name:
            raise Broken(f"{path} is left")
