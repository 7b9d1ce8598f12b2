# SPDX-License-Identifier: Apache-2.0
"""What a server is at while one of its file calls fails, what its client does
then, and what is asked of the next server."""

import contextlib
import copy
import shutil
import time

import grpc
from fault_promises import (
    FAILED,
    JOB,
    REASONS,
    STEPS,
    Told,
    attach,
    batch,
    create,
    go_on,
    operations,
    outcome,
    query,
    settled,
    train,
)
from file_faults import PATIENCE, STOPPED, Broken, Server, Stubs, calls
from gradwire import GradwireError
from gradwire._proto.gradwire.v1 import (
    checkpoints_pb2,
    jobs_pb2,
    training_pb2,
)
from gradwire.errors import from_rpc

TRIES = 4
DELETED = jobs_pb2.JOB_STATE_DELETED


class Died(Exception):
    """The server has, of its fault."""


class Refused(Exception):
    """Again and again: of a job whose log broke."""


class Client:
    """Makes calls as one would that repeats what was refused."""

    def __init__(self, server, fault, told):
        self.server = server
        self.fault = fault
        self.told = told
        self.stubs = Stubs(server.address)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stubs.channel.close()

    def call(self, make, tries=TRIES):
        for _ in range(tries):
            try:
                return make()
            except grpc.RpcError as error:
                self._check_death(error)
                failure = from_rpc(error)
                infos = calls.error_infos(error)
                if len(infos) != 1 or infos[0].domain != "gradwire":
                    raise Broken(f"no reason was given: {error}") from error
            except GradwireError as error:
                failure = error
            self._check(failure)
        raise Refused from failure

    def _check_death(self, error):
        if self.fault.ends_server:
            self.server.ended()
            raise Died from error

    def _check(self, failure):
        reason = failure.reason
        if reason in ("JOB_FAILED", "JOB_NOT_READY", "HANDLE_FENCED"):
            reason = failure.metadata.get("cause", reason)
        if reason not in REASONS or not self.fault.fired:
            raise Broken(f"refused: {failure.code} {failure}") from failure
        if failure.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            raise Broken(f"no code of a disk: {failure.code}") from failure
        if "disk" not in failure.message:
            raise Broken(f"no word of what to do: {failure}") from failure

    def job(self):
        """Once it is ready, or has failed of the fault."""
        job = self.call(lambda: self.stubs.watch(JOB, settled))
        if job.state == FAILED:
            check_failure(job, self.fault)
            raise Refused
        return job

    def train(self, model, first, last, seq):
        for step in range(first, last):
            for i, operate in enumerate(operations(model, step, seq)):
                done = self.call(lambda call=operate: model.result(call()))
                self.told.outcomes[2 * step + i] = outcome(done)
                self.told.seq = seq + i
            self.told.steps = step + 1
            seq += 2


def check_failure(job, fault):
    reason = job.error.reason
    if (
        reason not in REASONS
        or not fault.fired
        or "disk" not in job.error.message
    ):
        raise Broken(f"the job has failed: {job.error}")


def await_point(state):
    """Until there is a checkpoint for recovery, after whichever step."""
    end = time.monotonic() + PATIENCE
    while not query(state, "SELECT number FROM recovery_points"):
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.01)


class Scenario:
    """`prepare` leaves a state directory once; `suffer` is what the fault
    meets, and `check` asks the next server, which has none."""

    from_the_start = False  # whether the fault may meet the start as well
    program = "gradwired"  # whose calls they are

    def __init__(self, model, folder):
        self.spec = {"base_model": str(model), "precision": "f32"}
        self.state = folder / "state"
        self.state.mkdir(parents=True)
        self.log = folder / "gradwired.log"
        self.prepare()

    def prepare(self):
        with self.server() as (server, _):
            assert server.stop() in STOPPED

    @contextlib.contextmanager
    def server(self):
        with Server(self.state, self.log) as server:
            assert server.serves()
            with Stubs(server.address) as stubs:
                yield server, stubs

    def suffer(self, client):
        """Raises Died or Refused where it cannot go on."""

    def check(self, stubs, told, want):
        """`want`: outcomes of all steps, and the log-probabilities at last."""
        if told.job is not None:
            listed = stubs.jobs.ListJobs(jobs_pb2.ListJobsRequest()).jobs
            if [job.job_id for job in listed] != [JOB]:
                raise Broken(f"an acknowledged job is not there: {listed}")
        job = create(stubs, self.spec)
        if told.job is not None and job.create_time != told.job.create_time:
            raise Broken("another job has the acknowledged one's name")
        go_on(stubs, told, want)


class FirstStart(Scenario):
    """On a directory that does not have anything yet."""

    from_the_start = True

    def prepare(self):
        pass


class Creation(Scenario):
    """A job, a session and a handle."""

    def suffer(self, client):
        told = client.told
        told.job = client.call(lambda: create(client.stubs, self.spec))
        client.job()
        told.session = client.call(client.stubs.new_session)
        reply = client.call(lambda: attach(client.stubs, told.session))
        told.model_id = reply.model_id

    def check(self, stubs, told, want):
        super().check(stubs, told, want)
        if told.model_id and told.session:
            again = attach(stubs, told.session)
            if again.model_id != told.model_id:
                raise Broken("a handle that was told is not there")


class CreationOnce(Scenario):
    """A job, which is not asked for again if it was refused."""

    def suffer(self, client):
        client.told.job = client.call(
            lambda: create(client.stubs, self.spec), tries=1
        )


class Trained(Scenario):
    """Begins with a job that was trained for some steps."""

    steps = 3

    def prepare(self):
        with self.server() as (server, stubs):
            self.told = Told(job=create(stubs, self.spec), steps=self.steps)
            assert stubs.watch(JOB, settled).ready
            self.told.session = stubs.new_session()
            self.told.model_id = attach(stubs, self.told.session).model_id
            model = calls.Model(stubs, self.told.model_id)
            train(model, 0, self.steps, 1)
            self.told.seq = 2 * self.steps
            await_point(self.state)
            self.end(server, stubs, model)

    def end(self, server, stubs, model):
        assert server.stop() in STOPPED

    def suffer(self, client):
        vars(client.told).update(vars(copy.deepcopy(self.told)))


class Training(Trained):
    """Steps, with a checkpoint for recovery, and what that lets go of."""

    def suffer(self, client):
        super().suffer(client)
        model = calls.Model(client.stubs, self.told.model_id)
        client.train(model, self.steps, STEPS, 2 * self.steps + 1)


class TakeOver(Trained):
    """By a second client. If it is refused, the first one goes on."""

    def suffer(self, client):
        super().suffer(client)
        told = client.told
        session = client.call(client.stubs.new_session)
        try:
            reply = client.call(lambda: attach(client.stubs, session), tries=1)
        except Died:
            # It will say so again, if it got that far.
            told.session, told.model_id, told.seq = session, "", 0
            raise
        except Refused:
            model = calls.Model(client.stubs, told.model_id)
            client.train(model, self.steps, self.steps + 1, told.seq + 1)
        else:
            told.session, told.model_id, told.seq = session, reply.model_id, 0
            told.first = reply.optimizer_step


class Recovery(Trained):
    """After a kill: a checkpoint, a log behind it whose end is torn, and what
    a deletion and a save had left when they were interrupted."""

    from_the_start = True

    def end(self, server, stubs, model):
        gone = "gone"
        stubs.create_job(gone, **self.spec)
        shutil.copytree(self.state / "jobs" / gone, self.state.parent / gone)
        stubs.delete_job(gone)
        # Pending: gradients that no step has used.
        model.result(model.forward_backward(batch(self.steps), seq=7))
        self.told.seq = 7
        server.process.kill()
        server.ended()
        jobs = self.state / "jobs"
        shutil.copytree(
            self.state.parent / gone, jobs / gone, dirs_exist_ok=True
        )
        (point,) = (jobs / JOB / "recovery").iterdir()
        shutil.copytree(point, point.with_name("7"))
        with open(max((jobs / JOB / "log").iterdir()), "ab") as segment:
            segment.write(b"torn")

    def suffer(self, client):
        super().suffer(client)
        client.job()
        model = calls.Model(client.stubs, self.told.model_id)
        client.train(model, self.steps, self.steps + 1, 7)


class Deletion(Trained):
    """Of a job with a log, and with a checkpoint for recovery."""

    def suffer(self, client):
        super().suffer(client)
        told = client.told
        client.call(lambda: client.stubs.delete_job(JOB))
        told.deleted = True

    def check(self, stubs, told, want):
        request = jobs_pb2.GetJobRequest(job_id=JOB)
        gone = stubs.jobs.GetJob(request).state == DELETED
        if told.deleted and not gone:
            raise Broken("a deletion that was told is not there")
        if not gone:
            go_on(stubs, told, want)
        stubs.delete_job(JOB)
        if stubs.jobs.ListJobs(jobs_pb2.ListJobsRequest()).jobs:
            raise Broken("a job was deleted and is listed")
        try:
            create(stubs, self.spec)
        except grpc.RpcError as error:
            if from_rpc(error).reason == "JOB_ID_TOMBSTONED":
                return
        raise Broken("a deleted job's name can be taken")


class Saves(Trained):
    """Of checkpoints, one over another, and of snapshots, which a rank writes
    after it has recovered."""

    program = "gradwire_rank"
    steps = STEPS

    def suffer(self, client):
        super().suffer(client)
        told = client.told
        told.saved = {}
        client.job()
        model = calls.Model(client.stubs, told.model_id)
        state, snapshot = model.save_state, model.save_snapshot
        for save, name, options in (
            (state, "one", {}),
            (snapshot, "base", {"kind": training_pb2.SNAPSHOT_KIND_BASE}),
            (snapshot, "delta", {"kind": training_pb2.SNAPSHOT_KIND_DELTA}),
            (state, "one", {"overwrite": True, "user_metadata": {"is": "2"}}),
            (state, "two", {}),
        ):
            if name == "delta" and not any("/base" in p for p in told.saved):
                continue  # for want of a parent
            told.seq += 1
            ref = save(name, seq=told.seq, **options)
            # One that has failed has failed for good.
            with contextlib.suppress(Refused):
                done = client.call(lambda ref=ref: model.result(ref), tries=1)
                result = getattr(done, done.WhichOneof("result"))
                told.saved[result.path] = result

    def check(self, stubs, told, want):
        super().check(stubs, told, want)
        catalogue = stubs.checkpoints
        request = checkpoints_pb2.ListCheckpointsRequest(job_id=JOB)
        listed = {}
        for row in catalogue.ListCheckpoints(request).checkpoints:
            path = checkpoints_pb2.CheckpointRequest(path=row.path)
            listed[row.path] = catalogue.VerifyCheckpoint(path)
        for path, result in told.saved.items():
            if path not in listed:
                raise Broken(f"{path} was told and is not there")
            row = listed[path]
            # Of what may have been replaced since, it is one of the two.
            replaced = row.user_metadata and path.endswith("/one")
            if row.kind == "training" and row.digest != result.digest:
                if not replaced:
                    raise Broken(f"{path} is not what was told")
            elif row.weight_id != getattr(result, "weight_id", ""):
                raise Broken(f"{path} has other weights than were told")


SCENARIOS = {
    "first_start": FirstStart,
    "recovery": Recovery,
    "create": Creation,
    "create_once": CreationOnce,
    "delete": Deletion,
    "take_over": TakeOver,
    "train": Training,
    "save": Saves,
}
