# SPDX-License-Identifier: Apache-2.0
"""How datums are split, ordered and pipelined must not be seen in results."""

import calls
import gradwire
import numpy as np
import oracle
import pytest
import torch
from conftest import MODELS, sequences
from gradwire import wire
from gradwire._proto.gradwire.v1 import data_pb2

VOCAB = MODELS["llama"][1]["vocab_size"]
LENGTHS = (9, 2, 31, 14, 5, 23, 3, 17)
STILL = gradwire.AdamParams(learning_rate=0.0)


@pytest.fixture(scope="module")
def judge(models):
    return oracle.load(models["llama"])


@pytest.fixture(scope="module")
def batch():
    """Datums with signed weights."""
    generator = torch.Generator().manual_seed(7)
    return [
        weighted(
            datum,
            torch.randn(len(datum.model_input), generator=generator).numpy(),
        )
        for datum in sequences(VOCAB, LENGTHS)
    ]


@pytest.fixture(scope="module")
def lengths(judge, batch):
    """The length of each position's gradient, by datum."""
    return [oracle.jacobian_norms(judge, datum) for datum in batch]


def weighted(datum, weights):
    return gradwire.Datum(
        datum.model_input, {**datum.loss_fn_inputs, "weights": weights}
    )


def weights_of(datum):
    return np.asarray(datum.loss_fn_inputs["weights"])


def opposite(data):
    return [weighted(datum, -weights_of(datum)) for datum in data]


def residual_allowed(judge, batch, lengths):
    """Of the length of a gradient minus the same one computed otherwise.

    Both err by the rounding of their ops, which is relative to what each
    position contributes, cancellations apart.
    """
    total = sum(
        float((torch.as_tensor(weights_of(d)).abs() * n).sum())
        for d, n in zip(batch, lengths, strict=True)
    )
    return 2 * oracle.unit(judge) * total


def check_same_gradient(client, first, second, allowed):
    """first and second are lists of batches; their sums must agree."""
    for data in first:
        client.forward_backward(data, "cross_entropy")
    alone = client.optim_step(STILL)
    for data in first:
        client.forward_backward(data, "cross_entropy")
    for data in second:
        client.forward_backward(opposite(data), "cross_entropy")
    both = client.optim_step(STILL)
    client.check()
    assert both.result().grad_norm <= allowed
    assert alone.result().grad_norm > 100 * allowed, "the check is blind"


ORDERS = {
    "as it came": [list(range(8))],
    "reversed": [list(range(7, -1, -1))],
    "shuffled": [[3, 6, 0, 5, 1, 7, 4, 2]],
    "split": [[0, 1, 2], [3], [4, 5, 6, 7]],
    "one by one": [[i] for i in range(8)],
    "shuffled and split": [[6, 2], [7, 0, 5], [1, 3, 4]],
}


@pytest.mark.parametrize("micro_batch_tokens", [0, 16])
def test_any_packing_gives_the_same_results(
    new_client, judge, batch, lengths, micro_batch_tokens
):
    client = new_client("llama", micro_batch_tokens=micro_batch_tokens)

    def compute(model):
        with torch.no_grad():
            found = [oracle.logprobs(model, datum) for datum in batch]
        return {str(i): lp for i, lp in enumerate(found)}

    exact, tolerance = oracle.with_tolerance(judge, compute)
    allowed = residual_allowed(judge, batch, lengths)
    for name, order in ORDERS.items():
        parts = [[batch[i] for i in part] for part in order]
        results = [client.forward(part) for part in parts]
        found = {}
        for part, result in zip(order, results, strict=True):
            served = result.result().logprobs
            found.update(zip(map(str, part), served, strict=True))
        assert oracle.worst_of(found, exact, tolerance) == {}, name
        check_same_gradient(client, [batch], parts, allowed)


def test_accumulated_calls_count_as_one(new_client, judge, batch, lengths):
    """Whichever normalisation: the counters add up as the gradients do."""
    client = new_client("llama")
    moved = sum(int((weights_of(d) != 0).sum()) for d in batch)
    expected = {
        "none": 1,
        "num_loss_tokens": moved,
        "num_sequences": len(batch),
    }
    norms = {}
    for normalization in expected:
        for parts in ([batch], [batch[:3], batch[3:]]):
            for part in parts:
                client.forward_backward(part, "cross_entropy")
            step = client.optim_step(
                gradwire.AdamParams(
                    learning_rate=0.0, normalization=normalization
                )
            ).result()
            assert step.loss_tokens == moved
            assert step.sequences == len(batch)
            norms[normalization, len(parts)] = step.grad_norm
    allowed = residual_allowed(judge, batch, lengths)
    plain = norms["none", 1]
    for (normalization, _), norm in norms.items():
        assert abs(norm * expected[normalization] - plain) <= allowed
    client.check()


def test_zero_weights_count_for_nothing(shared_client, batch):
    datum = batch[2]
    weights = weights_of(datum).copy()
    weights[::2] = 0
    silent = weighted(batch[0], np.zeros_like(weights_of(batch[0])))
    result = shared_client.forward_backward(
        [weighted(datum, weights), silent], "cross_entropy"
    ).result()
    step = shared_client.optim_step(STILL).result()
    assert step.loss_tokens == (weights != 0).sum()
    assert step.sequences == 1
    assert result.metrics["tokens:sum"] == step.loss_tokens
    assert result.metrics["sequences:sum"] == 1
    # Logprobs come for every position all the same.
    plain = shared_client.forward([datum, batch[0]]).result()
    for a, b in zip(plain.logprobs, result.logprobs, strict=True):
        assert len(a) == len(b)
        assert np.array_equal(a, b)


def test_a_zero_gradient_is_a_step_and_no_gradient_is_none(new_client, batch):
    client = new_client("llama")
    zero = [weighted(d, np.zeros_like(weights_of(d))) for d in batch]
    empty = client.optim_step().result()
    assert empty.skipped
    assert (empty.optimizer_step, empty.weight_version) == (0, 0)
    client.forward_backward(zero, "cross_entropy")
    decayed = client.optim_step(
        gradwire.AdamParams(
            learning_rate=0.1, weight_decay=0.5, normalization="num_sequences"
        )
    ).result()
    assert not decayed.skipped
    assert decayed.grad_norm == decayed.loss_tokens == 0
    assert (decayed.optimizer_step, decayed.weight_version) == (1, 1)
    client.forward_backward(batch, "cross_entropy")
    client.zero_grad()
    assert client.optim_step().result().skipped
    client.check()


def test_zero_gradient_decays_weights_alone(new_client, models, batch):
    client = new_client("llama")
    zero = [weighted(d, np.zeros_like(weights_of(d))) for d in batch]
    client.forward_backward(zero, "cross_entropy")
    client.optim_step(gradwire.AdamParams(learning_rate=0.5, weight_decay=0.5))
    found = oracle.weights_of(client.save_weights_for_sampler("end").result())
    start = oracle.parameters(oracle.load(models["llama"]))
    expected = {name: 0.75 * value for name, value in start.items()}
    tolerance = {n: oracle.U_F32 * v.abs() for n, v in expected.items()}
    assert oracle.worst_of(found, expected, tolerance) == {}


def many_targets(batch, k, seed=8):
    generator = np.random.default_rng(seed)
    found = []
    for datum in batch:
        n = len(datum.model_input)
        targets = generator.integers(VOCAB, size=(n, k))
        weights = generator.normal(size=(n, k)).astype("f4")
        weights[generator.uniform(size=(n, k)) < 0.3] = 0
        found.append(
            gradwire.Datum(
                datum.model_input,
                {"target_tokens": targets, "weights": weights},
            )
        )
    return found


def column(data, j):
    return [
        gradwire.Datum(
            d.model_input,
            {name: np.asarray(v)[:, j] for name, v in d.loss_fn_inputs.items()},
        )
        for d in data
    ]


def test_several_targets_are_as_many_single_ones(shared_client, judge, batch):
    k = 3
    data = many_targets(batch, k)

    def compute(model):
        with torch.no_grad():
            found = [oracle.logprobs(model, datum) for datum in data]
        return {str(i): lp for i, lp in enumerate(found)}

    exact, tolerance = oracle.with_tolerance(judge, compute)
    result = shared_client.forward_backward(data, "cross_entropy").result()
    found = {str(i): lp for i, lp in enumerate(result.logprobs)}
    assert oracle.worst_of(found, exact, tolerance) == {}
    step = shared_client.optim_step(STILL).result()
    moved = [(weights_of(d) != 0).any(-1) for d in data]
    assert step.loss_tokens == sum(m.sum() for m in moved)
    assert step.sequences == sum(m.any() for m in moved)

    lengths = [oracle.jacobian_norms(judge, datum) for datum in data]
    allowed = residual_allowed(judge, data, lengths)
    columns = [column(data, j) for j in range(k)]
    check_same_gradient(shared_client, [data], columns, allowed)


def test_one_target_in_two_dimensions_is_one(shared_client, batch):
    data = many_targets(batch, 1)
    wide = shared_client.forward(data).result().logprobs
    flat = shared_client.forward(column(data, 0)).result().logprobs
    for a, b in zip(wide, flat, strict=True):
        assert a.shape == (len(b), 1)
        assert np.array_equal(a[:, 0], b)


def sparse(tensor, dtype):
    """The same array, compressed by rows."""
    array = wire.decode_tensor(tensor)
    rows, columns = np.nonzero(array)
    offsets = np.zeros(len(array) + 1, "<i8")
    np.add.at(offsets, rows + 1, 1)
    return data_pb2.TensorData(
        dtype=dtype,
        shape=array.shape,
        data=array[rows, columns].tobytes(),
        csr_columns=columns.astype("<i4").tobytes(),
        csr_row_offsets=np.cumsum(offsets).astype("<i8").tobytes(),
    )


def test_sparse_arrays_are_dense_ones(model, batch):
    data = many_targets(batch, 3)
    data[0].loss_fn_inputs["target_tokens"][1:3] = 0  # stored nowhere
    dense = calls.encode(data)
    compressed = calls.encode(data)
    for datum in compressed:
        for name, dtype in (
            ("target_tokens", data_pb2.DATA_TYPE_INT64),
            ("weights", data_pb2.DATA_TYPE_FLOAT32),
        ):
            values = datum.loss_fn_inputs[name]
            values.CopyFrom(sparse(values, dtype))
    results = []
    for datums in (dense, compressed):
        ref = model.forward_backward(list(wire.datum_stream(datums)))
        results.append(model.logprobs(ref, len(datums)))
        step = model.result(model.optim_step(learning_rate=0.0)).optim_step
        results[-1].append(np.array([step.grad_norm, step.loss_tokens]))
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a, b)


def squares(data, logprobs):
    terms = [d.response(lp) for d, lp in zip(data, logprobs, strict=True)]
    return sum(t.sum() ** 2 for t in terms), {}


def test_depth_eight_equals_depth_one(new_client):
    """Custom steps, built-in losses and forwards, eight steps outstanding."""
    data = sequences(VOCAB, LENGTHS)

    def run(depth):
        client = new_client("llama")
        outstanding, logprobs = [], []
        for step in range(12):
            part = data[step % 4 :]
            outstanding.append(
                (
                    client.forward_backward(part[:2], "cross_entropy"),
                    client.forward_backward_custom(part, squares),
                    client.forward(part[::2]),
                    client.optim_step(gradwire.AdamParams(learning_rate=3e-3)),
                )
            )
            while len(outstanding) >= depth:
                fused, custom, forward, update = outstanding.pop(0)
                assert update.result().optimizer_step > 0
                for future in (fused, custom, forward):
                    logprobs.extend(future.result().logprobs)
        for fused, custom, forward, _ in outstanding:
            for future in (fused, custom, forward):
                logprobs.extend(future.result().logprobs)
        client.check()
        digest = client.save_weights_for_sampler("end").result().digest
        return digest, logprobs

    one, eight = run(1), run(8)
    assert one[0] == eight[0]
    for a, b in zip(one[1], eight[1], strict=True):
        assert np.array_equal(a, b)


def test_sixteen_forwards_at_once(shared_client):
    data = sequences(VOCAB, LENGTHS)
    alone = shared_client.forward(data).result().logprobs
    many = [shared_client.forward(data) for _ in range(16)]
    for future in many:
        for a, b in zip(alone, future.result().logprobs, strict=True):
            assert np.array_equal(a, b)


def test_two_jobs_train_beside_each_other(new_client):
    """Interleaved jobs equal jobs alone."""
    data = sequences(VOCAB, LENGTHS)

    def train(clients):
        for step in range(4):
            for client in clients:
                client.forward_backward(data[step:], "cross_entropy")
                client.optim_step(gradwire.AdamParams(learning_rate=1e-2))
        ends = [client.save_weights_for_sampler("end") for client in clients]
        return [end.result().digest for end in ends]

    (alone,) = train([new_client("llama")])
    assert train([new_client("llama"), new_client("llama")]) == [alone, alone]


def test_a_snapshot_is_of_its_place_in_the_sequence(new_client):
    data = sequences(VOCAB, LENGTHS)
    client = new_client("llama")
    ends = []
    for step in range(3):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(gradwire.AdamParams(learning_rate=1e-2))
        ends.append(client.save_weights_for_sampler(f"step-{step}"))
    digests = [end.result().digest for end in ends]
    assert len(set(digests)) == len(digests)
    again = new_client("llama")
    for step in range(2):
        again.forward_backward(data, "cross_entropy")
        again.optim_step(gradwire.AdamParams(learning_rate=1e-2)).result()
        end = again.save_weights_for_sampler(f"step-{step}").result()
        assert end.digest == digests[step]
