# SPDX-License-Identifier: Apache-2.0
"""A network between a client and a server, which can be cut."""

import contextlib
import selectors
import socket
import struct
import threading

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


class Proxy:
    """Forwards connections to a port of this machine. `with` ends it."""

    def __init__(self, port, target):
        self.port = port
        self._target = target
        self._lock = threading.Lock()  # guards the three below
        self._pairs = []
        self._listener = None
        self._through = 0
        self.open()

    @property
    def bytes(self):
        """How many have passed, both ways."""
        with self._lock:
            return self._through

    def open(self):
        """Takes connections."""
        listener = socket.create_server(("127.0.0.1", self.port))
        with self._lock:
            self._listener = listener
        threading.Thread(
            target=self._accept, args=(listener,), daemon=True
        ).start()

    def cut(self):
        """Resets all connections and takes no new ones."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
            listener, self._listener = self._listener, None
        if listener is not None:
            # Ends the accept that is under way, which closing would not.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for pair in pairs:
            for end in pair:
                _reset(end)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cut()

    def _accept(self, listener):
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                _reset(near)
                continue
            with self._lock:
                if self._listener is not listener:
                    _reset(near)
                    far.close()
                    return
                self._pairs.append((near, far))
            threading.Thread(
                target=self._pump, args=(near, far), daemon=True
            ).start()

    def _pump(self, near, far):
        with selectors.DefaultSelector() as selector, near, far:
            try:
                selector.register(near, selectors.EVENT_READ, far)
                selector.register(far, selectors.EVENT_READ, near)
                while True:
                    for key, _ in selector.select():
                        data = key.fileobj.recv(1 << 16)
                        if not data:
                            return
                        key.data.sendall(data)
                        with self._lock:
                            self._through += len(data)
            except (OSError, ValueError):
                return  # it was cut


def _reset(end):
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        # Wakes a thread that waits for it.
        end.shutdown(socket.SHUT_RD)
        end.close()
