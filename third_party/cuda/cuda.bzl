"""cuda_library: .cu files, compiled by nvcc.

On a machine without the toolkit, and without --config=cuda, targets that need
it are left out of wildcards by what they are compatible with.
"""

load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain")
load("@cuda//:defs.bzl", "ARCHITECTURES", "CUBLAS", "NCCL", "TOOLKIT")

_NEVER = ["//third_party/cuda:never"]

# Of targets that include CUDA's headers, cuBLAS's and NCCL's: tests on the
# emulator.
CUDA_HEADERS = [] if TOOLKIT else _NEVER
CUBLAS_HEADERS = [] if TOOLKIT and CUBLAS else _NEVER
NCCL_HEADERS = [] if TOOLKIT and NCCL else _NEVER
CUBLAS_AND_NCCL_HEADERS = [] if TOOLKIT and CUBLAS and NCCL else _NEVER

def _enabled(found):
    return select({
        "//third_party/cuda:enabled": [] if found else _NEVER,
        "//conditions:default": _NEVER,
    })

# Of targets that are compiled by nvcc or linked with what CUDA brings.
CUDA = _enabled(TOOLKIT)
CUDA_AND_CUBLAS = _enabled(TOOLKIT and CUBLAS)
CUDA_AND_NCCL = _enabled(TOOLKIT and NCCL)
CUDA_CUBLAS_AND_NCCL = _enabled(TOOLKIT and CUBLAS and NCCL)

def _flags():
    flags = [
        "-std=c++20",
        "-O3",
        # As in .bazelrc: no contraction beyond what the source writes.
        "--fmad=false",
        "-lineinfo",
        # The tables of constants that host and device share.
        "--expt-relaxed-constexpr",
        "-Werror=all-warnings",
        # nvcc's own: it takes an assignment of a nodiscard type for a call.
        "-diag-suppress=2810",
        # Three architectures with line numbers are large.
        "-Xfatbin=-compress-all",
        "-Xcompiler=-fPIC,-Wall,-Wextra,-fno-omit-frame-pointer,-ffp-contract=off",
    ]
    for arch in ARCHITECTURES:
        flags.append("-gencode=arch=compute_{0},code=sm_{0}".format(arch))

    # For what is newer than all of these: the driver compiles it.
    if ARCHITECTURES:
        flags.append("-gencode=arch=compute_80,code=compute_80")
    return flags

def _cuda_library_impl(ctx):
    cc_toolchain = find_cpp_toolchain(ctx)
    features = cc_common.configure_features(
        ctx = ctx,
        cc_toolchain = cc_toolchain,
        requested_features = ctx.features,
        unsupported_features = ctx.disabled_features,
    )
    below = cc_common.merge_cc_infos(
        cc_infos = [dep[CcInfo] for dep in ctx.attr.deps],
    )
    context = below.compilation_context
    objects = []
    for src in ctx.files.srcs:
        out = ctx.actions.declare_file("_objs/{}/{}.o".format(
            ctx.label.name,
            src.basename[:-len(".cu")],
        ))
        args = ctx.actions.args()
        args.add_all(_flags())
        args.add("-I.")
        args.add_all(context.system_includes, before_each = "-isystem")
        args.add("-c", src)
        args.add("-o", out)
        ctx.actions.run(
            executable = TOOLKIT + "/bin/nvcc",
            arguments = [args],
            inputs = depset(
                [src] + ctx.files.hdrs,
                transitive = [context.headers],
            ),
            outputs = [out],
            mnemonic = "CudaCompile",
            progress_message = "Compiling %{input}".replace("%{input}", src.short_path),
            use_default_shell_env = True,
        )
        objects.append(out)
    linking, _ = cc_common.create_linking_context_from_compilation_outputs(
        actions = ctx.actions,
        feature_configuration = features,
        cc_toolchain = cc_toolchain,
        name = ctx.label.name,
        compilation_outputs = cc_common.create_compilation_outputs(
            objects = depset(objects),
            pic_objects = depset(objects),
        ),
        linking_contexts = [below.linking_context],
        disallow_dynamic_library = True,
    )
    own = CcInfo(
        compilation_context = cc_common.create_compilation_context(
            headers = depset(ctx.files.hdrs),
        ),
        linking_context = linking,
    )
    return [
        DefaultInfo(files = depset(objects)),
        cc_common.merge_cc_infos(cc_infos = [own, below]),
    ]

cuda_library = rule(
    implementation = _cuda_library_impl,
    attrs = {
        "srcs": attr.label_list(allow_files = [".cu"]),
        "hdrs": attr.label_list(allow_files = [".h"]),
        "deps": attr.label_list(providers = [CcInfo]),
        "_cc_toolchain": attr.label(
            default = "@bazel_tools//tools/cpp:current_cc_toolchain",
        ),
    },
    fragments = ["cpp"],
    toolchains = ["@bazel_tools//tools/cpp:toolchain_type"],
)
