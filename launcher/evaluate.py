"""Evaluate an export: `python launcher/evaluate.py scenes --model exports/demo`.

    scenes    masked words and pixels with the right and with a wrong other modality, and the binding probes

Needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository root holds a folder `kernels`, the name of a package that transformers looks for; multi-node
# `deepspeed` puts the root on the path, and Python puts the folder of this script there.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "launcher")]

import argparse
import json
import os
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, without the usage text."""
        self.exit(2, f"evaluate: {message} (see --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line; each subcommand sets `run`."""
    parser = Parser(prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="TASK", parser_class=Parser)
    scenes = commands.add_parser("scenes", help="what a pre-trained model has learnt from scenes")
    scenes.add_argument("--model", type=Path, required=True, metavar="DIR", help="an export of launcher/convert.py")
    scenes.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    scenes.add_argument("--num_scenes", type=int, default=1024, help="validation scenes (default: %(default)s)")
    scenes.set_defaults(run=evaluate_scenes)
    return parser


def evaluate_scenes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Masked words, pixels and binding."""
    from eve_ds import evaluation
    from eve_ds.export import load

    model, config, tokenizer = load(arguments.model)
    return evaluation.evaluate_scenes(model, config, tokenizer, num_scenes=arguments.num_scenes)


def write_json(result: dict[str, Any], path: Path) -> None:
    """Whole or not at all, so that a later step can trust the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def main() -> int:
    """Exit code 0, or 2 for input that cannot be used and files that cannot be written."""
    arguments = build_parser().parse_args()
    if arguments.num_scenes < 2 or arguments.num_scenes % 2:
        print(f"evaluate: --num_scenes ({arguments.num_scenes}) must be even and at least 2", file=sys.stderr)
        return 2

    from rich.console import Console

    from eve_ds.config import ConfigError
    from eve_ds.export import ExportError
    from eve_ds.report.tables import evaluation_tables

    try:
        result = arguments.run(arguments)
        if arguments.json is not None:
            write_json(result, arguments.json)
    except (ConfigError, ExportError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evaluate: cannot write {arguments.json}: {error.strerror}", file=sys.stderr)
        return 2
    console = Console()
    for table in evaluation_tables(result):
        console.print(table.to_rich())
    return 0


if __name__ == "__main__":
    sys.exit(main())
