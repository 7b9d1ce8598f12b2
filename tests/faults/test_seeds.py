# SPDX-License-Identifier: Apache-2.0
"""The table of seeded bugs fits the source that it changes, and names tests
that exist. That the tests see the bugs is seeded_bugs.py's to show."""

import ast
import functools
import pathlib
import re

import pytest
from seeds import SEEDS

ROOT = pathlib.Path(__file__).resolve().parents[2]


@functools.cache
def functions_of(path):
    return {
        node.name
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def exists(test):
    if test.startswith("//"):
        package, target = test.removeprefix("//").split(":")
        rules = (ROOT / package / "BUILD.bazel").read_text()
        rule = rf'cc_test\(\s*name = "{re.escape(target)}"'
        return re.search(rule, rules) is not None
    path, _, name = test.partition("::")
    if not (ROOT / path).is_file():
        return False
    return not name or name.partition("[")[0] in functions_of(path)


def test_names_are_unique():
    names = [seed.name for seed in SEEDS]
    assert len(names) == len(set(names)) >= 30


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.name)
def test_a_seed_fits_its_file_and_its_tests_exist(seed):
    text = (ROOT / seed.file).read_text()
    assert text.count(seed.before) == 1
    assert seed.after != seed.before
    assert seed.tests
    for test in seed.tests:
        assert exists(test), test
