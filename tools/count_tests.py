# SPDX-License-Identifier: Apache-2.0
"""Counts test cases for ./test.sh.

Reads what the runners wrote: Bazel's build events (--bazel, one JSON object a
line, which name the test.xml of every test target, cached ones included), a
JUnit file (--junit) or the lines of tests/fuzz/run.sh (--fuzz; a target is a
case). Prints "PASSED FAILED", and on standard error each failure's name and the
end of what it said. A target that was not built, crashed or timed out counts as
one failure.
"""

import argparse
import json
import os
import sys
import urllib.parse
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

# Of what a failed test said, the lines that are told.
LINES = 30


class Failure(NamedTuple):
    name: str
    why: str = ""


def end_of(text):
    return "\n".join(text.strip().splitlines()[-LINES:])


def count_junit(path):
    """Returns (passed, failures) of one JUnit file."""
    passed, failed = 0, []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name', '')}"
        bad = [e for e in case if e.tag in ("failure", "error")]
        if bad:
            said = [e.text or e.get("message") or "" for e in bad]
            failed.append(Failure(name, end_of("\n".join(said))))
        elif case.find("skipped") is None and case.get("status") != "notrun":
            passed += 1
    return passed, failed


def end_of_file(path):
    if path is None:
        return ""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return end_of(file.read())
    except OSError as error:
        return str(error)


def count_bazel(path):
    """Returns (passed, failures) of one Bazel invocation."""
    passed, failed, seen_failing = 0, [], set()
    with open(path, encoding="utf-8") as lines:
        events = [json.loads(line) for line in lines if line.strip()]
    for event in events:
        label = event["id"].get("testResult", {}).get("label")
        if label is None:
            continue
        result = event["testResult"]
        files = {
            output["name"]: urllib.parse.unquote(
                urllib.parse.urlparse(output["uri"]).path
            )
            for output in result.get("testActionOutput", [])
        }
        cases_failed = []
        if "test.xml" in files:
            try:
                n, cases_failed = count_junit(files["test.xml"])
                passed += n
            except (OSError, ElementTree.ParseError) as error:
                cases_failed = [Failure(str(error))]
        if result["status"] != "PASSED" and not cases_failed:
            log = end_of_file(files.get("test.log"))
            cases_failed = [Failure(result["status"], log)]
        if cases_failed:
            seen_failing.add(label)
        failed += [Failure(f"{label}: {f.name}", f.why) for f in cases_failed]
    for event in events:
        label = event["id"].get("targetCompleted", {}).get("label")
        if label is None or label in seen_failing:
            continue
        # Left out of a wildcard: the machine lacks what it is compatible with.
        if event.get("aborted", {}).get("reason") == "SKIPPED":
            continue
        if not event.get("completed", {}).get("success"):
            failed.append(Failure(f"{label}: not built"))
    return passed, failed


def count_fuzz(path):
    """Returns (passed, failures) of one run of the fuzz targets."""
    passed, failed = 0, []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            words = line.split()
            if words[:1] != ["fuzz:"]:
                continue
            if words[-2:] == ["0", "findings"]:
                passed += 1
            else:
                failed.append(Failure(f"fuzz.{words[1]}", line.strip()))
    return passed, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bazel", action="append", default=[])
    parser.add_argument("--junit", action="append", default=[])
    parser.add_argument("--fuzz", action="append", default=[])
    args = parser.parse_args()
    passed, failed = 0, []
    for path, count in (
        [(p, count_bazel) for p in args.bazel]
        + [(p, count_junit) for p in args.junit]
        + [(p, count_fuzz) for p in args.fuzz]
    ):
        if not os.path.exists(path):
            failed.append(Failure(f"{path}: the runner left no result"))
            continue
        p, f = count(path)
        passed += p
        failed += f
    for failure in failed:
        print(f"FAILED {failure.name}", file=sys.stderr)
        for line in failure.why.splitlines():
            print(f"    {line}", file=sys.stderr)
    print(passed, len(failed))


if __name__ == "__main__":
    main()
