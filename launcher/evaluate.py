"""Evaluate an export or a fine-tuned model: `python launcher/evaluate.py scenes --model exports/demo`.

    scenes    masked words and pixels with the right and with a wrong other modality, and the binding probes
    task      a fine-tuned model on the examples of its task; metrics, and predictions in a folder
    zero_shot retrieval by a pre-trained model, without fine-tuning
    ask       what a model says to a question, or a statement, about an image
    rank      captions by how well they fit an image

Needs neither DeepSpeed nor a process group; `task` also runs under torchrun, deepspeed, srun and mpirun, where each
rank takes a share. Started again after it was killed, it does what is left.
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
from typing import TYPE_CHECKING, Any, NoReturn

from eve_ds.config import ConfigError

if TYPE_CHECKING:
    from eve_ds.report.tables import Table


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
    task = commands.add_parser("task", help="a fine-tuned model on examples of its task")
    task.add_argument("--model", type=Path, required=True, metavar="DIR", help="what launcher/finetune.py saved")
    _add_examples(task)
    task.add_argument("--csv", type=Path, metavar="FILE", help="NLVR: one row per image, for its metrics_images.py")
    task.set_defaults(run=evaluate_task)
    zero_shot = commands.add_parser("zero_shot", help="retrieval by a pre-trained model")
    zero_shot.add_argument("--model", type=Path, required=True, metavar="DIR", help="export, checkpoint or run")
    zero_shot.add_argument("--features", choices=["class_token", "words"], help="default: what the model was taught")
    zero_shot.add_argument(
        "--rerank", type=int, default=0, metavar="K", help="score the best K of a query pair by pair (default: 0)"
    )
    _add_examples(zero_shot)
    zero_shot.set_defaults(run=evaluate_zero_shot)
    question = commands.add_parser("ask", help="what a model says about an image")
    question.add_argument("--model", type=Path, required=True, metavar="DIR", help="fine-tuned for vqa or nlvr")
    question.add_argument("--image", type=Path, required=True, action="append", metavar="FILE", help="may come twice")
    question.add_argument("--top", type=int, default=3, help="answers of each question (default: %(default)s)")
    question.add_argument("questions", nargs="+", metavar="QUESTION", help="questions, or statements")
    question.set_defaults(run=ask_questions)
    rank = commands.add_parser("rank", help="captions by how well they fit an image")
    rank.add_argument("--model", type=Path, required=True, metavar="DIR", help="fine-tuned for retrieval")
    rank.add_argument("--image", type=Path, required=True, metavar="FILE")
    rank.add_argument("captions", nargs="+", metavar="CAPTION")
    rank.set_defaults(run=rank_captions)
    return parser


def _add_examples(command: argparse.ArgumentParser) -> None:
    """Options of what is evaluated on examples, by as many processes as were launched."""
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of predictions and metrics")
    command.add_argument(
        "--data", nargs="+", metavar="DATA", help="scenes, scenes:hard, or files (default: as fine-tuned)"
    )
    command.add_argument("--images", type=Path, metavar="DIR", help="folder that image names are relative to")
    command.add_argument("--split", help="of data that holds several (scenes: val, the default, or test)")
    command.add_argument("--batch_size", type=int, default=64, help="changes the speed only (default: %(default)s)")
    command.add_argument("--limit", type=int, metavar="N", help="the first N examples")
    command.add_argument("--local_rank", type=int, help="passed by `deepspeed`; the environment says the same")


def evaluate_scenes(arguments: argparse.Namespace) -> list[Table]:
    """Masked words, pixels and binding."""
    from eve_ds.evaluation import scenes as evaluation
    from eve_ds.export import load
    from eve_ds.report.tables import evaluation_tables

    if arguments.num_scenes < 2 or arguments.num_scenes % 2:
        raise ConfigError(f"--num_scenes ({arguments.num_scenes}) must be even and at least 2")
    model, config, tokenizer = load(arguments.model)
    result = evaluation.evaluate_scenes(model, config, tokenizer, num_scenes=arguments.num_scenes)
    if arguments.json is not None:
        write_json(result, arguments.json)
    return evaluation_tables(result)


def evaluate_task(arguments: argparse.Namespace) -> list[Table]:
    """Predictions and metrics of a fine-tuned model."""
    from eve_ds.distributed import rank_zero
    from eve_ds.evaluation.predictions import evaluate, read_predictions
    from eve_ds.report.tables import metrics_table
    from eve_ds.tasks.batches import TaskCollator
    from eve_ds.tasks.formats import load_examples
    from eve_ds.tasks.nlvr import write_published_csv
    from eve_ds.tasks.recipes import evaluated_on
    from eve_ds.tasks.saved import load_task_model

    device = _begin(arguments)
    loaded = load_task_model(arguments.model)
    config = evaluated_on(loaded.config, arguments.data, arguments.images, arguments.split, arguments.limit)
    metrics = evaluate(
        loaded.task,
        loaded.model.to(device),
        load_examples(config, "val"),
        TaskCollator(config, loaded.tokenizer),
        out=arguments.out,
        weights=loaded.sha256,
        batch_size=arguments.batch_size,
    )
    if not rank_zero():
        return []
    if arguments.csv is not None:
        write_published_csv(read_predictions(arguments.out), arguments.csv)
    return [metrics_table(f"{arguments.model}, {arguments.out}", metrics)]


def evaluate_zero_shot(arguments: argparse.Namespace) -> list[Table]:
    """Predictions and metrics of a pre-trained model that ranks captions and images."""
    from eve_ds.distributed import rank_zero
    from eve_ds.evaluation.predictions import evaluate
    from eve_ds.evaluation.zero_shot import load_zero_shot
    from eve_ds.report.tables import metrics_table
    from eve_ds.tasks.batches import TaskCollator

    if arguments.rerank < 0:
        raise ConfigError(f"--rerank ({arguments.rerank}) must be 0 or more")
    device = _begin(arguments)
    loaded, examples = load_zero_shot(
        arguments.model,
        features=arguments.features,
        data=arguments.data,
        images=arguments.images,
        split=arguments.split,
        limit=arguments.limit,
        rerank=arguments.rerank,
    )
    metrics = evaluate(
        loaded.task,
        loaded.model.to(device),
        examples,
        TaskCollator(loaded.config, loaded.tokenizer),
        out=arguments.out,
        weights=loaded.sha256,
        batch_size=arguments.batch_size,
    )
    return [metrics_table(f"{arguments.model}, {arguments.out}", metrics)] if rank_zero() else []


def _begin(arguments: argparse.Namespace) -> str:
    """Join the other ranks, if there are any; the device of this one."""
    import torch

    from eve_ds.distributed import initialize_process_group
    from eve_ds.launch_environment import read_environment

    if arguments.batch_size < 1:
        raise ConfigError(f"--batch_size ({arguments.batch_size}) must be at least 1")
    if read_environment().world_size > 1:
        initialize_process_group()
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else "cpu"


def ask_questions(arguments: argparse.Namespace) -> list[Table]:
    """The best answers to each question."""
    from eve_ds.evaluation.ask import ask
    from eve_ds.report.tables import Table
    from eve_ds.tasks.saved import load_task_model

    found = ask(load_task_model(arguments.model), arguments.image, arguments.questions, arguments.top)
    rows = [(item.question, item.answer, f"{item.score:.3f}") for item in found]
    return [Table(" ".join(map(str, arguments.image)), ("question", "answer", "score"), rows)]


def rank_captions(arguments: argparse.Namespace) -> list[Table]:
    """Captions, the best one first."""
    from eve_ds.evaluation.ask import rank
    from eve_ds.report.tables import Table
    from eve_ds.tasks.saved import load_task_model

    found = rank(load_task_model(arguments.model), arguments.image, arguments.captions)
    rows = [
        (item.caption, f"{item.similarity:.3f}", "-" if item.match is None else f"{item.match:.3f}") for item in found
    ]
    return [Table(str(arguments.image), ("caption", "similarity", "match"), rows)]


def write_json(result: dict[str, Any], path: Path) -> None:
    """Whole or not at all, so that a later step can trust the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def main() -> int:
    """Exit code 0, or 2 for input that cannot be used and files that cannot be written."""
    arguments = build_parser().parse_args()

    from rich.console import Console

    from eve_ds.distributed import get_logger
    from eve_ds.export import ExportError
    from eve_ds.launch_environment import LaunchError

    get_logger()  # shows what reading the configuration has to say
    try:
        tables = arguments.run(arguments)
    except (ConfigError, ExportError, LaunchError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evaluate: cannot write {error.filename or 'the result'}: {error.strerror}", file=sys.stderr)
        return 2
    console = Console()
    for table in tables:
        console.print(table.to_rich())
    return 0


if __name__ == "__main__":
    sys.exit(main())
