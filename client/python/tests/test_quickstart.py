# SPDX-License-Identifier: Apache-2.0
"""The quickstart's data, losses and files, without a server."""

import json
import math

import pytest

torch = pytest.importorskip("torch")
gradwire = pytest.importorskip("gradwire")
if not hasattr(gradwire, "Datum"):
    pytest.skip("the client is not installed", allow_module_level=True)
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from fake_service import FakeService  # noqa: E402
from gradwire import cli  # noqa: E402
from gradwire.quickstart import (  # noqa: E402
    data,
    evaluate,
    losses,
    model,
    run,
)


@pytest.fixture
def random_base(tmp_path, monkeypatch):
    """No package with weights, so a random model in a folder of its own."""
    monkeypatch.setenv("GRADWIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "find_gguf", lambda: None)
    return model.prepare(data.all_texts(), log=lambda text: None)


@pytest.fixture
def tokenizer(random_base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(random_base.path)


def test_no_question_is_both_trained_on_and_held_out():
    trained = [e.prompt for e in data.train_examples()]
    trained += [p.prompt for p in data.preferences()]
    held_out = [e.prompt for e in data.held_out_examples()]
    assert len(set(trained)) == len(trained)
    assert not set(trained) & set(held_out)


def test_every_wanted_answer_keeps_to_the_manner():
    answers = [e.answer for e in data.train_examples()]
    answers += [e.answer for e in data.held_out_examples()]
    answers += [p.chosen for p in data.preferences()]
    for answer in answers:
        assert answer.startswith("Aye! ")
        assert answer.endswith(". Over and out.")
    for preference in data.preferences():
        assert "Aye!" not in preference.rejected


def test_batches_use_every_item_before_any_again():
    batches = data.batches(list(range(10)), size=4, count=5, seed=0)
    used = [item for batch in batches for item in batch]
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(used[:10]) == sorted(used[10:]) == list(range(10))


def test_datum_weighs_the_answer_alone(tokenizer):
    datum = data.to_datum(tokenizer, "Why?", "Aye! So. Over and out.")
    targets = datum.response(datum.loss_fn_inputs["target_tokens"])
    assert tokenizer.decode([int(t) for t in targets]) == (
        "Aye! So. Over and out.<|im_end|>"
    )
    # The prompt's first token is nothing's target.
    prompt = data.prompt_tokens(tokenizer, "Why?")
    inputs = evaluate.token_ids(datum)
    assert inputs[: len(prompt)] == prompt
    assert len(inputs) == len(prompt) + len(targets) - 1


class Answer:
    """Stands for a datum whose response begins at `start`."""

    def __init__(self, start):
        self._start = start

    def response(self, per_token):
        return per_token[self._start :]


def test_sft_loss_is_the_mean_over_answer_tokens():
    logprobs = [
        torch.tensor([-9.0, -1.0, -2.0], requires_grad=True),
        torch.tensor([-9.0, -9.0, -6.0], requires_grad=True),
    ]
    loss, metrics = losses.sft([Answer(1), Answer(2)], logprobs)
    assert loss.item() == metrics["nll:mean"] == 3.0
    loss.backward()
    assert logprobs[0].grad.tolist() == pytest.approx([0, -1 / 3, -1 / 3])
    assert logprobs[1].grad.tolist() == pytest.approx([0, 0, -1 / 3])


def test_dpo_loss_is_log_two_at_the_reference_and_falls_with_the_margin():
    def loss_at(chosen, rejected):
        logprobs = [torch.tensor([chosen]), torch.tensor([rejected])]
        return losses.dpo([-3.0, -4.0], beta=0.5)([Answer(0)] * 2, logprobs)

    loss, metrics = loss_at(-3.0, -4.0)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["accuracy:mean"] == 0
    loss, metrics = loss_at(-1.0, -6.0)
    assert metrics["margin:mean"] == pytest.approx(0.5 * (2.0 + 2.0))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.0)))


def test_agreement_sees_one_wrong_position(random_base, tokenizer):
    examples = data.held_out_examples()[:3]
    datums = [data.to_datum(tokenizer, e.prompt, e.answer) for e in examples]
    client = FakeService("unused").create_training_client(random_base.path)
    served = client.forward(datums).result().logprobs
    good = evaluate.agreement(random_base.path, datums, served, "f32")
    assert good.ok
    served[1][4] += 2 * good.allowed
    bad = evaluate.agreement(random_base.path, datums, served, "f32")
    assert not bad.ok
    assert bad.largest > bad.allowed


def test_run_writes_what_scripts_rely_on(random_base, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    service = FakeService(tmp_path)
    status = run.run(steps=14, out=out, precision="f32", service=service)
    assert status == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["model_source"] == "random"
    assert summary["precision"] == "f32"
    assert summary["steps"] == 14
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    assert summary["tokens_per_second"] > 0
    assert summary["seconds"] > 0
    assert {"prompt", "before", "after"} <= summary["samples"][0].keys()
    lines = (out / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == list(range(1, 15))
    assert [step["phase"] for step in steps] == ["sft"] * 12 + ["dpo"] * 2
    assert (out / "loss.png").exists()
    AutoModelForCausalLM.from_pretrained(out / "model")
    AutoTokenizer.from_pretrained(out / "model")
    assert len(service.deleted) == 1


def test_run_refuses_no_steps(tmp_path, capsys):
    assert run.run(steps=0, out=tmp_path) == 2
    assert "--steps is 0; use 1 or more" in capsys.readouterr().err


def test_an_out_that_can_be_no_folder_is_told(tmp_path, capsys):
    out = tmp_path / "file"
    out.touch()
    assert cli.main(["quickstart", "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"gradwire: no folder can be made at {out} (File")
    assert "give --out" in err
    assert len(err.splitlines()) == 1
