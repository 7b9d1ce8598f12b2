# SPDX-License-Identifier: Apache-2.0
"""What `gradwire` makes of its arguments, without a server."""

import os
import signal
import subprocess
import sys

import pytest

gradwire = pytest.importorskip("gradwire")
if not hasattr(gradwire, "Datum"):
    pytest.skip("the client is not installed", allow_module_level=True)
from gradwire import cli  # noqa: E402

# Of waits that end early where all is well.
LONG = 60


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home and folders of its own, and an address that nobody listens at."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("GRADWIRE_ADDRESS", "127.0.0.1:1")
    return home


@pytest.fixture
def server(tmp_path, monkeypatch):
    """server(script): gradwired is this shell script from now on."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("GRADWIRE_BIN_DIR", str(folder))

    def write(script, mode=0o755):
        binary = folder / "gradwired"
        binary.write_text(f"#!/bin/sh\n{script}\n")
        binary.chmod(mode)

    return write


@pytest.fixture
def serve():
    """serve(*flags): a process of `gradwire serve`; both outputs are pipes."""
    processes = []

    def start(*flags):
        command = [sys.executable, "-m", "gradwire.cli", "serve", *flags]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended, and so has all that it started
        process.communicate()


# gradwire serve.


def test_serve_becomes_the_server(server, serve):
    server("echo $$; exit 7")
    process = serve()
    out, _ = process.communicate(timeout=LONG)
    assert int(out) == process.pid
    assert process.returncode == 7


def test_a_signal_to_serve_leaves_no_server_behind(server, serve):
    server("echo ready; exec sleep 600")
    process = serve()
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    # The output ends with the last process that has it.
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGTERM


def test_the_server_takes_no_signals_from_python(server, serve):
    server("grep SigIgn /proc/self/status")
    out, _ = serve().communicate(timeout=LONG)
    ignored = int(out.split()[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        assert not ignored >> (number - 1) & 1


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--flagfile=/etc/gradwired.flags"],
        ["--state_dir", "./state", "--threads=2"],
        ["--version"],
        ["--bogus"],
    ],
)
def test_the_server_gets_the_flags_as_they_are(server, serve, home, flags):
    server('for flag in "$@"; do echo "$flag"; done')
    out, _ = serve(*flags).communicate(timeout=LONG)
    assert out.splitlines() == flags
    assert os.listdir(home) == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_serve_is_that_of_the_server(server, capfd, flag):
    server('test "$*" = --help && echo "--listen (HOST:PORT)"; exit 1')
    assert cli.main(["serve", flag]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("usage: gradwire serve")
    assert "--listen (HOST:PORT)" in out
    assert err == ""


def test_a_server_that_cannot_be_started_is_named(server, serve):
    server("exit 0", mode=0o644)
    process = serve()
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 1
    line = err.splitlines()[-1]
    assert line.startswith("gradwire: SERVER_NOT_STARTED: ")
    assert "gradwired cannot be started (Permission denied)" in line
    assert "bazel build //server:gradwired" in line


# Arguments.


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"gradwire {gradwire.__version__}\n"


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("", "COMMAND"),
        ("job", "ACTION"),
        ("job get", "JOB"),
        ("job list job", "does not take job"),
        ("job get job other", "does not take other"),
        ("job list --remote", "does not take --remote"),
        ("checkpoint get", "PATH"),
        ("checkpoint get path other", "does not take other"),
        ("checkpoint list job other", "does not take other"),
        ("checkpoint promote path", "MODEL_ID"),
        ("checkpoint diff path", "PATH"),
        ("checkpoint diff a b --format xor", "--format needs --export FILE"),
        ("checkpoint diff a b --remote", "does not take --remote"),
        ("checkpoint verify a --export file", "does not take --export file"),
        ("checkpoint ttl path", "SECONDS"),
        ("checkpoint ttl path soon", "soon is no number of seconds"),
        ("doctor other", "does not take other"),
        ("quickstart --steps few", "--steps"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(command, what, capsys):
    assert cli.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert what in err
    assert "--help` shows what it takes" in err


@pytest.mark.parametrize(
    "command",
    [
        "job list --json",
        "job --json list",
        "job get --json job",
        "job get job --json",
        "checkpoint list --remote job --json",
        "checkpoint diff before --json after",
        "checkpoint ttl path 90",
        "checkpoint ttl path never",
    ],
)
def test_options_stand_anywhere_among_the_arguments(command, capsys):
    assert cli.main(command.split()) == 1
    assert "SERVER_UNREACHABLE" in capsys.readouterr().err


# Files.


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none/change", "No such file or directory"),
        ("home", "Is a directory"),
    ],
)
def test_a_difference_that_cannot_be_written_is_told(
    tmp_path, monkeypatch, capsys, name, why
):
    def export(self, before, after, file, format):
        return file.write(b"difference")

    monkeypatch.setattr(gradwire.ServiceClient, "export_diff", export)
    path = tmp_path / name
    command = ["checkpoint", "diff", "a", "b", "--export", str(path)]
    assert cli.main(command) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"the difference was not written to {path} ({why}); give" in err
    assert "Errno" not in err
    assert os.listdir(tmp_path) == ["home"]


def test_an_exported_difference_is_at_its_path(tmp_path, monkeypatch):
    def export(self, before, after, file, format):
        return file.write(f"{before} {after} {format}".encode())

    monkeypatch.setattr(gradwire.ServiceClient, "export_diff", export)
    path = tmp_path / "change"
    command = ["checkpoint", "diff", "--export", str(path), "a", "b"]
    assert cli.main(command) == 0
    assert path.read_bytes() == b"a b dlt1"


def test_a_server_away_during_an_export_is_no_fault_of_the_file(
    tmp_path, capsys
):
    path = tmp_path / "change"
    command = ["checkpoint", "diff", "a", "b", "--export", str(path)]
    assert cli.main(command) == 1
    assert "SERVER_UNREACHABLE" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["home"]
