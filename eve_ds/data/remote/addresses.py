"""Addresses of shards: their schemes, their parts, and the package that reads each scheme."""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_UNSENT = re.compile(r"[\s\"<>\\^`]")
"""Characters that clients percent-encode before they send an address."""
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_SIGNATURES = re.compile(
    r"x-amz-.*|x-goog-.*|x-oss-.*|x-cos-security-token|q-(sign|ak|key|header|url).*|hdnt[a-z]"
    r"|(aws|oss)accesskeyid|googleaccessid|key-pair-id|hash-algorithm|policy|signature|sig|expires"
    r"|(access_|auth_|security-)?token"
    r"|response-(content-.*|cache-control|expires)",
    re.IGNORECASE,
)
"""Parameters of signatures and of headers of an answer, which say nothing of the object: of Amazon S3 and CloudFront,
Google Cloud, Alibaba OSS, Tencent COS, Akamai and others."""
_AZURE = re.compile(r"s[vsrpet]|srt|spr|sip|sdd|ses|sk[etsv]|sk(o|t)id|s[acu]oid|scid", re.IGNORECASE)
"""Further ones of a shared access signature of Azure; only beside `sig`: other servers may mean something else."""


class Reader(NamedTuple):
    """Package that reads a scheme."""

    module: str
    requirement: str
    """What to install, as an argument of pip."""


HTTP = ("http", "https")
READERS = {
    **dict.fromkeys(HTTP, Reader("requests", "requests>=2.32")),
    "s3": Reader("s3fs", "s3fs>=2025.3"),
    **dict.fromkeys(("gs", "gcs"), Reader("gcsfs", "gcsfs>=2025.3")),
}
"""Scheme -> package. Further file systems of fsspec would need a row here and a test."""


def scheme_of(text: str) -> str | None:
    """Scheme of an address in lower case; None for a path."""
    match = _SCHEME.match(text)
    return match[1].lower() if match else None


def is_remote(text: str) -> bool:
    """Whether a shard lies at an address, not at a path."""
    return scheme_of(text) is not None


def is_http(address: str) -> bool:
    """Whether an address is read by HTTP, so that its path is quoted and a query may follow."""
    return scheme_of(address) in HTTP


def file_name(address: str) -> str:
    """Part of an address or path behind its last slash, without a query; empty for `https://host/folder/`."""
    path = unquote(urlsplit(address).path) if is_http(address) else address
    return path.rpartition("/")[2]


def encoded(address: str) -> str:
    """Address of HTTP with white space and quotation marks percent-encoded, as clients send it; others as they are."""
    return _UNSENT.sub(lambda found: quote(found[0]), address) if is_http(address) else address


def object_name(address: str) -> str:
    """One name of an object, whatever spellings and signatures lead to it.

    Names are equal if scheme, host, port, path and query are, without the user, the password and the signature in the
    query. Of HTTP, percent encoding, steps `.` and `..` of the path and the order of parameters do not count. A
    parameter that is not known as a part of a signature tells objects apart.
    """
    scheme, rest = str(scheme_of(address)), address.partition("://")[2]
    if scheme not in HTTP:
        bucket, slash, key = rest.partition("/")
        return f"{'gs' if scheme == 'gcs' else scheme}://{bucket.rpartition('@')[2]}{slash}{key}"
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2].lower().removesuffix(_DEFAULT_PORTS[scheme])
    steps = (unquote(step, errors="surrogateescape") for step in _steps(parts.path))
    path = "/".join(quote(step, safe="", errors="surrogatepass") for step in steps)
    return f"{scheme}://{host}/{path}{_content_query(parts.query)}"


def _steps(path: str) -> list[str]:
    """Steps of a path without `.` and `..` (RFC 3986, section 5.2.4)."""
    steps: list[str] = []
    for step in path.removeprefix("/").split("/"):
        if step == "..":
            del steps[-1:]
        elif step != ".":
            steps.append(step)
    return steps


def _content_query(query: str) -> str:
    """Query without the parameters of signatures, sorted by their names."""
    found = parse_qsl(query, keep_blank_values=True, errors="surrogateescape")
    is_azure = any(name.lower() == "sig" for name, _ in found)
    left = [item for item in found if not _is_of_signature(item[0], is_azure)]
    return f"?{urlencode(sorted(left, key=itemgetter(0)), errors='surrogatepass')}" if left else ""


def _is_of_signature(parameter: str, is_azure: bool) -> bool:
    return bool(_SIGNATURES.fullmatch(parameter) or (is_azure and _AZURE.fullmatch(parameter)))


def path_of(address: str) -> str:
    """Path of a `file://` address."""
    return unquote(address.partition("://")[2].removeprefix("localhost"))


def folder_of(address: str) -> str:
    """Address of the folder of a file; a query, such as a signature, is kept."""
    return _with_path(address, lambda path: path.rpartition("/")[0])


def join(folder: str, name: str) -> str:
    """Address of a file of a folder; a query of the folder is kept."""
    shown = quote(name) if is_http(folder) else name
    return _with_path(folder, lambda path: f"{path.rstrip('/')}/{shown}")


def _with_path(address: str, change: Callable[[str], str]) -> str:
    if not is_http(address):
        return change(address)
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=change(parts.path), fragment=""))
