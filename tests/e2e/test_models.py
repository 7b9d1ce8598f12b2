# SPDX-License-Identifier: Apache-2.0
"""Model directories that are refused, and those that must not be."""

import json
import shutil
import struct

import calls
import gradwire
import oracle
import pytest
import torch
from conftest import MODELS, save_model, sequences
from gradwire._proto.gradwire.v1 import jobs_pb2
from grpc import StatusCode
from safetensors.torch import load_file, save_file


@pytest.fixture
def copy(models, tmp_path):
    """copy(name): a directory of one's own to spoil."""

    def make(name="llama"):
        path = tmp_path / name
        shutil.copytree(models[name], path)
        return path

    return make


def edit_config(path, **changes):
    file = path / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    file.write_text(json.dumps(config))


def refused(service, path):
    with pytest.raises(gradwire.GradwireError) as caught:
        service.create_training_client(path, precision="f32")
    assert str(path) not in caught.value.message
    return caught.value


def llama_rope(**changes):
    rope = MODELS["llama"][1]["rope_parameters"]
    return {"rope_parameters": {**rope, **changes}}


UNSUPPORTED = {
    "another architecture": (
        "llama",
        {"architectures": ["GPT2LMHeadModel"]},
        "architectures",
    ),
    "sliding window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8},
        "use_sliding_window",
    ),
    "sliding layers": (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types",
    ),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    "another rope": (
        "llama",
        llama_rope(rope_type="yarn"),
        "rope_parameters.rope_type",
    ),
    "quantised": (
        "llama",
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config",
    ),
    "attention bias": ("llama", {"attention_bias": True}, "attention_bias"),
    "mlp bias": ("llama", {"mlp_bias": True}, "mlp_bias"),
    "a field nobody knows": ("llama", {"logit_scale": 2.0}, "logit_scale"),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_changes_the_mathematics_is_refused_by_name(service, copy, what):
    name, changes, field = UNSUPPORTED[what]
    path = copy(name)
    edit_config(path, **changes)
    error = refused(service, path)
    assert (error.code, error.reason) == (
        StatusCode.UNIMPLEMENTED,
        "MODEL_UNSUPPORTED",
    )
    assert error.metadata["field"] == field


def spoil_header(file, header, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    rest = file.read_bytes()
    (old,) = struct.unpack("<Q", rest[:8])
    file.write_bytes(struct.pack("<Q", size) + text + rest[8 + old :])


def header_of(file):
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])


def offsets(begin, end):
    def spoil(header):
        entry = header["model.norm.weight"]
        first, _ = entry["data_offsets"]
        entry["data_offsets"] = [
            first if begin is None else begin,
            first + 4 if end is None else end,
        ]

    return spoil


def shape(*dims):
    def spoil(header):
        header["model.norm.weight"]["shape"] = list(dims)

    return spoil


HOSTILE = {
    "negative offset": offsets(-4, None),
    "offset beyond the file": offsets(None, 1 << 50),
    "overlap": offsets(0, 128),
    "shape that overflows": shape(1 << 62, 1 << 62),
    "negative shape": shape(-32),
    "size that is not its shape's": shape(31),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tensor_files_are_refused(service, copy, what):
    path = copy()
    file = path / "model.safetensors"
    header = header_of(file)
    HOSTILE[what](header)
    spoil_header(file, header)
    error = refused(service, path)
    assert (error.code, error.reason) == (
        StatusCode.INVALID_ARGUMENT,
        "SAFETENSORS_INVALID",
    )


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def huge_header(path):
    spoil_header(path / "model.safetensors", b"{}", length=1 << 60)


def deep_header(path):
    spoil_header(path / "model.safetensors", b"[" * 100000)


def no_file(path):
    (path / "model.safetensors").unlink()


def deep_config(path):
    (path / "config.json").write_text('{"a":' * 100000)


def cut_config(path):
    file = path / "config.json"
    file.write_text(file.read_text()[:-5])


def no_config(path):
    (path / "config.json").unlink()


def negative_layers(path):
    edit_config(path, num_hidden_layers=-1)


@pytest.mark.parametrize(
    ("spoil", "code", "reason"),
    [
        (cut, "INVALID_ARGUMENT", "SAFETENSORS_INVALID"),
        (huge_header, "INVALID_ARGUMENT", "SAFETENSORS_INVALID"),
        (deep_header, "INVALID_ARGUMENT", "SAFETENSORS_INVALID"),
        (no_file, "NOT_FOUND", "MODEL_FILE_NOT_FOUND"),
        (no_config, "NOT_FOUND", "MODEL_FILE_NOT_FOUND"),
        (deep_config, "INVALID_ARGUMENT", "MODEL_CONFIG_INVALID"),
        (cut_config, "INVALID_ARGUMENT", "MODEL_CONFIG_INVALID"),
        (negative_layers, "INVALID_ARGUMENT", "MODEL_CONFIG_INVALID"),
    ],
)
def test_damaged_directories_are_refused(service, copy, spoil, code, reason):
    path = copy()
    spoil(path)
    error = refused(service, path)
    assert (error.code.name, error.reason) == (code, reason)


def test_a_directory_that_is_not_there(service, tmp_path):
    error = refused(service, tmp_path / "nowhere")
    assert (error.code, error.reason) == (
        StatusCode.NOT_FOUND,
        "MODEL_FILE_NOT_FOUND",
    )


def change_tensors(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("model.norm.weight"), "MODEL_TENSOR_MISSING"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            "MODEL_TENSOR_MISMATCH",
        ),
        (
            lambda t: t.update({"model.extra.weight": torch.ones(3)}),
            "MODEL_TENSOR_UNKNOWN",
        ),
    ],
)
def test_weights_must_be_those_of_the_config(service, copy, change, reason):
    path = copy()
    change_tensors(path, change)
    error = refused(service, path)
    assert error.reason == reason
    assert error.category == "USER"


def test_what_does_not_fit_is_refused_with_the_numbers(service, models):
    with pytest.raises(gradwire.GradwireError) as caught:
        service.create_training_client(
            models["llama"], precision="f32", activation_bytes=1 << 50
        )
    error = caught.value
    assert (error.code, error.reason) == (
        StatusCode.RESOURCE_EXHAUSTED,
        "MEMORY_PLAN_EXCEEDED",
    )
    assert int(error.metadata["value"]) > int(error.metadata["limit"])


def test_a_context_beyond_the_models_is_refused(service, models):
    with pytest.raises(gradwire.GradwireError) as caught:
        service.create_training_client(
            models["llama"], precision="f32", max_context_length=65
        )
    assert caught.value.reason == "SEQUENCE_TOO_LONG"


# What must load.


def served(service, path, data):
    client = service.create_training_client(path, precision="f32")
    found = client.forward(data).result().logprobs
    service.delete_job(client.job_id)
    return found


def check(service, path, judge, data):
    def compute(model):
        with torch.no_grad():
            found = [oracle.logprobs(model, datum) for datum in data]
        return {str(i): lp for i, lp in enumerate(found)}

    exact, tolerance = oracle.with_tolerance(judge, compute)
    found = {str(i): lp for i, lp in enumerate(served(service, path, data))}
    assert oracle.worst_of(found, exact, tolerance) == {}


def test_the_older_form_of_config_is_the_same_model(service, copy, models):
    path = copy()
    rope = dict(MODELS["llama"][1]["rope_parameters"])
    theta = rope.pop("rope_theta")
    edit_config(
        path,
        rope_parameters=None,
        rope_theta=theta,
        rope_scaling=rope,
        dtype=None,
        torch_dtype="float32",
        layer_types=None,
    )
    data = sequences(MODELS["llama"][1]["vocab_size"], (40, 9))
    check(service, path, oracle.load(models["llama"]), data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_storage_is_read_exactly(service, copy, tmp_path, dtype):
    path = copy("qwen3")
    change_tensors(
        path,
        lambda t: t.update({n: v.to(dtype) for n, v in t.items()}),
    )
    data = sequences(MODELS["qwen3"][1]["vocab_size"], (20, 9))
    check(service, path, oracle.load(path), data)


def test_shards_are_one_model(service, tmp_path, models):
    whole = oracle.transformers.AutoModelForCausalLM.from_pretrained(
        models["qwen2"]
    )
    path = tmp_path / "sharded"
    whole.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    data = sequences(MODELS["qwen2"][1]["vocab_size"], (20, 9))
    check(service, path, oracle.load(models["qwen2"]), data)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../" + content["weight_map"][name]
    index.write_text(json.dumps(content))
    assert refused(service, path).category == "USER"


def test_a_plain_rope_and_tied_llama(service, tmp_path):
    path = save_model(
        "llama",
        tmp_path / "plain",
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        num_key_value_heads=4,
        num_hidden_layers=1,
    )
    data = sequences(MODELS["llama"][1]["vocab_size"], (20, 9))
    check(service, path, oracle.load(path), data)


def test_a_failed_job_says_why(service, stubs, copy):
    path = copy()
    edit_config(path, hidden_act="gelu")
    job_id = stubs.start_job(base_model=str(path))
    job = stubs.watch(job_id, lambda job: job.status_reason)
    assert job.status_reason == "MODEL_UNSUPPORTED"
    assert job.error.reason == "MODEL_UNSUPPORTED"
    assert not job.ready
    for call in (
        lambda: stubs.attach(job_id),
        lambda: stubs.jobs.GetProfile(
            jobs_pb2.GetProfileRequest(job_id=job_id)
        ),
    ):
        error = calls.refusal(stubs, call)
        assert (error.code, error.reason) == (
            StatusCode.FAILED_PRECONDITION,
            "JOB_FAILED",
        )


def test_a_forward_only_job_answers_forward_alone(service, models):
    train = service.create_training_client(models["qwen2"], precision="f32")
    frozen = service.create_training_client(
        models["qwen2"], precision="f32", mode="forward_only"
    )
    data = [gradwire.Datum.from_tokens([3, 1, 4, 1, 5, 9])]
    expected = train.forward(data).result().logprobs[0]
    assert (frozen.forward(data).result().logprobs[0] == expected).all()
    plans = [service.get_job(c.job_id).memory for c in (train, frozen)]
    assert plans[0].optimizer > 0
    assert plans[1].optimizer == plans[1].gradients == 0
    for call in (
        lambda: frozen.forward_backward(data, "cross_entropy"),
        lambda: frozen.forward_backward_custom(
            data, lambda d, lps: (lps[0].sum(), {})
        ),
        frozen.optim_step,
        lambda: frozen.save_weights_for_sampler("frozen"),
    ):
        with pytest.raises(gradwire.GradwireError) as caught:
            call().result()
        assert caught.value.reason == "MODEL_FORWARD_ONLY"
    assert (frozen.forward(data).result().logprobs[0] == expected).all()
    for client in (train, frozen):
        service.delete_job(client.job_id)
