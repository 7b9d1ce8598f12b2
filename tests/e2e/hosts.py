# SPDX-License-Identifier: Apache-2.0
"""Network namespaces as hosts, each with one link to a common switch."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

_HERE = pathlib.Path(__file__).parent


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Hosts:
    """Hosts 0 .. count-1; host i is 10.77.0.(i + 1). Skips where the system
    lets nobody make namespaces."""

    def __init__(self, count):
        self.count = count
        self._id = f"gw{os.getpid() % 10000}"
        self._made = []

    def __enter__(self):
        try:
            self._add("sw")
            _ip("-n", self._name("sw"), "link", "add", "br0", "type", "bridge")
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            self.__exit__()
            pytest.skip(f"network namespaces cannot be made: {error}")
        self._in("sw", "link", "set", "br0", "up")
        for host in range(self.count):
            self._add(f"h{host}")
            port = f"p{host}"
            self._in(
                "sw", "link", "add", port, "type", "veth", "peer", "name",
                "eth0", "netns", self._name(f"h{host}"),
            )  # fmt: skip
            self._in("sw", "link", "set", port, "master", "br0", "up")
            self._in(
                f"h{host}", "addr", "add", f"{self.address(host)}/24", "dev",
                "eth0",
            )  # fmt: skip
            self._in(f"h{host}", "link", "set", "eth0", "up")
            self._in(f"h{host}", "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def address(self, host):
        return f"10.77.0.{host + 1}"

    def command(self, host, *command):
        """`command` as it is run on a host."""
        name = self._name(f"h{host}")
        return ["ip", "netns", "exec", name, *map(str, command)]

    def start(self, host, *command, **options):
        return subprocess.Popen(self.command(host, *command), **options)

    def set_link(self, host, up):
        """Cuts or mends a host's link at the switch: nobody is told."""
        self._in("sw", "link", "set", f"p{host}", "up" if up else "down")

    def set_path(self, sender, receiver, up):
        """Loses, or no longer, what one host sends to another; what the other
        sends arrives."""
        to = self.address(receiver)
        if up:
            self._in(f"h{sender}", "neigh", "del", to, "dev", "eth0")
        else:
            self._in(
                f"h{sender}", "neigh", "replace", to, "lladdr",
                "02:00:00:00:00:01", "dev", "eth0", "nud", "permanent",
            )  # fmt: skip

    def delay(self, milliseconds):
        """What is sent takes longer by this on its way out of every host."""
        for host in range(self.count):
            subprocess.run(
                self.command(
                    host, "tc", "qdisc", "replace", "dev", "eth0", "root",
                    "netem", "delay", f"{milliseconds}ms",
                ),
                check=True,
            )  # fmt: skip

    def _name(self, part):
        return f"{self._id}{part}"

    def _add(self, part):
        _ip("netns", "add", self._name(part))
        self._made.append(self._name(part))

    def _in(self, part, *arguments):
        _ip("-n", self._name(part), *arguments)


class Driver:
    """A client on a host: driver.py, told by lines of JSON."""

    def __init__(self, hosts, host, address):
        self.process = hosts.start(
            host,
            sys.executable,
            _HERE / "driver.py",
            address,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(30)

    def tell(self, call, **arguments):
        line = json.dumps({"call": call, **arguments})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def ask(self, call, **arguments):
        self.tell(call, **arguments)
        return self.answer()
