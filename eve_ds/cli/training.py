"""Parts that `pretrain` and `finetune` share: options, the DeepSpeed JSON, and the end of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from eve_ds.cli.command import (
    BAD_INPUT,
    NONFINITE,
    NOT_SAVED,
    RANK_LOST,
    STOPPED,
    add_local_rank,
    add_overrides,
    complain,
    ending,
    handled_signals,
    start_log,
)
from eve_ds.signals import Stopped, StopSignals

CODES = (0, BAD_INPUT, NONFINITE, STOPPED, NOT_SAVED, RANK_LOST)
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
    parser.add_argument(
        "--deepspeed",
        nargs="?",
        metavar="FILE",
        help="the same option as in Transformers; without FILE, as in scripts of DeepSpeed, it is ignored",
    )
    add_overrides(parser)
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the run; short for --set train.output_dir=...")
    parser.add_argument("--max_steps", type=int, metavar="N", help="short for --set train.max_steps=...")
    parser.add_argument("--max_seconds", type=float, metavar="S", help="short for --set train.max_seconds=...")
    add_local_rank(parser)


def overrides(arguments: argparse.Namespace) -> list[str]:
    """`--set` and the options that are short for it, as `section.key=value`; texts of the latter in quotes of YAML."""
    given = {name: getattr(arguments, name) for name in SHORT_OPTIONS if hasattr(arguments, name)}
    return [*arguments.set, *(f"train.{name}={_quoted(value)}" for name, value in given.items() if value is not None)]


def _quoted(value: str | float) -> str:
    """Value of an option as YAML: a folder may be named `2024` or `a #1`."""
    import yaml

    return yaml.safe_dump(value, default_style='"', width=sys.maxsize).strip() if isinstance(value, str) else str(value)


def read_deepspeed_config(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Content of the file that `--deepspeed_config` or `--deepspeed` names, None without one.

    Raises:
        ConfigError: the options name two files, or the file is not JSON.
    """
    from eve_ds.config import ConfigError
    from eve_ds.parallel.deepspeed_json.file import read_deepspeed_json

    paths = {path for path in (arguments.deepspeed_config, arguments.deepspeed) if path is not None}
    if len(paths) > 1:
        raise ConfigError(
            f"--deepspeed_config ({arguments.deepspeed_config}) and --deepspeed ({arguments.deepspeed}) name two "
            "files: leave one out"
        )
    return read_deepspeed_json(paths.pop()) if paths else None


def run_training(
    name: str,
    train: Callable[[StopSignals], AnySummary],
    describe: Callable[[AnySummary], str],
    debug: bool = False,
) -> int:
    """Train, log one line about the end or about an error that :func:`ending` knows, and return the exit code.

    A signal before training ends the run, which has nothing to save yet.

    Args:
        name: name of the command.
        train: the run, which gets the handlers of the signals.
        describe: text about its summary.
        debug: log the traceback of such an error as well.
    """
    try:
        with handled_signals() as stop:
            return _train(partial(train, stop), describe, debug)
    except Stopped as signal:
        return complain(name, f"stopped by {signal.name} before training; rerun the same command to resume", STOPPED)


def _train(train: Callable[[], AnySummary], describe: Callable[[AnySummary], str], debug: bool) -> int:
    logger = start_log()
    from eve_ds.lost_ranks import rank_losses
    from eve_ds.process_group import check_accelerator

    try:
        check_accelerator()
        with rank_losses("train.timeout_seconds"):
            summary = train()
    except Exception as error:
        end = ending(error)
        if end is None:
            raise
        logger.error("%s", end.line, exc_info=debug)
        return end.code
    logger.info("%s %s", STOPPED_BY_SIGNAL if summary.stopped else "Done.", describe(summary))
    return STOPPED if summary.stopped else 0
