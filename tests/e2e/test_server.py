# SPDX-License-Identifier: Apache-2.0
"""The process gradwired: flags, exit codes, health, metrics."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request

import calls
import gradwire
import numpy as np
import pytest
from conftest import MODELS, sequences
from gradwire.local_server import find_server
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import proto_reflection_descriptor_database
from processes import Server, Watched, ranks_of

LONG = 60
FREE = ("--listen=127.0.0.1:0", "--metrics_listen=127.0.0.1:0")


def status_of(*flags):
    """The exit status of gradwired and what it said."""
    done = subprocess.run(
        [find_server(), *flags], capture_output=True, text=True, timeout=LONG
    )
    return done.returncode, done.stdout + done.stderr


def get(address, path):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=LONG) as got:
        return got.status, got.read().decode()


@pytest.mark.parametrize(
    "flags",
    [
        ("--no_such_flag",),
        ("--threads=many",),
        ("--threads=-1",),
        ("--listen=nonsense",),
        ("--listen=127.0.0.1:99999",),
        ("--listen=0.0.0.0:0",),
        ("--listen=[::]:0",),
        ("--listen=127.example.com:0",),
        ("--metrics_listen=0.0.0.0:0",),
        ("--launch=elsewhere",),
        ("word",),
    ],
)
def test_a_bad_flag_ends_with_2(binaries, tmp_path, flags):
    state = f"--state_dir={tmp_path / 'state'}"
    free = [f for f in FREE if f.split("=")[0] != flags[0].split("=")[0]]
    status, output = status_of(state, *free, *flags)
    assert status == 2, output
    assert output.strip()


def test_a_locked_state_directory_ends_with_3(server):
    status, output = status_of(f"--state_dir={server.state_dir}", *FREE)
    assert status == 3, output
    assert str(server.pid) in output


def test_an_unusable_state_directory_ends_with_3(binaries, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    status, output = status_of(f"--state_dir={file / 'state'}", *FREE)
    assert status == 3, output


@pytest.mark.parametrize("flag", ["listen", "metrics_listen"])
def test_a_taken_port_ends_with_4(binaries, tmp_path, flag):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = [f for f in FREE if not f.startswith(f"--{flag}=")]
        status, output = status_of(
            f"--state_dir={tmp_path / 'state'}",
            f"--{flag}=127.0.0.1:{port}",
            *free,
        )
    assert status == 4, output
    assert str(port) in output


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_is_no_failure(binaries, flag):
    status, output = status_of(flag)
    assert status in (0, 1)  # Abseil's own answer to --help
    assert output.strip()


def test_the_port_file_tells_and_goes(tmp_path):
    server = gradwire.LocalServer(tmp_path / "state", threads=1).start()
    port_file = tmp_path / "state" / "ports.json"
    ports = json.loads(port_file.read_text())
    assert ports == {
        "grpc": server.address,
        "metrics": server.metrics_address,
        "pid": server.pid,
    }
    for address in (server.address, server.metrics_address):
        assert address.startswith("127.0.0.1:")
    server.stop()
    assert not port_file.exists()
    assert server._process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_ends_everything(binaries, tmp_path, models, number):
    state = tmp_path / "state"
    server = gradwire.LocalServer(state, threads=1)
    with server:
        with calls.Stubs(server.address) as stubs:
            job = stubs.create_job(base_model=str(models["llama"]))
            model = calls.Model(stubs, stubs.attach(job))
            data = sequences(MODELS["llama"][1]["vocab_size"], (9, 5))
            model.result(model.forward_backward(calls.batch(data)))
            ranks = [Watched(pid) for pid in ranks_of(server.pid)]
            assert len(ranks) == 1
            os.kill(server.pid, number)
            # Of SIGTERM: whoever started it learns that jobs are to go on.
            goes_on = number == signal.SIGTERM
            assert server._process.wait(LONG) == (143 if goes_on else 0)
        for rank in ranks:
            assert rank.has_ended(LONG)
            rank.close()
        assert not (state / "ports.json").exists()


SERVICES = ("Checkpoint", "Job", "Operation", "Session", "Training")


def test_health_is_the_standard_one(server, shared_job):
    with calls.Stubs(server.address) as stubs:
        health = health_pb2_grpc.HealthStub(stubs.channel)
        services = ["", *(f"gradwire.v1.{s}Service" for s in SERVICES)]
        for service in services:
            request = health_pb2.HealthCheckRequest(service=service)
            assert (
                health.Check(request).status
                == health_pb2.HealthCheckResponse.SERVING
            )
            watching = health.Watch(request)
            assert (
                next(watching).status == health_pb2.HealthCheckResponse.SERVING
            )
            watching.cancel()
        with pytest.raises(calls.grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="no.Such"))
        assert caught.value.code() == calls.grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(server):
    with calls.Stubs(server.address) as stubs:
        module = proto_reflection_descriptor_database
        database = module.ProtoReflectionDescriptorDatabase(stubs.channel)
        found = set(database.get_services())
        for name in SERVICES:
            assert f"gradwire.v1.{name}Service" in found
        file = database.FindFileContainingSymbol("gradwire.v1.TrainingService")
        assert "ForwardBackwardCustom" in [
            method.name for method in file.service[0].method
        ]


def test_probes_answer(server):
    for path in ("/livez", "/readyz"):
        status, _ = get(server.metrics_address, path)
        assert status == 200
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server.metrics_address, "/nothing")
    with contextlib.closing(caught.value):
        assert caught.value.code == 404


def test_probes_answer_beside_connections_that_ask_for_nothing(server):
    host, port = server.metrics_address.rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            silent = socket.create_connection((host, int(port)))
            stack.enter_context(contextlib.closing(silent))
            silent.sendall(b"GET /livez HTTP/1.1\r\n")
        with urllib.request.urlopen(
            f"http://{server.metrics_address}/livez", timeout=4
        ) as got:
            assert got.status == 200


METRICS = {
    "grpc_server_started_total": "counter",
    "grpc_server_handled_total": "counter",
    "gradwire_rpc_in_flight": "gauge",
    "gradwire_rpc_dedup_total": "counter",
    "gradwire_build_info": "gauge",
    "gradwire_job_state": "gauge",
    "gradwire_job_phase": "gauge",
    "gradwire_job_last_progress_timestamp_seconds": "gauge",
    "gradwire_job_step": "gauge",
    "gradwire_ops_queue_depth": "gauge",
    "gradwire_queue_bytes": "gauge",
    "gradwire_op_total": "counter",
    "gradwire_op_queue_seconds": "histogram",
    "gradwire_op_execution_seconds": "histogram",
    "gradwire_tokens_total": "counter",
    "gradwire_optim_steps_total": "counter",
    "gradwire_loss": "gauge",
    "gradwire_grad_norm": "gauge",
    "gradwire_learning_rate": "gauge",
    "gradwire_rank_up": "gauge",
    "process_cpu_seconds_total": "counter",
    "process_resident_memory_bytes": "gauge",
    "process_open_fds": "gauge",
    "process_start_time_seconds": "gauge",
}
SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")


def scrape(server):
    """({family: type}, {(name, frozenset of labels): value})."""
    _, text = get(server.metrics_address, "/metrics")
    types, samples = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            types[name] = kind
        elif line and not line.startswith("#"):
            name, labels, value = SAMPLE.fullmatch(line).groups()
            pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")
            samples[name, frozenset(pairs)] = float(value)
    return types, samples


def value(samples, name, **labels):
    """The sum over all samples that have these labels."""
    wanted = set(labels.items())
    return sum(
        sample
        for (family, its), sample in samples.items()
        if family == name and wanted <= its
    )


def test_metrics_have_their_names_and_count(server, stubs, models):
    job = stubs.create_job(base_model=str(models["llama"]), precision="f32")
    model = calls.Model(stubs, stubs.attach(job))
    _, before = scrape(server)
    data = sequences(MODELS["llama"][1]["vocab_size"], (9, 5))
    tokens = sum(len(d.model_input) for d in data)
    # A prompt of two tokens.
    weights = np.ones(len(data[0].model_input), np.float32)
    weights[:2] = 0
    data[0].loss_fn_inputs["weights"] = weights
    trained = sum(
        int(np.count_nonzero(d.loss_fn_inputs["weights"])) for d in data
    )
    calls_made = 3
    for _ in range(calls_made):
        parts = calls.batch(data)
        seq = model.due()
        model.result(model.forward_backward(parts, seq=seq))
        model.forward_backward(parts, seq=seq)  # a repetition counts once
    model.result(model.optim_step(learning_rate=0.25))
    types, after = scrape(server)
    for name, kind in METRICS.items():
        assert types.get(name) == kind, name

    def grown(name, **labels):
        return value(after, name, **labels) - value(before, name, **labels)

    for kind, count in (("trained", trained), ("prompt", tokens - trained)):
        assert grown("gradwire_tokens_total", job_id=job, kind=kind) == (
            calls_made * count
        )
    model.result(model.forward(calls.batch(data)))
    _, scored = scrape(server)
    labels = {"job_id": job, "kind": "scored", "op": "forward"}
    assert value(scored, "gradwire_tokens_total", **labels) == tokens
    assert grown("gradwire_op_total", op="forward_backward", outcome="ok") == (
        calls_made
    )
    assert grown("gradwire_rpc_dedup_total", outcome="replayed") == calls_made
    assert (
        grown("gradwire_optim_steps_total", job_id=job, outcome="applied") == 1
    )
    assert value(after, "gradwire_job_step", job_id=job) == 1
    assert value(after, "gradwire_learning_rate", job_id=job) == 0.25
    assert value(after, "gradwire_job_phase", job_id=job, phase="ready") == 1
    handled = grown(
        "grpc_server_handled_total",
        grpc_service="gradwire.v1.TrainingService",
        grpc_method="ForwardBackward",
        grpc_code="OK",
    )
    assert handled == 2 * calls_made
    assert value(after, "gradwire_build_info") == 1
    assert value(after, "process_resident_memory_bytes") > 1 << 20


def test_the_step_of_a_job_is_that_of_its_weights(binaries, tmp_path, models):
    def told(server):
        _, samples = scrape(server)
        return samples["gradwire_job_step", frozenset({("job_id", "job")})]

    with Server(tmp_path) as server, calls.Stubs(server.address) as stubs:
        stubs.create_job("job", base_model=str(models["llama"]))
        assert told(server) == 0
        model = calls.Model(stubs, stubs.attach("job"))
        batch = calls.batch(sequences(9, (5,)))

        def step():
            model.result(model.forward_backward(batch))
            model.result(model.optim_step())

        step()
        model.result(model.save_state("one"))
        step()
        assert told(server) == 2
        model.result(model.load_state("one", optimizer=True))
        assert told(server) == 1
    with Server(tmp_path) as server, calls.Stubs(server.address) as stubs:
        stubs.watch("job", lambda job: job.ready)
        assert told(server) == 1


def test_a_method_that_there_is_not_is_counted_as_unknown(server, stubs):
    call = stubs.channel.unary_unary("/gradwire.v1.JobService/Nothing")
    with pytest.raises(calls.grpc.RpcError):
        call(b"")
    _, samples = scrape(server)
    assert value(samples, "grpc_server_started_total", grpc_service="unknown")
    assert not value(
        samples, "grpc_server_started_total", grpc_service="nknown"
    )


def test_server_info_describes_this_machine(service):
    info = service.get_server_info()
    assert 1 <= info.cores <= os.cpu_count()
    page = os.sysconf("SC_PAGE_SIZE")
    assert info.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * page
    assert 0 < info.memory_available_bytes <= info.memory_bytes
    assert {"f32", "bf16"} <= set(info.precisions)
    assert set(info.architectures) == {
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }


def test_a_job_reports_its_plan(service, stubs, models):
    job = stubs.create_job(base_model=str(models["llama"]), precision="bf16")
    found = service.get_job(job)
    plan = found.memory
    parts = (
        plan.weights
        + plan.gradients
        + plan.optimizer
        + plan.activations
        + plan.workspace
    )
    assert plan.total == parts <= plan.available
    profile = service.get_profile(job)
    # A float32 master in two halves, a gradient, two moments: 16 bytes each,
    # and gaps that align them.
    for planned, bytes_each in (
        (plan.weights, 4),
        (plan.gradients, 4),
        (plan.optimizer, 8),
    ):
        least = bytes_each * profile.num_parameters
        assert least <= planned < 1.1 * least
    assert found.seconds_to_ready > 0
    assert profile.vocab_size == MODELS["llama"][1]["vocab_size"]
    assert profile.precision == "bf16"
    assert {loss.loss_fn for loss in profile.losses} >= {
        "cross_entropy",
        "importance_sampling",
        "ppo",
        "cispo",
        "dro",
    }
    service.delete_job(job)
