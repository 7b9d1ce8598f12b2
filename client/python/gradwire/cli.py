# SPDX-License-Identifier: Apache-2.0
"""The command `gradwire`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gradwire import __version__
from gradwire.errors import GradwireError, ServerError
from gradwire.local_server import find_server


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _UsageError(Exception):
    """Arguments that a command does not take."""


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong and where to read on."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(
            f"{self.prog}: {message}; `{self.prog} --help` shows what it takes"
        )


def _serve(args: argparse.Namespace) -> int:
    """Becomes gradwired: its process id, signals and exit status are the
    server's."""
    binary = find_server()
    try:
        if {"-h", "--help"} & set(args.flags):
            print("usage: gradwire serve [FLAG ...]\n", flush=True)
            status = subprocess.run([str(binary), "--help"]).returncode
            return 0 if status == 1 else status  # 1 is Abseil's for help
        _say(f"gradwire: starting {' '.join([binary.name, *args.flags])}")
        # Python ignores these, and what is ignored stays so.
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored, signal.SIG_DFL)
        os.execv(binary, [str(binary), *args.flags])
    except OSError as error:
        raise ServerError(
            f"{binary} cannot be started ({error.strerror}); build it anew "
            "with `bazel build //server:gradwired`",
            reason="SERVER_NOT_STARTED",
        ) from error


def _processor_isa() -> list[str]:
    """What the processor has; what a server would use, only it can say."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next(
                (line.split() for line in file if line.startswith("flags")), []
            )
    except OSError:
        return []
    return [name for name in wanted if name in flags]


def _described(rank: pathlib.Path) -> dict[str, Any]:
    """What gradwire_rank says that a job would compute with."""
    try:
        done = subprocess.run(
            [str(rank), "--describe"],
            capture_output=True,
            check=True,
            timeout=60,
        )
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ServerError(
            f"{rank} cannot describe itself ({error}); build it anew with "
            "`bazel build //server:gradwire_rank`",
            reason="SERVER_NOT_STARTED",
        ) from error


def _doctor(args: argparse.Namespace) -> int:
    checks: list[dict[str, Any]] = []

    def check(name: str, ok: bool, found: str, remedy: str = "") -> None:
        row = {"name": name, "ok": ok, "found": found}
        checks.append(row if ok else {**row, "remedy": remedy})

    python_ok = sys.version_info >= (3, 10)
    check(
        "python", python_ok, platform.python_version(), "install 3.10 or newer"
    )
    described: dict[str, Any] = {}
    try:
        server = find_server()
        check("gradwired", True, str(server))
    except GradwireError as error:
        check("gradwired", False, "", error.message)
    else:
        rank = server.with_name("gradwire_rank")
        try:
            described = _described(rank)
            check("gradwire_rank", True, str(rank))
        except GradwireError as error:
            check("gradwire_rank", False, "", error.message)
    for module in ("torch", "transformers", "matplotlib"):
        found = importlib.util.find_spec(module) is not None
        check(
            module, found, "installed" if found else "", f"pip install {module}"
        )
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    report = {
        "ok": all(row["ok"] for row in checks),
        "cores": os.cpu_count(),
        "memory_bytes": pages * size,
        "isa": [described["isa"]] if described else _processor_isa(),
        "device": described.get("device"),
        "threads": described.get("threads"),
        "default_precision": described.get("default_precision"),
        "default_precision_reason": described.get("default_precision_reason"),
        "gpu": shutil.which("nvidia-smi") is not None,
        "checks": checks,
    }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _say(
            f"{report['cores']} cores, {report['memory_bytes'] / 2**30:.1f} "
            f"GiB, {' '.join(report['isa']) or 'no wide vectors'}"
        )
        if described:
            _say(
                f"a job computes on {report['device']}, {report['threads']} "
                f"threads, in {report['default_precision']} unless it asks "
                f"for another precision: {report['default_precision_reason']}"
            )
        for row in checks:
            mark = "ok     " if row["ok"] else "MISSING"
            _say(f"{mark} {row['name']:14} {row.get('remedy') or row['found']}")
    return 0 if report["ok"] else 1


def _quickstart(args: argparse.Namespace) -> int:
    from gradwire.quickstart.run import run

    return run(steps=args.steps, out=args.out, precision=args.precision)


def _fields(message: Any) -> dict[str, Any]:
    from google.protobuf import json_format

    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def _print_job(job: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_fields(job)), flush=True)
        return
    _say(_line(job))


def _line(job: Any) -> str:
    from gradwire._proto.gradwire.v1 import jobs_pb2

    state = jobs_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")
    ready = "ready" if job.ready else f"{job.progress:.0%}"
    return (
        f"{job.job_id:32} {state.lower():10} {ready:6} step "
        f"{job.optimizer_step}  {job.spec.base_model}  {job.status_message}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _time(stamp: Any) -> str:
    """RFC 3339 with six digits, whose order is that of time."""
    return stamp.ToDatetime().isoformat("T", "microseconds") + "Z"


def _checkpoint_fields(row: Any) -> dict[str, Any]:
    fields = _fields(row)
    for name in ("create_time", "expire_time"):
        if name in fields:
            fields[name] = _time(getattr(row, name))
    return fields


def _checkpoint_line(row: Any) -> str:
    path = row.path.removeprefix("gradwire://")
    when = row.create_time.ToDatetime().isoformat(" ", "seconds")
    if row.HasField("error"):
        return f"{path:48} {when}  {row.error.reason}"
    model = row.attributes["base_model"] if row.attributes else ""
    line = (
        f"{path:48} {when}  {row.kind or 'training':8} "
        f"step {row.optimizer_step}  {_mib(row.bytes)}  {model}"
    )
    if row.object_url:
        line += f"  {'at' if row.local_path else 'only at'} {row.object_url}"
    if row.HasField("upload_error"):
        line += f"  no copy: {row.upload_error.reason}"
    if row.parent:
        line += f"  to {row.parent}"
    if row.HasField("expire_time"):
        line += f"  expires {_time(row.expire_time)}"
        line += f" (kept for {row.child})" if row.child else ""
    return line


def _promote(service: Any, args: argparse.Namespace) -> None:
    model = service.promote_checkpoint(args.path, args.model_id)
    if args.json:
        print(json.dumps(_checkpoint_fields(model)))
        return
    _say(f"{args.model_id}  {_mib(model.bytes)}  {model.local_path}")


def _seconds_or_never(text: str) -> float | None:
    try:
        return None if text == "never" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is no number of seconds; give one, or never"
        ) from None


def _set_ttl(service: Any, args: argparse.Namespace) -> None:
    row = service.set_checkpoint_ttl(args.path, args.ttl)
    if args.json:
        print(json.dumps(_checkpoint_fields(row)))
        return
    _say(_checkpoint_line(row))


def _export(service: Any, args: argparse.Namespace) -> None:
    partial = pathlib.Path(f"{args.export}.partial")
    layout = args.format or "dlt1"
    try:
        with open(partial, "wb") as file:
            size = service.export_diff(args.before, args.after, file, layout)
        os.replace(partial, args.export)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and not isinstance(error, GradwireError):
            raise OSError(
                f"the difference was not written to {args.export} "
                f"({error.strerror}); give --export a file in a folder that "
                "exists, can be written and has room"
            ) from error
        raise
    if args.json:
        fields = {"file": args.export, "format": layout, "bytes": size}
        print(json.dumps(fields))
        return
    _say(f"{args.export}  {layout}  {_mib(size)}")


def _diff(service: Any, args: argparse.Namespace) -> None:
    if args.export is not None:
        _export(service, args)
        return
    if args.format:
        args.parser.error("--format needs --export FILE")
    diff = service.diff_checkpoints(args.before, args.after)
    share = diff.changed / max(diff.elements, 1)
    if args.json:
        fields = _fields(diff)
        # int64 is text in JSON's mapping of messages; these are numbers.
        for name in ("elements", "changed", "delta_bytes", "full_bytes"):
            fields[name] = getattr(diff, name)
        print(json.dumps({**fields, "share": share}, indent=2))
        return
    for tensor in diff.tensors:
        part = tensor.changed / max(tensor.elements, 1)
        _say(
            f"{tensor.name:56} {tensor.changed:12} of {tensor.elements:12} "
            f"{part:8.2%}{' new' if tensor.fresh else ''}"
        )
    for name in diff.removed:
        _say(f"{name:56} removed")
    smaller = diff.full_bytes / max(diff.delta_bytes, 1)
    _say(
        f"{len(diff.tensors)} tensors, {diff.changed} of {diff.elements} "
        f"elements ({share:.2%}); as a delta {_mib(diff.delta_bytes)}, "
        f"{smaller:.1f} times smaller than {_mib(diff.full_bytes)}"
    )


def _checkpoint(args: argparse.Namespace) -> int:
    from gradwire.service_client import ServiceClient

    with ServiceClient() as service:
        if args.action == "list":
            rows = service.list_checkpoints(
                args.job_id or "", remote=args.remote
            )
            if args.json:
                listed = [_checkpoint_fields(row) for row in rows]
                print(json.dumps(listed, indent=2))
            for row in rows if not args.json else ():
                _say(_checkpoint_line(row))
            return 0
        if args.action == "promote":
            _promote(service, args)
            return 0
        if args.action == "diff":
            _diff(service, args)
            return 0
        if args.action == "ttl":
            _set_ttl(service, args)
            return 0
        call = {
            "get": service.get_checkpoint,
            "verify": service.verify_checkpoint,
            "delete": service.delete_checkpoint,
            "fetch": service.fetch_checkpoint,
        }[args.action]
        row = call(args.path)
        if args.json:
            print(json.dumps(_checkpoint_fields(row)))
        else:
            done = {
                "get": "",
                "verify": "verified ",
                "delete": "deleted ",
                "fetch": "fetched ",
            }
            _say(done[args.action] + _checkpoint_line(row))
    return 0


def _job(args: argparse.Namespace) -> int:
    from gradwire.service_client import ServiceClient

    with ServiceClient() as service:
        if args.action == "list":
            jobs = service.list_jobs()
            if args.json:
                print(json.dumps([_fields(job) for job in jobs], indent=2))
            for job in jobs if not args.json else ():
                _say(_line(job))
            return 0
        if args.action == "watch":
            for job in service.watch_job(args.job_id):
                _print_job(job, args.json)
            return 0
        if args.action == "delete":
            job = service.delete_job(args.job_id, force=args.force)
        else:
            call = {"get": service.get_job, "restart": service.restart_job}
            job = call[args.action](args.job_id)
        _print_job(job, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gradwire")
    parser.add_argument(
        "--version", action="version", version=f"gradwire {__version__}"
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True
    )
    serve = commands.add_parser(
        "serve",
        help="start a server; flags are those of gradwired, see `serve --help`",
        add_help=False,
    )
    serve.set_defaults(run=_serve)
    doctor = commands.add_parser("doctor", help="what this machine has")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor, parser=doctor)
    quickstart = commands.add_parser(
        "quickstart", help="fine-tune a model with a loss in Python"
    )
    quickstart.add_argument("--steps", type=int)
    quickstart.add_argument("--out", default="quickstart-out")
    quickstart.add_argument("--precision", choices=("f32", "bf16"))
    quickstart.set_defaults(run=_quickstart, parser=quickstart)
    _add_job(commands)
    _add_checkpoint(commands)
    return parser


def _actions(commands: Any, name: str, about: str) -> Callable[..., Any]:
    """add(action, help, run): the parser of an action of command `name`."""
    command = commands.add_parser(name, help=about)
    command.add_argument("--json", action="store_true")
    actions = command.add_subparsers(
        dest="action", metavar="ACTION", required=True
    )

    def add(action: str, about: str, run: Callable[..., int]) -> Any:
        leaf = actions.add_parser(action, help=about)
        # The default is the command's, which takes the flag as well.
        leaf.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS
        )
        leaf.set_defaults(run=run, parser=leaf)
        return leaf

    return add


def _add_job(commands: Any) -> None:
    add = _actions(commands, "job", "list, get, watch, restart, delete jobs")
    add("list", "all jobs, oldest first", _job)
    for action, about in (
        ("get", "one job"),
        ("watch", "a job now and at every change, until it is deleted"),
        ("restart", "start a failed job again"),
        ("delete", "end a job and delete it, once its saves have ended"),
    ):
        made = add(action, about, _job)
        made.add_argument(
            "job_id", metavar="JOB", help="as `gradwire job list` shows it"
        )
        if action == "delete":
            made.add_argument(
                "--force", action="store_true", help="give saves up"
            )


def _add_checkpoint(commands: Any) -> None:
    add = _actions(
        commands,
        "checkpoint",
        "list, get, verify, promote, diff, ttl, fetch, delete checkpoints and "
        "snapshots",
    )
    path = "as `gradwire checkpoint list` shows it"
    listed = add("list", "those of a job, or of all jobs", _checkpoint)
    listed.add_argument("job_id", nargs="?", metavar="JOB")
    listed.add_argument(
        "--remote",
        action="store_true",
        help="also what is in the object store alone",
    )
    for action, about in (
        ("get", "one of them"),
        ("verify", "read all of it and compare its digests"),
        ("delete", "delete it"),
        ("fetch", "bring it back from the object store"),
    ):
        add(action, about, _checkpoint).add_argument(
            "path", metavar="PATH", help=path
        )
    promote = add("promote", "make a Hugging Face directory of it", _checkpoint)
    promote.add_argument("path", metavar="PATH", help=path)
    promote.add_argument("model_id", metavar="MODEL_ID")
    diff = add("diff", "what has changed between snapshots", _checkpoint)
    diff.add_argument("before", metavar="PATH", help="the earlier snapshot")
    diff.add_argument("after", metavar="PATH", help="the later one")
    diff.add_argument(
        "--export", metavar="FILE", help="write the difference to a file"
    )
    diff.add_argument(
        "--format",
        choices=("dlt1", "xor", "sparse"),
        help="of --export: docs/delta.md (the default), XOR + zstd, indices "
        "and values",
    )
    ttl = add("ttl", "change when the server may delete it", _checkpoint)
    ttl.add_argument("path", metavar="PATH", help=path)
    ttl.add_argument(
        "ttl",
        type=_seconds_or_never,
        metavar="SECONDS",
        help="since it was made, or never",
    )


def _reason(error: OSError) -> str:
    """In one line, without the number."""
    if error.strerror is None:
        return " ".join(str(error).split())
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}; mend that and run the command again"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 a failure, 2 usage, 130 Ctrl-C."""
    try:
        args, rest = _parser().parse_known_args(argv)
        if args.command == "serve":
            args.flags = rest
        elif rest:
            args.parser.error(f"it does not take {' '.join(rest)}")
        return args.run(args)
    except _UsageError as error:
        _say(str(error))
        return 2
    except GradwireError as error:
        _say(f"gradwire: {' '.join(str(error).split())}")
        return 1
    except OSError as error:
        _say(f"gradwire: {_reason(error)}")
        return 1
    except KeyboardInterrupt:
        _say("gradwire: interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
