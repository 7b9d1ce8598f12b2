# SPDX-License-Identifier: Apache-2.0
"""The quickstart's instructions, as text and as datums.

Every answer of the data set keeps to the manner of a ship's radio: "Aye!", one
short sentence, "Over and out." The pretrained model never answers like that,
so one look at an answer tells whether the training worked.
"""

import dataclasses
import importlib.resources
import json

import gradwire


@dataclasses.dataclass(frozen=True)
class Example:
    """A question and the answer that is wanted."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to a question: in the manner, and as a chatbot would."""

    prompt: str
    chosen: str
    rejected: str


def _read(name, kind):
    folder = importlib.resources.files(__package__) / "data"
    text = (folder / name).read_text(encoding="utf-8")
    return [kind(**json.loads(line)) for line in text.splitlines()]


def train_examples() -> list[Example]:
    return _read("train.jsonl", Example)


def held_out_examples() -> list[Example]:
    """Questions that are trained on nowhere."""
    return _read("held_out.jsonl", Example)


def preferences() -> list[Preference]:
    return _read("preferences.jsonl", Preference)


def all_texts() -> list[str]:
    """What a tokenizer for a random model is made from."""
    return [text for e in train_examples() for text in (e.prompt, e.answer)]


def prompt_tokens(tokenizer, prompt: str) -> list[int]:
    """The question in the model's chat form, up to where the answer starts."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def to_datum(tokenizer, prompt: str, answer: str) -> gradwire.Datum:
    """One datum; `from_tokens` shifts and gives the prompt weight 0."""
    question = prompt_tokens(tokenizer, prompt)
    reply = tokenizer(answer, add_special_tokens=False)["input_ids"]
    tokens = question + reply + [tokenizer.eos_token_id]
    return gradwire.Datum.from_tokens(tokens, prompt_length=len(question))


def batches(items, size: int, count: int, seed: int) -> list[list]:
    """`count` batches of `size` items, every item once before any again."""
    import numpy as np

    generator = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < size * count:
        order += generator.permutation(len(items)).tolist()
    return [
        [items[i] for i in order[size * n : size * (n + 1)]]
        for n in range(count)
    ]
