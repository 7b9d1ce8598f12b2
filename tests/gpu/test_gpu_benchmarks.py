# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of a GPU, on the emulator and on PyTorch's CPU build."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import FIELDS  # noqa: E402
from gpu import goals, sides, step  # noqa: E402

BIN = ROOT / "bazel-bin" / "benchmarks"
STEP = BIN / "gpu" / "gpu_step_emulated"
OPS = BIN / "cuda_kernels" / "cuda_kernels_emulated"
SAVES = BIN / "checkpoint" / "gpu_checkpoint_emulated"


def need(binary):
    if not binary.exists():
        pytest.skip(f"{binary.name} was not built: there is no CUDA toolkit")
    return binary


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        **options,
    )


def lines_of(output):
    return [
        json.loads(line) for line in output.splitlines() if line.startswith("{")
    ]


@pytest.mark.parametrize(
    ("precision", "way"), [("f32", "f32"), ("bf16", "master head=16")]
)
def test_a_step_of_the_gpu_kernels_is_that_of_pytorch(precision, way):
    done = run(
        sys.executable,
        ROOT / "benchmarks/gpu/step.py",
        *("--device=cpu", "--model=tiny", "--shape=3x16"),
        *("--rounds=1", "--warm=0", f"--precision={precision}"),
        *(f"--way={way}", f"--binary={need(STEP)}"),
    )
    assert done.returncode == 0, done.stderr
    lines = {line["mode"]: line for line in lines_of(done.stdout)}
    assert set(lines) == set(step.MODE_NAMES.values())
    for line in lines.values():
        assert set(FIELDS) <= set(line)
        assert line["dloss"] <= step.MAX_LOSS_DIFFERENCE[precision]
        assert line["grad_cos"] >= step.MIN_COSINE
        assert line["tokens"] == 48
        assert line["tok_s"] > 0
    assert lines["torch_ft"]["ratio"] == 1
    assert lines["double_forward"]["ratio"] == 1


class Told:
    """A side that answers with a sum and writes a gradient."""

    def __init__(self, total, gradient):
        self._total, self._gradient = total, gradient

    def ask(self, command):
        word, *arguments = command.split()
        if word == "gradient":
            pathlib.Path(arguments[0]).write_bytes(
                self._gradient.numpy().tobytes()
            )
        return {"logprob_sum": self._total}


@pytest.fixture
def parity(tmp_path):
    """A run that has asked gradwire's side, which said this."""
    # Threads that wait for each other take long on a machine that is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    told = object.__new__(step.Run)
    told.geometry = step.GEOMETRIES["tiny"]
    told.scratch = tmp_path
    told.args = type("Args", (), {"precision": "bf16"})
    shapes = told.geometry.shapes()
    size = sum(math.prod(shapes[n]) for n in told.geometry.sampled())
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(1))
    told.total = -100.0
    told.gradients = told.gradient(Told(-100.0, gradient))
    yield told, gradient
    torch.set_num_threads(threads)


def test_equal_sides_have_parity(parity):
    run, gradient = parity
    run.check("the same", Told(-100.5, 2 * gradient))
    assert run.cosine == pytest.approx(1)
    assert run.dloss == pytest.approx(0.005)


@pytest.mark.parametrize("total", [-102.0, math.nan])
def test_another_loss_ends_the_benchmark(parity, total):
    run, gradient = parity
    with pytest.raises(SystemExit, match="logprobs sum to"):
        run.check("another", Told(total, gradient))


def test_another_gradient_ends_the_benchmark(parity):
    run, gradient = parity
    wrong = gradient.clone()
    wrong[: len(wrong) // 2] *= 0.8
    with pytest.raises(SystemExit, match="cosine of gradients"):
        run.check("another", Told(-100.0, wrong))


class Timed:
    """A side whose every step takes this long."""

    def __init__(self, name, seconds, started):
        self.about = {"attention": "FLASH"}
        self._name, self._seconds, self._started = name, seconds, started

    def seconds(self, mode):
        self._started.append((self._name, mode))
        return self._seconds * (1.5 if mode == "double" else 1.0)

    def close(self):
        self._started.append((self._name, "close"))


@pytest.mark.parametrize(("total", "together"), [(400, True), (200, False)])
def test_sides_that_do_not_fit_at_once_run_after_each_other(
    monkeypatch, capsys, total, together
):
    gib = 2**30
    monkeypatch.setattr(step.machine, "total_bytes", lambda: total * gib)
    monkeypatch.setattr(step.machine, "query", lambda *_: ["NVIDIA H200", "1"])
    calls = []
    run = object.__new__(step.Run)
    run.geometry = step.GEOMETRIES["Qwen3-4B"]
    run.args = step.arguments(["--rounds=2", "--warm=1", "--shape=4x1024"])
    run.gpu, run.idle = True, gib
    run.peaks = {"gradwire": 80 * gib, "a way": 100 * gib}
    run.dloss = run.cosine = run.least_cosine = 1.0
    run.start_ours = lambda: Timed("gradwire", 0.25, calls)
    run.start_theirs = lambda way: Timed("torch", 0.5, calls)
    seconds, about = step.alternate(run, "a way")
    turns = [name for name, mode in calls if mode == "close"]
    assert about["alternating"] is together
    assert turns == (
        ["gradwire", "torch"] if together else ["gradwire", "torch", "gradwire"]
    )
    assert len(seconds["step"]) == (2 if together else 4)
    assert len(seconds["torch_step"]) == 2
    step.report(run, "a way", {"gemm": 8e14, "copy": 4e12}, seconds, about)
    lines = {x["mode"]: x for x in lines_of(capsys.readouterr().out)}
    assert lines["ft"]["ratio"] == pytest.approx(2)
    assert lines["custom"]["ratio"] == pytest.approx(1.5)
    useful = run.geometry.useful_flops(4, 1024)
    assert lines["ft"]["mfu_c"] == pytest.approx(useful / 0.25 / 989.4e12)
    assert lines["ft"]["mcu"] == pytest.approx(useful / 0.25 / 8e14)
    assert lines["ft"]["hfu"] > lines["ft"]["mfu_c"]
    assert lines["ft"]["peak_mem"] == 80 * gib
    assert lines["torch_ft"]["peak_mem"] == 100 * gib


@pytest.mark.parametrize("model", ["tiny", "tiny-untied"])
def test_where_memory_is_tight_both_sides_make_activations_again(model):
    done = run(
        sys.executable,
        ROOT / "benchmarks/gpu/step.py",
        *("--device=cpu", f"--model={model}", "--shape=3x16", "--tight"),
        *("--rounds=1", "--warm=0", "--moments=bf16"),
        *("--way=master ac=1", "--way=bf16 ac head=16"),
        f"--binary={need(STEP)}",
    )
    assert done.returncode == 0, done.stderr
    for way in ("master ac=1", "bf16 ac head=16"):
        assert f"parity with {way}:" in done.stderr
    lines = {line["mode"]: line for line in lines_of(done.stdout)}
    assert set(lines) == {
        *("ft", "ft_forward_backward"),
        *("torch_ft", "torch_ft_forward_backward"),
    }
    assert lines["ft"]["recompute"] == "planned"
    assert lines["torch_ft"]["recompute"] in ("ac", "ac=1")
    assert lines["ft"]["optimizer"] == "adamw, bf16 moments"


def test_a_ragged_batch_has_as_many_tokens():
    done = run(
        sys.executable,
        ROOT / "benchmarks/gpu/lengths.py",
        *("--device=cpu", "--model=tiny", "--shape=2x64"),
        *("--rounds=1", "--warm=0", f"--binary={need(STEP)}"),
    )
    assert done.returncode == 0, done.stderr
    lines = {line["mode"]: line for line in lines_of(done.stdout)}
    full, ragged = lines["full"], lines["ragged"]
    assert set(FIELDS) <= set(full)
    assert full["tokens"] == ragged["tokens"] == 128
    assert full["sequences"] == 2 < ragged["sequences"]
    assert ragged["useful_flops"] < full["useful_flops"]
    assert ragged["ratio"] == pytest.approx(full["ms"][0] / ragged["ms"][0])
    assert goals.table(lines_of(done.stdout)).count("not measured") == (
        len(goals.GOALS) - 1
    )


def test_saves_of_a_gpu_are_timed():
    done = run(
        sys.executable,
        ROOT / "benchmarks/gpu/saves.py",
        *("--device=cpu", "--model=tiny", "--shape=3x16", "--rounds=1"),
        f"--binary={need(SAVES)}",
    )
    assert done.returncode == 0, done.stderr
    lines = {line["op"]: line for line in lines_of(done.stdout)}
    assert set(lines) == {"checkpoint", "delta", "base"}
    for line in lines.values():
        assert set(FIELDS) <= set(line)
        assert line["model"] == "tiny"
        assert line["ms"][0] > 0
        assert line["still_ms"][0] > 0


def test_the_work_of_a_step_is_that_of_the_specification():
    # GFLOP a token of a full fine-tune, at 1k and 4k tokens.
    for name, length, gflop in [
        ("Qwen3-0.6B", 1024, 3.93),
        ("Qwen3-0.6B", 4096, 4.99),
        ("Qwen3-1.7B", 4096, 11.7),
        ("Qwen3-4B", 4096, 27.8),
    ]:
        flops = step.GEOMETRIES[name].useful_flops(1, length) / length
        assert flops == pytest.approx(1e9 * gflop, rel=0.01)


def test_a_side_that_ends_says_why(tmp_path):
    binary = need(STEP)
    with pytest.raises(sides.SideEnded, match="config.json"):
        sides.gradwire(binary, tmp_path / "nowhere", 1, 16, "bf16")


def test_every_op_of_the_table_gives_finite_numbers():
    done = run(need(OPS), "--model=tiny", "--tokens=48", "--length=16",
               "--rounds=1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    ops = {line["op"] for line in lines_of(done.stdout)}
    assert {
        "copy",
        "matmul_backward_weight_down",
        "attention_backward",
        "logprob_head_backward",
        "embedding_backward",
        "rmsnorm_backward",
        "qk_norm_rope_backward",
        "bias_backward",
        "adamw",
    } <= ops


def measured(bench, **fields):
    return {"bench": bench, "commit": "c", "dtype": "bf16"} | fields


def steps(model, tok_s, way="master compile head=1024", **fields):
    """A whole step and PyTorch's, which makes 1,000 tokens a second."""
    common = {
        "model": model,
        "T": 4096,
        "tokens": 4096,
        "recompute": "none",
        "baseline": {"name": "torch", "options": f"{way}, SDPA FLASH"},
        "mfu_c": 0.55,
        "mcu": 0.7,
        "peaks": {"gradwire": 60, "master compile": 75, way: 80},
    } | fields
    return [
        measured("gpu_step", **common, mode="ft", tok_s=tok_s,
                 ratio=tok_s / 1000),
        measured("gpu_step", **common, mode="torch_ft", tok_s=1000.0, ratio=1),
    ]  # fmt: skip


def verdicts(lines):
    """The last column and the measured one of each goal's first row."""
    rows = {}
    for row in goals.table(goals.counted(lines)).splitlines()[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        rows.setdefault(cells[0], (cells[4], cells[5]))
    return rows


def test_a_goal_needs_all_models_and_takes_the_worst():
    lines = steps("Qwen3-1.7B", 1100.0)
    assert verdicts(lines)["G1"] == ("-", "not measured: gpu.sh step")
    lines += steps("Qwen3-4B", 1030.0)
    assert verdicts(lines)["G1"] == ("1.03x", "must")
    # Another batch, at which both are faster, but PyTorch more so.
    faster = steps("Qwen3-4B", 1200.0, tokens=8192)
    faster[1]["tok_s"] = 1300.0
    assert verdicts(lines + faster)["G1"] == ("0.92x", "BELOW")
    assert verdicts(lines)["G3"] == ("55.0 %", "must")
    assert verdicts(lines)["G9"] == ("0.75x", "target")


def test_a_goal_does_not_take_the_lines_of_another():
    lines = [
        *steps("Qwen3-1.7B", 5000.0, way="master"),  # eager
        *steps("Qwen3-4B", 4000.0, way="master"),
        *steps("Qwen3-0.6B", 4500.0, way="master"),
        *steps("Qwen3-0.6B", 1700.0, way="master reduce-overhead", tokens=512),
        *steps("Qwen3-0.6B", 1800.0, way="bf16 reduce-overhead", tokens=2048),
        *steps("Qwen3-8B", 900.0, recompute="planned"),
    ]
    rows = verdicts(lines)
    assert rows["G1"][0] == "-"
    assert rows["G6"] == ("4.50x", "target")
    assert rows["G7"] == ("1.70x", "target")
    assert rows["G2"][0] == "-", "a model is missing"
    lines += steps("Qwen3-4B", 1200.0, recompute="planned", tokens=32768)
    assert verdicts(lines)["G2"] == ("0.90x", "BELOW")
    again = steps("Qwen3-8B", 1300.0, way="max-autotune", recompute="planned")
    assert verdicts(lines + again)["G2"] == ("1.20x", "must")


def test_only_the_last_commit_counts_and_the_later_of_two_lines():
    both = [*steps("Qwen3-1.7B", 1200.0), *steps("Qwen3-4B", 1200.0)]
    old = [line | {"commit": "old", "tok_s": 9000.0} for line in both]
    again = steps("Qwen3-4B", 1001.0)
    assert verdicts(old + both)["G1"] == ("1.20x", "target")
    assert verdicts(old + both + again)["G1"] == ("1.00x", "must")
    assert verdicts([])["G1"][0] == "-"


def test_ops_count_by_the_least_of_them():
    def op(name, **fields):
        return measured("torch_ops", op=name, model="Qwen3-1.7B", **fields)

    lines = [
        op(name, T=length, ratio=1.2)
        for name in ("attention_forward", "attention_backward")
        for length in (1024, 4096, 16384)
    ]
    assert verdicts(lines)["G11"] == ("1.20x", "target")
    lines[3]["ratio"] = 0.96
    assert verdicts(lines)["G11"] == ("0.96x", "must")
    assert verdicts(lines[1:])["G11"][0] == "-"
    copy = measured("cuda_kernels", op="copy_to_host", share_of_pinned=0.5)
    assert verdicts([copy])["G18"] == ("50.0 %", "BELOW")


def test_the_table_is_made_of_a_file_of_the_caller(tmp_path):
    lines = [*steps("Qwen3-1.7B", 1200.0), *steps("Qwen3-4B", 1200.0)]
    text = "\n".join(["a table", *(json.dumps(line) for line in lines)])
    (tmp_path / "lines").write_text(text + "\n")
    env = os.environ | {"PYTHON": sys.executable}
    command = [ROOT / "benchmarks/gpu.sh", "goals"]
    done = run(*command, "lines", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "| 1.20x | target |" in done.stdout
    for name in ("nowhere", "damaged"):
        (tmp_path / "damaged").write_text('{"bench": ')
        done = run(*command, name, cwd=tmp_path, env=env)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("part", ["step", "ops", "tight", "saves", "all"])
def test_a_machine_without_a_gpu_is_told_so(tmp_path, part):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    fake.chmod(0o755)
    done = run(
        ROOT / "benchmarks/gpu.sh",
        part,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode != 0
    assert "no GPU" in done.stdout + done.stderr
    assert not lines_of(done.stdout)
