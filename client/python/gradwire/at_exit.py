# SPDX-License-Identifier: Apache-2.0
"""A script that ends without close() loses no calls and hears of failures."""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwire.service_client import ServiceClient

_log = logging.getLogger("gradwire")
# For which the end of a script waits for a server that is away.
_MOST_AWAY_SECONDS = 60.0
_services: weakref.WeakSet[ServiceClient] = weakref.WeakSet()


def add(service: ServiceClient) -> None:
    """Lets the interpreter wait for its calls at the end."""
    _services.add(service)


def wait_for(service: ServiceClient) -> None:
    """Waits for its calls, as the end of a script does."""
    try:
        service.settle(_MOST_AWAY_SECONDS)
    except Exception:
        _log.exception("calls were not waited for")


@atexit.register
def _settle_all() -> None:
    # What an error has ended is not to be waited for. A prompt goes on after
    # one.
    if getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1"):
        return
    with contextlib.suppress(KeyboardInterrupt):
        for service in list(_services):
            wait_for(service)
