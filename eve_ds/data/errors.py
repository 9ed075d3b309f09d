"""Errors that readers of data raise; free of heavy imports, as launchers read them before torch is needed."""

from __future__ import annotations

from eve_ds.config import ConfigError


class SourceError(ConfigError):
    """Published data that cannot be read; the message names the file, the problem and the expected content."""


class UnusableData(ValueError):
    """Raised if the data cannot be used for training; the message names shard, key and reason."""


class BadSample(ValueError):
    """A sample that is left out and counted.

    Args:
        reason: one of a few fixed texts, under which the sample is counted.
        detail: exact cause, for the message only.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.key: str | None = None
        """Key of the sample; None until it is known."""
