# SPDX-License-Identifier: Apache-2.0
"""docs/errors.md is the registry of reasons: nothing missing, nothing dead."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("base", "checkpoint", "device", "model", "server", "trainer")
# An ErrorBuilder, or a function that makes one, with the reason in it.
MADE = re.compile(
    r'(?:StatusCode::k\w+,|Error\(|Invalid\(|NotFound\("\w+",)\s*'
    r'"([A-Z0-9]+(?:_[A-Z0-9]+)*)"'
)
RAISED = re.compile(r'(?:reason=|invalid\(\s*)"([A-Z0-9]+(?:_[A-Z0-9]+)+)"')


@pytest.fixture(scope="module")
def binaries():
    """None are needed here."""


def reasons(files, pattern):
    found = set()
    for file in files:
        found.update(pattern.findall(file.read_text(encoding="utf-8")))
    return found


def sources():
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.[ch]*")):
            if not file.name.endswith("_test.cc"):
                yield file


def documented():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    return set(re.findall(r"`([A-Z0-9]+(?:_[A-Z0-9]+)*)`", page))


def test_every_reason_is_on_the_page():
    client = sorted((ROOT / "client" / "python" / "gradwire").glob("*.py"))
    made = reasons(sources(), MADE) | reasons(client, RAISED)
    assert len(made) > 60, "the patterns find nothing"
    assert made - documented() == set()


def test_every_reason_on_the_page_exists():
    files = [
        *sources(),
        *sorted((ROOT / "client" / "python" / "gradwire").glob("*.py")),
    ]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    codes = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "USER", "SERVER"}
    names = documented() - codes - {"GRADWIRE_ADDRESS"}
    assert {name for name in names if f'"{name}"' not in text} == set()
