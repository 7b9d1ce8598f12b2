# SPDX-License-Identifier: Apache-2.0
"""Plants the bugs of seeds.py, one at a time, and says which test sees each.

    .venv/bin/python tests/faults/seeded_bugs.py [--list] [--baseline] [SEED...]

Works in a git worktree of its own, of what is committed. The status is 1 if a
bug was missed and 2 if that could not be found out. A build that fails, or
tests that end without a verdict, are errors and no catch; a hang is one only
where the test itself gives up.
"""

import argparse
import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree

from seeds import SEEDS

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of one pytest test, and of all that are to see a seed.
TEST_SECONDS = 200
RUN_SECONDS = 1800
PROGRAMS = ("gradwired", "gradwire_rank")


class Unclear(Exception):
    """Neither caught nor missed."""


def is_bazel(test):
    return test.startswith("//")


class Tree:
    """A worktree in which files are changed, built and tested."""

    def __init__(self, path, scratch, bazel, build_flags):
        self.path = path
        self._scratch = scratch
        self._bazel = bazel
        self._build_flags = build_flags

    def first_failure(self, tests):
        """What the first test that fails is called; None if none does."""
        for target in filter(is_bazel, tests):
            if failure := self._bazel_failure(target):
                return failure
        python = [test for test in tests if not is_bazel(test)]
        return self._pytest_failure(python) if python else None

    def _run(self, command, seconds=None, **options):
        """(status, output); ends all of its group when time is up."""
        with subprocess.Popen(
            command,
            cwd=self.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            **options,
        ) as process:
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                raise Unclear(f"{command[0]} ran past {seconds} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output

    def _call_bazel(self, command, *arguments):
        return self._run(
            [
                *self._bazel,
                command,
                "--noshow_progress",
                *self._build_flags,
                *arguments,
            ]
        )

    def _bazel_failure(self, target):
        status, output = self._call_bazel(
            "test", "--test_env=GTEST_FAIL_FAST=1", target
        )
        if status == 0:
            return None
        if status != 3:
            raise Unclear(f"{target} was not built:\n{tail(output)}")
        if re.search(rf"^{target}\s.*TIMEOUT", output, re.M):
            return f"{target} (it hangs)"
        failed = re.search(r"\[  FAILED  \] (\S+?)[,\s]", output)
        if failed:
            return f"{target} {failed[1]}"
        begun = re.findall(r"\[ RUN      \] (\S+)", output)
        return f"{target} {begun[-1] if begun else ''} (it crashes)"

    def _pytest_failure(self, tests):
        environment = dict(os.environ)
        environment["PYTHONPATH"] = str(self.path / "client" / "python")
        # Within one second, a file that came back looks like the changed one.
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        if any(test.startswith("tests/") for test in tests):
            programs = list(PROGRAMS)
            if any(
                name in test
                for test in tests
                for name in ("test_death_at_a_failpoint", "before_outcomes")
            ):
                programs.append("gradwired_failpoints")
            if any("test_cuda" in test for test in tests):
                programs.append("gradwire_rank_emulated")
            targets = [f"//server:{program}" for program in programs]
            if any("test_fault_index" in test for test in tests):
                targets.append("//tests/faults:libfault_shim.so")
                # No sample would see a bug each time.
                environment["GRADWIRE_FAULTS"] = "all"
            status, output = self._call_bazel("build", *targets)
            if status != 0:
                raise Unclear(f"the server was not built:\n{tail(output)}")
            environment["GRADWIRE_BIN_DIR"] = str(
                self.path / "bazel-bin" / "server"
            )
        report = self._scratch / "report.xml"
        report.unlink(missing_ok=True)
        status, output = self._run(
            [
                sys.executable,
                *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
                f"--timeout={TEST_SECONDS}",
                "--timeout-method=signal",
                f"--junitxml={report}",
                *tests,
            ],
            RUN_SECONDS,
            env=environment,
        )
        if status not in (0, 1) or not report.exists():
            raise Unclear(f"pytest ended with {status}:\n{tail(output)}")
        passed = 0
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            if "failure" in kinds:
                return f"{case.get('classname')}::{case.get('name')}"
            passed += not kinds & {"error", "skipped"}
        # That nothing ran, a broken fixture for example, proves nothing.
        if status != 0 or passed == 0:
            raise Unclear(f"no test has failed or passed:\n{tail(output)}")
        return None


def tail(output):
    return "\n".join(output.splitlines()[-25:])


@contextlib.contextmanager
def planted(tree, seed):
    file = tree.path / seed.file
    text = file.read_text()
    if text.count(seed.before) != 1:
        raise Unclear(f"{seed.file} is no longer what the seed changes")
    file.write_text(text.replace(seed.before, seed.after))
    try:
        yield
    finally:
        file.write_text(text)


@contextlib.contextmanager
def worktree(given):
    """The path of a worktree; one that is made here is of HEAD."""
    if given is not None:
        yield given.resolve()
        return
    # Always the same, so that Bazel finds what it has built before.
    path = ROOT / ".cache" / "seeds" / "tree"
    git("worktree", "prune")
    if path.exists():
        git("worktree", "remove", "--force", str(path))
    git("worktree", "add", "--detach", str(path), "HEAD")
    try:
        yield path
    finally:
        git("worktree", "remove", "--force", str(path))


def git(*arguments):
    subprocess.run(
        ["git", "-C", ROOT, *arguments], check=True, capture_output=True
    )


def take_over_generated(tree):
    """What git does not have: the client's messages, and cuBLAS and NCCL."""
    libraries = ROOT / ".cache" / "cuda"
    if libraries.exists() and not (tree / ".cache" / "cuda").exists():
        (tree / ".cache").mkdir(exist_ok=True)
        (tree / ".cache" / "cuda").symlink_to(libraries)
    folder = pathlib.Path("client/python/gradwire/_proto")
    if not (tree / folder).exists():
        shutil.copytree(ROOT / folder, tree / folder)


def judge(tree, seed):
    """(verdict, detail) of one seed."""
    try:
        with planted(tree, seed):
            failure = tree.first_failure(seed.tests)
    except Unclear as error:
        return "ERROR", str(error)
    return ("CAUGHT", f"by {failure}") if failure else ("MISSED", "")


def check_baseline(tree, seeds):
    """That the tests pass where no bug is planted."""
    tests = sorted({test for seed in seeds for test in seed.tests})
    print(f"baseline: {len(tests)} tests", flush=True)
    try:
        failure = tree.first_failure(tests)
    except Unclear as error:
        failure = str(error)
    if failure:
        print(f"baseline FAILED: {failure}")
    return not failure


def main():
    parser = argparse.ArgumentParser(
        description="Plants known bugs, and says which test sees each."
    )
    parser.add_argument("seeds", nargs="*", metavar="SEED", help="default: all")
    parser.add_argument("--list", action="store_true", help="name the seeds")
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="first run the tests without a bug",
    )
    parser.add_argument(
        "--worktree",
        type=pathlib.Path,
        help="change this worktree instead of one of HEAD that is made for it",
    )
    parser.add_argument(
        "--bazel",
        default=os.environ.get("BAZEL", "bazel"),
        help="the command, with startup options",
    )
    parser.add_argument(
        "--build_flags", default="", help="of all of Bazel's commands"
    )
    options = parser.parse_args()
    by_name = {seed.name: seed for seed in SEEDS}
    for name in options.seeds:
        if name not in by_name:
            parser.error(f"there is no seed {name}; --list names them")
    chosen = [by_name[name] for name in options.seeds] or list(SEEDS)
    if options.list:
        for seed in chosen:
            print(f"{seed.name:42} {seed.file}: {seed.meaning}")
        return 0

    scratch = ROOT / ".cache" / "seeds"
    scratch.mkdir(parents=True, exist_ok=True)
    counts = {"CAUGHT": 0, "MISSED": 0, "ERROR": 0}
    with worktree(options.worktree) as path:
        take_over_generated(path)
        tree = Tree(
            path,
            scratch,
            shlex.split(options.bazel),
            shlex.split(options.build_flags),
        )
        if options.baseline and not check_baseline(tree, chosen):
            return 2
        for seed in chosen:
            began = time.monotonic()
            verdict, detail = judge(tree, seed)
            counts[verdict] += 1
            seconds = time.monotonic() - began
            line = f"{seed.name} {verdict} {detail}".rstrip()
            print(f"{line} ({seconds:.0f} s)", flush=True)
    told = ", ".join(f"{n} {verdict.lower()}" for verdict, n in counts.items())
    print(f"{len(chosen)} seeds: {told}")
    if counts["ERROR"]:
        return 2
    return 1 if counts["MISSED"] else 0


if __name__ == "__main__":
    sys.exit(main())
