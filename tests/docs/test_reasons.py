# SPDX-License-Identifier: Apache-2.0
"""docs/errors.md and docs/metrics.md list what the sources can say."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYERS = (
    "base",
    "checkpoint",
    "device",
    "kernels",
    "model",
    "server",
    "sharding",
)
WORD = r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+"


def sources(suffixes):
    for layer in (*LAYERS, "trainer"):
        for path in sorted((ROOT / layer).rglob("*")):
            if path.suffix in suffixes and not path.stem.endswith("_test"):
                yield path.read_text(encoding="utf-8")


def documented(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def reasons_of_the_server():
    """Reasons are made with ErrorBuilder, or handed to a helper that does."""
    before = r"(?:StatusCode::k\w+,\s*|Error\(|return invalid\()"
    made = re.compile(rf'{before}"({WORD})"')
    found = set()
    for text in sources({".cc"}):
        found.update(made.findall(text))
    return found


def test_every_reason_is_documented():
    reasons = reasons_of_the_server()
    assert len(reasons) > 40
    text = documented("errors.md")
    missing = {r for r in reasons if f"`{r}`" not in text}
    assert not missing


def test_every_documented_reason_exists():
    everything = "\n".join(sources({".cc", ".h"}))
    for path in (ROOT / "client" / "python" / "gradwire").rglob("*.py"):
        everything += path.read_text(encoding="utf-8")
    named = set(re.findall(rf"`({WORD})`", documented("errors.md")))
    assert len(named) > 60
    # Codes by name, of statuses without a reason.
    codes = {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert not {r for r in named - codes if f'"{r}"' not in everything}


def test_every_metric_is_documented_and_exists():
    source = (ROOT / "server" / "metrics.cc").read_text(encoding="utf-8")
    names = r'"((?:gradwire|grpc_server|process)_[a-z0-9_]+)"'
    made = set(re.findall(names, source))
    listed = set(re.findall(names.replace('"', "`"), documented("metrics.md")))
    assert len(made) > 20
    assert made == listed
