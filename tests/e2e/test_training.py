# SPDX-License-Identifier: Apache-2.0
"""A real server and a tiny model, through the public client alone."""

import os
import pathlib
import signal

import pytest

gradwire = pytest.importorskip("gradwire")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not hasattr(gradwire, "LocalServer"):
    pytest.skip("the client is not installed", allow_module_level=True)
from gradwire.local_server import find_server  # noqa: E402
from gradwire.quickstart import evaluate  # noqa: E402

try:
    _RANK = find_server().with_name("gradwire_rank")
except gradwire.GradwireError as error:
    pytest.skip(error.message, allow_module_level=True)
if not _RANK.exists() and not _RANK.with_name("gradwire-rank").exists():
    pytest.skip(
        "gradwire_rank was not found beside gradwired; run `bazel build "
        "//server:gradwire_rank`",
        allow_module_level=True,
    )

VOCAB = 97


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server():
    with gradwire.LocalServer(threads=1) as running:
        yield running


@pytest.fixture
def service(server):
    with gradwire.ServiceClient(address=server.address) as client:
        yield client


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(2)
    return [
        gradwire.Datum.from_tokens(
            torch.randint(VOCAB, (length,), generator=generator),
            prompt_length=3,
        )
        for length in (9, 17, 5, 12)
    ]


@pytest.fixture
def new_client(service, base):
    jobs = []

    def create(precision="f32", **options):
        client = service.create_training_client(
            base, precision=precision, **options
        )
        jobs.append(client.job_id)
        return client

    yield create
    for job in jobs:
        service.delete_job(job)


def squares(data, logprobs):
    """Not linear in the log-probabilities."""
    terms = [d.response(lp) for d, lp in zip(data, logprobs, strict=True)]
    return sum(t.sum() ** 2 for t in terms), {}


def signed_weights(data, gradients):
    return [
        gradwire.Datum(
            d.model_input,
            {
                "target_tokens": d.loss_fn_inputs["target_tokens"],
                "weights": -gradient,
            },
        )
        for d, gradient in zip(data, gradients, strict=True)
    ]


def test_logprobs_are_those_of_transformers(new_client, base, data):
    served = new_client().forward(data).result().logprobs
    assert evaluate.agreement(base, data, served, "f32").ok


def test_exported_weights_are_those_that_were_trained(new_client, data):
    client = new_client()
    before = client.forward(data).result().logprobs
    for _ in range(3):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(gradwire.AdamParams(learning_rate=1e-2))
    snapshot = client.save_weights_for_sampler("trained").result()
    after = client.forward(data).result().logprobs
    client.check()
    path = pathlib.Path(snapshot.local_path)
    assert evaluate.agreement(path, data, after, "f32").ok
    assert not evaluate.agreement(path, data, before, "f32").ok


def test_custom_loss_equals_its_two_call_form(new_client, data):
    custom = new_client()
    step = custom.forward_backward_custom(data, squares)
    custom.optim_step()
    one = custom.save_weights_for_sampler("one").result()
    assert not step.result().recomputed

    classic = new_client()
    leaves = [
        torch.tensor(lp, requires_grad=True)
        for lp in classic.forward(data).result().logprobs
    ]
    loss, _ = squares(data, leaves)
    loss.backward()
    batch = signed_weights(data, [leaf.grad for leaf in leaves])
    classic.forward_backward(batch, "cross_entropy")
    classic.optim_step()
    two = classic.save_weights_for_sampler("two").result()
    assert step.result().loss == loss.item()
    assert one.digest == two.digest


def test_depth_does_not_change_results(new_client, data):
    def digest(wait):
        client = new_client()
        for step in range(8):
            parts = [
                client.forward_backward(data[step % 4 :], "cross_entropy"),
                client.optim_step(),
            ]
            if wait:
                for part in parts:
                    part.result()
        return client.save_weights_for_sampler("end").result().digest

    assert digest(wait=True) == digest(wait=False)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_moments_in_bf16_learn_in_half_the_memory(
    new_client, service, data, precision
):
    def run(**options):
        client = new_client(precision, **options)
        losses = []
        for _ in range(8):
            step = client.forward_backward(data, "cross_entropy").result()
            losses.append(step.metrics["loss:sum"])
            client.optim_step(gradwire.AdamParams(beta2=0.999)).result()
        assert losses == sorted(losses, reverse=True)
        digest = client.save_weights_for_sampler("end").result().digest
        return client, digest

    client, digest = run(moment_precision="bf16")
    _, again = run(moment_precision="bf16")
    whole, other = run()
    assert digest == again, "the same calls give the same bits"
    assert digest != other, "nothing was rounded"
    assert client.info().moment_precision == "bf16"
    assert client.info().profile.moment_precision == "bf16"
    assert whole.info().moment_precision == "f32"
    plans = [service.get_job(c.job_id).memory for c in (client, whole)]
    least = 4 * client.info().profile.num_parameters
    assert least <= plans[0].optimizer < 1.1 * least
    assert 2 * least <= plans[1].optimizer < 1.1 * 2 * least


def test_another_moment_precision_is_refused_before_there_is_a_job(
    service, base
):
    jobs = service.list_jobs(show_deleted=True)
    with pytest.raises(gradwire.UserError) as caught:
        service.create_training_client(base, moment_precision="fp8")
    assert caught.value.reason == "PRECISION_UNKNOWN"
    assert caught.value.metadata["field"] == "moment_precision"
    assert caught.value.metadata["value"] == "fp8"
    assert caught.value.metadata["limit"] == "f32, bf16"
    assert "f32 or bf16" in caught.value.message
    assert service.list_jobs(show_deleted=True) == jobs


@pytest.mark.parametrize(
    ("inputs", "loss", "reason"),
    [
        ({}, "cross_entropy", "MISSING_LOSS_INPUT"),
        ({"target_tokens": [1, 2]}, "cross_entropy", "SHAPE_MISMATCH"),
        (
            {"target_tokens": [1, VOCAB, 2]},
            "cross_entropy",
            "TOKEN_OUT_OF_RANGE",
        ),
        ({"target_tokens": [1, 2, 3]}, "no_such_loss", "UNKNOWN_LOSS"),
        (
            {"target_tokens": [1, 2, 3], "weights": [1, float("nan"), 1]},
            "cross_entropy",
            "NONFINITE_INPUT",
        ),
        (
            {"target_tokens": [1, 2, 3], "colour": [1, 1, 1]},
            "cross_entropy",
            "UNKNOWN_LOSS_INPUT",
        ),
    ],
)
def test_bad_input_is_named_and_the_job_goes_on(
    new_client, data, inputs, loss, reason
):
    client = new_client()
    bad = gradwire.Datum([1, 2, 3], inputs)
    with pytest.raises(gradwire.UserError) as caught:
        client.forward_backward([data[0], bad], loss).result()
    assert caught.value.reason == reason
    assert client.forward(data).result().logprobs


def ranks_of(pid):
    found = []
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        name, fields = stat.rsplit(")", 1)
        if int(fields.split()[1]) == pid and "rank" in name:
            found.append(int(folder.name))
    return found


def test_a_killed_rank_comes_back_with_its_weights(
    server, service, new_client, data
):
    client = new_client()
    client.forward_backward(data, "cross_entropy").result()
    client.optim_step(gradwire.AdamParams(learning_rate=0.1)).result()
    before = client.forward(data).result().logprobs
    (rank,) = ranks_of(server.pid)
    os.kill(rank, signal.SIGKILL)
    after = client.forward(data).result().logprobs
    assert [x.tobytes() for x in before] == [x.tobytes() for x in after]
    recovery = service.get_job(client.job_id).last_recovery
    assert recovery.cause == "RANK_EXITED"
    assert recovery.optimizer_step == 1
    assert ranks_of(server.pid) != [rank]
