"""Fine-tune EVE: `python launcher/finetune.py --task vqa --init exports/demo --output_dir runs/vqa`.

    --task vqa         answers to questions about an image
    --task nlvr        statements about two images, or one: true or false
    --task retrieval   images by caption, captions by image

Also runs under deepspeed, torchrun, srun and mpirun. After training, the model is saved and evaluated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eve_ds.cli.command import Parser, exit_code_table, is_debugging, presets, tasks
from eve_ds.cli.training import CODES, add_training_options, overrides, read_deepspeed_config, run_training
from eve_ds.signals import StopSignals

if TYPE_CHECKING:
    from eve_ds.config import Config
    from eve_ds.training.finetune import FinetuneSummary

RECIPES_HELP = "tasks/scenes_TASK for scenes; for files the paper's: tasks/vqa, tasks/nlvr2 or tasks/retrieval_coco"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and fine-tune; the exit code is one of :data:`eve_ds.cli.training.CODES`."""
    arguments = build_parser().parse_args(argv)
    return run_training("finetune", partial(_finetune, arguments), _describe, is_debugging(arguments))


def build_parser() -> Parser:
    """Parser of the command line."""
    parser = Parser(prog="finetune", description=__doc__, epilog=exit_code_table(*CODES))
    parser.add_argument("--task", required=True, metavar="TASK", help=f"task to learn: {tasks()}")
    parser.add_argument(
        "--init",
        required=True,
        metavar="PATH",
        help="start of the backbone: export, run, checkpoint, fine-tuned model, file of released weights, or none",
    )
    parser.add_argument(
        "--model",
        default="eve_tiny",
        help="preset of the model where --init is none or a file of released weights: "
        f"{presets()} or a YAML file (default: %(default)s)",
    )
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help=f"recipe: a YAML file or a preset such as tasks/NAME with NAME one of {presets('tasks')} "
        f"(default: {RECIPES_HELP})",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="DATA",
        help="training examples: scenes or scenes:hard (generated), or annotation files in a known format "
        "(default: those of the recipe)",
    )
    parser.add_argument(
        "--val_data", nargs="+", metavar="DATA", help="examples for the evaluation, as --data (default: --data)"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder that image names are relative to")
    add_training_options(parser, zero_stage=1)
    return parser


def read_config(arguments: argparse.Namespace) -> Config:
    """Configuration of the run: the model that `--init` names, under the recipe, under the other options."""
    from eve_ds.tasks.finetune_config import task_config

    return task_config(
        arguments.task,
        init=None if arguments.init == "none" else Path(arguments.init),
        model=arguments.model,
        recipe=arguments.config,
        train_data=arguments.data,
        val_data=arguments.val_data,
        images=arguments.images,
        overrides=overrides(arguments),
    )


def _finetune(arguments: argparse.Namespace, stop: StopSignals) -> FinetuneSummary:
    config = read_config(arguments)
    deepspeed_config = read_deepspeed_config(arguments)
    # Takes seconds to import: an error in the configuration is reported before.
    from eve_ds.training.finetune import finetune

    return finetune(config, deepspeed_config, stop)


def _describe(summary: FinetuneSummary) -> str:
    model = "not yet saved" if summary.stopped else summary.model
    return (
        f"{summary.steps} steps, {summary.samples} samples in {summary.train_seconds:.1f} s of training, model {model}"
    )
