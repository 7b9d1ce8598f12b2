# SPDX-License-Identifier: Apache-2.0
"""The last line of ./test.sh must not hide a failure of any kind."""

import json

from count_tests import LINES, Failure, count_bazel, count_fuzz, count_junit

JUNIT = """<testsuites><testsuite>
  <testcase name="a" classname="A" status="run"/>
  <testcase name="b" classname="A" status="run"><failure>one
      two</failure></testcase>
  <testcase name="c" classname="A"><skipped/></testcase>
  <testcase name="d" classname="A" status="notrun"/>
</testsuite></testsuites>"""

GREEN = '<testsuites><testsuite><testcase name="a"/></testsuite></testsuites>'


def write_events(tmp_path, *events):
    path = tmp_path / "events.json"
    path.write_text("\n".join(json.dumps(e) for e in events))
    return path


def result(tmp_path, status, xml=None):
    outputs = []
    if xml is not None:
        file = tmp_path / "test.xml"
        file.write_text(xml)
        outputs.append({"name": "test.xml", "uri": f"file://{file}"})
    return {
        "id": {"testResult": {"label": "//a:a_test"}},
        "testResult": {"status": status, "testActionOutput": outputs},
    }


def test_skipped_cases_count_neither_way(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    assert count_junit(path) == (1, [Failure("A.b", "one\n      two")])


def test_passed_target(tmp_path):
    events = write_events(tmp_path, result(tmp_path, "PASSED", GREEN))
    assert count_bazel(events) == (1, [])


def test_timeout_is_a_failure_even_if_its_cases_passed(tmp_path):
    events = write_events(tmp_path, result(tmp_path, "TIMEOUT", GREEN))
    assert count_bazel(events) == (1, [Failure("//a:a_test: TIMEOUT")])


def test_crash_without_xml_is_one_failure(tmp_path):
    events = write_events(tmp_path, result(tmp_path, "FAILED"))
    assert count_bazel(events) == (0, [Failure("//a:a_test: FAILED")])


def test_a_crash_tells_the_end_of_its_log(tmp_path):
    log = tmp_path / "test.log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    crash = result(tmp_path, "FAILED")
    crash["testResult"]["testActionOutput"].append(
        {"name": "test.log", "uri": f"file://{log}"}
    )
    _, [failure] = count_bazel(write_events(tmp_path, crash))
    assert failure.why.splitlines()[-1] == "line 99"
    assert len(failure.why.splitlines()) == LINES


def test_target_that_does_not_build_is_one_failure(tmp_path):
    completed = {
        "id": {"targetCompleted": {"label": "//a:a_test"}},
        "completed": {},
    }
    events = write_events(tmp_path, completed)
    assert count_bazel(events) == (0, [Failure("//a:a_test: not built")])


def test_failed_target_is_not_counted_twice(tmp_path):
    completed = {
        "id": {"targetCompleted": {"label": "//a:a_test"}},
        "completed": {},
    }
    events = write_events(
        tmp_path, result(tmp_path, "FAILED", JUNIT), completed
    )
    assert count_bazel(events) == (
        1,
        [Failure("//a:a_test: A.b", "one\n      two")],
    )


def aborted(reason):
    return {
        "id": {"targetCompleted": {"label": "//a:a_test"}},
        "aborted": {"reason": reason},
    }


def test_target_that_the_machine_cannot_have_counts_neither_way(tmp_path):
    events = write_events(tmp_path, aborted("SKIPPED"))
    assert count_bazel(events) == (0, [])


def test_target_that_was_given_up_is_one_failure(tmp_path):
    for reason in ("INCOMPLETE", "LOADING_FAILURE", "ANALYSIS_FAILURE"):
        events = write_events(tmp_path, aborted(reason))
        assert count_bazel(events) == (0, [Failure("//a:a_test: not built")])


def test_fuzz_target_is_a_case(tmp_path):
    bad = "fuzz: delta  10 inputs  100/s  9 edges 1 findings"
    lines = tmp_path / "fuzz.txt"
    lines.write_text(
        "INFO: something else\n"
        "fuzz: oplog  2000 inputs  100/s  9 edges 0 findings\n"
        f"{bad}\n"
    )
    assert count_fuzz(lines) == (1, [Failure("fuzz.delta", bad)])
