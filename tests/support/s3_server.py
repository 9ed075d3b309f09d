"""moto's S3 server on the loopback interface, with faults."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"


class _Handler(MotoRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *_: object) -> None:
        """Write nothing."""


class S3Server:
    """Server of buckets in memory; a context manager.

    Attributes:
        faults: function of (method, path, index of the request) -> `STATUS CODE`, as `503 SlowDown`, or an empty text.
        requests: method, path and range of all requests so far.
    """

    def __init__(self) -> None:
        self.faults: Callable[[str, str, int], str] = lambda method, path, index: ""
        self.requests: list[tuple[str, str, str]] = []
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def _answer(self, environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        self.requests.append((method, path, environment.get("HTTP_RANGE", "")))
        fault = self.faults(method, path, len(self.requests) - 1)
        if not fault:
            return self._application(environment, start)
        body = b"" if method == "HEAD" else ERROR.format(code=fault.split()[1]).encode()
        start(fault, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def __enter__(self) -> S3Server:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
