"""Commit of the checkout that is measured. Imports no torch, because `launcher/gpu.py` runs without it."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """Return the name that git gives the commit, with a mark if files differ from it; `unknown` without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
