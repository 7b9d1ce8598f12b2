# SPDX-License-Identifier: Apache-2.0
"""Jobs whose weights begin with a checkpoint."""

import pathlib

import calls
import gradwire
import pytest
from few_steps import DATA, train
from gradwire._proto.gradwire.v1 import (
    checkpoints_pb2,
    jobs_pb2,
    training_pb2,
)
from processes import Server

BIT_IDENTICAL = jobs_pb2.REPLAY_FIDELITY_BIT_IDENTICAL


def logprobs(client):
    return [x.tobytes() for x in client.forward(DATA).result().logprobs]


@pytest.fixture
def trained(new_client):
    """A client after two steps, and the checkpoint that it saved then."""
    client = new_client("llama")
    train(client, 2)
    return client, client.save_state("two").result().path


@pytest.fixture
def begin(service):
    """begin(job_id=None, **options): a client of a job that begins so."""
    jobs = set()

    def create(base_model=None, **options):
        client = service.create_training_client(
            base_model, precision="f32", **options
        )
        jobs.add(client.job_id)
        return client

    yield create
    for job in jobs:
        service.delete_job(job)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_job_begins_with_a_checkpoint(
    new_client, service, begin, world_size, with_optimizer
):
    first = new_client("llama", world_size=world_size)
    train(first, 2)
    path = first.save_state("two").result().path
    want = logprobs(first)
    client = begin(
        init_from=path, with_optimizer=with_optimizer, world_size=world_size
    )
    info = client.info()
    assert info.optimizer_step == (2 if with_optimizer else 0)
    assert info.weight_version == 2
    # The base model is the checkpoint's.
    assert service.get_job(client.job_id).spec.base_model == (
        service.get_job(first.job_id).spec.base_model
    )
    assert logprobs(client) == want
    if not with_optimizer:
        first.load_state(path).result()
    assert train(client, 2) == train(first, 2)


def test_a_beginning_that_is_refused_leaves_no_job(trained, service):
    client, path = trained
    before = {job.job_id for job in service.list_jobs()}
    for options, reason in (
        ({"init_from": f"jobs/{client.job_id}/checkpoints/none"}, None),
        ({"mode": "base_only"}, "UNSUPPORTED_OPTION"),
        ({"lora": {"alpha": 8}}, "UNSUPPORTED_OPTION"),
        ({"user_metadata": {"epoch": 1}}, "BAD_ARGUMENT"),
        ({"world_size": "two"}, "BAD_ARGUMENT"),
    ):
        with pytest.raises(gradwire.GradwireError) as caught:
            service.create_training_client(
                client.info().base_model, precision="f32", **options
            )
        assert caught.value.reason == (reason or "CHECKPOINT_NOT_FOUND")
        assert {job.job_id for job in service.list_jobs()} == before
    # One that has a name may be somebody's.
    with pytest.raises(gradwire.GradwireError):
        service.create_training_client(
            client.info().base_model, job_id=client.job_id, mode="base_only"
        )
    assert service.get_job(client.job_id).ready
    # What save_state has returned is as good as its path.
    saved = client.save_state("three").result()
    assert client.load_state(saved).result().path == saved.path


def test_attaching_again_finds_what_has_become_of_it(trained, begin):
    _, path = trained
    client = begin(init_from=path, job_id="continued")
    train(client, 3)
    want = logprobs(client)
    # As a script does that is started again.
    again = begin(init_from=path, job_id="continued", take_over=True)
    assert again.info().optimizer_step == 3
    assert logprobs(again) == want
    # With or without saying how it began; not with something else.
    model = again.info().base_model
    assert begin(model, job_id="continued", take_over=True)
    for options, field in (
        ({"init_from": path.replace("two", "three")}, "init_from.ref"),
        (
            {"init_from": path, "with_optimizer": True},
            "init_from.optimizer",
        ),
    ):
        with pytest.raises(gradwire.GradwireError) as caught:
            begin(model, job_id="continued", take_over=True, **options)
        assert caught.value.reason == "MODEL_CONFIG_MISMATCH"
        assert caught.value.metadata["field"] == field
    # The same under another name.
    alias = path.replace("gradwire://", "")
    assert begin(model, job_id="continued", take_over=True, init_from=alias)


def test_attaching_needs_no_checkpoint(trained, service, begin):
    """It may have been deleted since, with the job that made it."""
    first, path = trained
    client = begin(init_from=path, job_id="without")
    want = train(client)
    service.delete_checkpoint(path)
    again = begin(init_from=path, job_id="without", take_over=True)
    assert again.info().optimizer_step == len(want)


def test_a_job_that_has_begun_does_not_begin_again(trained, new_client, begin):
    _, path = trained
    other = new_client("llama")
    train(other)
    want = logprobs(other)
    with pytest.raises(gradwire.GradwireError) as caught:
        begin(
            other.info().base_model,
            job_id=other.job_id,
            init_from=path,
            take_over=True,
        )
    assert caught.value.reason == "MODEL_CONFIG_MISMATCH"
    assert caught.value.metadata["limit"] == "base model"
    # Its client was not fenced for that.
    assert logprobs(other) == want


def test_what_cannot_be_loaded_makes_no_model(
    trained, new_client, service, begin
):
    first, path = trained
    model = first.info().base_model
    qwen = new_client("qwen3").save_state("zero").result().path
    snapshot = first.save_weights_for_sampler("served").result().path
    damaged = first.save_state("damaged").result()
    data = pathlib.Path(damaged.local_path) / "rank-00000.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    for init_from, want in (
        (path.replace("two", "none"), "CHECKPOINT_NOT_FOUND"),
        ("two", "CHECKPOINT_NOT_FOUND"),
        ("jobs/..", "INVALID_NAME"),
        ("", "INVALID_NAME"),
        (snapshot, "CHECKPOINT_KIND_MISMATCH"),
        (qwen, "CHECKPOINT_INCOMPATIBLE"),
        (damaged.path, "CHECKPOINT_CORRUPT"),
    ):
        with pytest.raises(gradwire.GradwireError) as caught:
            begin(model, job_id="late", init_from=init_from)
        assert caught.value.reason == want, init_from
    # The job is as new.
    client = begin(model, job_id="late", init_from=path)
    assert client.info().weight_version == 2
    assert logprobs(client) == logprobs(first)
    with pytest.raises(gradwire.GradwireError) as caught:
        begin(None)
    assert caught.value.metadata["field"] == "base_model"
    with pytest.raises(gradwire.GradwireError) as caught:
        begin(model, with_optimizer=True)
    assert caught.value.metadata["field"] == "with_optimizer"


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_reference_that_does_not_change(
    new_client, service, precision, world_size
):
    policy = new_client("llama", precision=precision)
    train(policy, 2)
    path = policy.save_state("sft").result().path
    want = policy.forward(DATA).result().logprobs
    reference = service.create_training_client(
        None,
        mode="forward_only",
        init_from=path,
        precision=precision,
        world_size=world_size,
    )
    before = logprobs(reference)
    got = reference.forward(DATA).result().logprobs
    for one, other in zip(got, want, strict=True):
        # Of several ranks, by the order of their sums.
        tolerance = 0 if world_size == 1 else 1e-5
        assert abs(one - other).max() <= tolerance
    train(policy, 2)
    assert logprobs(reference) == before
    for call in (
        lambda: reference.load_state(path),
        lambda: reference.forward_backward(DATA, "cross_entropy"),
    ):
        with pytest.raises(gradwire.GradwireError) as caught:
            call().result(60)
        assert caught.value.reason == "MODEL_FORWARD_ONLY"
    service.delete_job(reference.job_id)
    with pytest.raises(gradwire.GradwireError) as caught:
        service.create_training_client(
            None,
            job_id=f"frozen-{precision}-{world_size}",
            mode="forward_only",
            init_from=path,
            with_optimizer=True,
        )
    assert caught.value.reason == "UNSUPPORTED_OPTION"
    assert caught.value.metadata["field"] == "init_from.optimizer"
    service.delete_job(f"frozen-{precision}-{world_size}")


def test_a_frozen_model_is_a_job_of_its_own(stubs, models, trained):
    """Not a handle of one whose weights are trained."""
    _, path = trained
    job = stubs.create_job(base_model=str(models["llama"]), precision="f32")
    request = training_pb2.CreateModelRequest(
        session_id=stubs.new_session(),
        model_seq_id=1,
        job_id=job,
        mode=training_pb2.MODEL_MODE_FORWARD_ONLY,
        init_from=training_pb2.InitFrom(ref=path),
    )
    found = calls.create_refusal(stubs, request)
    assert found.reason == "MODEL_CONFIG_MISMATCH"
    assert found.metadata["field"] == "mode"
    stubs.delete_job(job)


def test_a_repeated_request_begins_once(stubs, models, trained):
    first, path = trained
    job = stubs.create_job(base_model=str(models["llama"]), precision="f32")
    request = training_pb2.CreateModelRequest(
        session_id=stubs.new_session(),
        model_seq_id=1,
        job_id=job,
        init_from=training_pb2.InitFrom(ref=path, optimizer=True),
    )
    created = stubs.training.CreateModel(request)
    assert not created.attached
    assert (created.weight_version, created.optimizer_step) == (2, 2)
    model = calls.Model(stubs, created.model_id)
    model.result(model.forward_backward(calls.batch(DATA)))
    model.result(model.optim_step())
    assert stubs.training.CreateModel(request) == created
    assert model.info().weight_version == 3
    stubs.delete_job(job)


def served(model):
    ref = model.forward(calls.batch(DATA))
    return [x.tobytes() for x in model.logprobs(ref, len(DATA))]


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("deleted", [False, True])
def test_the_next_server_begins_as_this_one_did(
    models, tmp_path, forward_only, deleted
):
    """Though the checkpoint has gone."""
    recovery = tmp_path / "jobs" / "late" / "recovery"
    flags = ("--max_recoveries=5",)
    mode = training_pb2.MODEL_MODE_FORWARD_ONLY if forward_only else 0
    spec = {"base_model": str(models["llama"]), "precision": "f32"}
    with (
        Server(tmp_path, *flags) as server,
        calls.Stubs(server.address) as stubs,
    ):
        stubs.create_job("early", **spec)
        early = calls.Model(stubs, stubs.attach("early"))
        early.result(early.forward_backward(calls.batch(DATA)))
        early.result(early.optim_step(learning_rate=0.01))
        path = early.result(early.save_state("one")).save_state.path
        stubs.create_job("late", forward_only=forward_only, **spec)
        # So that all of it is run again.
        recovery.write_text("")
        request = training_pb2.CreateModelRequest(
            session_id=stubs.new_session(),
            model_seq_id=1,
            job_id="late",
            mode=mode,
            init_from=training_pb2.InitFrom(ref=path),
        )
        created = stubs.training.CreateModel(request)
        model = calls.Model(stubs, created.model_id)
        if not forward_only:
            model.result(model.forward_backward(calls.batch(DATA)))
            model.result(model.optim_step(learning_rate=0.01))
        want = served(model)
        if deleted:
            stubs.checkpoints.DeleteCheckpoint(
                checkpoints_pb2.CheckpointRequest(path=path)
            )
        server.process.kill()
        server.process.wait()
    recovery.unlink()
    for _ in range(2):
        with (
            Server(tmp_path, *flags) as server,
            calls.Stubs(server.address) as stubs,
        ):
            job = stubs.watch(
                "late", lambda job: job.ready or job.HasField("error")
            )
            assert job.last_recovery.fidelity == BIT_IDENTICAL, job.error
            model = calls.Model(stubs, created.model_id)
            assert served(model) == want
            assert stubs.training.CreateModel(request) == created
            # It has begun.
            other = training_pb2.CreateModelRequest()
            other.CopyFrom(request)
            other.model_seq_id = 2
            other.init_from.ref = path.replace("one", "two")
            found = calls.create_refusal(stubs, other)
            assert found.reason == "MODEL_CONFIG_MISMATCH"
            server.process.kill()
            server.process.wait()


def test_a_beginning_that_failed_is_none_for_the_next_server(models, tmp_path):
    spec = {"base_model": str(models["llama"]), "precision": "f32"}
    with Server(tmp_path) as server, calls.Stubs(server.address) as stubs:
        stubs.create_job("early", **spec)
        early = calls.Model(stubs, stubs.attach("early"))
        saved = early.result(early.save_state("one")).save_state
        good = early.result(early.save_state("two")).save_state
        data = pathlib.Path(saved.local_path) / "rank-00000.data"
        data.write_bytes(bytes(data.stat().st_size))
        stubs.create_job("late", **spec)
        request = training_pb2.CreateModelRequest(
            session_id=stubs.new_session(),
            model_seq_id=1,
            job_id="late",
            init_from=training_pb2.InitFrom(ref=saved.path),
        )
        found = calls.create_refusal(stubs, request)
        assert found.reason == "CHECKPOINT_CORRUPT"
        server.process.kill()
        server.process.wait()
    with Server(tmp_path) as server, calls.Stubs(server.address) as stubs:
        stubs.watch("late", lambda job: job.ready)
        assert calls.create_refusal(stubs, request).reason == found.reason
        request.model_seq_id = 2
        request.init_from.ref = good.path
        created = stubs.training.CreateModel(request)
        assert not created.attached
        model = calls.Model(stubs, created.model_id)
        model.result(model.zero_grad())
