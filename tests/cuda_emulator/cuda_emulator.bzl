"""The .cu files of a cuda_library, compiled as C++ for the emulator."""

load("//third_party/cuda:cuda.bzl", "CUDA_HEADERS")

# Kernels and what they run on ask all the time which thread they are.
EMULATOR_COPTS = ["-ftls-model=initial-exec"]

def emulated_cuda_library(name, srcs, hdrs, deps = [], **kwargs):
    """A cc_library of kernels that run on the host.

    Args:
      name: of the library.
      srcs: .cu files that include device/cuda/kernel.h.
      hdrs: as in cuda_library.
      deps: as in cuda_library.
      **kwargs: of the cc_library.
    """
    copies = []
    for src in srcs:
        copy = "{}.emulated.cc".format(src[:-len(".cu")])
        native.genrule(
            name = "{}_{}".format(name, src[:-len(".cu")]),
            srcs = [src],
            outs = [copy],
            cmd = "cp $< $@",
            target_compatible_with = CUDA_HEADERS,
        )
        copies.append(copy)
    native.cc_library(
        name = name,
        srcs = copies,
        hdrs = hdrs,
        copts = EMULATOR_COPTS + [
            "-O2",
            # Of nvcc.
            "-Wno-unknown-pragmas",
        ],
        target_compatible_with = CUDA_HEADERS,
        testonly = True,
        deps = deps + ["//tests/cuda_emulator:kernel"],
        **kwargs
    )
