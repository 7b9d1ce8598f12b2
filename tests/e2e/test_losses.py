# SPDX-License-Identifier: Apache-2.0
"""Every built-in loss against autograd, position by position.

A position's gradient is compared without moving a weight: the built-in loss
and a cross_entropy with weights of the opposite gradient go into one
accumulator, and an optimizer step with a learning rate of 0 tells how long
their sum is. What it may be follows from float32 and from the length of that
position's own gradient, which transformers knows.
"""

import math

import gradwire
import numpy as np
import oracle
import pytest
import torch
from conftest import MODELS, sequences

STILL = gradwire.AdamParams(learning_rate=0.0)
LENGTH = 12
# Log-ratios; the cap is 20.
GAPS = (0.0, 0.05, -0.05, 0.4, -0.4, 3.0, -3.0, 19.5, -19.5, 25.0, -25.0)


def ratio(lp, q, cap):
    gap = lp - q
    return torch.exp(gap.clamp(-cap, cap) if cap else gap)


def clipped_policy(r, a, low, high):
    return torch.minimum(r * a, r.clamp(low, high) * a)


def importance_sampling(lp, q, a, w, ratio_log_cap=20.0):
    return -(w * ratio(lp, q, ratio_log_cap) * a).sum()


def ppo(
    lp,
    q,
    a,
    w,
    clip_low_threshold=0.8,
    clip_high_threshold=1.2,
    ratio_log_cap=20.0,
):
    r = ratio(lp, q, ratio_log_cap)
    objective = clipped_policy(r, a, clip_low_threshold, clip_high_threshold)
    return -(w * objective).sum()


def cispo(
    lp,
    q,
    a,
    w,
    clip_low_threshold=0.0,
    clip_high_threshold=4.0,
    ratio_log_cap=20.0,
):
    r = ratio(lp, q, ratio_log_cap).detach()
    return -(
        w * r.clamp(clip_low_threshold, clip_high_threshold) * lp * a
    ).sum()


def dro(lp, q, a, w, beta=0.05):
    return -(w * (lp * a - beta / 2 * (lp - q) ** 2)).sum()


def dapo(
    lp,
    q,
    a,
    w,
    clip_low_threshold=0.8,
    clip_high_threshold=1.28,
    ratio_log_cap=20.0,
    eps_clip_c=None,
):
    r = ratio(lp, q, ratio_log_cap)
    penalty = -clipped_policy(r, a, clip_low_threshold, clip_high_threshold)
    if eps_clip_c is not None:
        penalty = torch.where(
            a < 0, torch.minimum(-eps_clip_c * a, penalty), penalty
        )
    return (w * penalty).sum()


def gspo(
    lp,
    q,
    a,
    w,
    mask=None,
    clip_low_threshold=0.8,
    clip_high_threshold=1.2,
    seq_ratio_log_cap=10.0,
):
    counted = (w != 0) if mask is None else mask != 0
    mean = (lp - q)[counted].mean().detach()
    log_s = (lp - lp.detach() + mean).clamp(max=seq_ratio_log_cap)
    objective = clipped_policy(
        torch.exp(log_s), a, clip_low_threshold, clip_high_threshold
    )
    return -(w * objective).sum()


LOSSES = {
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "dapo": dapo,
}
CONFIGS = [
    ("importance_sampling", {}),
    ("importance_sampling", {"ratio_log_cap": 2.0}),
    ("ppo", {}),
    ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 30.0}),
    ("cispo", {}),
    ("cispo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
    ("dro", {}),
    ("dro", {"beta": 0.7}),
    ("dapo", {}),
    ("dapo", {"eps_clip_c": 3.0}),
]


@pytest.fixture(scope="module")
def judged(models):
    """A datum, its inputs, and the length of each position's gradient."""
    judge = oracle.load(models["llama"])
    (datum,) = sequences(
        judge.config.vocab_size, (LENGTH + 1,), prompt_length=0
    )
    lengths = oracle.jacobian_norms(judge, datum)
    # A residual is a sum over layers and elements of float32 roundings.
    return datum, lengths, 2 * math.sqrt(oracle.terms(judge))


def with_inputs(datum, **inputs):
    target = datum.loss_fn_inputs["target_tokens"]
    return gradwire.Datum(
        datum.model_input,
        {"target_tokens": target, **inputs},
    )


def autograd(loss, lp, inputs, config):
    """(value, dvalue/dlp), float64, of float32 inputs."""
    leaf = torch.tensor(lp, dtype=torch.float64, requires_grad=True)
    arrays = {k: torch.as_tensor(v).double() for k, v in inputs.items()}
    config = dict(config)
    for name in ("clip_low_threshold", "clip_high_threshold"):
        if name in arrays:
            config[name] = arrays.pop(name)
    if "sequence_ratio_mask" in arrays:
        config["mask"] = arrays.pop("sequence_ratio_mask")
    ones = torch.ones_like(leaf)
    value = loss(
        leaf,
        arrays["logprobs"],
        arrays["advantages"],
        arrays.get("weights", ones),
        **config,
    )
    value.backward()
    return float(value.detach()), leaf.grad.numpy()


class Probe:
    """Sends a built-in loss and its autograd opposite; checks them later."""

    def __init__(self, client, judged):
        self._client = client
        self._datum, self._lengths, self._roundings = judged
        self._lp = client.forward([self._datum]).result().logprobs[0]
        self._sent = []

    @property
    def lp(self):
        return self._lp

    def send(self, name, loss, inputs, config):
        value, gradient = autograd(loss, self._lp, inputs, config)
        opposite = gradient.astype(np.float32)
        built_in = self._client.forward_backward(
            [with_inputs(self._datum, **inputs)], name, config
        )
        alone = self._client.optim_step(STILL)
        self._client.forward_backward(
            [with_inputs(self._datum, **inputs)], name, config
        )
        self._client.forward_backward(
            [with_inputs(self._datum, weights=opposite)], "cross_entropy"
        )
        both = self._client.optim_step(STILL)
        gap = np.abs(self._lp.astype(np.float64) - inputs["logprobs"]).max()
        self._sent.append(
            (f"{name} {config}", value, gradient, gap, built_in, alone, both)
        )

    def check(self):
        for what, value, gradient, gap, built_in, alone, both in self._sent:
            # exp turns the rounding of its argument into a relative error.
            relative = oracle.U_F32 * (8 + gap)
            served = built_in.result()
            terms = max(abs(value), np.abs(gradient * self._lp).sum())
            assert abs(served.loss - value) <= 2 * relative * terms, what
            moved = gradient != 0
            step = alone.result()
            assert step.loss_tokens == moved.sum(), what
            assert step.sequences == moved.any(), what
            if not moved.any():
                assert step.grad_norm == 0, what
            length = float(
                (torch.as_tensor(gradient).abs() * self._lengths).sum()
            )
            allowed = (relative + oracle.U_F32 * self._roundings) * length
            residual = both.result().grad_norm
            assert residual <= allowed, (what, residual, allowed)
            # The check would see a gradient that is off by a thousandth.
            assert allowed <= 1e-3 * length
        self._client.check()


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_gradient_is_that_of_autograd(shared_client, judged, name, config):
    probe = Probe(shared_client, judged)
    generator = np.random.default_rng(3)
    for case, gap in enumerate(GAPS):
        position = (5 * case + 1) % LENGTH
        for advantage in (1.7, -0.6):
            q = probe.lp - generator.uniform(-0.1, 0.1, LENGTH).astype("f4")
            q[position] = np.float32(probe.lp[position] - gap)
            inputs = {
                "logprobs": q,
                "advantages": np.zeros(LENGTH, np.float32),
                "weights": np.zeros(LENGTH, np.float32),
            }
            inputs["advantages"][position] = advantage
            inputs["weights"][position] = 0.75
            probe.send(name, LOSSES[name], inputs, config)
    probe.check()


@pytest.mark.parametrize("name", LOSSES)
def test_a_whole_sequence_sums_its_positions(shared_client, judged, name):
    probe = Probe(shared_client, judged)
    generator = np.random.default_rng(4)
    inputs = {
        "logprobs": probe.lp - generator.normal(0, 0.3, LENGTH).astype("f4"),
        "advantages": generator.normal(0, 1, LENGTH).astype("f4"),
    }
    probe.send(name, LOSSES[name], inputs, {})
    weights = generator.normal(0, 1, LENGTH).astype("f4")
    weights[::3] = 0
    probe.send(name, LOSSES[name], {**inputs, "weights": weights}, {})
    probe.check()


@pytest.mark.parametrize("name", ["ppo", "cispo", "dapo"])
def test_thresholds_of_a_token_override_the_config(shared_client, judged, name):
    probe = Probe(shared_client, judged)
    generator = np.random.default_rng(5)
    inputs = {
        "logprobs": probe.lp - generator.normal(0, 0.3, LENGTH).astype("f4"),
        "advantages": generator.normal(0, 1, LENGTH).astype("f4"),
        "clip_low_threshold": generator.uniform(0.5, 1, LENGTH).astype("f4"),
        "clip_high_threshold": generator.uniform(1, 1.5, LENGTH).astype("f4"),
    }
    probe.send(name, LOSSES[name], inputs, {"clip_high_threshold": 9.0})
    probe.check()


def test_gspo_has_one_ratio_for_a_sequence(shared_client, judged):
    probe = Probe(shared_client, judged)
    generator = np.random.default_rng(6)
    mask = (np.arange(LENGTH) % 2).astype("f4")
    for shift in (0.05, -0.5, 0.5, 12.0):
        noise = generator.normal(0, 0.05, LENGTH).astype("f4")
        inputs = {
            "logprobs": probe.lp - noise - np.float32(shift),
            "advantages": generator.normal(0, 1, LENGTH).astype("f4"),
            "weights": generator.uniform(0.5, 1, LENGTH).astype("f4"),
        }
        inputs["weights"][:4] = 0
        probe.send("gspo", gspo, inputs, {})
        masked = {**inputs, "sequence_ratio_mask": mask}
        probe.send("gspo", gspo, masked, {})
    probe.check()


def test_ratios_are_counted(shared_client):
    (datum,) = sequences(MODELS["llama"][1]["vocab_size"], (9,))
    lp = shared_client.forward([datum]).result().logprobs[0]
    n = len(lp)
    d = np.array([0.0, 0.5, -0.5, 0.1] * 2, np.float32)[:n]
    result = shared_client.forward_backward(
        [
            with_inputs(
                datum, logprobs=lp - d, advantages=np.ones(n, np.float32)
            )
        ],
        "ppo",
    ).result()
    shared_client.zero_grad()
    gap = lp.astype(np.float64) - (lp - d)
    allowed = 8 * oracle.U_F32 * max(1, np.abs(lp).max())
    metrics = result.metrics
    for key in metrics:
        assert key.count(":") == 1, key
    # A > 0 is clipped above 1.2 alone.
    assert metrics["clip_fraction:mean"] == np.mean(np.exp(gap) > 1.2)
    assert abs(metrics["logprob_gap:mean"] - np.abs(gap).mean()) <= allowed
    k3 = np.mean(np.expm1(gap) - gap)
    assert abs(metrics["kl_k3:mean"] - k3) <= allowed
    shared_client.check()
