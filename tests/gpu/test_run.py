# SPDX-License-Identifier: Apache-2.0
"""tests/gpu/run.sh where everything but the script itself is made up."""

import os
import pathlib
import shutil
import subprocess
import tarfile

import pytest

HERE = pathlib.Path(__file__).parent

SMI = 'if [[ $1 == -L ]]; then echo "GPU 0: none"; else echo none, 1, 9.0; fi'
# A tool that has an old name for its filter, says more than a pipe holds, and
# runs what it is given.
SANITIZER = """
if [[ $1 == --help ]]; then
  echo '  --kernel-regex arg'
  seq 30000
  exit
fi
echo "sanitizer: $*"
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""

TEST = """
if [[ $* == *--gtest_list_tests* ]]; then
  if [[ $* != *=None* ]]; then printf 'A.\\n  Test\\n'; fi
  exit
fi
echo "said $*"
"""


def script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path):
    """A checkout with two packed tests, on a machine that has a GPU."""
    folder = tmp_path / "checkout/tests/gpu"
    folder.mkdir(parents=True)
    for name in ("run.sh", "programs.sh", "libraries.sh"):
        shutil.copy(HERE / name, folder / name)
    script(folder / "bin/good_test", TEST)
    script(folder / "bin/other_test", TEST)
    (folder / "bin/commit").touch()
    script(tmp_path / "bin/nvidia-smi", SMI)
    return tmp_path


def run(machine, *arguments, **environment):
    done = subprocess.run(
        [machine / "checkout/tests/gpu/run.sh", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ
        | {"PATH": f"{machine / 'bin'}:{os.environ['PATH']}"}
        | environment,
    )
    return done.returncode, done.stdout.splitlines()


def log(machine, name):
    return (machine / "checkout/tests/gpu/logs" / name).read_text()


def test_every_test_runs_and_counts(machine):
    status, lines = run(machine, "tests", "A.*")
    assert (status, lines[-1]) == (0, "2 passed, 0 failed")
    assert "--gtest_filter=A.*" in log(machine, "good_test.txt")


def test_a_failure_is_shown_at_its_end(machine):
    script(
        machine / "checkout/tests/gpu/bin/bad_test",
        TEST + "seq 1000; echo '[  FAILED  ] Some.Test'; exit 1",
    )
    status, lines = run(machine, "tests")
    assert (status, lines[-1]) == (1, "2 passed, 1 failed")
    text = "\n".join(lines)
    assert "FAILED: bad_test (status 1" in text
    assert "[  FAILED  ] Some.Test" in text
    assert "\n500\n" not in text
    assert "\n500\n" in log(machine, "bad_test.txt")


def test_a_program_that_does_not_start_is_a_failure(machine):
    script(machine / "checkout/tests/gpu/bin/bad_test", "exit 127")
    status, lines = run(machine, "tests")
    assert (status, lines[-1]) == (1, "2 passed, 1 failed")


def test_tools_look_at_our_kernels_and_at_no_refused_calls(machine):
    script(machine / "bin/compute-sanitizer", SANITIZER)
    status, lines = run(machine)
    assert (status, lines[-1]) == (0, "8 passed, 0 failed")
    memcheck = log(machine, "good_test_under_memcheck.txt")
    assert "--kernel-regex=kns=gradwire" in memcheck
    assert "--report-api-errors=no" in memcheck
    racecheck = log(machine, "good_test_under_racecheck.txt")
    assert "--tool=racecheck" in racecheck
    assert "--report-api-errors" not in racecheck
    assert run(machine, "racecheck")[1][-1] == "2 passed, 0 failed"


def test_a_device_that_tools_do_not_support_is_no_failure(machine):
    script(
        machine / "bin/compute-sanitizer",
        'echo "========= Error: Device not supported"; exit 1',
    )
    status, lines = run(machine, "memcheck")
    assert (status, lines[-1]) == (0, "0 passed, 0 failed")
    assert sum("left out" in line for line in lines) == 2


def test_programs_that_have_none_of_the_tests_are_left_out(machine):
    script(machine / "bin/compute-sanitizer", SANITIZER)
    status, lines = run(machine, "memcheck", "None.*")
    assert (status, lines[-1]) == (0, "0 passed, 0 failed")


def test_what_there_is_no_time_for_is_named(machine):
    status, lines = run(machine, "tests", GRADWIRE_GPU_SECONDS="0")
    assert (status, lines[-1]) == (0, "0 passed, 0 failed")
    assert "left out: good_test" in lines


def test_what_the_time_ends_is_no_failure(machine):
    script(machine / "checkout/tests/gpu/bin/bad_test", TEST + "sleep 60")
    status, lines = run(
        machine, "tests", GRADWIRE_GPU_SECONDS="8", PYTHON="false"
    )
    assert status == 0
    assert any(line.startswith("cut off: bad_test") for line in lines)
    assert "left out: good_test" in lines


def test_a_test_that_hangs_fails(machine):
    script(machine / "checkout/tests/gpu/bin/bad_test", TEST + "sleep 60")
    status, lines = run(machine, "tests", GRADWIRE_GPU_TIMEOUT="5")
    assert (status, lines[-1]) == (1, "2 passed, 1 failed")
    assert any("status 124" in line for line in lines)


@pytest.mark.parametrize("xz", [True, False])
def test_the_archive_is_unpacked(machine, xz):
    folder = machine / "checkout/tests/gpu"
    with tarfile.open(folder / "bin.tar.xz", "w:xz") as archive:
        archive.add(folder / "bin", arcname="bin")
    # What was unpacked before is older, and one of another name is not left.
    (folder / "bin/good_test").rename(folder / "bin/stale_test")
    os.utime(folder / "bin/commit", (0, 0))
    if not xz:
        script(machine / "bin/tar", "exit 1")
    status, lines = run(machine, "tests")
    assert (status, lines[-1]) == (0, "2 passed, 0 failed")
    assert (folder / "bin/good_test").exists()
    # And again, with what is there.
    (folder / "bin/good_test").unlink()
    assert run(machine, "tests")[1][-1] == "1 passed, 0 failed"


def test_an_argument_that_is_none_is_refused(machine):
    assert run(machine, "everything")[0] == 2


def test_without_a_gpu_nothing_runs(machine):
    script(machine / "bin/nvidia-smi", "exit 9")
    status, lines = run(machine)
    assert (status, lines[-1]) == (0, "0 passed, 0 failed")
