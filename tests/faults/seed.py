# SPDX-License-Identifier: Apache-2.0
"""What a seeded bug is; the modules of seeds.py have them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Seed:
    """`before` stands once in `file`; `tests` are Bazel targets, and files or
    node ids of pytest. One that fails is enough."""

    name: str
    meaning: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
