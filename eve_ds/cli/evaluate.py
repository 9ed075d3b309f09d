"""Evaluate an export or a fine-tuned model: `python launcher/evaluate.py scenes --model exports/demo`.

    scenes    masked words and pixels with the right and with a wrong other modality, and the binding probes
    task      a fine-tuned model on examples of its task: metrics, and predictions in a folder
    zero_shot retrieval by a pre-trained model, without fine-tuning
    ask       answers of a model to a question, or to a statement, about an image
    rank      rank captions by their match to an image

Needs neither DeepSpeed nor a process group; `task` and `zero_shot` also run under torchrun, deepspeed, srun and
mpirun, where each rank takes a share. Rerun the same command to resume after a kill. Options of a command:
`evaluate.py COMMAND --help`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eve_ds.cli.command import (
    BAD_INPUT,
    NOT_SAVED,
    RANK_LOST,
    SIGNALED,
    Parser,
    add_local_rank,
    exit_code_table,
    is_debugging,
    output,
    positive,
    run_command,
    start_log,
)

if TYPE_CHECKING:
    from eve_ds.report.tables import Table


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print tables; exit code 0, or 2 for bad input and files that cannot be written."""
    arguments = build_parser().parse_args(argv)
    return run_command("evaluate", partial(_evaluate, arguments), is_debugging(arguments))


def build_parser() -> Parser:
    """Parser of the command line; each command sets `run`."""
    codes = exit_code_table(0, BAD_INPUT, NOT_SAVED, RANK_LOST, *SIGNALED)
    parser = Parser(prog="evaluate", description=__doc__, epilog=codes)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_scenes(commands.add_parser("scenes", help="pre-trained model: masked words, pixels and binding on scenes"))
    _add_task(commands.add_parser("task", help="fine-tuned model on examples of its task"))
    _add_zero_shot(commands.add_parser("zero_shot", help="retrieval by a pre-trained model"))
    _add_ask(commands.add_parser("ask", help="answers of a model about an image"))
    _add_rank(commands.add_parser("rank", help="rank captions by their match to an image"))
    return parser


def _add_scenes(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "export of launcher/convert.py")
    parser.add_argument("--json", type=output, metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--num_scenes", type=int, default=1024, help="validation scenes, even (default: %(default)s)")
    parser.set_defaults(run=evaluate_scenes)


def _add_task(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "folder `model` that launcher/finetune.py saved")
    _add_examples(parser)
    parser.add_argument("--csv", type=output, metavar="FILE", help="NLVR: one row per image, for its metrics_images.py")
    parser.set_defaults(run=evaluate_task)


def _add_zero_shot(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "export, checkpoint or run")
    parser.add_argument(
        "--features",
        choices=["class_token", "words"],
        help="features to compare (default: those that pre-training taught)",
    )
    parser.add_argument(
        "--rerank", type=int, default=0, metavar="K", help="score the best K of a query pair by pair (default: 0)"
    )
    _add_examples(parser)
    parser.set_defaults(run=evaluate_zero_shot)


def _add_ask(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "model that was fine-tuned for questions or statements (vqa, nlvr)")
    parser.add_argument(
        "--image", type=Path, required=True, action="append", metavar="FILE", help="image; give it twice for two images"
    )
    parser.add_argument(
        "--top", type=positive, default=3, metavar="N", help="number of answers to each question (default: %(default)s)"
    )
    parser.add_argument("questions", nargs="+", metavar="QUESTION", help="questions, or statements")
    parser.set_defaults(run=ask_questions)


def _add_rank(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "model that was fine-tuned for retrieval")
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="image to compare captions with")
    parser.add_argument("captions", nargs="+", metavar="CAPTION", help="captions to order")
    parser.set_defaults(run=rank_captions)


def _add_model(parser: argparse.ArgumentParser, description: str) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help=description)


def _add_examples(parser: argparse.ArgumentParser) -> None:
    """Options of evaluations on examples, which any number of processes may share."""
    parser.add_argument("--out", type=output, required=True, metavar="DIR", help="folder of predictions and metrics")
    parser.add_argument(
        "--data", nargs="+", metavar="DATA", help="scenes, scenes:hard, or files (default: those of the model)"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder that image names are relative to")
    parser.add_argument("--split", help="split, where the data holds several (scenes: val, the default, or test)")
    parser.add_argument(
        "--batch_size",
        type=positive,
        default=64,
        metavar="N",
        help="examples of a batch; changes the speed only (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate the first N examples only")
    add_local_rank(parser)


def _evaluate(arguments: argparse.Namespace) -> int:
    start_log()
    from rich.console import Console

    from eve_ds.checkpoint.output_folder import refuse_checkpoint
    from eve_ds.config import ConfigError
    from eve_ds.lost_ranks import rank_losses

    console = Console()
    for option in ("json", "csv"):  # before the evaluation, which takes minutes
        file = getattr(arguments, option, None)
        if file is not None:
            refuse_checkpoint(file, ConfigError, f"--{option}")
    with rank_losses():
        tables = arguments.run(arguments)
    for table in tables:
        console.print(table.to_rich())
    return 0


def evaluate_scenes(arguments: argparse.Namespace) -> list[Table]:
    """Tables of masked words, pixels and binding."""
    from eve_ds.config import ConfigError
    from eve_ds.evaluation import scenes as evaluation
    from eve_ds.evaluation.predictions import write_json
    from eve_ds.export import load
    from eve_ds.report.tables import evaluation_tables

    if arguments.num_scenes < 2 or arguments.num_scenes % 2:
        raise ConfigError(f"--num_scenes ({arguments.num_scenes}) must be even and at least 2")
    model, config, tokenizer = load(arguments.model)
    result = evaluation.evaluate_scenes(model, config, tokenizer, num_scenes=arguments.num_scenes)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, result)
    return evaluation_tables(result)


def evaluate_task(arguments: argparse.Namespace) -> list[Table]:
    """Write predictions of a fine-tuned model; the table of its metrics, on rank 0."""
    from eve_ds.distributed import rank_zero
    from eve_ds.evaluation.predictions import evaluate, read_predictions
    from eve_ds.report.tables import metrics_table
    from eve_ds.tasks.batches import TaskCollator
    from eve_ds.tasks.finetune_config import evaluated_on
    from eve_ds.tasks.load_examples import load_examples
    from eve_ds.tasks.saved import load_task_model

    device = _begin()
    loaded = load_task_model(arguments.model)
    if arguments.csv is not None:
        loaded.task.check_csv(arguments.csv)
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
        loaded.task.write_csv(read_predictions(arguments.out), arguments.csv)
    return [metrics_table(f"{arguments.model}, {arguments.out}", metrics)]


def evaluate_zero_shot(arguments: argparse.Namespace) -> list[Table]:
    """Write the rankings of captions and images by a pre-trained model; the table of its metrics, on rank 0."""
    from eve_ds.config import ConfigError
    from eve_ds.distributed import rank_zero
    from eve_ds.evaluation.predictions import evaluate
    from eve_ds.evaluation.zero_shot import load_zero_shot
    from eve_ds.report.tables import metrics_table
    from eve_ds.tasks.batches import TaskCollator

    if arguments.rerank < 0:
        raise ConfigError(f"--rerank ({arguments.rerank}) must be 0 or more")
    device = _begin()
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


def _begin() -> str:
    """Join the other ranks, if any; return the device of this rank."""
    import torch

    from eve_ds.launch_environment import read_environment
    from eve_ds.process_group import initialize_process_group

    if read_environment().world_size > 1:
        initialize_process_group()
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else "cpu"


def ask_questions(arguments: argparse.Namespace) -> list[Table]:
    """Table of the best answers to each question."""
    from eve_ds.evaluation.ask import ask
    from eve_ds.report.tables import Table
    from eve_ds.tasks.saved import load_task_model

    found = ask(load_task_model(arguments.model), arguments.image, arguments.questions, arguments.top)
    rows = [(item.question, item.answer, f"{item.score:.3f}") for item in found]
    return [Table(" ".join(map(str, arguments.image)), ("question", "answer", "score"), rows)]


def rank_captions(arguments: argparse.Namespace) -> list[Table]:
    """Table of captions, the best one first."""
    from eve_ds.evaluation.ask import rank
    from eve_ds.report.tables import Table
    from eve_ds.tasks.saved import load_task_model

    found = rank(load_task_model(arguments.model), arguments.image, arguments.captions)
    rows = [
        (item.caption, f"{item.similarity:.3f}", "-" if item.match is None else f"{item.match:.3f}") for item in found
    ]
    return [Table(str(arguments.image), ("caption", "similarity", "match"), rows)]
