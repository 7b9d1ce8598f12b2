# SPDX-License-Identifier: Apache-2.0
"""The command `gradwire`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from gradwire.errors import GradwireError, ServerError, UserError
from gradwire.local_server import find_server


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _serve(args: argparse.Namespace) -> int:
    binary = find_server()
    state = os.path.expanduser("~/.local/state/gradwire")
    flags = list(args.flags)
    given = [f for f in flags if f.startswith(("--state_dir", "-state_dir"))]
    if not given:
        os.makedirs(state, exist_ok=True)
        flags.append(f"--state_dir={state}")
    _say(f"gradwire: starting {binary.name} {' '.join(flags)}")
    process = subprocess.Popen([str(binary), *flags])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The terminal has sent the signal to the server as well.
            continue


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


def _needed(args: argparse.Namespace, count: int, what: str) -> list[str]:
    """The arguments of an action, of which there must be so many."""
    given = [args.what, args.other]
    if None in given[:count]:
        raise UserError(
            f"checkpoint {args.action} needs {what}; `gradwire checkpoint "
            "list` shows them",
            reason="MISSING_ARGUMENT",
        )
    return given[:count]


def _promote(service: Any, args: argparse.Namespace) -> None:
    path, model_id = _needed(args, 2, "a path and a model's id")
    model = service.promote_checkpoint(path, model_id)
    if args.json:
        print(json.dumps(_checkpoint_fields(model)))
        return
    _say(f"{model_id}  {_mib(model.bytes)}  {model.local_path}")


def _set_ttl(service: Any, args: argparse.Namespace) -> None:
    path, given = _needed(args, 2, "a path, and seconds or never")
    try:
        ttl = None if given == "never" else float(given)
    except ValueError:
        raise UserError(
            f"{given} is no number of seconds; give one, or never",
            reason="OPTION_OUT_OF_RANGE",
        ) from None
    row = service.set_checkpoint_ttl(path, ttl)
    if args.json:
        print(json.dumps(_checkpoint_fields(row)))
        return
    _say(_checkpoint_line(row))


def _diff(service: Any, args: argparse.Namespace) -> None:
    before, after = _needed(args, 2, "two paths")
    if args.export:
        partial = f"{args.export}.partial"
        try:
            with open(partial, "wb") as file:
                size = service.export_diff(before, after, file, args.format)
            os.replace(partial, args.export)
        except BaseException:
            pathlib.Path(partial).unlink(missing_ok=True)
            raise
        if args.json:
            fields = {"file": args.export, "format": args.format, "bytes": size}
            print(json.dumps(fields))
            return
        _say(f"{args.export}  {args.format}  {_mib(size)}")
        return
    diff = service.diff_checkpoints(before, after)
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
            rows = service.list_checkpoints(args.what or "", remote=args.remote)
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
        (path,) = _needed(args, 1, "a path")
        call = {
            "get": service.get_checkpoint,
            "verify": service.verify_checkpoint,
            "delete": service.delete_checkpoint,
            "fetch": service.fetch_checkpoint,
        }[args.action]
        row = call(path)
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
        if not args.job_id:
            raise UserError(
                f"job {args.action} needs a job's id; `gradwire job list` "
                "shows them",
                reason="MISSING_ARGUMENT",
            )
        if args.action == "watch":
            for job in service.watch_job(args.job_id):
                _print_job(job, args.json)
            return 0
        call = {
            "get": service.get_job,
            "restart": service.restart_job,
            "delete": service.delete_job,
        }[args.action]
        _print_job(call(args.job_id), args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradwire")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve", help="start a server; flags are those of gradwired"
    )
    serve.set_defaults(run=_serve)
    doctor = commands.add_parser("doctor", help="what this machine has")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    quickstart = commands.add_parser(
        "quickstart", help="fine-tune a model with a loss in Python"
    )
    quickstart.add_argument("--steps", type=int)
    quickstart.add_argument("--out", default="quickstart-out")
    quickstart.add_argument("--precision", choices=("f32", "bf16"))
    quickstart.set_defaults(run=_quickstart)
    job = commands.add_parser(
        "job", help="list, get, watch, restart, delete jobs"
    )
    job.add_argument(
        "action", choices=("list", "get", "watch", "restart", "delete")
    )
    job.add_argument("job_id", nargs="?")
    job.add_argument("--json", action="store_true")
    job.set_defaults(run=_job)
    checkpoint = commands.add_parser(
        "checkpoint",
        help="list, get, verify, promote, diff, ttl, fetch, delete checkpoints "
        "and snapshots",
    )
    checkpoint.add_argument(
        "action",
        choices=(
            "list",
            "get",
            "verify",
            "promote",
            "diff",
            "ttl",
            "fetch",
            "delete",
        ),
    )
    checkpoint.add_argument("what", nargs="?", help="a job's id (list), a path")
    checkpoint.add_argument(
        "other",
        nargs="?",
        help="the model's id (promote), the later snapshot's path (diff), "
        "seconds since it was made, or never (ttl)",
    )
    checkpoint.add_argument(
        "--export", metavar="FILE", help="write the difference (diff)"
    )
    checkpoint.add_argument(
        "--format",
        choices=("dlt1", "xor", "sparse"),
        default="dlt1",
        help="of --export: docs/delta.md, XOR + zstd, indices and values",
    )
    checkpoint.add_argument(
        "--remote",
        action="store_true",
        help="list also what is in the object store alone",
    )
    checkpoint.add_argument("--json", action="store_true")
    checkpoint.set_defaults(run=_checkpoint)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 a failure, 2 usage, 130 Ctrl-C."""
    args, rest = _parser().parse_known_args(argv)
    if args.command == "serve":
        args.flags = rest
    elif rest:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args)
    except GradwireError as error:
        _say(f"gradwire: {' '.join(str(error).split())}")
        return 1
    except OSError as error:
        _say(f"gradwire: {error}")
        return 1
    except KeyboardInterrupt:
        _say("gradwire: interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
