# SPDX-License-Identifier: Apache-2.0
"""Counts test cases for ./test.sh.

Reads what the runners wrote: Bazel's build events (--bazel, one JSON object a
line, which name the test.xml of every test target, cached ones included), a
JUnit file (--junit) or the lines of tests/fuzz/run.sh (--fuzz; a target is a
case). Prints "PASSED FAILED" and names each failure on standard
error. A target that was not built, crashed or timed out counts as one failure.
"""

import argparse
import json
import os
import sys
import urllib.parse
import xml.etree.ElementTree as ElementTree


def count_junit(path):
    """Returns (passed, names of the failed) of one JUnit file."""
    passed, failed = 0, []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name', '')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif case.find("skipped") is None and case.get("status") != "notrun":
            passed += 1
    return passed, failed


def count_bazel(path):
    """Returns (passed, names of the failed) of one Bazel invocation."""
    passed, failed, seen_failing = 0, [], set()
    with open(path, encoding="utf-8") as lines:
        events = [json.loads(line) for line in lines if line.strip()]
    for event in events:
        label = event["id"].get("testResult", {}).get("label")
        if label is None:
            continue
        result = event["testResult"]
        cases_failed = []
        for output in result.get("testActionOutput", []):
            if output["name"] == "test.xml":
                file = urllib.parse.unquote(
                    urllib.parse.urlparse(output["uri"]).path
                )
                try:
                    n, cases_failed = count_junit(file)
                    passed += n
                except (OSError, ElementTree.ParseError) as error:
                    cases_failed = [str(error)]
        if result["status"] != "PASSED" and not cases_failed:
            cases_failed = [result["status"]]
        if cases_failed:
            seen_failing.add(label)
        failed += [f"{label}: {name}" for name in cases_failed]
    for event in events:
        label = event["id"].get("targetCompleted", {}).get("label")
        if label is None or label in seen_failing:
            continue
        # Left out of a wildcard: the machine lacks what it is compatible with.
        if event.get("aborted", {}).get("reason") == "SKIPPED":
            continue
        if not event.get("completed", {}).get("success"):
            failed.append(f"{label}: not built")
    return passed, failed


def count_fuzz(path):
    """Returns (passed, names of the failed) of one run of the fuzz targets."""
    passed, failed = 0, []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            words = line.split()
            if words[:1] != ["fuzz:"]:
                continue
            if words[-2:] == ["0", "findings"]:
                passed += 1
            else:
                failed.append(f"fuzz.{words[1]}")
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
            failed.append(f"{path}: the runner left no result")
            continue
        p, f = count(path)
        passed += p
        failed += f
    for name in failed:
        print(f"FAILED {name}", file=sys.stderr)
    print(passed, len(failed))


if __name__ == "__main__":
    main()
