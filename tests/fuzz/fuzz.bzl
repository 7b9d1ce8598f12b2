# SPDX-License-Identifier: Apache-2.0
"""A libFuzzer target: bazel build --config=fuzz //tests/fuzz:NAME."""

load("@rules_cc//cc:defs.bzl", "cc_binary")

def fuzz_target(name, deps):
    """NAME_fuzz.cc, linked with libFuzzer.

    Args:
      name: of the target; NAME_fuzz.cc defines the functions of fuzz.h.
      deps: what it tests.
    """
    cc_binary(
        name = name,
        testonly = True,
        srcs = [name + "_fuzz.cc"],
        linkopts = ["-fsanitize=fuzzer"],
        # gcc has no libFuzzer: not a part of //...
        tags = ["manual"],
        deps = deps + [":fuzz"],
    )
