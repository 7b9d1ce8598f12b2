# SPDX-License-Identifier: Apache-2.0
"""Training examples, and the one place where tokens are shifted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gradwire.errors import invalid


def to_array(values: Any, dtype: Any) -> np.ndarray:
    """A contiguous array of a torch tensor, an array or a list."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
        values = values.numpy()
    return np.ascontiguousarray(np.asarray(values), dtype=dtype)


@dataclasses.dataclass(frozen=True)
class TextChunk:
    tokens: tuple[int, ...]


class ModelInput(Sequence[int]):
    """The tokens that the model reads."""

    def __init__(self, tokens: Any):
        ids = np.asarray(to_array(tokens, None))
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise invalid(
                "SHAPE_MISMATCH",
                "model_input must be a flat sequence of integers; got shape "
                f"{list(ids.shape)} of {ids.dtype}",
                field="model_input",
            )
        limit = np.iinfo(np.int32)
        if ids.size and (ids.min() < limit.min or ids.max() > limit.max):
            raise invalid(
                "TOKEN_OUT_OF_RANGE",
                "model_input holds a token id that does not fit 32 bits",
                field="model_input",
            )
        self._tokens = ids.astype(np.int32)

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        return cls(tokens)

    @property
    def tokens(self) -> np.ndarray:
        """int32, [N]."""
        return self._tokens

    @property
    def chunks(self) -> list[TextChunk]:
        return [TextChunk(tuple(self.to_ints()))]

    @property
    def length(self) -> int:
        return len(self._tokens)

    def to_ints(self) -> list[int]:
        return self._tokens.tolist()

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: Any) -> Any:
        part = self._tokens[index]
        return int(part) if np.ndim(part) == 0 else part.tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.to_ints())

    def __repr__(self) -> str:
        return f"ModelInput({self.to_ints()!r})"


class Datum:
    """One example: N input tokens and named arrays with N entries each.

    The entry i of every array belongs to the token after input token i, so the
    arrays are shifted by one; `from_tokens` does that.
    """

    def __init__(
        self,
        model_input: ModelInput | Sequence[int],
        loss_fn_inputs: Mapping[str, Any] | None = None,
        *,
        response_start: int | None = None,
    ):
        if not isinstance(model_input, ModelInput):
            model_input = ModelInput(model_input)
        self.model_input = model_input
        self.loss_fn_inputs: dict[str, Any] = dict(loss_fn_inputs or {})
        self._response_start = response_start

    @classmethod
    def from_tokens(
        cls,
        tokens: Any,
        *,
        prompt_length: int = 0,
        weights: Any = None,
        advantages: Any = None,
        logprobs: Any = None,
    ) -> Datum:
        """The datum of a whole sequence s[0..L), prompt and response.

        weights, advantages and logprobs have one entry for each token of the
        sequence (the first is dropped, for nothing predicts the first token)
        or for each token of the response. Weights are 1 where none are given,
        and always 0 up to the prompt's end.
        """
        ids = ModelInput(tokens).tokens
        length = len(ids)
        if length < 2:
            raise invalid(
                "EMPTY_BATCH",
                f"a sequence of {length} tokens predicts nothing; give 2 or "
                "more",
                field="tokens",
                value=length,
            )
        if not 0 <= prompt_length <= length:
            raise invalid(
                "SHAPE_MISMATCH",
                f"prompt_length is {prompt_length}; it must lie in 0..{length}",
                field="prompt_length",
                value=prompt_length,
                limit=length,
            )
        start = max(prompt_length - 1, 0)

        def shifted(name: str, values: Any) -> np.ndarray:
            array = to_array(values, np.float32)
            if len(array) == length:
                return array[1:].copy()
            if len(array) == length - prompt_length:
                if prompt_length == 0:
                    return array[1:].copy()
                full = np.zeros((length - 1, *array.shape[1:]), np.float32)
                full[start:] = array
                return full
            raise invalid(
                "SHAPE_MISMATCH",
                f"{name} has {len(array)} entries; give one for each of the "
                f"{length} tokens or of the {length - prompt_length} response "
                "tokens",
                field=name,
                value=len(array),
                limit=length,
            )

        ones = np.ones(length, np.float32) if weights is None else weights
        mask = shifted("weights", ones)
        mask[:start] = 0
        inputs: dict[str, Any] = {
            "target_tokens": ids[1:].astype(np.int64),
            "weights": mask,
        }
        if advantages is not None:
            inputs["advantages"] = shifted("advantages", advantages)
        if logprobs is not None:
            inputs["logprobs"] = shifted("logprobs", logprobs)
        return cls(ids[:-1], inputs, response_start=start)

    def response(self, per_token: Any) -> Any:
        """The response's part of anything with one entry for each target."""
        if len(per_token) != len(self.model_input):
            raise invalid(
                "SHAPE_MISMATCH",
                f"got {len(per_token)} entries for {len(self.model_input)} "
                "positions",
                value=len(per_token),
                limit=len(self.model_input),
            )
        return per_token[self._start() :]

    def _start(self) -> int:
        if self._response_start is not None:
            return self._response_start
        weights = self.loss_fn_inputs.get("weights")
        if weights is None:
            return 0
        counted = np.flatnonzero(to_array(weights, np.float32))
        return int(counted[0]) if counted.size else len(self.model_input)

    def __repr__(self) -> str:
        names = ", ".join(sorted(self.loss_fn_inputs))
        return f"Datum({len(self.model_input)} tokens, {names})"
