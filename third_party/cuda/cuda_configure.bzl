"""Finds the CUDA toolkit, cuBLAS and NCCL where they are installed, as @cuda.

Toolkit: $CUDA_HOME, /usr/local/cuda. cuBLAS: the toolkit's, what tools/setup.sh
--dev has put into .cache/cuda. NCCL: $NCCL_HOME, .cache/cuda as well, the
compiler's own search path. Without them @cuda is
there all the same, and says so in defs.bzl.
"""

_DEFS = """\"\"\"What this machine has.\"\"\"

TOOLKIT = "{toolkit}"
ARCHITECTURES = {architectures}
CUBLAS = {cublas}
NCCL = {nccl}
"""

_BUILD = """package(default_visibility = ["//visibility:public"])

cc_library(
    name = "headers",
    hdrs = glob(["toolkit/include/*.h", "toolkit/include/*.hpp", "toolkit/include/crt/*", "toolkit/include/cccl/nv/**"]),
    includes = ["toolkit/include", "toolkit/include/cccl"],
)

cc_library(
    name = "runtime",
    srcs = glob(["toolkit/lib64/libcudart_static.a"]),
    linkopts = ["-ldl", "-lrt", "-lpthread"],
    deps = [":headers"],
)

cc_library(
    name = "cublas_headers",
    hdrs = glob(["cublas/include/cublas*.h"]),
    includes = ["cublas/include"],
    deps = [":headers"],
)

cc_library(
    name = "cublas",
    srcs = glob(["cublas/{cublas_lib}/libcublasLt.so.*"]),
    deps = [":cublas_headers"],
)

cc_library(
    name = "nccl_headers",
    hdrs = glob(["nccl/include/nccl.h"]),
    includes = ["nccl/include"],
    deps = [":headers"],
)

cc_library(
    name = "nccl",
    srcs = glob(["nccl/lib/libnccl.so.2"]),
    deps = [":nccl_headers"],
)
"""

def _first(repository_ctx, places, file):
    for place in places:
        if place and repository_ctx.path(place + "/" + file).exists:
            return place
    return ""

# Of those that kernels are written for, what the compiler knows.
def _architectures(repository_ctx, toolkit):
    if not toolkit:
        return []
    known = repository_ctx.execute([toolkit + "/bin/nvcc", "--list-gpu-arch"])
    names = known.stdout.split("\n")
    return [
        arch
        for arch in ["80", "90a", "100"]
        if "compute_" + arch.replace("a", "") in names
    ]

def _cuda_configure_impl(repository_ctx):
    root = str(repository_ctx.path(Label("@//:WORKSPACE")).dirname)
    env = repository_ctx.os.environ
    toolkit = _first(
        repository_ctx,
        [env.get("CUDA_HOME"), "/usr/local/cuda"],
        "bin/nvcc",
    )
    nccl = _first(
        repository_ctx,
        [env.get("NCCL_HOME"), root + "/.cache/cuda/nvidia/nccl", "/usr"],
        "include/nccl.h",
    )
    cublas = _first(
        repository_ctx,
        [root + "/.cache/cuda/nvidia/cu13", toolkit],
        "include/cublasLt.h",
    )
    if cublas:
        repository_ctx.symlink(cublas, "cublas")
    if toolkit:
        repository_ctx.symlink(toolkit, "toolkit")
    if nccl and nccl != "/usr":
        repository_ctx.symlink(nccl, "nccl")
    repository_ctx.file("defs.bzl", _DEFS.format(
        architectures = _architectures(repository_ctx, toolkit),
        cublas = bool(cublas),
        nccl = bool(nccl),
        toolkit = toolkit,
    ))
    lib = "lib64" if cublas and cublas == toolkit else "lib"
    build = _BUILD.replace("{cublas_lib}", lib)
    if nccl == "/usr":
        build = build.replace('glob(["nccl/lib/libnccl.so.2"])', "[]").replace(
            'deps = [":nccl_headers"],',
            'linkopts = ["-lnccl"], deps = [":nccl_headers"],',
        )
    repository_ctx.file("BUILD.bazel", build)

cuda_configure = repository_rule(
    implementation = _cuda_configure_impl,
    configure = True,
    environ = ["CUDA_HOME", "NCCL_HOME"],
    local = True,
)
