# SPDX-License-Identifier: Apache-2.0
"""Jobs whose model is sharded over rank processes, through the client.

One rank is the judge of many: the same logprobs, and gradients and weights
within what sums in another order can differ by.
"""

import os
import random
import signal
import time
import urllib.request

import calls
import gradwire
import numpy as np
import pytest
import torch
from conftest import MODELS, save_model, sequences
from gradwire._proto.gradwire.v1 import jobs_pb2
from processes import Server, ranks_by_number, ranks_of
from safetensors.torch import load_file

LENGTHS = (9, 17, 5, 12, 2, 30, 7, 3, 21)
STEPS = 10
# A rank that waits for a peer gives up after this, one that is silent is hung.
TIMEOUT = 4
# Times that a rank is killed in the middle of work.
KILLS = int(os.environ.get("GRADWIRE_KILLS", "9"))


def loss_of(data, logprobs):
    """Not a plain sum: each position's gradient depends on its logprob."""
    answers = [d.response(lp) for d, lp in zip(data, logprobs, strict=True)]
    terms = [(torch.exp(answer / 4) - answer).sum() for answer in answers]
    loss = sum(terms) / len(terms)
    return loss, {"mean": float(loss.detach())}


def train(client, vocab, steps=STEPS):
    """Built-in and custom steps, accumulated and clipped; what they gave."""
    out = []
    for step in range(steps):
        first = sequences(vocab, LENGTHS, seed=step)
        second = sequences(vocab, (11, 4), seed=100 + step)
        built_in = client.forward_backward(first, "cross_entropy")
        custom = client.forward_backward_custom(second, loss_of)
        update = client.optim_step(
            # Long enough an epsilon: no element's step is the sign of noise.
            gradwire.AdamParams(
                learning_rate=1e-2,
                eps=1.0,
                grad_clip_norm=1.0,
                weight_decay=0.1,
            )
        ).result()
        out.append(
            (
                built_in.result().metrics["loss:sum"],
                custom.result().metrics["mean"],
                update.grad_norm,
                update.clip_factor,
            )
        )
    return out


def weights_of(client, name):
    snapshot = client.save_weights_for_sampler(name, type="base").result()
    return load_file(os.path.join(snapshot.local_path, "model.safetensors"))


def distance(a, b):
    """|a - b| / |b| of all tensors together."""
    off = sum(float((a[k].double() - b[k].double()).square().sum()) for k in b)
    size = sum(float(b[k].double().square().sum()) for k in b)
    return (off / size) ** 0.5


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """More blocks than places for gathered ones."""
    return save_model(
        "llama", tmp_path_factory.mktemp("deep"), num_hidden_layers=5
    )


@pytest.fixture(scope="module")
def judged(server, deep):
    """What one rank makes of the model: logprobs, training, weights."""
    vocab = MODELS["llama"][1]["vocab_size"]
    found = {}
    with gradwire.ServiceClient(address=server.address) as service:
        for precision in ("f32", "bf16"):
            client = service.create_training_client(deep, precision=precision)
            logprobs = client.forward(sequences(vocab, LENGTHS)).result()
            before = weights_of(client, "before")
            out = train(client, vocab)
            found[precision] = (
                logprobs.logprobs,
                out,
                before,
                weights_of(client, "after"),
            )
            service.delete_job(client.job_id)
    return found


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_train_as_one_does(
    new_client, service, deep, judged, world_size, precision
):
    vocab = MODELS["llama"][1]["vocab_size"]
    logprobs, expected, before, after = judged[precision]
    # Sums of the block's dozen results, each rounded on its own way; they add
    # like a random walk over the layers. In f32 the products' terms count too.
    terms = MODELS["llama"][1]["intermediate_size"]
    unit, terms = (2.0**-24, terms) if precision == "f32" else (2.0**-8, 1)
    sigma = unit * (2 * 12 * 12 * terms) ** 0.5
    runs = []
    for _ in range(2):
        client = service.create_training_client(
            deep, precision=precision, world_size=world_size
        )
        profile = service.get_profile(client.job_id)
        assert profile.world_size == world_size
        found = client.forward(sequences(vocab, LENGTHS)).result().logprobs
        for got, want in zip(found, logprobs, strict=True):
            np.testing.assert_allclose(
                got, want, rtol=4 * sigma, atol=4 * sigma
            )
        runs.append((train(client, vocab), weights_of(client, "after")))
        service.delete_job(client.job_id)
    for got, want in zip(runs[0][0], expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=4 * sigma * STEPS**0.5)
    change = {k: after[k].double() - before[k].double() for k in after}
    got = {k: runs[0][1][k].double() - before[k].double() for k in after}
    # The exported weights are rounded once more, to what products compute with.
    size = sum(float(v.double().square().sum()) for v in after.values()) ** 0.5
    moved = sum(float(v.square().sum()) for v in change.values()) ** 0.5
    assert moved > 0
    assert distance(got, change) <= 4 * sigma * STEPS**0.5 + unit * size / moved
    # And bit for bit the same in every run.
    assert runs[0][0] == runs[1][0]
    for key, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][key]), key


@pytest.mark.parametrize(
    "options", [{"keep_gathered": True}, {"replicas": 2}, {"replicas": 4}]
)
def test_other_layouts_train_too(service, deep, judged, options):
    vocab = MODELS["llama"][1]["vocab_size"]
    client = service.create_training_client(
        deep, precision="f32", world_size=4, **options
    )
    got = train(client, vocab, steps=3)
    np.testing.assert_allclose(got, judged["f32"][1][:3], rtol=1e-4)
    service.delete_job(client.job_id)


def test_groups_must_be_of_one_size(service, models):
    with pytest.raises(gradwire.GradwireError) as refused:
        service.create_training_client(
            models["llama"], world_size=4, replicas=3
        )
    assert refused.value.reason == "OPTION_OUT_OF_RANGE"
    assert refused.value.metadata["field"] == "replicas"


@pytest.mark.parametrize("lengths", [(4,), (3, 5), (40, 2, 2, 2, 2, 2)])
def test_few_and_uneven_datums(service, deep, lengths):
    vocab = MODELS["llama"][1]["vocab_size"]
    data = sequences(vocab, lengths, seed=7)
    found = []
    for world_size in (1, 3):
        client = service.create_training_client(
            deep, precision="f32", world_size=world_size
        )
        result = client.forward_backward(data, "cross_entropy").result()
        update = client.optim_step(gradwire.AdamParams()).result()
        found.append((result.logprobs, update.grad_norm))
        assert update.loss_tokens == sum(lengths) - 3 * len(lengths) + sum(
            3 - min(3, n - 1) for n in lengths
        )
        service.delete_job(client.job_id)
    for one, many in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


def test_what_ranks_send_is_told(server, service, deep):
    """A step gathers the weights twice, less what lies there still, and sums
    the gradient once; half of each is another rank's."""
    vocab = MODELS["llama"][1]["vocab_size"]
    client = service.create_training_client(deep, precision="f32", world_size=2)
    data = sequences(vocab, LENGTHS)

    def sent():
        client.forward_backward(data, "cross_entropy")
        client.optim_step(gradwire.AdamParams()).result()
        return service.get_job(client.job_id).collective_use

    before, after = sent(), sent()
    parameters = service.get_profile(client.job_id).num_parameters
    of_a_step = after.bytes_sent - before.bytes_sent
    # Two gathers and a sum, of 4 bytes; at the least one gather and the sum.
    # Padding and what ranks agree on come on top.
    assert 8 * parameters <= of_a_step <= 1.3 * 12 * parameters
    assert after.busy_seconds > before.busy_seconds
    assert after.wait_seconds >= before.wait_seconds
    url = f"http://{server.metrics_address}/metrics"
    text = urllib.request.urlopen(url, timeout=60).read().decode()
    name = "gradwire_collective_bytes_total"
    label = f'{{job_id="{client.job_id}",axis="dp"}}'
    (line,) = (
        line
        for line in text.splitlines()
        if line.startswith(name) and client.job_id in line
    )
    assert line.split("} ")[0] + "}" in (
        name + label,
        f'{name}{{axis="dp",job_id="{client.job_id}"}}',
    )
    assert float(line.split()[-1]) == pytest.approx(after.bytes_sent, rel=1e-6)
    service.delete_job(client.job_id)


@pytest.fixture
def own_server(tmp_path):
    with Server(
        tmp_path,
        f"--rank_timeout_seconds={TIMEOUT}",
        f"--collective_timeout_seconds={TIMEOUT}",
    ) as server:
        yield server


def failed(job):
    return job.state == jobs_pb2.JOB_STATE_FAILED


def assert_no_ranks(server):
    """None is left, or will be in a moment: they have been killed."""
    deadline = time.monotonic() + 5
    while ranks_of(server.process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start_steps(model, vocab, count):
    """Queues steps without waiting for any."""
    parts = calls.batch(sequences(vocab, LENGTHS))
    for step in range(count):
        model.forward_backward(parts, seq=1 + 2 * step)
        model.optim_step(seq=2 + 2 * step, learning_rate=1e-4)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_fails_mid_step_ends_its_group(own_server, deep, how):
    """Each rank, at random points of training; then the job starts again."""
    vocab = MODELS["llama"][1]["vocab_size"]
    randomness = random.Random(5)
    with calls.Stubs(own_server.address) as stubs:
        job = stubs.create_job(
            base_model=str(deep), world_size=3, precision="f32"
        )
        for round_number in range(KILLS if how == signal.SIGKILL else 3):
            rank = round_number % 3
            model = calls.Model(stubs, stubs.attach(job))
            start_steps(model, vocab, 20)
            time.sleep(randomness.uniform(0, 0.2))
            pid = ranks_by_number(own_server.process.pid)[rank]
            began = time.monotonic()
            os.kill(pid, how)
            ended = stubs.watch(job, failed)
            seconds = time.monotonic() - began
            assert seconds < 2 * TIMEOUT + 5
            assert ended.error.metadata["rank"] == str(rank), ended.error
            assert ended.status_reason in (
                ("RANK_EXITED",)
                if how == signal.SIGKILL
                else ("RANK_HUNG", "COLLECTIVE_TIMEOUT")
            )
            assert_no_ranks(own_server)
            stubs.restart_job(job)
            stubs.watch(job, lambda j: j.ready)
        stubs.delete_job(job)
        assert_no_ranks(own_server)
