"""Pre-train EVE: `deepspeed launcher/pretrain.py --config eve_tiny --deepspeed_config ds_configs/zero1_ep2_cpu.json`.

Also runs under torchrun, srun and mpirun, or as plain `python` with one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eve_ds.cli.command import Parser, exit_code_table, is_debugging, presets
from eve_ds.cli.training import CODES, add_training_options, overrides, read_deepspeed_config, run_training
from eve_ds.signals import StopSignals

if TYPE_CHECKING:
    from eve_ds.training.trainer import Summary


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and pre-train; the exit code is one of :data:`eve_ds.cli.training.CODES`."""
    arguments = build_parser().parse_args(argv)
    return run_training("pretrain", partial(_pretrain, arguments), _describe, is_debugging(arguments))


def build_parser() -> Parser:
    """Parser of the command line."""
    parser = Parser(prog="pretrain", description=__doc__, epilog=exit_code_table(*CODES))
    parser.add_argument(
        "--config", default="eve_tiny", help=f"preset ({presets()}) or YAML file (default: %(default)s)"
    )
    add_training_options(parser, zero_stage=0)
    parser.add_argument(
        "--init",
        metavar="PATH",
        help="exported folder, checkpoint or run to take the first weights from; short for --set train.init=...",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|DIR",
        help="auto: resume from the newest checkpoint of the output folder, if it has one; none: require a new folder; "
        "DIR: resume from this checkpoint, or from the newest one of this run (default: %(default)s)",
    )
    return parser


def _pretrain(arguments: argparse.Namespace, stop: StopSignals) -> Summary:
    from eve_ds.config import load_config

    config = load_config(arguments.config, overrides(arguments))
    deepspeed_config = read_deepspeed_config(arguments)
    # Takes seconds to import: an error in the configuration is reported before.
    from eve_ds.training.pretrain import pretrain

    resume = arguments.resume if arguments.resume in {"auto", "none"} else Path(arguments.resume)
    return pretrain(config, deepspeed_config, resume, stop)


def _describe(summary: Summary) -> str:
    return (
        f"{summary.steps} steps, {summary.samples} samples in {summary.train_seconds:.1f} s of training "
        f"({summary.samples_per_second:.1f} samples/s), checkpoint {summary.checkpoint}"
    )
