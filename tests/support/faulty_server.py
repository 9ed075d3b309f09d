"""An HTTP server of files with ranges, redirects and faults, for tests of shards at addresses."""

from __future__ import annotations

import gzip
import hashlib
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

PAGE = b"<!DOCTYPE html><html><body>Log in</body></html>"


class Request(NamedTuple):
    """One request as it arrived."""

    path: str
    """Path with its query."""
    range: str
    headers: dict[str, str]


class FaultyServer:
    """Server on the loopback interface; a context manager.

    Attributes:
        files: path without its first slash -> content; may change at any time. A query counts if it is in a path here.
        faults: function of (path, index of the request) -> name of a fault of `Handler`, or an empty text.
        requests: all requests so far.
        etags: whether answers have an ETag.
    """

    def __init__(self, files: dict[str, bytes], faults: Callable[[str, int], str] = lambda path, index: "") -> None:
        self.files, self.faults, self.etags = files, faults, True
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"owner": self})
        self._server = Listener(("127.0.0.1", 0), handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.address = f"http://{self.host}"

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Listener(ThreadingHTTPServer):
    """Server whose connections end with the test."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients are killed on purpose."""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    owner: FaultyServer
    timeout = 20

    def log_message(self, *_: object) -> None:
        """Write nothing."""

    def do_GET(self) -> None:
        """Answer a request, with its fault if it has one."""
        owner = self.owner
        with owner.lock:
            index = len(owner.requests)
            owner.requests.append(Request(self.path, self.headers.get("Range", ""), dict(self.headers)))
        fault = owner.faults(self.path, index)
        whole = self.path.lstrip("/")
        name = whole if whole in owner.files else whole.partition("?")[0]
        if fault.startswith("status "):
            return self._send(int(fault.split()[1]), b"", {"Retry-After": fault[11:]} if fault[10:] else {})
        if fault.startswith("redirect "):
            return self._send(302, b"", {"Location": fault.split()[1]})
        if fault == "page":
            return self._send(200, PAGE, {"Content-Type": "text/html"})
        if fault == "long page":
            return self._send(200, PAGE + b" " * 9000, {"Content-Type": "text/html"})
        if fault == "hang":
            time.sleep(2)
            return None
        if name not in owner.files:
            return self._send(404, b"no such file")
        return self._send_file(owner.files[name], fault)

    def _send_file(self, content: bytes, fault: str) -> None:
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'} if self.owner.etags and fault != "no ETag" else {}
        if fault.startswith("Last-Modified"):
            headers = {"Last-Modified": f"Mon, 01 Jan 2024 00:00:0{fault[-1]} GMT"}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if fault == "gzip whole":
            return self._send(200, gzip.compress(content), headers | {"Content-Encoding": "gzip"})
        if fault == "gzip cut":
            packed = gzip.compress(content)
            return self._send(200, packed[: len(packed) // 2], headers | {"Content-Encoding": "gzip"})
        if fault == "short":
            return self._send(200, content[: len(content) // 2], headers)
        if match is None or fault == "no ranges":
            return self._send(200, content, headers, fault)
        first, last = int(match[1]), min(int(match[2]), len(content) - 1)
        if first >= len(content):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        if fault == "short range":
            last = first + (last - first) // 2
        if fault == "other range":
            first, last = 0, last - first
        body, total = content[first : last + 1], len(content)
        headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        if fault == "no total":
            headers["Content-Range"] = f"bytes {first}-{last}/*"
        if fault == "no Content-Range":
            del headers["Content-Range"]
        if fault == "weak":
            headers["ETag"] = f"W/{headers['ETag']}"
        if fault == "zeros":
            body = bytes(len(body))
        if fault == "zeros behind the caption":
            body = body[:1536] + bytes(len(body[1536:]))
        if fault == "more bytes":
            body += bytes(100)
        if fault == "gzip":
            body, headers["Content-Encoding"] = gzip.compress(content), "gzip"
        return self._send(206, body, headers, fault)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: str = "") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if fault == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:100], body[100:], b""))
        else:
            self.send_header("Content-Length", str(len(body) + (100 if fault == "too long" else 0)))
        if fault == "drip headers":
            for number in range(40):
                self.send_header(f"X-{number}", "")
                self.flush_headers()
                time.sleep(0.05)
        self.end_headers()
        if fault == "drip":
            for place in range(0, len(body), 64):
                self.wfile.write(body[place : place + 64])
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        if fault in ("cut", "too long"):
            self.close_connection = True
