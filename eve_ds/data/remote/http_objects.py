"""Objects of HTTP servers, read in ranges by `requests`.

Calls are synchronous: a loader worker needs no event loop, and a forked process only a session of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import requests
import urllib3

from eve_ds.data.failed_download import failed_download
from eve_ds.data.remote.errors import (
    FailedAttempt,
    MissingObject,
    RefusedObject,
    RemoteError,
    WrongContent,
    wrong_content,
)
from eve_ds.data.remote.interface import Version, require_same
from eve_ds.data.remote.retries import Clock
from eve_ds.printable import excerpt, without_credentials

PROBE_BYTES = 4096
"""Bytes that are read to learn the size of an object: usually they hold the first headers of a tar."""
_PIECE = 2**18
_PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that may pass: RFC 9110, section 15, RFC 6585 and RFC 8470."""
_KINDS: dict[int, type[RemoteError]] = {
    **dict.fromkeys((404, 410), MissingObject),
    **dict.fromkeys((400, 401, 403), RefusedObject),
}
"""Errors of statuses that say more than that an object cannot be read."""
_REASONS: dict[str, tuple[type[Exception], ...]] = {
    "unknown host, check its name": (urllib3.exceptions.NameResolutionError,),
    "no connection to the proxy": (requests.exceptions.ProxyError,),
    "no connection": (urllib3.exceptions.NewConnectionError,),
    "timed out": (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError),
}
"""Text -> classes of errors."""
_PLAIN_SERVER = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")
"""Names that OpenSSL gives to an answer without encryption."""
_WITHOUT_AUTHORITIES = "Could not find a suitable TLS CA certificate bundle"
"""Start of the text of `requests` about a variable that names no file."""
_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)")


class HttpServers:
    """All HTTP servers; see :class:`eve_ds.data.remote.interface.Server`.

    Args:
        timeout: seconds to wait for a connection, and for further bytes.
        clock: clock of the ends of reads.
        connections: number of connections that each server keeps open.
    """

    def __init__(self, timeout: float, clock: Clock, connections: int) -> None:
        self._session, self._timeout, self._clock = requests.Session(), timeout, clock
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=connections))

    def open(self, address: str, end: float) -> HttpObject:
        """Open an object."""
        return HttpObject(self._session, address, self._timeout, self._clock, end)

    def read_whole(self, address: str, most: int) -> bytes:
        """Read a small object as a whole; a coding of the server is undone."""
        with sent(self._session, address, {}, self._timeout) as answer:
            check_status(address, answer)
            data = bytearray()
            for piece in pieces(answer, decode=True):
                data += piece
                if len(data) > most:
                    raise RemoteError(f"{without_credentials(address)} has more than the {most:,} bytes that are read")
            length = answer.headers.get("Content-Length", "")
            if "Content-Encoding" not in answer.headers and length.isdecimal() and len(data) != int(length):
                raise FailedAttempt(f"cut after {len(data):,} of {length} bytes")
            return bytes(data)

    def matching(self, pattern: str) -> list[str]:
        """Raise :class:`RemoteError`: HTTP has no lists of files."""
        raise RemoteError(
            f"'{without_credentials(pattern)}' is a glob pattern, but HTTP has no lists of files: name numbers in "
            "braces as {00000..00331}, or a folder with an index.json"
        )


class HttpObject:
    """One object; the constructor reads its start to learn its size and version.

    Args:
        session: session of this process.
        address: `http://` or `https://`; a user and password in it are sent, also those of `.netrc`.
        timeout: seconds to wait for a connection, and for further bytes.
        clock: clock of `end`.
        end: time when the constructor gives up.

    Raises:
        FailedAttempt: the request may be repeated.
        RemoteError: the object is missing, or the server cannot read ranges of it.
    """

    def __init__(self, session: requests.Session, address: str, timeout: float, clock: Clock, end: float) -> None:
        self._session, self._address, self._timeout, self._clock = session, address, timeout, clock
        self.start = b""
        """First bytes."""
        with self._answer({"Range": f"bytes=0-{PROBE_BYTES - 1}"}) as answer:
            content_range = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status_code == 416 and content_range and content_range[3] == "0":
                self.version = _version(0, answer.headers)
                return
            self._check_status(answer)
            total = self._whole(answer) if answer.status_code == 200 else self._total(content_range)
            self.version = _version(total, answer.headers)
            self.start = self._body(answer, min(PROBE_BYTES, total), end)

    def _whole(self, answer: requests.Response) -> int:
        """Size of an object that was sent as a whole, which is right for a small one only."""
        length = answer.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > PROBE_BYTES:
            raise self._without_ranges(answer)
        return int(length)

    def _total(self, content_range: re.Match[str] | None) -> int:
        if content_range is None or content_range[1] != "0":
            raise FailedAttempt("an answer without a valid Content-Range")
        if content_range[3] == "*":
            raise RemoteError(
                f"the server of {without_credentials(self._address)} does not say its size (Content-Range: bytes "
                "0-.../*): use another server, or download the shards"
            )
        return int(content_range[3])

    def read(self, offset: int, size: int, end: float) -> bytes:
        """Read `size` bytes, which lie in the object, by one request.

        Raises:
            FailedAttempt: the request may be repeated.
            RemoteError: the object was replaced or is gone, or the server cannot read ranges of it.
        """
        with self._answer({"Range": f"bytes={offset}-{offset + size - 1}"}) as answer:
            self._check_status(answer)
            if answer.status_code == 200:
                if size == self.version.size and answer.headers.get("Content-Length") == str(size):
                    return self._body(answer, size, end)
                raise self._without_ranges(answer)
            found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if found is None:
                raise FailedAttempt("an answer without a valid Content-Range")
            if found[3] != "*":
                now = _version(int(found[3]), answer.headers)
                self.version = require_same(self._address, self.version, now)
            if (found[1], found[2]) != (str(offset), str(offset + size - 1)):
                raise FailedAttempt(f"bytes {found[1]}-{found[2]} in place of {offset}-{offset + size - 1}")
            return self._body(answer, size, end)

    @contextmanager
    def _answer(self, headers: dict[str, str]) -> Iterator[requests.Response]:
        with sent(self._session, self._address, headers | {"Accept-Encoding": "identity"}, self._timeout) as answer:
            yield answer

    def _check_status(self, answer: requests.Response) -> None:
        status = answer.status_code
        if status == 416:
            raise RemoteError(
                f"{without_credentials(self._address)} is shorter than when it was opened (HTTP 416): it was replaced "
                "while it was read; restore it, and rerun the same command"
            )
        check_status(self._address, answer)
        coding = answer.headers.get("Content-Encoding", "identity").lower()
        if coding not in ("", "identity"):
            raise RemoteError(
                f"the server sends {without_credentials(self._address)} in another coding (Content-Encoding: "
                f"{excerpt(coding)}), so that offsets are not those of the tar: turn its compression off for tars"
            )

    def _without_ranges(self, answer: requests.Response) -> RemoteError:
        if (page := failed_download(next(pieces(answer, decode=True), b""))) is not None:
            return WrongContent(wrong_content(self._address, page))
        return RemoteError(
            f"the server of {without_credentials(self._address)} does not read ranges (it answers with HTTP 200 and "
            "the whole file), but samples are read at their offsets: use a server with range requests, or download "
            "the shards"
        )

    def _body(self, answer: requests.Response, size: int, end: float) -> bytes:
        data = bytearray()
        for piece in pieces(answer, decode=False):
            data += piece
            if len(data) > size:
                raise FailedAttempt(f"more than the {size:,} bytes of the range")
            if self._clock.now() > end:
                raise FailedAttempt(f"too slow ({len(data):,} of {size:,} bytes)")
        if len(data) < size:
            raise FailedAttempt(f"cut after {len(data):,} of {size:,} bytes")
        return bytes(data)


@contextmanager
def sent(
    session: requests.Session, address: str, headers: Mapping[str, str], timeout: float
) -> Iterator[requests.Response]:
    """Send a GET request; its answer, whose body is not read yet. Errors of `requests` become those of this package."""
    try:
        with _get(session, address, headers, timeout) as answer:
            yield answer
    except requests.exceptions.TooManyRedirects:
        raise RemoteError(f"{without_credentials(address)} leads in a circle of redirects") from None
    except requests.exceptions.SSLError as error:
        raise _tls_error(address, error) from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        if str(error).startswith(_WITHOUT_AUTHORITIES):
            raise RemoteError(
                f"{without_credentials(address)} cannot be read: the variable REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE "
                "names no file of authorities that exists: correct it"
            ) from None
        raise FailedAttempt(_reason(error)) from None  # the text of the error repeats the address


def _get(session: requests.Session, address: str, headers: Mapping[str, str], timeout: float) -> requests.Response:
    """Send a GET request; an address that is wrong, of the object or of a redirect, is an error that lasts."""
    shown = without_credentials(address)
    try:
        return session.get(address, headers=headers, timeout=timeout, stream=True)
    except (requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema):
        raise RemoteError(f"{shown} is, or leads to, an address that is not http(s)") from None
    except requests.exceptions.InvalidProxyURL:
        raise RemoteError(f"{shown} cannot be read: the variable HTTP_PROXY or HTTPS_PROXY holds no address") from None
    except ValueError:  # of requests, of urllib3, or of Python, whose texts repeat parts of the address
        raise RemoteError(
            f"{shown} is, or leads to, an address that is not valid: check its host and port, and write other "
            "characters as %XX"
        ) from None


def _tls_error(address: str, error: Exception) -> RemoteError | FailedAttempt:
    """Error of a connection that TLS refused; a reason other than these may pass."""
    shown = without_credentials(address)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return RemoteError(
            f"the certificate of {shown} cannot be verified: name the file of its authority in the variable "
            "REQUESTS_CA_BUNDLE"
        )
    if "[X509" in str(error):
        return RemoteError(
            f"{shown} cannot be read: the file that the variable REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names holds no "
            "certificates"
        )
    if any(sign in str(error) for sign in _PLAIN_SERVER):
        return RemoteError(f"the server of {shown} does not answer in TLS: does the address begin with http://?")
    return FailedAttempt("TLS failed")


def check_status(address: str, answer: requests.Response) -> None:
    """Raise the error of an answer whose status is neither 200 nor 206."""
    status = answer.status_code
    if status in (200, 206):
        return
    if status in _PASSING:
        raise FailedAttempt(f"HTTP {status}", _asked_wait(answer.headers))
    kind = _KINDS.get(status, RemoteError)
    raise kind(f"{without_credentials(address)} cannot be read: HTTP {status} {excerpt(answer.reason or '')}".rstrip())


def _asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds to wait by `Retry-After`, a number or a date (RFC 9110, section 10.2.3); 0 without a valid one."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,18}", text):
        return float(text)
    until, now = _date(text), _date(headers.get("Date", "")) or datetime.now(UTC)  # the clock of the server, if known
    return 0.0 if until is None else max((until - now).total_seconds(), 0.0)


def _date(text: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def pieces(answer: requests.Response, decode: bool) -> Iterator[bytes]:
    """Pieces of a body as they arrive, so that a slow server cannot hold a read beyond its deadline."""
    while piece := answer.raw.read1(_PIECE, decode_content=decode):
        yield piece


def _version(size: int, headers: Mapping[str, str]) -> Version:
    """Version of an answer; weak and strong tags are compared alike, since proxies weaken them."""
    return Version(size, *(excerpt(headers.get(name, "").removeprefix("W/")) for name in ("ETag", "Last-Modified")))


def _reason(error: Exception) -> str:
    """Short text of an error; `requests` wraps those of `urllib3`, which have a reason of their own."""
    first = error.args[0] if error.args else None
    causes = (error, first, getattr(first, "reason", None))
    for text, kinds in _REASONS.items():
        if any(isinstance(cause, kinds) for cause in causes):
            return text
    return "connection lost"
