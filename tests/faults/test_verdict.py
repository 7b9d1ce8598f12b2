# SPDX-License-Identifier: Apache-2.0
"""The judge of the crash loop finds what it is there to find."""

import copy

import pytest
from verdict import differences, different_files, percentile

RUN = [
    {"t": 0, "step": 0, "name": "begin"},
    {"t": 1, "step": 0, "name": "first", "value": {"logprobs": "a"}},
    {"t": 2, "step": 0, "name": "update", "value": {"optimizer_step": 1}},
    {"t": 3, "step": 1, "name": "first", "value": {"logprobs": "b"}},
    {"t": 4, "step": 1, "name": "update", "value": {"optimizer_step": 2}},
    {"t": 5, "step": 2, "name": "state", "value": {"digest": "c"}},
]


def test_a_run_equals_itself():
    assert differences(RUN, copy.deepcopy(RUN), client_died=False) == []


def changed(change):
    journal = copy.deepcopy(RUN)
    change(journal)
    return journal


@pytest.mark.parametrize("client_died", [False, True])
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda j: j[1]["value"].update(logprobs="z"), "differs"),
        (lambda j: j[5]["value"].update(digest="z"), "differs"),
        (lambda j: j[4]["value"].update(optimizer_step=3), "after 1"),
        (lambda j: j.insert(5, j[4]), "after 2"),  # applied twice
        (lambda j: j.insert(5, RUN[0]), "was acknowledged"),  # lost
        (lambda j: j[1].update(name="other"), "is no result"),
    ],
)
def test_one_wrong_result_is_found(change, said, client_died):
    found = differences(RUN, changed(change), client_died)
    assert said in "\n".join(found)


def test_what_only_the_death_of_a_client_excuses():
    again = {"t": 6, "step": 2, "name": "begin"}
    exists = {"t": 7, "step": 2, "name": "state", "exists": True}
    for change, said in (
        (lambda j: j.pop(1), "is missing"),
        (lambda j: j.insert(2, j[1]), "came 2 times"),
        (lambda j: j.extend([again, exists]), "saved twice"),
    ):
        (found,) = differences(RUN, changed(change), client_died=False)
        assert said in found
        assert differences(RUN, changed(change), client_died=True) == []


def test_one_wrong_byte_of_a_file_is_found():
    want = {"a": b"12", "b": b"3"}
    assert different_files(want, dict(want)) == []
    assert different_files(want, {**want, "a": b"13"}) == ["a differs"]
    assert different_files(want, {"a": b"12"}) == ["b is missing"]
    assert different_files(want, {**want, "c": b""}) == ["c is too much"]


def test_percentiles():
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([3, 1, 2], 0.99) == 3
    assert percentile([1], 0.5) == 1
