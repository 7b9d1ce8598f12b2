# SPDX-License-Identifier: Apache-2.0
"""`gradwire quickstart`: a training loop, as a user of gradwire writes it.

First supervised fine-tuning, then a few steps of DPO, both with losses in
Python (`losses.py`) through `forward_backward_custom`. Around the loop stands
what shows that it worked: the loss on questions that were not trained on,
answers before and after, and a check of the exported model.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import time
import uuid

import gradwire
from gradwire.quickstart import data, evaluate, losses, model
from gradwire.quickstart.journal import Journal, say

DEFAULT_STEPS = 56  # optimizer steps in all
_DPO_SHARE = 1 / 7  # of the steps are DPO
_SFT_BATCH = 8  # examples
_DPO_BATCH = 4  # pairs
_SFT_LEARNING_RATE = 5e-5
_DPO_LEARNING_RATE = 1e-5
_DPO_BETA = 0.1
# A full run must lower the held-out loss by this share, a shorter one by as
# much of it as it has steps.
_MARGIN = 0.5
_NUM_SAMPLES = 5


def run(steps=None, out="quickstart-out", precision=None, service=None) -> int:
    """Trains, prints, writes summary.json and the rest; returns the status.

    steps: optimizer steps in all; None means DEFAULT_STEPS.
    precision: "f32", "bf16", or None for the server's choice.
    service: a ServiceClient; None connects to GRADWIRE_ADDRESS, or starts a
        server for this run if that is not set.
    """
    started = time.monotonic()
    steps = DEFAULT_STEPS if steps is None else steps
    if steps < 1:
        print(
            f"gradwire quickstart: --steps is {steps}; use 1 or more",
            file=sys.stderr,
        )
        return 2
    out = pathlib.Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"no folder can be made at {out} ({error.strerror}); give --out "
            "a folder that can be written, or a name that is free"
        ) from error

    import transformers
    from transformers import AutoTokenizer

    transformers.logging.disable_progress_bar()
    base = model.prepare(data.all_texts(), log=say)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    held_out = [
        data.to_datum(tokenizer, e.prompt, e.answer)
        for e in data.held_out_examples()
    ]
    margin = _MARGIN * min(1.0, steps / DEFAULT_STEPS)
    say(
        f"{base.name} ({base.source}), {steps} steps; the loss on "
        f"{len(held_out)} held-out answers must fall by {margin:.0%} or more"
    )
    # Every seventh held-out question, so that the samples differ in kind.
    questions = [e.prompt for e in data.held_out_examples()][::7][:_NUM_SAMPLES]
    before = evaluate.answer(base.path, tokenizer, questions)

    with contextlib.ExitStack() as stack:
        if service is None:
            service = stack.enter_context(_connect(out))
        job = f"quickstart-{uuid.uuid4().hex[:8]}"
        policy = service.create_training_client(
            base_model=str(base.path), job_id=job, precision=precision
        )
        stack.callback(service.delete_job, job)
        stack.callback(policy.close, wait=False)
        precision = _effective_precision(policy, precision)

        loss_before, _ = _held_out_loss(policy, held_out)
        say(f"held-out loss before: {loss_before:.3f} ({precision})")
        journal = Journal(out / "metrics.jsonl", steps)
        num_dpo = round(steps * _DPO_SHARE)
        _train_sft(policy, tokenizer, steps - num_dpo, journal)
        _train_dpo(policy, tokenizer, num_dpo, journal)
        journal.close()
        loss_after, served = _held_out_loss(policy, held_out)

        snapshot = policy.save_weights_for_sampler(
            "quickstart", type="base"
        ).result()
        exported = _fetch(snapshot.local_path, base.path, out / "model")

    gradwire.logging.plot_loss(out / "metrics.jsonl")
    after = evaluate.answer(exported, tokenizer, questions)
    agreement = evaluate.agreement(exported, held_out, served, precision)
    fall = 1 - loss_after / loss_before
    summary = {
        "model": base.name,
        "model_source": base.source,
        "precision": precision,
        "steps": steps,
        "held_out_loss_before": loss_before,
        "held_out_loss_after": loss_after,
        "margin": margin,
        "tokens_per_second": journal.tokens / journal.seconds,
        "training_seconds": journal.seconds,
        "seconds": time.monotonic() - started,
        "exported_difference": agreement.largest,
        "exported_difference_mean": agreement.mean,
        "exported_difference_allowed": agreement.allowed,
        "samples": [
            {"prompt": q, "before": b, "after": a}
            for q, b, a in zip(questions, before, after, strict=True)
        ],
    }
    _write_json(out / "summary.json", summary)
    _report(out, summary)
    return _verdict(summary, fall, agreement)


def _train_sft(policy, tokenizer, steps, journal):
    batches = data.batches(data.train_examples(), _SFT_BATCH, steps, seed=1)
    journal.start("sft")
    for step, examples in enumerate(batches):
        batch = [data.to_datum(tokenizer, e.prompt, e.answer) for e in examples]
        rate = _SFT_LEARNING_RATE * _schedule(step, steps)
        _step(policy, batch, losses.sft, rate, journal)
    journal.drain()


def _train_dpo(policy, tokenizer, steps, journal):
    batches = data.batches(data.preferences(), _DPO_BATCH, steps, seed=2)
    pairs = [
        [
            data.to_datum(tokenizer, p.prompt, text)
            for p in preferences
            for text in (p.chosen, p.rejected)
        ]
        for preferences in batches
    ]
    # The reference is the model as SFT left it, so all of its answers are
    # scored before the first step moves it.
    scored = [(batch, policy.forward(batch)) for batch in pairs]
    references = [_answer_sums(batch, future) for batch, future in scored]
    journal.start("dpo")
    for batch, reference in zip(pairs, references, strict=True):
        _step(
            policy,
            batch,
            losses.dpo(reference, _DPO_BETA),
            _DPO_LEARNING_RATE,
            journal,
        )
    journal.drain()


def _step(policy, batch, loss_fn, learning_rate, journal):
    """One optimizer step; both calls return at once, the server orders them."""
    result = policy.forward_backward_custom(batch, loss_fn)
    update = policy.optim_step(
        gradwire.AdamParams(learning_rate=learning_rate, grad_clip_norm=1.0)
    )
    journal.add(batch, learning_rate, result, update)


def _schedule(step, steps):
    """A short rise, then a straight line to a tenth."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 1 - 0.9 * (step - rise) / max(1, steps - rise)


def _held_out_loss(policy, datums):
    """The mean loss per answer token, and the log-probabilities."""
    logprobs = policy.forward(datums).result().logprobs
    answers = [d.response(lp) for d, lp in zip(datums, logprobs, strict=True)]
    tokens = sum(len(answer) for answer in answers)
    return -sum(float(a.sum()) for a in answers) / tokens, logprobs


def _answer_sums(batch, future):
    logprobs = future.result().logprobs
    return [
        float(d.response(lp).sum())
        for d, lp in zip(batch, logprobs, strict=True)
    ]


@contextlib.contextmanager
def _connect(out):
    if os.environ.get("GRADWIRE_ADDRESS"):
        with gradwire.ServiceClient() as service:
            yield service
        return
    from gradwire.local_server import LocalServer

    state = out / "server-state"
    shutil.rmtree(state, ignore_errors=True)
    with LocalServer(state_dir=state) as server:
        with gradwire.ServiceClient(address=server.address) as service:
            yield service
    # Kept after a failure, for its logs.
    shutil.rmtree(state, ignore_errors=True)


def _effective_precision(policy, asked):
    return getattr(policy.info(), "precision", None) or asked or "f32"


def _fetch(exported, base, target):
    """Copies the snapshot and adds the base's tokenizer where it has none."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(exported, target)
    for file in pathlib.Path(base).iterdir():
        if "safetensors" not in file.name and not (target / file.name).exists():
            shutil.copy(file, target / file.name)
    return target


def _write_json(path, value):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _report(out, summary):
    say("")
    for sample in summary["samples"]:
        say(f"  Q       {sample['prompt']}")
        say(f"  before  {_one_line(sample['before'])}")
        say(f"  after   {_one_line(sample['after'])}\n")
    say(
        f"held-out loss  {summary['held_out_loss_before']:.3f} -> "
        f"{summary['held_out_loss_after']:.3f}\n"
        f"speed          {summary['tokens_per_second']:.0f} tokens/s, "
        f"training took {summary['training_seconds']:.0f} s\n"
        f"export         its log-probabilities differ from the server's by "
        f"{summary['exported_difference_mean']:.2g} on average,\n"
        f"               {summary['exported_difference']:.2g} at most "
        f"({summary['exported_difference_allowed']:.2g} allowed there)\n"
        f"plot           {out / 'loss.png'}\n"
        f"model          {out / 'model'}\n"
        f"figures        {out / 'summary.json'}"
    )


def _one_line(text):
    text = " ".join(text.split())
    return text if len(text) <= 90 else text[:87] + "..."


def _verdict(summary, fall, agreement):
    if not agreement.ok:
        say(
            "gradwire quickstart: the exported model does not give the "
            "server's log-probabilities; please report this with summary.json"
        )
        return 1
    if summary["model_source"] == "pretrained" and fall < summary["margin"]:
        say(
            f"gradwire quickstart: the held-out loss fell by {fall:.1%}, less "
            f"than {summary['margin']:.0%}; please report this with "
            "metrics.jsonl"
        )
        return 1
    return 0
