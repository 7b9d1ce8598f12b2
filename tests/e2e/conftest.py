# SPDX-License-Identifier: Apache-2.0
"""A real server, tiny random models and jobs on them, shared by the tests."""

import subprocess

import calls
import gradwire
import pytest
import torch
import transformers
from gradwire._proto.gradwire.v1 import jobs_pb2
from gradwire.local_server import find_server

# The models are tiny, and the server computes beside the tests.
torch.set_num_threads(1)

_COMMON = {
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
# name: (configuration class, what differs)
MODELS = {
    "llama": (
        transformers.LlamaConfig,
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 10000.0,
            },
        },
    ),
    "qwen2": (
        transformers.Qwen2Config,
        {
            "vocab_size": 131,
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": (
        transformers.Qwen3Config,
        {
            "vocab_size": 61,
            "hidden_size": 40,
            "intermediate_size": 64,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
}


def save_model(name, path, **changes):
    """A random model as a Hugging Face directory."""
    kind, fields = MODELS[name]
    torch.manual_seed(len(name))
    config = kind(**{**_COMMON, **fields, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases: else 1 and 0
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert parameter.dtype == torch.float32, parameter_name
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def binaries():
    """The folder of gradwired and gradwire_rank; skips without them."""
    try:
        server = find_server()
    except gradwire.GradwireError as error:
        pytest.skip(error.message)
    for name in ("gradwire_rank", "gradwire-rank"):
        if server.with_name(name).exists():
            return server.parent
    pytest.skip(
        "gradwire_rank was not found beside gradwired; run `bazel build "
        "//server:gradwire_rank`"
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return {
        name: save_model(name, tmp_path_factory.mktemp(name)) for name in MODELS
    }


@pytest.fixture(scope="session")
def server(binaries):
    with gradwire.LocalServer(threads=2) as running:
        yield running


@pytest.fixture
def service(server):
    with gradwire.ServiceClient(address=server.address) as client:
        yield client


@pytest.fixture
def stubs(server):
    with calls.Stubs(server.address) as stubs:
        yield stubs


@pytest.fixture
def new_client(service, models):
    """new_client(model, **options): a training client on a job of its own.

    Options are those of ServiceClient.create_training_client, and
    micro_batch_tokens, which a client need not know.
    """
    jobs = []

    def create(model="llama", precision="f32", micro_batch_tokens=0, **options):
        if micro_batch_tokens:
            job = calls.create_job(
                service,
                base_model=str(models[model]),
                precision=precision,
                micro_batch_tokens=micro_batch_tokens,
                **options,
            )
            jobs.append(job)
            return calls.attach(service, job)
        client = service.create_training_client(
            models[model], precision=precision, **options
        )
        jobs.append(client.job_id)
        return client

    yield create
    for job in jobs:
        service.delete_job(job)


@pytest.fixture(scope="session")
def shared_job(server, models):
    """A job of the llama model for tests that leave its weights alone."""
    with gradwire.ServiceClient(address=server.address) as service:
        job = calls.create_job(
            service, base_model=str(models["llama"]), precision="f32"
        )
        yield job
        assert service.get_job(job).state in (
            jobs_pb2.JOB_STATE_RUNNING,
            jobs_pb2.JOB_STATE_IDLE,
        )


@pytest.fixture
def shared_client(service, shared_job):
    return calls.attach(service, shared_job)


@pytest.fixture
def model(stubs, shared_job):
    """A handle on the shared job, driven by raw calls."""
    return calls.Model(stubs, stubs.attach(shared_job))


def sequences(vocab, lengths, seed=0, prompt_length=3):
    """Random datums; `lengths` counts whole sequences."""
    generator = torch.Generator().manual_seed(seed)
    return [
        gradwire.Datum.from_tokens(
            torch.randint(vocab, (length,), generator=generator),
            prompt_length=min(prompt_length, length - 1),
        )
        for length in lengths
    ]


@pytest.fixture
def data():
    return sequences(MODELS["llama"][1]["vocab_size"], (9, 17, 5, 12, 2))


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    """ca, server, rank and a stranger's rank (of the authority other), as PEM
    files."""
    folder = tmp_path_factory.mktemp("pki")

    def openssl(*arguments):
        subprocess.run(
            ["openssl", *map(str, arguments)], check=True, capture_output=True
        )

    new = ("req", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    for ca in ("ca", "other"):
        out = ("-keyout", folder / f"{ca}.key", "-out", folder / f"{ca}.pem")
        openssl(*new, "-x509", "-subj", f"/CN={ca}", *out)
    names = folder / "names"
    names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name, ca in (("server", "ca"), ("rank", "ca"), ("stranger", "other")):
        request = folder / f"{name}.csr"
        key = folder / f"{name}.key"
        openssl(
            *new[:4], "-subj", f"/CN={name}", "-keyout", key, "-out", request
        )
        openssl(
            *("x509", "-req", "-days", "2", "-in", request),
            *("-CA", folder / f"{ca}.pem", "-CAkey", folder / f"{ca}.key"),
            *("-CAcreateserial", "-extfile", names),
            *("-out", folder / f"{name}.pem"),
        )
    return folder
