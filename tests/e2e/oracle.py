# SPDX-License-Identifier: Apache-2.0
"""What transformers and torch say, and how far rounding may move it.

transformers in float64 is the judge. The tolerance of an element is computed:
its response to small relative errors of every module's output, measured on the
judge itself (tests/golden/make_golden.py says how), times the unit roundoff of
the server's arithmetic.
"""

import math
import pathlib
import sys

import gradwire
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

_GOLDEN = str(pathlib.Path(__file__).resolve().parents[1] / "golden")
if _GOLDEN not in sys.path:
    sys.path.append(_GOLDEN)
import make_golden  # noqa: E402

U_F32 = torch.finfo(torch.float32).eps / 2
U_BF16 = torch.finfo(torch.bfloat16).eps / 2
# The response is a root mean square of a few samples; the largest of some
# thousand elements of a real error lies several times above it.
SPREAD = 6

# AdamW as plain descent: with beta1 = beta2 = 0 and an eps that no gradient
# reaches, a step is lr / eps * gradient, so that the weights after it give the
# gradient back, scaled by a power of two that keeps its digits.
_SCALE = 2.0**10
_HUGE = 2.0**40
DESCENT = gradwire.AdamParams(
    learning_rate=_SCALE * _HUGE, beta1=0.0, beta2=0.0, eps=_HUGE
)


def load(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info.get(problem), (problem, info[problem])
    return model.double().eval()


def log_softmax(logits):
    """In float32 at least, whatever the model is in."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits.to(wide), -1)


def logprobs(model, datum):
    """Shaped like target_tokens, with its graph."""
    tokens = torch.tensor(datum.model_input.to_ints())
    targets = torch.as_tensor(np.asarray(datum.loss_fn_inputs["target_tokens"]))
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    flat = targets.long().reshape(len(tokens), -1)
    found = log_softmax(logits).gather(-1, flat)
    return found.reshape(targets.shape)


def distribution(model, datum):
    """float64 [N, vocab]."""
    tokens = torch.tensor(datum.model_input.to_ints())
    with torch.no_grad():
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    return log_softmax(logits)


def gradients(model, loss):
    """dloss/dparameter by name."""
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def jacobian_norms(model, datum):
    """The length of d logprobs[i] / d parameters for every i, [N]."""
    lengths = []
    found = logprobs(model, datum)
    for value in found.reshape(-1):
        model.zero_grad()
        value.backward(retain_graph=True)
        squares = sum(p.grad.square().sum() for p in model.parameters())
        lengths.append(squares.sqrt())
    return torch.stack(lengths).reshape(found.shape)


def terms(model):
    """The longest sum in one output element of one op."""
    config = model.config
    return max(config.hidden_size, config.intermediate_size, config.vocab_size)


def unit(model, precision="f32"):
    """The error of one op's output, relative to its size.

    In float32 a sum of n terms errs like a random walk of n roundings; in
    bfloat16 the rounding of the output covers its float32 sum.
    """
    return U_BF16 if precision == "bf16" else math.sqrt(terms(model)) * U_F32


def with_tolerance(model, compute, precision="f32"):
    """(exact, tolerance) of compute(model), a dict of tensors."""
    exact = compute(model)
    squares = {name: torch.zeros_like(value) for name, value in exact.items()}
    # From the function's name: the same answer whatever ran before.
    torch.manual_seed(1)
    hooks = make_golden.add_noise(model)
    for _ in range(make_golden.SAMPLES):
        for name, value in compute(model).items():
            squares[name] += (
                (value - exact[name]) / make_golden.PROBE
            ).square()
    for hook in hooks:
        hook.remove()
    one = unit(model, precision)
    tolerance = {}
    for name, value in exact.items():
        response = (squares[name] / make_golden.SAMPLES).sqrt()
        usual = response.square().mean().sqrt()
        tolerance[name] = (
            SPREAD * one * response.clamp(min=usual) + 2 * U_F32 * value.abs()
        )
    return exact, tolerance


def weights_of(snapshot):
    """The tensors of an exported directory, float64 by name."""
    path = pathlib.Path(snapshot.local_path)
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found.update(load_file(file))
    return {name: value.double() for name, value in found.items()}


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def descend(client, name="descended"):
    """A step of DESCENT and its export; the weights are of no use after it."""
    client.optim_step(DESCENT)
    return client.save_weights_for_sampler(name)


def descended(model, snapshot):
    """(gradient, rounding of it) from the export of descend()."""
    start = parameters(model)
    end = weights_of(snapshot.result())
    assert set(start) == set(end)
    found = {name: (start[name] - end[name]) / _SCALE for name in start}
    # The subtraction was rounded to float32, and the product before it.
    rounding = {
        name: 2 * U_F32 * (end[name].abs() / _SCALE + found[name].abs())
        for name in start
    }
    return found, rounding


def worst(found, expected, tolerance):
    """Empty if every element is within its tolerance, else the worst one."""
    found = torch.as_tensor(np.asarray(found), dtype=torch.float64)
    if found.shape != expected.shape:
        return f"shape {list(found.shape)}, not {list(expected.shape)}"
    error = (found - expected).abs()
    # A NaN is beyond every tolerance.
    beyond = ~(error <= tolerance)
    if not beyond.any():
        return ""
    share = (error / torch.as_tensor(tolerance)).nan_to_num(nan=math.inf)
    at = int(share.argmax())
    where = list(np.unravel_index(at, tuple(expected.shape)))
    return (
        f"{int(beyond.sum())} of {found.numel()} differ; worst at "
        f"{[int(i) for i in where]}: {float(found.flatten()[at])!r}, not "
        f"{float(expected.flatten()[at])!r} (within "
        f"{float(tolerance.flatten()[at])!r})"
    )


def worst_of(found, expected, tolerance):
    """`worst` over dicts of tensors with the same names."""
    assert set(found) == set(expected)
    lines = {
        name: worst(found[name], expected[name], tolerance[name])
        for name in expected
    }
    return {name: line for name, line in lines.items() if line}
