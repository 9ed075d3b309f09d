"""Report of a run, finished or not: `python launcher/report.py runs/tiny --model exports/tiny`.

Writes report.md with tables and loss curves. With an export of the run, also a grid of masked and reconstructed images
with the words that the model predicted, and the use of its experts by modality. Needs neither DeepSpeed nor a process
group.

`report.py plan --model eve_base --gpus 64` prints the shapes of a run that fit on a number of GPUs; its options:
`report.py plan --help`. Write ./plan for a run whose folder has that name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eve_ds.cli import plan
from eve_ds.cli.command import (
    BAD_INPUT,
    SIGNALED,
    Parser,
    exit_code_table,
    is_debugging,
    output,
    run_command,
    start_log,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and print the files; exit code 0, or 2 for bad input and folders that cannot be written."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["plan"]:
        return plan.main(given[1:])
    arguments = build_parser().parse_args(given)
    return run_command("report", partial(_report, arguments), is_debugging(arguments))


def build_parser() -> Parser:
    """Parser of the command line."""
    parser = Parser(prog="report", description=__doc__, epilog=exit_code_table(0, BAD_INPUT, *SIGNALED))
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--model", type=Path, metavar="DIR", help="export of that run, for the pictures that need it")
    parser.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="file that `evaluate.py scenes --json FILE` wrote"
    )
    parser.add_argument("--out", type=output, metavar="DIR", help="folder to write (default: RUN/report)")
    return parser


def _report(arguments: argparse.Namespace) -> int:
    start_log()
    from eve_ds.checkpoint.output_folder import refuse_checkpoint
    from eve_ds.export import load
    from eve_ds.report.records import ReportError
    from eve_ds.report.run_report import Exported, write_report

    out = arguments.out or arguments.run / "report"
    refuse_checkpoint(out, ReportError)
    evaluation = None if arguments.evaluation is None else read_evaluation(arguments.evaluation)
    exported = None if arguments.model is None else Exported(*load(arguments.model))
    for path in write_report(arguments.run, out, exported, evaluation):
        print(path)
    return 0


def read_evaluation(path: Path) -> dict[str, Any]:
    """Result of an evaluation on scenes, as `evaluate.py scenes --json` writes it; raises ReportError for others."""
    from eve_ds.reading import read_json
    from eve_ds.report.records import ReportError, with_current_names
    from eve_ds.storage import cause

    try:
        result = read_json(path)
    except OSError as error:
        raise ReportError(f"--evaluation {path} cannot be read: {cause(error)}") from None
    except ValueError as error:
        raise ReportError(f"--evaluation {path} is not JSON: {error}") from None
    result = with_current_names(result) if isinstance(result, dict) else {}
    if not {"pixel_loss", "color"} & result.keys():
        raise ReportError(
            f"--evaluation {path} is not a result of `evaluate.py scenes --json`: it has neither color nor pixel_loss"
        )
    return result
