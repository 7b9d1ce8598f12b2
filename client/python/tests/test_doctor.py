# SPDX-License-Identifier: Apache-2.0
"""`gradwire doctor` says what the built server would compute with."""

import json

import pytest

gradwire = pytest.importorskip("gradwire")
if not hasattr(gradwire, "Datum"):
    pytest.skip("the client is not installed", allow_module_level=True)
from gradwire import cli  # noqa: E402

DESCRIPTION = {
    "version": "0.1.0",
    "device": "cpu of_tests",
    "isa": "of_tests",
    "threads": 3,
    "default_precision": "f32",
    "default_precision_reason": "a reason in words",
}


@pytest.fixture
def doctor(tmp_path, monkeypatch, capsys):
    """doctor(rank, *flags): both outputs, with `rank` as the rank's script."""
    monkeypatch.setenv("GRADWIRE_BIN_DIR", str(tmp_path))

    def run(rank, *flags):
        if rank is not None:
            for name in ("gradwired", "gradwire_rank"):
                script = tmp_path / name
                script.write_text(f"#!/bin/sh\n{rank}\n")
                script.chmod(0o755)
        status = cli.main(["doctor", *flags])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def checks(out):
    return {row["name"]: row for row in json.loads(out)["checks"]}


def test_the_report_is_what_the_rank_says(doctor):
    rank = f"test \"$1\" = --describe && echo '{json.dumps(DESCRIPTION)}'"
    _, out, err = doctor(rank, "--json")
    report = json.loads(out)
    assert err == ""
    assert report["isa"] == ["of_tests"]
    for key in (
        "device",
        "threads",
        "default_precision",
        "default_precision_reason",
    ):
        assert report[key] == DESCRIPTION[key]
    assert checks(out)["gradwire_rank"]["ok"]


def test_people_read_device_precision_and_reason(doctor):
    _, out, err = doctor(f"echo '{json.dumps(DESCRIPTION)}'")
    assert out == ""
    for words in ("cpu of_tests, 3 threads", "f32", "a reason in words"):
        assert words in err


@pytest.mark.parametrize("rank", ["exit 3", "echo no JSON"])
def test_a_rank_that_does_not_answer_is_named_with_its_remedy(doctor, rank):
    status, out, _ = doctor(rank, "--json")
    row = checks(out)["gradwire_rank"]
    assert status == 1
    assert not row["ok"]
    assert "bazel build //server:gradwire_rank" in row["remedy"]
    assert json.loads(out)["default_precision"] is None


def test_without_a_server_nothing_is_said_of_its_precision(doctor):
    status, out, _ = doctor(None, "--json")
    assert status == 1
    assert not checks(out)["gradwired"]["ok"]
    assert json.loads(out)["default_precision"] is None
