# SPDX-License-Identifier: Apache-2.0
"""A server whose ranks compute with the kernels of GPUs, on the emulator."""

import json
import os
import signal
import subprocess
import urllib.request

import gradwire
import oracle
import pytest
import torch
from conftest import MODELS, sequences
from gradwire._proto.gradwire.v1 import jobs_pb2
from gradwire.local_server import find_server
from processes import Server, ranks_of

EMULATED = "gradwire_rank_emulated"


@pytest.fixture(scope="module")
def emulated(binaries):
    """The flags of a server on the emulator."""
    rank = binaries / EMULATED
    if not rank.exists():
        pytest.skip(f"{EMULATED} was not built: there is no CUDA toolkit")
    return ["--device=cuda", f"--rank_binary={rank}"]


def data_of(model, lengths=(9, 17, 5, 12, 2)):
    return sequences(MODELS[model][1]["vocab_size"], lengths)


def train(client, data, steps):
    """Bits and metrics of each step, with a loss of ours in between."""
    out = []
    for step in range(steps):
        if step % 2:
            result = client.forward_backward_custom(data, squares).result()
            told = (result.loss,)
        else:
            result = client.forward_backward(data, "cross_entropy").result()
            told = [x.tobytes() for x in result.logprobs]
        done = client.optim_step(gradwire.AdamParams(learning_rate=0.01))
        out.append((told, done.result().grad_norm))
    return out


def squares(data, logprobs):
    loss = sum((lp.exp() - 0.5).square().sum() for lp in logprobs)
    return loss, {}


def create(service, models, name, **options):
    return service.create_training_client(models[name], **options)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_logprobs_and_gradients_are_those_of_transformers(
    emulated, models, tmp_path, name, precision
):
    data = data_of(name)
    with (
        Server(tmp_path, *emulated) as server,
        gradwire.ServiceClient(address=server.address) as service,
    ):
        client = create(service, models, name, precision=precision)
        assert service.get_job(client.job_id).device.startswith("cuda sm_")
        result = client.forward_backward(data, "cross_entropy").result()
        snapshot = oracle.descend(client)
        judge = oracle.load(models[name])

        def compute(model):
            found = {
                str(i): oracle.logprobs(model, datum)
                for i, datum in enumerate(data)
            }
            loss = -sum(
                (lp * torch.as_tensor(d.loss_fn_inputs["weights"])).sum()
                for lp, d in zip(found.values(), data, strict=True)
            )
            gradients = oracle.gradients(model, loss)
            return {k: v.detach() for k, v in (found | gradients).items()}

        exact, tolerance = oracle.with_tolerance(judge, compute, precision)
        for i, logprobs in enumerate(result.logprobs):
            assert not oracle.worst(logprobs, exact[str(i)], tolerance[str(i)])
        if precision == "bf16":
            return  # the export rounds what the step has made
        found, rounding = oracle.descended(judge, snapshot)
        names = list(found)
        assert not oracle.worst_of(
            found,
            {n: exact[n] for n in names},
            {n: tolerance[n] + rounding[n] for n in names},
        )


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_rank_that_is_killed_goes_on_with_the_same_bits(
    emulated, models, tmp_path, precision
):
    data = data_of("qwen3")
    flags = [*emulated, "--auto_checkpoint_steps=2", "--max_recoveries=3"]
    with (
        Server(tmp_path, *flags) as server,
        gradwire.ServiceClient(address=server.address) as service,
    ):
        undisturbed = create(service, models, "qwen3", precision=precision)
        want = train(undisturbed, data, 6)
        service.delete_job(undisturbed.job_id)
        client = create(service, models, "qwen3", precision=precision)
        assert train(client, data, 4) == want[:4]
        path = client.save_state("four").result().path
        (rank,) = ranks_of(server.process.pid)
        os.kill(rank, signal.SIGKILL)
        assert train(client, data, 2) == want[4:]
        assert service.get_job(client.job_id).last_recovery.optimizer_step == 4
        client.load_state_with_optimizer(path).result()
        assert train(client, data, 2) == want[4:]


def test_the_algorithms_of_products_outlast_the_server(
    emulated, models, tmp_path, monkeypatch
):
    """They decide bits: what is run again has those of the first run, though
    cuBLASLt would choose others by now."""
    data = data_of("qwen3")
    more = data_of("qwen3", (31, 3, 8))

    def run(client):
        return train(client, data, 2) + train(client, more, 2)

    def choose(parts):
        monkeypatch.setenv("GRADWIRE_EMULATED_GEMM_PARTS", str(parts))

    wanted = []
    for parts in (1, 2):
        choose(parts)
        with (
            Server(tmp_path / f"undisturbed-{parts}", *emulated) as server,
            gradwire.ServiceClient(address=server.address) as service,
        ):
            client = create(service, models, "qwen3", precision="f32")
            wanted.append(run(client) + run(client))
    want, others = wanted
    assert want != others
    choose(1)
    with (
        Server(tmp_path / "disturbed", *emulated) as server,
        gradwire.ServiceClient(address=server.address) as service,
    ):
        client = create(service, models, "qwen3", precision="f32", job_id="it")
        assert run(client) == want[:4]
        server.process.kill()
    choose(2)
    with (
        Server(tmp_path / "disturbed", *emulated) as server,
        gradwire.ServiceClient(address=server.address) as service,
    ):
        client = create(
            service,
            models,
            "qwen3",
            precision="f32",
            job_id="it",
            take_over=True,
        )
        assert run(client) == want[4:]
        recovery = service.get_job("it").last_recovery
        assert recovery.fidelity == jobs_pb2.REPLAY_FIDELITY_BIT_IDENTICAL
        # What begins now is not bound.
        late = create(service, models, "qwen3", precision="f32")
        assert run(late) == others[:4]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("first", ["cuda", "cpu"])
def test_a_job_goes_on_on_another_device(
    emulated, models, tmp_path, precision, first
):
    """What was done is done again there, as near as roundings allow; and a
    checkpoint is of any device."""
    data = data_of("qwen3")
    # The CPU's rank is the other program beside the server.
    flags = {"cuda": emulated, "cpu": ["--device=cpu"]}
    then = {"cuda": "cpu", "cpu": "cuda"}[first]
    with (
        Server(tmp_path, *flags[first]) as server,
        gradwire.ServiceClient(address=server.address) as service,
    ):
        client = create(
            service, models, "qwen3", precision=precision, job_id="it"
        )
        train(client, data, 3)
        saved = client.save_state("three").result()
        want = train(client, data, 1)
        server.process.kill()
    with (
        Server(tmp_path, *flags[then]) as server,
        gradwire.ServiceClient(address=server.address) as service,
    ):
        client = create(
            service,
            models,
            "qwen3",
            precision=precision,
            job_id="it",
            take_over=True,
        )
        assert client.info().optimizer_step == 4
        job = service.get_job("it")
        assert job.device.startswith(then)
        assert (
            job.last_recovery.fidelity
            == jobs_pb2.REPLAY_FIDELITY_WITHIN_TOLERANCE
        )
        client.load_state_with_optimizer(saved.path).result()
        assert client.info().optimizer_step == 3
        got = train(client, data, 1)
        relative = 1e-4 if precision == "f32" else 0.1
        assert got[0][1] == pytest.approx(want[0][1], rel=relative)


def test_a_snapshot_is_of_what_was_trained(emulated, models, tmp_path):
    data = data_of("llama")
    with (
        Server(tmp_path, *emulated) as server,
        gradwire.ServiceClient(address=server.address) as service,
    ):
        client = create(service, models, "llama", precision="f32")
        client.save_weights_for_sampler("base", type="base").result()
        train(client, data, 2)
        delta = client.save_weights_for_sampler("next", type="delta").result()
        assert service.verify_checkpoint(delta.path).weight_id
        full = client.save_weights_for_sampler("full", type="base").result()
        served = client.forward(data).result().logprobs
        judge = oracle.load(full.local_path)
        exact, tolerance = oracle.with_tolerance(
            judge,
            lambda model: {
                str(i): oracle.logprobs(model, datum).detach()
                for i, datum in enumerate(data)
            },
        )
        for i, logprobs in enumerate(served):
            assert not oracle.worst(logprobs, exact[str(i)], tolerance[str(i)])


def test_bf16_is_what_gpus_compute_in(emulated, models, tmp_path):
    rank = emulated[1].removeprefix("--rank_binary=")
    said = json.loads(
        subprocess.run(
            [rank, "--describe", "--device=cuda:0"],
            capture_output=True,
            check=True,
        ).stdout
    )
    assert said["device"] == "cuda sm_90, 4 multiprocessors"
    assert said["default_precision"] == "bf16"
    with (
        Server(tmp_path, *emulated) as server,
        gradwire.ServiceClient(address=server.address) as service,
    ):
        client = create(service, models, "llama")
        assert client.info().precision == "bf16"
        with urllib.request.urlopen(
            f"http://{server.metrics_address}/metrics"
        ) as page:
            assert 'device="cuda",job_id' in page.read().decode()
        assert service.get_server_info().device == said["device"]


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda", "built without CUDA"),
        ("tpu", 'is "tpu"; use cpu or cuda'),
        ("cuda:1", 'is "cuda:1"; use cpu or cuda'),
    ],
)
def test_a_device_that_is_not_there_is_refused_at_the_start(
    tmp_path, binaries, device, said
):
    done = subprocess.run(
        [
            find_server(),
            f"--state_dir={tmp_path}",
            "--listen=127.0.0.1:0",
            "--metrics_listen=127.0.0.1:0",
            f"--device={device}",
            f"--rank_binary={binaries / 'gradwire_rank'}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
