"""C++ libraries from .proto files, through Debian's protoc and gRPC plugin."""

def gradwire_cc_proto(name, srcs, grpc = False, deps = []):
    """Compiles `srcs` (paths below proto/) into one cc_library.

    Args:
      name: of the library.
      srcs: .proto files of this package, named by their path below proto/.
      grpc: also generate service classes.
      deps: other gradwire_cc_proto targets that are imported.
    """
    hdrs = [s.replace(".proto", ".pb.h") for s in srcs]
    ccs = [s.replace(".proto", ".pb.cc") for s in srcs]
    grpc_args = ""
    if grpc:
        hdrs = hdrs + [s.replace(".proto", ".grpc.pb.h") for s in srcs]
        ccs = ccs + [s.replace(".proto", ".grpc.pb.cc") for s in srcs]
        grpc_args = "--plugin=protoc-gen-grpc=/usr/bin/grpc_cpp_plugin " + \
                    "--grpc_out=$(RULEDIR) "
    native.genrule(
        name = name + "_gen",
        srcs = srcs + ["//proto:all_protos"],
        outs = hdrs + ccs,
        cmd = "protoc -Iproto --cpp_out=$(RULEDIR) " + grpc_args +
              " ".join(["proto/" + s for s in srcs]),
    )
    native.cc_library(
        name = name,
        srcs = ccs,
        hdrs = hdrs,
        copts = ["-w"],
        includes = ["."],
        deps = deps + [
            "//third_party:grpc" if grpc else "//third_party:protobuf",
        ],
    )
