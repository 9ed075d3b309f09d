"""Which shape for what: `python launcher/report.py plan --model eve_base --gpus 64`.

Prints the shapes of a run that fit into the memory of the GPUs, the recommended one first: memory per GPU by term,
bytes that a GPU sends in a step, the file of ds_configs/ and the settings. Memory and bytes are counted on the model,
built without storage, with captions of the greatest length. Needs neither GPUs nor DeepSpeed.
"""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from typing import TYPE_CHECKING

from eve_ds.cli.command import (
    BAD_INPUT,
    SIGNALED,
    Parser,
    add_overrides,
    exit_code_table,
    is_debugging,
    positive,
    presets,
    run_command,
    start_log,
)

if TYPE_CHECKING:
    from eve_ds.planner.option import Option
    from eve_ds.planner.shape import Shape
    from eve_ds.report.tables import Table

MOST_GPUS = 65_536
"""Largest number of GPUs that is planned for."""


def build_parser() -> Parser:
    """Parser of the command line behind `plan`."""
    parser = Parser(prog="report plan", description=__doc__, epilog=exit_code_table(0, BAD_INPUT, *SIGNALED))
    parser.add_argument("--model", required=True, metavar="CONFIG", help=f"preset ({presets()}) or YAML file")
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="number of GPUs")
    parser.add_argument(
        "--gpus_per_node", type=positive, default=8, metavar="N", help="GPUs of a node (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu_memory", type=positive, default=80, metavar="GIB", help="memory of a GPU in GiB (default: %(default)s)"
    )
    parser.add_argument(
        "--micro_batch", type=positive, metavar="N", help="samples of a micro-batch (default: as many as fit)"
    )
    add_overrides(parser)
    return parser


def main(argv: list[str]) -> int:
    """Print the plan; exit code 0, or 2 for bad input and models that do not fit."""
    arguments = build_parser().parse_args(argv)
    return run_command("report plan", partial(_plan, arguments), is_debugging(arguments))


def _plan(arguments: argparse.Namespace) -> int:
    start_log()
    from rich.console import Console

    from eve_ds.config import ConfigError, load_config
    from eve_ds.planner.plan import Machine, Planner

    if arguments.gpus > MOST_GPUS:
        raise ConfigError(f"--gpus ({arguments.gpus}) must be at most {MOST_GPUS}")
    per_node = min(arguments.gpus_per_node, arguments.gpus)
    if arguments.gpus % per_node:
        raise ConfigError(
            f"--gpus ({arguments.gpus}) must be a multiple of --gpus_per_node ({per_node}): plan for whole nodes, "
            "or give the GPUs of a node"
        )
    size = [] if arguments.micro_batch is None else [f"train.micro_batch_size={arguments.micro_batch}"]
    config = load_config(arguments.model, [*arguments.set, *size])
    machine = Machine(arguments.gpus, per_node, arguments.gpu_memory)
    options = Planner(config).plan(machine)
    console = Console(width=200, soft_wrap=True)
    console.print(plan_table(config.name, machine.gpus, options).to_rich())
    print(f"recommended: the first, which {options[0].reason}")
    settings = _settings(arguments, options[0].shape)
    print(f"  --config {arguments.model} --deepspeed_config {options[0].file} --set {settings}")
    return 0


def _settings(arguments: argparse.Namespace, shape: Shape) -> str:
    """Settings of a plan for a shell: those that were given, and those of the shape."""
    chosen = {setting.partition("=")[0] for setting in shape.settings}
    given = [setting for setting in arguments.set if setting.partition("=")[0] not in chosen]
    return shlex.join([*given, *shape.settings])


def plan_table(name: str, gpus: int, options: list[Option]) -> Table:
    """Table of the options, best first."""
    from eve_ds.report.tables import Table

    columns = (
        *("shape", "samples x steps", "weights", "masters", "moments", "gradients", "buffers", "activations"),
        *("GPU", "host", "sent inside node", "sent between nodes", "ds_configs/"),
    )
    rows = [_row(option) for option in options]
    return Table(f"{name} on {gpus} GPUs: GiB per GPU, and GiB that a GPU sends in a step", columns, rows)


def _row(option: Option) -> tuple[str, ...]:
    shape, memory = option.shape, option.memory
    sizes = [
        *(memory.weights, memory.masters, memory.moments, memory.gradients, memory.buckets + memory.gathered),
        *(memory.activations, memory.gpu, memory.host, option.sent_inside_node, option.sent_between_nodes),
    ]
    batch = f"{shape.micro_batch} x {shape.accumulation_steps}"
    return str(shape), batch, *map(_gib, sizes), option.file.removeprefix("ds_configs/")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
