"""Turn a published data set into WebDataset shards with an index, index the shards of another tool, or
train a tokenizer on the captions of shards.

    python launcher/prepare.py nlvr nlvr-dev.tar.xz --out datasets/nlvr-dev
    python launcher/prepare.py img2dataset cc3m/ --out datasets/cc3m --exclude_ids datasets/coco-test/ids.txt
    python launcher/prepare.py karpathy dataset_coco.json --images coco/ --split train restval --out datasets/coco
    python launcher/prepare.py coco captions_train2014.json --images coco/ --out datasets/coco
    python launcher/prepare.py visual_genome region_descriptions.json --images vg/ --out datasets/vg
    python launcher/prepare.py urls sbu-captions-all.json --images sbu/ --out datasets/sbu
    python launcher/prepare.py json coco_train.json --images coco/ --out datasets/coco
    python launcher/prepare.py table captions.tsv --images photos/ --out datasets/photos
    python launcher/prepare.py scenes --num_samples 100000 --out datasets/scenes
    python launcher/prepare.py index shards/
    python launcher/prepare.py tokenizer --shards datasets/coco --vocab_size 8000 --out tokenizers/coco

Rerun the same command to resume after an interruption or a kill. Options may be written with dashes or underscores.
Options of a source: `prepare.py SOURCE --help`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eve_ds.cli.command import (
    BAD_INPUT,
    NOT_SAVED,
    SIGNALED,
    Parser,
    exit_code_table,
    is_debugging,
    output,
    positive,
    run_command,
)
from eve_ds.cli.prepare_sources import add_sources
from eve_ds.cli.shard_progress import Tally, counter, print_report, shown_progress

if TYPE_CHECKING:
    from eve_ds.data.importers import Source


def main(argv: Sequence[str] | None = None) -> int:
    """Write shards or a tokenizer; exit code 0, 2 for bad input, 5 if the disk takes no more, 4 or 130 for a signal."""
    given = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args([with_underscores(argument) for argument in given])
    return run_command("prepare", partial(_prepare, arguments), is_debugging(arguments))


def with_underscores(argument: str) -> str:
    """`--exclude-ids=x-y` as `--exclude_ids=x-y`."""
    name, equals, value = argument.partition("=")
    return (name[:2] + name[2:].replace("-", "_") if name.startswith("--") else name) + equals + value


def _prepare(arguments: argparse.Namespace) -> int:
    arguments.run(arguments)
    return 0


# --------------------------------------------------------------------------------------------------------- options


def build_parser() -> Parser:
    """Parser of the command line; each command sets `run`."""
    codes = exit_code_table(0, BAD_INPUT, NOT_SAVED, *SIGNALED)
    parser = Parser(prog="prepare", description=__doc__, epilog=codes)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SOURCE")
    add_sources(commands, _shared_options(), prepare_shards)
    _add_tokenizer(commands.add_parser("tokenizer", help="train a BPE tokenizer on the captions of shards"))
    index = commands.add_parser("index", help="write index.json for the plain tars of another tool")
    index.add_argument("path", nargs="+", type=output, metavar="FOLDER", help="folders of WebDataset shards (*.tar)")
    index.set_defaults(run=prepare_index)
    return parser


def _shared_options() -> Parser:
    shared = Parser(add_help=False)
    shared.add_argument("--out", type=output, required=True, metavar="DIR", help="folder to write")
    shared.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="number of processes (default: one for each core)",
    )
    shared.add_argument(
        "--samples_per_shard",
        type=positive,
        default=1000,
        metavar="N",
        help="number of captions in each shard (default: %(default)s)",
    )
    shared.add_argument(
        "--max_size",
        type=positive,
        metavar="PIXELS",
        help="shrink images whose shorter side is longer to this size, as JPEG",
    )
    shared.add_argument(
        "--quality", type=jpeg_quality, metavar="Q", help="quality of the JPEG files of shrunk images (default: 90)"
    )
    shared.add_argument("--limit", type=positive, metavar="N", help="take the first N images with captions only")
    shared.add_argument(
        "--exclude_ids",
        action="append",
        default=[],
        metavar="FILE",
        help="leave out the images of this list, such as ids.txt of a test set; may be given several times",
    )
    shared.add_argument(
        "--unescape_html", action="store_true", help="replace HTML entities of captions, such as &amp;, by characters"
    )
    return shared


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", nargs="+", required=True, metavar="DIR", help="folders of shards, or single ones")
    parser.add_argument(
        "--vocab_size", type=positive, required=True, metavar="N", help="maximum number of tokens, with special ones"
    )
    parser.add_argument("--out", type=output, required=True, metavar="DIR", help="folder to write")
    parser.set_defaults(run=prepare_tokenizer)


def jpeg_quality(text: str) -> int:
    """A quality of JPEG files, as the type of an option."""
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{value} must be from 1 to 100")
    return value


jpeg_quality.__name__ = "whole number"  # argparse: "invalid whole number value: 'x'"


# -------------------------------------------------------------------------------------------------------- commands


def prepare_shards(arguments: argparse.Namespace) -> None:
    """Write the shards of a source."""
    from eve_ds.config import ConfigError
    from eve_ds.data.image_check import JPEG_QUALITY
    from eve_ds.data.shard_writer import WriterOptions, write_shards

    if arguments.quality is not None and arguments.max_size is None:
        raise ConfigError(
            f"--quality ({arguments.quality}) is for the images that --max_size shrinks: add --max_size, or leave "
            "--quality out"
        )
    options = WriterOptions(
        arguments.samples_per_shard,
        arguments.max_size,
        arguments.limit,
        tuple(arguments.exclude_ids),
        arguments.unescape_html,
        arguments.quality or JPEG_QUALITY,
    )
    source: Source = arguments.build(arguments)
    tally = Tally()
    with shown_progress(tally) as on_shard:
        report = write_shards(source, arguments.out, options, arguments.workers, on_shard)
    print_report(report, tally, arguments.out)


def prepare_index(arguments: argparse.Namespace) -> None:
    """Write the indices of folders."""
    from eve_ds.data.index_writer import write_index

    for folder in arguments.path:
        entries = write_index(folder, counter("shards"))
        samples, size = (sum(entry[name] for entry in entries) for name in ("samples", "bytes"))
        print(f"{folder}: {samples:,} samples in {len(entries)} shards, {size / 1e6:,.1f} MB, index.json written")


def prepare_tokenizer(arguments: argparse.Namespace) -> None:
    """Train a tokenizer on the captions of shards."""
    from eve_ds.data.shard_captions import read_captions
    from eve_ds.data.writing.progress_files import OutputError

    out: Path = arguments.out
    if (out / "tokenizer.json").exists():
        raise OutputError(f"{out} holds a tokenizer already; choose another --out or remove it")
    captions = (caption for folder in arguments.shards for caption in read_captions(folder))
    first = list(itertools.islice(captions, 1))  # a wrong folder is named at once: the import below takes seconds

    from eve_ds.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(itertools.chain(first, captions), arguments.vocab_size)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    print(f"{out}: a tokenizer of {len(tokenizer):,} tokens")
