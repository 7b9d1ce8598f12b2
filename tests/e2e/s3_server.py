# SPDX-License-Identifier: Apache-2.0
"""moto's server, made as strict as a real store: it takes no body that is not
the one that was signed.

    python s3_server.py [CERTIFICATE KEY]     prints its address, and serves
"""

import hashlib
import io
import json
import string
import sys
import time

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

DELAYS = "/gradwire-delays"

_REFUSAL = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>XAmzContentSHA256Mismatch</Code></Error>"""


class SignedBodies:
    """The signature covers a digest of the body, which moto believes."""

    def __init__(self, app):
        self._app = app

    def __call__(self, environ, start_response):
        said = environ.get("HTTP_X_AMZ_CONTENT_SHA256", "")
        # Others say that the body is not signed, or is so in chunks.
        if len(said) == 64 and set(said) <= set(string.hexdigits):
            size = int(environ.get("CONTENT_LENGTH") or 0)
            body = environ["wsgi.input"].read(size)
            if hashlib.sha256(body).hexdigest() != said:
                start_response(
                    "400 Bad Request", [("Content-Type", "application/xml")]
                )
                return [_REFUSAL]
            environ["wsgi.input"] = io.BytesIO(body)
        return self._app(environ, start_response)


class Delays:
    """Requests for names that end with commit.json take as many seconds longer
    as was posted for their method: before they are done, or, of DELETE, after
    that."""

    def __init__(self, app):
        self._app = app
        self._seconds = {}

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == DELAYS:
            size = int(environ["CONTENT_LENGTH"])
            self._seconds = json.loads(environ["wsgi.input"].read(size))
            start_response("200 OK", [])
            return []
        delays = path.endswith("/commit.json")
        if delays and method != "DELETE":
            self._wait(method)
        answer = self._app(environ, start_response)
        if delays and method == "DELETE":
            self._wait(method)
        return answer

    def _wait(self, method):
        """Or until the delay is no longer wanted."""
        end = time.monotonic() + self._seconds.get(method, 0)
        while time.monotonic() < end and self._seconds.get(method):
            time.sleep(0.02)


def main(certificate=None, key=None):
    server = make_server(
        "127.0.0.1",
        0,
        Delays(SignedBodies(DomainDispatcherApplication(create_backend_app))),
        threaded=True,
        request_handler=MotoRequestHandler,
        ssl_context=(certificate, key) if certificate else None,
    )
    scheme = "https" if certificate else "http"
    print(f"{scheme}://127.0.0.1:{server.port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
