"""Log of the package: records of rank 0, and warnings of the other ranks."""

from __future__ import annotations

import logging
import sys

from eve_ds.distributed import rank_of_process, rank_zero
from eve_ds.printable import printable


def get_logger() -> logging.Logger:
    """Package logger: shows all records of rank 0, and warnings of the other ranks, marked with their rank."""
    logger = logging.getLogger("eve_ds")
    if not any(isinstance(handler, _RankHandler) for handler in logger.handlers):
        logger.addHandler(_RankHandler())
    if logger.level == logging.NOTSET:  # others may have reset it since the first call
        logger.setLevel(logging.INFO)
    return logger


class _OneLineFormatter(logging.Formatter):
    """Formatter that keeps a message on one line, whatever it quotes; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class _RankHandler(logging.Handler):
    """Handler that writes to the current standard error; looks up the rank per record, as the group may start later."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_OneLineFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))

    def filter(self, record: logging.LogRecord) -> bool:
        return bool((rank_zero() or record.levelno >= logging.WARNING) and super().filter(record))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if rank_zero() else f"[rank {rank_of_process()}] {text}"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")  # a single write keeps lines of different ranks apart
            sys.stderr.flush()
        except OSError:  # a full disk or a closed pipe must not end a training run
            self.handleError(record)
