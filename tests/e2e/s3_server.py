# SPDX-License-Identifier: Apache-2.0
"""moto's server, made as strict as a real store: it takes no body that is not
the one that was signed.

    python s3_server.py [CERTIFICATE KEY]     prints its address, and serves
"""

import hashlib
import io
import string
import sys

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

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


def main(certificate=None, key=None):
    server = make_server(
        "127.0.0.1",
        0,
        SignedBodies(DomainDispatcherApplication(create_backend_app)),
        threaded=True,
        request_handler=MotoRequestHandler,
        ssl_context=(certificate, key) if certificate else None,
    )
    scheme = "https" if certificate else "http"
    print(f"{scheme}://127.0.0.1:{server.port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
