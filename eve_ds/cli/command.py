"""Parts that all commands share: exit codes, the parser, presets in help texts, and errors as one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from eve_ds.cli.terminal import keep_terminal
from eve_ds.launcher_watch import LauncherWatch
from eve_ds.printable import printable
from eve_ds.resources import lack
from eve_ds.signals import Stopped, StopSignals
from eve_ds.storage import is_disk_error, output_path, reason, unusable

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parent

FAILED, BAD_INPUT, NONFINITE, STOPPED, NOT_SAVED, RANK_LOST, INTERRUPTED = 1, 2, 3, 4, 5, 6, 130
SIGNALED = (STOPPED, INTERRUPTED)
"""Codes of every command but training, which also saves and stops at Ctrl-C."""
EXIT_CODES = {
    0: "success",
    FAILED: "the command failed",
    BAD_INPUT: "bad input: settings, data, weights, files or launch that cannot be used",
    NONFINITE: "a loss or gradient norm is not finite",
    STOPPED: "stopped by a signal, a training run after saving; rerun the same command to resume",
    NOT_SAVED: "the disk takes no more bytes (full, read-only or broken): make room and rerun the same command",
    RANK_LOST: "another rank has ended or did not answer in time; rerun the same command to resume",
    INTERRUPTED: "interrupted by Ctrl-C",
}
KNOWN_ERRORS = {
    "CheckpointError": BAD_INPUT,
    "ConfigError": BAD_INPUT,
    "ExportError": BAD_INPUT,
    "LaunchError": BAD_INPUT,
    "NonFiniteError": NONFINITE,
    "OpsBuildError": BAD_INPUT,
    "OutputError": BAD_INPUT,
    "RankLostError": RANK_LOST,
    "ReportError": BAD_INPUT,
    "SaveError": NOT_SAVED,
    "SourceError": BAD_INPUT,
    "UnusableData": BAD_INPUT,
    "WeightFileError": BAD_INPUT,
}
"""Exit code for each exception of the package whose message is all that the user needs. Names, since the modules of the
classes take seconds to import."""


class Parser(argparse.ArgumentParser):
    """Parser that reports bad arguments in one line, with exit code 2 and without the usage text; has `--debug`.

    Names of options may have hyphens for underscores. `~` is expanded in `--option=~/path` too, where shells leave it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | options)
        if "--debug" not in self._option_string_actions:  # a parent parser has it
            # Without a default, so that the parser of a subcommand does not reset what stood before its name.
            show = "show the traceback of an error as well"
            self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=show)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; an empty argument, which an unset variable of a shell leaves, is an error."""
        given = [self._spelled(argument) for argument in (sys.argv[1:] if args is None else args)]
        for before, argument in zip(["", *given], given, strict=False):
            option, separator, value = argument.partition("=")
            if argument == "" or (separator and value == "" and option in self._option_string_actions):
                name = before if argument == "" else option
                behind = f" of {name}" if name.startswith("--") else ""
                self.error(f"the value{behind} is empty: is a variable of the shell not set?")
        return super().parse_known_args(given, namespace)

    def _spelled(self, argument: str) -> str:
        """Argument with the option's own spelling and the home folder in place of `~`."""
        name, separator, value = argument.partition("=")
        if not name.startswith("--"):
            return os.path.expanduser(argument) if argument.startswith("~/") else argument
        known = f"--{name[2:].replace('-', '_')}"
        spelled = known if name not in self._option_string_actions and known in self._option_string_actions else name
        return f"{spelled}{separator}{os.path.expanduser(value)}"

    def error(self, message: str) -> NoReturn:
        """Print the message behind the name of the command, and exit."""
        self.exit(BAD_INPUT, printable(f"{self.prog.split()[0]}: {message} (see --help)") + "\n")


def exit_code_table(*codes: int, failed: str = "") -> str:
    """Lines of a help text that explain the exit codes of a command; `failed` explains code 1."""
    meanings = EXIT_CODES | ({FAILED: failed} if failed else {})
    return "\n".join(["exit codes:", *(f"  {code:<3} {meanings[code]}" for code in codes)])


def presets(folder: str = "") -> str:
    """Names of the presets in a folder of `eve_ds/configs` ("" or "tasks"), separated by commas."""
    return ", ".join(sorted(file.stem for file in (PACKAGE / "configs" / folder).glob("*.yaml")))


def tasks() -> str:
    """Names of the downstream tasks, whose folders in `eve_ds/tasks` hold a `task.py`, separated by commas."""
    return ", ".join(sorted(file.parent.name for file in (PACKAGE / "tasks").glob("*/task.py")))


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of an option."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


positive.__name__ = "whole number"  # argparse: "invalid whole number value: 'x'"


def output(text: str) -> Path:
    """Path of a file or folder to write, as the type of an option."""
    try:
        return output_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the option `--set`."""
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the configuration, such as train.seed=1; with several hosts (pdsh) write values with "
        "braces, parentheses or quotes into the YAML file, since shells of the hosts expand them",
    )


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Add the option that `deepspeed` and `torch.distributed.launch` give to every rank, in both spellings."""
    spellings = ("--local_rank", "--local-rank")
    parser.add_argument(*spellings, type=int, help="set by launchers; ignored, the environment has the rank")


def start_log() -> logging.Logger:
    """The package's logger, with a handler, so that messages about the configuration are shown."""
    from eve_ds.log import get_logger

    keep_terminal()
    return get_logger()


class Ending(NamedTuple):
    """How a command ends after an error."""

    code: int
    line: str


def ending(error: Exception) -> Ending | None:
    """Exit code and line for an error of settings, data, files or the machine; None for any other, which is a bug."""
    ours = (kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith(f"{PACKAGE.name}."))
    code = next((KNOWN_ERRORS[name] for name in ours if name in KNOWN_ERRORS), None)
    if code is not None:
        return Ending(code, str(error))
    lacking = lack(error)
    if lacking is not None:
        return Ending(BAD_INPUT, lacking)
    if is_disk_error(error):
        return Ending(NOT_SAVED, f"{reason(error)}; make room, and rerun the same command")
    if isinstance(error, OSError):
        return Ending(BAD_INPUT, unusable(error))
    return None


def is_debugging(arguments: argparse.Namespace) -> bool:
    """Whether `--debug` was given."""
    return getattr(arguments, "debug", False)


@contextmanager
def handled_signals() -> Iterator[StopSignals]:
    """Handle the signals that end a command, and the end of its launcher."""
    with StopSignals() as stop, LauncherWatch(stop, STOPPED, RANK_LOST, os.environ):
        yield stop


def run_command(name: str, action: Callable[[], int], debug: bool = False) -> int:
    """Exit code of `action`; an error for which :func:`ending` has a line, or a signal, becomes one line.

    Args:
        name: name of the command, the start of the line on standard error.
        action: the command.
        debug: show the traceback of such an error as well.
    """
    try:
        with handled_signals():
            return action()
    except Stopped as signal:
        signaled = INTERRUPTED if signal.name == "SIGINT" else STOPPED
        return complain(name, f"stopped by {signal.name}; rerun the same command to resume", signaled)
    except Exception as error:
        end = ending(error)
        if end is None:
            raise
        if debug:
            traceback.print_exc()
        return complain(name, end.line, end.code)


def complain(name: str, message: str, code: int = BAD_INPUT) -> int:
    """Print one line, with controls escaped; the exit code."""
    print(printable(f"{name}: {message}"), file=sys.stderr)
    return code
