# SPDX-License-Identifier: Apache-2.0
"""Logprobs, gradients and trained weights against transformers and torch."""

import math

import calls
import gradwire
import numpy as np
import oracle
import pytest
import torch
from conftest import MODELS, sequences

LENGTHS = (9, 2, 31, 14, 5, 23)


def signed(data, seed=5):
    """The datums with signed weights, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for datum in data:
        weights = torch.randn(len(datum.model_input), generator=generator)
        weights[::4] = 0
        found.append(
            gradwire.Datum(
                datum.model_input,
                {**datum.loss_fn_inputs, "weights": weights},
            )
        )
    return found


def preference_loss(data, logprobs):
    """Pairs (chosen, rejected), as DPO has them, and a term over all datums."""
    sums = [d.response(lp).sum() for d, lp in zip(data, logprobs, strict=True)]
    margins = torch.stack(
        [a - b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    )
    loss = torch.nn.functional.softplus(-0.3 * margins).sum()
    return loss + 0.01 * torch.stack(sums).mean() ** 2, {}


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_transformers(new_client, models, name):
    judge = oracle.load(models[name])
    data = sequences(MODELS[name][1]["vocab_size"], LENGTHS)

    def compute(model):
        with torch.no_grad():
            found = [oracle.logprobs(model, datum) for datum in data]
        return {str(i): lp for i, lp in enumerate(found)}

    for precision in ("f32", "bf16"):
        served = new_client(name, precision).forward(data).result().logprobs
        exact, tolerance = oracle.with_tolerance(judge, compute, precision)
        found = {str(i): lp for i, lp in enumerate(served)}
        assert oracle.worst_of(found, exact, tolerance) == {}, precision


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_autograd(new_client, models, name):
    judge = oracle.load(models[name])
    data = signed(sequences(MODELS[name][1]["vocab_size"], LENGTHS))

    def compute(model):
        loss = -sum(
            (
                torch.as_tensor(d.loss_fn_inputs["weights"]).double()
                * oracle.logprobs(model, d)
            ).sum()
            for d in data
        )
        return oracle.gradients(model, loss)

    client = new_client(name)
    client.forward_backward(data, "cross_entropy")
    found, rounding = oracle.descended(judge, oracle.descend(client))
    exact, tolerance = oracle.with_tolerance(judge, compute)
    for key in tolerance:
        tolerance[key] = tolerance[key] + rounding[key]
    assert oracle.worst_of(found, exact, tolerance) == {}


def test_the_check_sees_one_wrong_element():
    exact = torch.linspace(-1, 1, 101, dtype=torch.float64)
    tolerance = torch.full_like(exact, 1e-6)
    assert oracle.worst(exact + 0.9e-6, exact, tolerance) == ""
    for wrong in (2e-6, math.nan, math.inf):
        found = exact.clone()
        found[17] += wrong
        assert "worst at [17]" in oracle.worst(found, exact, tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_a_nonlinear_loss_has_the_gradient_of_autograd(
    new_client, models, name
):
    judge = oracle.load(models[name])
    data = sequences(MODELS[name][1]["vocab_size"], LENGTHS)

    def compute(model):
        logprobs = [oracle.logprobs(model, datum) for datum in data]
        return oracle.gradients(model, preference_loss(data, logprobs)[0])

    client = new_client(name)
    step = client.forward_backward_custom(data, preference_loss)
    snapshot = oracle.descend(client)
    assert not step.result().recomputed
    found, rounding = oracle.descended(judge, snapshot)
    exact, tolerance = oracle.with_tolerance(judge, compute)
    for key in tolerance:
        tolerance[key] = tolerance[key] + rounding[key]
    assert oracle.worst_of(found, exact, tolerance) == {}


# Twenty steps on which every parameter of the optimizer changes.
SCHEDULE = [
    gradwire.AdamParams(
        learning_rate=2e-3 * (1 + math.cos(step)),
        beta1=0.9 - 0.02 * (step % 3),
        beta2=0.95 + 0.01 * (step % 4),
        eps=1e-12,
        weight_decay=0.05 * (step % 2),
        grad_clip_norm=(0.0, 0.5, 3.0)[step % 3],
        normalization=("none", "num_loss_tokens", "num_sequences")[step % 3],
    )
    for step in range(20)
]


def train_with_torch(path, batches, jitter=0.0):
    """Parameters and gradient norms after SCHEDULE, by torch in float64.

    jitter: relative error of every gradient element, a model of rounding.
    """
    model = oracle.load(path)
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-12)
    norms = []
    for params, data in zip(SCHEDULE, batches, strict=True):
        optimizer.zero_grad()
        logprobs = [oracle.logprobs(model, datum) for datum in data]
        leaves = [lp.detach().requires_grad_() for lp in logprobs]
        preference_loss(data, leaves)[0].backward()
        moved = [leaf.grad for leaf in leaves]
        torch.autograd.backward(logprobs, moved)
        divisor = {
            "none": 1,
            "num_loss_tokens": sum(int((g != 0).sum()) for g in moved),
            "num_sequences": sum(bool((g != 0).any()) for g in moved),
        }[params.normalization]
        for parameter in model.parameters():
            noise = 2 * torch.rand_like(parameter) - 1
            spread = parameter.grad.square().mean().sqrt()
            parameter.grad /= divisor
            parameter.grad += (
                jitter * noise * (parameter.grad.abs() + spread / divisor)
            )
        norms.append(
            float(
                torch.nn.utils.clip_grad_norm_(
                    model.parameters(), params.grad_clip_norm or math.inf
                )
            )
        )
        for group in optimizer.param_groups:
            group["lr"] = params.learning_rate
            group["betas"] = (params.beta1, params.beta2)
            group["weight_decay"] = params.weight_decay
        optimizer.step()
    return oracle.parameters(model), norms


def test_twenty_custom_steps_train_as_torch_does(new_client, models):
    judge = oracle.load(models["llama"])
    vocab = judge.config.vocab_size
    batches = [sequences(vocab, LENGTHS, seed=s) for s in range(len(SCHEDULE))]

    client = new_client("llama")
    updates = []
    for params, data in zip(SCHEDULE, batches, strict=True):
        client.forward_backward_custom(data, preference_loss)
        updates.append(client.optim_step(params))
    snapshot = client.save_weights_for_sampler("trained")
    norms = [update.result().grad_norm for update in updates]
    client.check()
    found = oracle.weights_of(snapshot.result())

    exact, expected_norms = train_with_torch(models["llama"], batches)
    assert any(
        params.grad_clip_norm and norm > params.grad_clip_norm
        for params, norm in zip(SCHEDULE, expected_norms, strict=True)
    ), "nothing was clipped"
    # AdamW divides by the gradient's own size, so that an error of rounding
    # is no small one where the gradient is small: how far it carries is found
    # by training with gradients that are off by as much.
    runs = 6
    squares = {name: torch.zeros_like(value) for name, value in exact.items()}
    norm_squares = np.zeros(len(SCHEDULE))
    torch.manual_seed(2)
    error = oracle.unit(judge) * math.sqrt(make_roundings(judge))
    for _ in range(runs):
        moved, noisy_norms = train_with_torch(models["llama"], batches, error)
        for name, value in moved.items():
            squares[name] += (value - exact[name]).square()
        norm_squares += (np.array(noisy_norms) - expected_norms) ** 2
    tolerance = {}
    steps = len(SCHEDULE)
    for name, value in exact.items():
        response = (squares[name] / runs).sqrt()
        usual = response.square().mean().sqrt()
        # And each step rounds the weight once.
        tolerance[name] = (
            oracle.SPREAD * response.clamp(min=usual)
            + steps * oracle.U_F32 * value.abs()
        )
    assert oracle.worst_of(found, exact, tolerance) == {}
    start = oracle.parameters(judge)
    assert oracle.worst_of(found, start, tolerance) != {}, "nothing was learnt"
    allowed = oracle.SPREAD * np.sqrt(norm_squares / runs).max()
    assert np.abs(np.array(norms) - expected_norms).max() <= allowed


def make_roundings(model):
    """How many ops a gradient passes on its longest way, twice."""
    return 2 * 12 * model.config.num_hidden_layers


def test_trained_weights_give_transformers_the_same_logprobs(new_client, data):
    client = new_client("llama")
    for _ in range(3):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(gradwire.AdamParams(learning_rate=1e-2))
    snapshot = client.save_weights_for_sampler("trained").result()
    served = client.forward(data).result().logprobs
    judge = oracle.load(snapshot.local_path)

    def compute(model):
        with torch.no_grad():
            found = [oracle.logprobs(model, datum) for datum in data]
        return {str(i): lp for i, lp in enumerate(found)}

    exact, tolerance = oracle.with_tolerance(judge, compute)
    found = {str(i): lp for i, lp in enumerate(served)}
    assert oracle.worst_of(found, exact, tolerance) == {}


def test_a_bf16_job_exports_what_it_computes_with(new_client, data):
    client = new_client("llama", "bf16")
    client.forward_backward(data, "cross_entropy")
    client.optim_step(gradwire.AdamParams(learning_rate=1e-2))
    snapshot = client.save_weights_for_sampler("trained").result()
    served = client.forward(data).result().logprobs
    judge = oracle.load(snapshot.local_path)
    for value in oracle.weights_of(snapshot).values():
        assert torch.equal(value, value.bfloat16().double())

    def compute(model):
        with torch.no_grad():
            found = [oracle.logprobs(model, datum) for datum in data]
        return {str(i): lp for i, lp in enumerate(found)}

    exact, tolerance = oracle.with_tolerance(judge, compute, "bf16")
    found = {str(i): lp for i, lp in enumerate(served)}
    assert oracle.worst_of(found, exact, tolerance) == {}


def test_top_k_is_that_of_the_distribution(new_client, models):
    # The whole vocabulary, so that the probabilities sum to 1.
    name = "qwen3"
    judge = oracle.load(models[name])
    vocab = judge.config.vocab_size
    data = sequences(vocab, (12, 3))
    served = new_client(name).forward(data, top_k=vocab).result()

    def compute(model):
        return {
            str(i): oracle.distribution(model, datum)
            for i, datum in enumerate(data)
        }

    exact, tolerance = oracle.with_tolerance(judge, compute)
    for i, datum in enumerate(data):
        values = torch.as_tensor(served.top_k_logprobs[i])
        indices = torch.as_tensor(served.top_k_indices[i])
        assert values.shape == indices.shape == (len(datum.model_input), vocab)
        # A permutation of the vocabulary, descending, ties by lower id.
        assert torch.equal(
            indices.sort(-1).values, torch.arange(vocab).expand_as(indices)
        )
        assert bool((values[:, 1:] <= values[:, :-1]).all())
        tied = values[:, 1:] == values[:, :-1]
        assert bool((indices[:, 1:] > indices[:, :-1])[tied].all())
        # Each value is that of its token.
        found = torch.empty_like(values).scatter_(-1, indices, values)
        assert oracle.worst(found, exact[str(i)], tolerance[str(i)]) == ""
        # torch.topk finds the same tokens wherever they are clearly apart.
        best = exact[str(i)].topk(vocab)
        bound = tolerance[str(i)].amax(-1, keepdim=True)
        gap = (best.values[:, :-1] - best.values[:, 1:]) > 2 * bound
        clear = torch.ones_like(best.indices, dtype=torch.bool)
        clear[:, :-1] &= gap
        clear[:, 1:] &= gap
        assert clear.float().mean() > 0.5
        assert torch.equal(indices[clear], best.indices[clear])
        # The target's logprob is the entry of its token, bit for bit.
        targets = torch.as_tensor(datum.loss_fn_inputs["target_tokens"])
        own = found.gather(-1, targets[:, None].long())[:, 0]
        assert torch.equal(own, torch.as_tensor(served.logprobs[i]))
        total = values.double().exp().sum(-1)
        slack = tolerance[str(i)].exp().amax(-1) - 1 + vocab * oracle.U_F32
        assert bool(((total - 1).abs() <= slack).all())


def test_a_shorter_top_k_is_its_beginning(new_client):
    client = new_client("llama")
    data = sequences(MODELS["llama"][1]["vocab_size"], (12, 3))
    long = client.forward(data, top_k=20).result()
    short = client.forward(data, top_k=3).result()
    for a, b in zip(long.top_k_indices, short.top_k_indices, strict=True):
        assert np.array_equal(a[:, :3], b)
    for a, b in zip(long.top_k_logprobs, short.top_k_logprobs, strict=True):
        assert np.array_equal(a[:, :3], b)


def test_recomputed_equals_retained(new_client, service):
    """Bit for bit, and the reply says which it was."""
    data = sequences(MODELS["llama"][1]["vocab_size"], LENGTHS)
    digests = []
    for activation_bytes in (1 << 26, 1):
        client = new_client(
            "llama", micro_batch_tokens=16, activation_bytes=activation_bytes
        )
        step = client.forward_backward_custom(data, preference_loss)
        client.optim_step(gradwire.AdamParams(learning_rate=1e-2))
        digests.append(client.save_weights_for_sampler("end").result().digest)
        plan = service.get_job(client.job_id).memory
        fits = plan.retained_tokens >= sum(LENGTHS)
        assert fits == (activation_bytes > 1)
        assert step.result().recomputed != fits
    assert digests[0] == digests[1]


def test_the_three_ways_to_a_gradient_are_one(new_client, stubs):
    """custom, Forward(retain) with Backward, cross_entropy of -dC/dlogprob."""
    data = sequences(MODELS["llama"][1]["vocab_size"], LENGTHS)
    adam = gradwire.AdamParams(learning_rate=1e-2)

    custom = new_client("llama")
    step = custom.forward_backward_custom(data, preference_loss)
    custom.optim_step(adam)
    digests = [custom.save_weights_for_sampler("end").result().digest]

    classic = new_client("llama")
    plain = classic.forward(data).result()
    for a, b in zip(plain.logprobs, step.result().logprobs, strict=True):
        assert np.array_equal(a, b)
    leaves = [torch.tensor(lp, requires_grad=True) for lp in plain.logprobs]
    preference_loss(data, leaves)[0].backward()
    gradients = [leaf.grad.numpy() for leaf in leaves]
    weighted = [
        gradwire.Datum(
            d.model_input, {**d.loss_fn_inputs, "weights": -gradient}
        )
        for d, gradient in zip(data, gradients, strict=True)
    ]
    fused = classic.forward_backward(weighted, "cross_entropy").result()
    for a, b in zip(plain.logprobs, fused.logprobs, strict=True):
        assert np.array_equal(a, b)
    classic.optim_step(adam)
    digests.append(classic.save_weights_for_sampler("end").result().digest)

    retained = new_client("llama")
    model = calls.Model(stubs, stubs.attach(retained.job_id))
    forward = model.result(model.forward(calls.batch(data), retain=True))
    assert forward.forward.retained
    parts = calls.gradient_parts(gradients)
    backward = model.backward(forward.forward.activation_id, parts)
    assert not model.result(backward).backward.recomputed
    model.result(model.optim_step(learning_rate=1e-2))
    digests.append(model.result(model.save_snapshot("end")).snapshot.digest)
    assert digests[0] == digests[1] == digests[2]
