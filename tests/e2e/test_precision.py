# SPDX-License-Identifier: Apache-2.0
"""The precision of a job that names none, with instructions and without.

oneDNN can be held to a lesser instruction set by its environment variable: the
server then runs as it would on a lesser machine.
"""

import json
import subprocess

import gradwire
import oracle
import pytest
import torch
from conftest import MODELS, sequences
from gradwire import cli


@pytest.fixture(params=["", "AVX512_CORE", "AVX2"])
def isa(request, monkeypatch):
    """The most that oneDNN may use; empty: all there is."""
    if request.param:
        monkeypatch.setenv("DNNL_MAX_CPU_ISA", request.param)
    return request.param


def describe(binaries):
    rank = binaries / "gradwire_rank"
    done = subprocess.run([rank, "--describe"], capture_output=True, check=True)
    return json.loads(done.stdout)


def info_of(service, path, **options):
    client = service.create_training_client(path, **options)
    info = client.info()
    job = service.get_job(client.job_id)
    service.delete_job(client.job_id)
    return info, job


def test_the_choice_is_the_instruction_sets_and_the_same_everywhere(
    isa, binaries, models, capsys
):
    said = describe(binaries)
    native = said["isa"] in ("avx512_bf16", "amx_bf16")
    assert said["default_precision"] == ("bf16" if native else "f32")
    if isa:
        assert not native
        assert "no bf16 products" in said["default_precision_reason"]
    cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["isa"] == [said["isa"]]
    assert report["default_precision"] == said["default_precision"]

    with (
        gradwire.LocalServer(threads=2) as server,
        gradwire.ServiceClient(address=server.address) as service,
    ):
        info, job = info_of(service, models["llama"])
        assert info.precision == said["default_precision"]
        assert info.profile.device == f"{said['device']}, 2 threads"
        assert job.device == info.profile.device
        info, _ = info_of(service, models["llama"], precision="bf16")
        assert info.precision == "bf16"


@pytest.mark.parametrize("isa", ["AVX512_CORE", "AVX2"], indirect=True)
def test_bf16_is_right_where_it_is_widened(isa, models):
    judge = oracle.load(models["llama"])
    data = sequences(MODELS["llama"][1]["vocab_size"], (9, 2, 31))

    def compute(model):
        with torch.no_grad():
            found = [oracle.logprobs(model, datum) for datum in data]
        return {str(i): lp for i, lp in enumerate(found)}

    with (
        gradwire.LocalServer(threads=2) as server,
        gradwire.ServiceClient(address=server.address) as service,
    ):
        client = service.create_training_client(
            models["llama"], precision="bf16"
        )
        served = client.forward(data).result().logprobs
        step = client.forward_backward(data, "cross_entropy").result()
        client.optim_step(gradwire.AdamParams(learning_rate=1e-3)).result()
        after = client.forward_backward(data, "cross_entropy").result()
    exact, tolerance = oracle.with_tolerance(judge, compute, "bf16")
    found = {str(i): lp for i, lp in enumerate(served)}
    assert oracle.worst_of(found, exact, tolerance) == {}
    assert after.metrics["loss:sum"] < step.metrics["loss:sum"]
