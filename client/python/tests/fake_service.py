# SPDX-License-Identifier: Apache-2.0
"""A service made of transformers and torch.optim, for tests of user loops.

It has the methods of `ServiceClient` and `TrainingClient` that a loop calls
and their meaning, and no server: what a loop does with results can be tested
apart from how results are computed.
"""

import pathlib
import types

import numpy as np
import torch
from transformers import AutoModelForCausalLM


class Done:
    """A future that has its result."""

    def __init__(self, value):
        self._value = value

    def result(self, timeout=None):
        return self._value


class FakeService:
    def __init__(self, folder):
        self._folder = pathlib.Path(folder)
        self.deleted = []

    def create_training_client(
        self, base_model, *, job_id=None, precision=None
    ):
        return FakeTrainingClient(base_model, self._folder / "snapshots")

    def delete_job(self, job_id):
        self.deleted.append(job_id)


class FakeTrainingClient:
    def __init__(self, base_model, snapshots):
        self._model = AutoModelForCausalLM.from_pretrained(
            base_model, dtype=torch.float32
        )
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), betas=(0.9, 0.95), eps=1e-12
        )
        self._snapshots = snapshots
        self.calls = []

    def info(self):
        return types.SimpleNamespace()

    def close(self, wait=True):
        self.calls.append("close")

    def _logprobs(self, data):
        tokens = [torch.as_tensor(list(d.model_input)) for d in data]
        targets = [
            torch.as_tensor(np.asarray(d.loss_fn_inputs["target_tokens"]))
            for d in data
        ]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        logits = self._model(padded).logits
        return [
            torch.log_softmax(logits[i, : len(t)], -1)
            .gather(1, t[:, None].long())
            .squeeze(1)
            for i, t in enumerate(targets)
        ]

    def forward(self, data):
        self.calls.append("forward")
        with torch.no_grad():
            logprobs = [lp.numpy() for lp in self._logprobs(data)]
        return Done(types.SimpleNamespace(logprobs=logprobs))

    def forward_backward_custom(self, data, loss_fn):
        self.calls.append("forward_backward_custom")
        loss, metrics = loss_fn(data, self._logprobs(data))
        loss.backward()
        metrics = {"loss:sum": loss.item(), **metrics}
        return Done(types.SimpleNamespace(metrics=metrics, loss=loss.item()))

    def optim_step(self, adam_params):
        self.calls.append("optim_step")
        norm = torch.nn.utils.clip_grad_norm_(
            self._model.parameters(), adam_params.grad_clip_norm
        )
        for group in self._optimizer.param_groups:
            group["lr"] = adam_params.learning_rate
            group["weight_decay"] = adam_params.weight_decay
        self._optimizer.step()
        self._optimizer.zero_grad()
        return Done(types.SimpleNamespace(grad_norm=float(norm)))

    def save_weights_for_sampler(self, name, type="base"):
        assert type == "base"
        path = self._snapshots / name
        self._model.save_pretrained(path)
        return Done(types.SimpleNamespace(local_path=str(path)))
