"""Parts that `pretrain` and `finetune` share: options, the DeepSpeed JSON, and the end of a run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from eve_ds.cli.command import BAD_INPUT, NONFINITE, NOT_SAVED, STOPPED, add_overrides, exit_code, start_log

CODES = (0, BAD_INPUT, NONFINITE, STOPPED, NOT_SAVED)
SHORT_OPTIONS = ("output_dir", "max_steps", "max_seconds", "init")
"""Options that are short for `--set train.NAME=...`, where a command has them."""
STOPPED_BY_SIGNAL = "Stopped by signal; rerun the same command to resume."


class Summary(Protocol):
    """Part of the summary of a run that its exit code depends on."""

    @property
    def stopped(self) -> bool:
        """Whether a signal stopped the run before its end."""


AnySummary = TypeVar("AnySummary", bound=Summary)


def add_training_options(parser: argparse.ArgumentParser, zero_stage: int) -> None:
    """Add the options of every training run; `zero_stage` is the one without `--deepspeed_config`."""
    parser.add_argument("--deepspeed_config", metavar="FILE", help=f"DeepSpeed JSON (default: ZeRO {zero_stage})")
    add_overrides(parser)
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the run; short for --set train.output_dir=...")
    parser.add_argument("--max_steps", type=int, metavar="N", help="short for --set train.max_steps=...")
    parser.add_argument("--max_seconds", type=float, metavar="S", help="short for --set train.max_seconds=...")
    parser.add_argument("--local_rank", type=int, help="set by `deepspeed`; ignored, the environment has the rank")


def overrides(arguments: argparse.Namespace) -> list[str]:
    """`--set` and the options that are short for it, as `section.key=value`."""
    given = {name: getattr(arguments, name) for name in SHORT_OPTIONS if hasattr(arguments, name)}
    return [*arguments.set, *(f"train.{name}={value}" for name, value in given.items() if value is not None)]


def read_deepspeed_config(path: str | None) -> dict[str, Any] | None:
    """Content of the file that `--deepspeed_config` names, None without one; raises ConfigError if it is not JSON."""
    from eve_ds.parallel.deepspeed_json.file import read_deepspeed_json

    return None if path is None else read_deepspeed_json(path)


def run_training(train: Callable[[], AnySummary], describe: Callable[[AnySummary], str]) -> int:
    """Train, log one line about the end or about a known error, and return the exit code."""
    logger = start_log()
    try:
        summary = train()
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        logger.error("%s", error)
        return code
    logger.info("%s %s", STOPPED_BY_SIGNAL if summary.stopped else "Done.", describe(summary))
    return STOPPED if summary.stopped else 0
