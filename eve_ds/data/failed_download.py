"""Recognizes what a failed download leaves in place of a file. Imports no torch, which takes seconds."""

from __future__ import annotations

GIT_LFS, WEB_PAGE = "a pointer of Git LFS", "a web page"


def failed_download(start: bytes) -> str | None:
    """Name of what stands in place of a file, by its first bytes: GIT_LFS or WEB_PAGE; None for anything else."""
    if start.startswith(b"version https://git-lfs"):
        return GIT_LFS
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_page = text.startswith((b"<!doctype html", b"<html")) or (text[:4] in (b"<!--", b"<?xm") and b"<html" in text)
    return WEB_PAGE if is_page else None
