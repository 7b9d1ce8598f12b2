# SPDX-License-Identifier: Apache-2.0
"""Whether a run that was disturbed equals one that was not."""

import math

LIMIT = 8  # differences that are told


def differences(want, got, client_died):
    """What is wrong with the journal `got`, given that of the undisturbed run.

    Each result must be there, once, and the same; if clients died, results may
    have died with them, and those of a step be computed again.
    """
    wanted = {(e["step"], e["name"]): e["value"] for e in results(want)}
    seen, problems = {}, []
    for entry in results(got):
        key = entry["step"], entry["name"]
        if key not in wanted:
            problems.append(f"{key} is no result of the run")
            continue
        if "exists" in entry:
            if not client_died:
                problems.append(f"{key} was saved twice")
            continue
        seen[key] = seen.get(key, 0) + 1
        if entry["value"] != wanted[key]:
            problems.append(
                f"{key} differs: {entry['value']} instead of {wanted[key]}"
            )
    if not client_died:
        problems += [f"{key} is missing" for key in wanted if key not in seen]
        problems += [f"{k} came {n} times" for k, n in seen.items() if n > 1]
    problems += wrong_steps(got)
    return problems[:LIMIT]


def results(journal):
    return [entry for entry in journal if entry["name"] != "begin"]


def wrong_steps(journal):
    """Optimizer steps are applied once and in order; a client that begins goes
    on where the last one that was applied leaves off."""
    problems, last = [], 0
    for entry in journal:
        if entry["name"] == "update":
            applied = entry["value"]["optimizer_step"]
            if applied != last + 1:
                problems.append(f"step {applied} was applied after {last}")
            last = applied
        elif entry["name"] == "begin":
            if entry["step"] < last:
                problems.append(
                    f"step {last} was acknowledged, and a client begins "
                    f"after {entry['step']}"
                )
            last = entry["step"]
    return problems


def different_files(want, got):
    problems = [f"{name} is missing" for name in sorted(want.keys() - got)]
    problems += [f"{name} is too much" for name in sorted(got.keys() - want)]
    problems += [
        f"{name} differs"
        for name in sorted(want.keys() & got)
        if want[name] != got[name]
    ]
    return problems[:LIMIT]


def percentile(values, share):
    """The smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
