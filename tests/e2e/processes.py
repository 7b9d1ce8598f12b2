# SPDX-License-Identifier: Apache-2.0
"""Processes of a server, and their ends, awaited without polling."""

import os
import pathlib
import select


def ranks_of(pid):
    """The process ids of the ranks that `pid` has started."""
    found = set()
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            name, fields = (folder / "stat").read_text().rsplit(")", 1)
        except OSError:  # it has ended meanwhile
            continue
        state, parent = fields.split()[:2]
        if int(parent) == pid and "rank" in name and state != "Z":
            found.add(int(folder.name))
    return found


class Watched:
    """A process that need not be a child."""

    def __init__(self, pid):
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def has_ended(self, seconds):
        """Waits for the end; False if it has not come by then."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self):
        os.close(self._fd)
