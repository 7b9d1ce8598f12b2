# SPDX-License-Identifier: Apache-2.0
"""One training step through the Python client, beside torch in the same run.

    .venv/bin/python benchmarks/step/step.py

SmolLM2-135M, 4 sequences of 512 tokens, 2 threads on each side, f32 and bf16.
The losses are compared first; then the two sides take turns. Prints one JSON
line for each result:

    start             from the creation of a job to the end of its first step
    forward_backward  tokens/s against torch, and the peaks of resident memory
    custom_step       one stream against a forward and a forward_backward
    optim_step        seconds of AdamW

Everything is a median; *_min and *_max are of the slowest and fastest round.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import gradwire
import torch
import transformers

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PRETRAINED = _ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
# Of the losses of the two sides, before anything is timed.
_PARITY = {"f32": 1e-5, "bf16": 1e-2}
GEOMETRY = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
SMOKE = {
    **GEOMETRY,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face directory")
    parser.add_argument("--precisions", default="f32,bf16")
    parser.add_argument("--steps", type=int, default=5, help="rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--torch", choices=["compile", "eager", "none"], default="compile"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a tiny model, a short batch, two rounds, eager torch",
    )
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.sequences, arguments.length = 2, 32
        arguments.steps, arguments.warmup = 2, 1
        if arguments.torch == "compile":
            arguments.torch = "eager"
    return arguments


def find_model(arguments, folder):
    """(directory, what it is); random weights where none are at hand."""
    if arguments.model:
        return pathlib.Path(arguments.model), "given"
    if not arguments.smoke and (_PRETRAINED / "config.json").exists():
        return _PRETRAINED, "pretrained"
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SMOKE if arguments.smoke else GEOMETRY)
    path = pathlib.Path(folder) / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path, "random"


def make_batch(vocab, sequences, length):
    generator = torch.Generator().manual_seed(2)
    whole = torch.randint(vocab, (sequences, length + 1), generator=generator)
    weights = torch.rand(sequences, length, generator=generator) + 0.5
    return {
        "tokens": whole[:, :-1].tolist(),
        "targets": whole[:, 1:].tolist(),
        "weights": weights.tolist(),
    }


def to_data(batch):
    return [
        gradwire.Datum(tokens, {"target_tokens": targets, "weights": weights})
        for tokens, targets, weights in zip(
            batch["tokens"], batch["targets"], batch["weights"], strict=True
        )
    ]


class TorchPeer:
    """torch_peer.py, started and fed."""

    def __init__(self, path, precision, arguments, batch):
        script = pathlib.Path(__file__).with_name("torch_peer.py")
        self._process = subprocess.Popen(
            [
                sys.executable,
                script,
                path,
                precision,
                str(arguments.threads),
                arguments.torch,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._send(batch)

    def _send(self, message):
        print(json.dumps(message), file=self._process.stdin, flush=True)

    def step(self):
        self._send({})
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("step.py: the torch side has ended; see above")
        return json.loads(line)

    def close(self):
        self._process.stdin.close()
        self._process.wait()


class NoPeer:
    def step(self):
        return {"loss": None, "seconds": None, "peak_rss_bytes": None}

    def close(self):
        pass


def peak_rss_bytes(pid):
    """Of the process and its children: the server and its ranks."""
    total = 0
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            status = dict(
                line.split(":", 1)
                for line in (folder / "status").read_text().splitlines()
            )
        except OSError:  # it has ended meanwhile
            continue
        if pid in (int(folder.name), int(status["PPid"])):
            total += int(status["VmHWM"].split()[0]) * 1024
    return total


def timed(work):
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def rates(tokens, seconds, prefix=""):
    return {
        f"{prefix}tokens_per_second": round(
            tokens / statistics.median(seconds), 1
        ),
        f"{prefix}tokens_per_second_min": round(tokens / max(seconds), 1),
        f"{prefix}tokens_per_second_max": round(tokens / min(seconds), 1),
    }


def report(what, precision, **fields):
    line = {"what": what, "precision": precision, **fields}
    print(json.dumps(line), flush=True)


def weighted_sum(data, logprobs):
    loss = -sum(
        (torch.tensor(d.loss_fn_inputs["weights"]) * lp).sum()
        for d, lp in zip(data, logprobs, strict=True)
    )
    return loss, {}


def double_forward(client, data):
    """A custom step as two calls: the forward runs twice."""
    served = client.forward(data).result().logprobs
    leaves = [torch.tensor(lp, requires_grad=True) for lp in served]
    weighted_sum(data, leaves)[0].backward()
    opposite = [
        gradwire.Datum(
            d.model_input, {**d.loss_fn_inputs, "weights": -leaf.grad}
        )
        for d, leaf in zip(data, leaves, strict=True)
    ]
    return client.forward_backward(opposite, "cross_entropy").result()


def measure(service, server, path, precision, arguments):
    config = transformers.AutoConfig.from_pretrained(path)
    batch = make_batch(config.vocab_size, arguments.sequences, arguments.length)
    data = to_data(batch)
    tokens = arguments.sequences * arguments.length
    still = gradwire.AdamParams(learning_rate=0.0)

    def create():
        client = service.create_training_client(path, precision=precision)
        client.forward_backward_custom(data, weighted_sum)
        client.optim_step(still).result()
        return client

    seconds, client = timed(create)
    job = service.get_job(client.job_id)
    report(
        "start",
        precision,
        seconds_to_first_step=round(seconds, 3),
        seconds_to_ready=round(job.seconds_to_ready, 3),
        device=job.device,
        planned_bytes=job.memory.total,
    )

    if arguments.torch == "none":
        peer = NoPeer()
    else:
        peer = TorchPeer(path, precision, arguments, batch)
    own = client.forward_backward(data, "cross_entropy").result().loss
    other = peer.step()["loss"]
    difference = None
    if other is not None:
        difference = abs(own - other) / abs(other)
        if not difference <= _PARITY[precision]:
            raise SystemExit(
                f"step.py: the losses differ: {own} and {other} of torch "
                f"({precision}); nothing was timed"
            )

    mine, theirs, custom, double = [], [], [], []
    for round_number in range(arguments.warmup + arguments.steps):
        a, _ = timed(
            lambda: client.forward_backward(data, "cross_entropy").result()
        )
        b = peer.step()
        c, step = timed(
            lambda: client.forward_backward_custom(data, weighted_sum).result()
        )
        d, _ = timed(lambda: double_forward(client, data))
        assert not step.recomputed, "the activations were not kept"
        if round_number >= arguments.warmup:
            mine.append(a)
            theirs.append(b["seconds"])
            custom.append(c)
            double.append(d)
    steps = []
    for _ in range(arguments.steps):
        client.forward_backward(data, "cross_entropy").result()
        steps.append(timed(lambda: client.optim_step(still).result())[0])
    peak = peak_rss_bytes(server.pid)
    peer_peak = b["peak_rss_bytes"]
    peer.close()
    service.delete_job(client.job_id)

    compared = {}
    if difference is not None:
        compared = {
            **rates(tokens, theirs, "torch_"),
            "torch": arguments.torch,
            "ratio": round(
                statistics.median(theirs) / statistics.median(mine), 3
            ),
            "loss_difference": difference,
            "torch_peak_rss_bytes": peer_peak,
            "peak_rss_ratio": round(peak / peer_peak, 3),
        }
    report(
        "forward_backward",
        precision,
        **rates(tokens, mine),
        peak_rss_bytes=peak,
        **compared,
    )
    report(
        "custom_step",
        precision,
        **rates(tokens, custom),
        **rates(tokens, double, "double_forward_"),
        ratio=round(statistics.median(double) / statistics.median(custom), 3),
    )
    report("optim_step", precision, seconds=round(statistics.median(steps), 4))


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)  # of the client's loss alone
    with tempfile.TemporaryDirectory(prefix="gradwire-step-") as folder:
        path, kind = find_model(arguments, folder)
        for precision in arguments.precisions.split(","):
            # Each with a server of its own, so that peaks are its own.
            with (
                gradwire.LocalServer(threads=arguments.threads) as server,
                gradwire.ServiceClient(address=server.address) as service,
            ):
                info = service.get_server_info()
                report(
                    "run",
                    precision,
                    model=kind,
                    sequences=arguments.sequences,
                    length=arguments.length,
                    threads=arguments.threads,
                    rounds=arguments.steps,
                    device=info.device,
                    cores=os.cpu_count(),
                    server=info.version,
                    torch=torch.__version__,
                    transformers=transformers.__version__,
                    python=platform.python_version(),
                )
                measure(service, server, path, precision, arguments)


if __name__ == "__main__":
    main()
