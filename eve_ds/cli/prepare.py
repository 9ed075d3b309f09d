"""Turn a published data set into WebDataset shards with an index, index the shards of another tool, or
train a tokenizer on the captions of shards.

    python launcher/prepare.py nlvr nlvr-dev.tar.xz --out datasets/nlvr-dev
    python launcher/prepare.py img2dataset cc3m/ --out datasets/cc3m --exclude_ids datasets/coco-test/ids.txt
    python launcher/prepare.py karpathy dataset_coco.json --images coco/ --split train restval --out datasets/coco
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
from collections.abc import Callable, Sequence
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
    """Parser of the command line; each command sets `run`, and each source `build`, which makes it from arguments."""
    codes = exit_code_table(0, BAD_INPUT, NOT_SAVED, *SIGNALED)
    parser = Parser(prog="prepare", description=__doc__, epilog=codes)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SOURCE")
    shared = _shared_options()

    def add_source(
        name: str,
        description: str,
        add_options: Callable[[argparse.ArgumentParser], None],
        build: Callable[[argparse.Namespace], Source],
    ) -> None:
        command = commands.add_parser(name, parents=[shared], help=description)
        add_options(command)
        command.set_defaults(run=prepare_shards, build=build)

    add_source("nlvr", "NLVR 1.0: archives or extracted folders", _add_nlvr, _nlvr)
    add_source("img2dataset", "output of img2dataset, tars or files", _add_img2dataset, _img2dataset)
    add_source("karpathy", "COCO or Flickr30K with Karpathy's splits", _add_karpathy, _karpathy)
    add_source("json", "[{image, caption, image_id}]; metadata.jsonl", _add_caption_json, _caption_json)
    add_source("table", "CSV or TSV of image path and caption", _add_table, _table)
    add_source("scenes", "generated scenes", _add_scenes, _scenes)
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
        help="number of samples in each shard (default: %(default)s)",
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
    shared.add_argument("--limit", type=positive, metavar="N", help="take the first N images of the source only")
    shared.add_argument("--exclude_ids", metavar="FILE", help="leave out these image ids: ids.txt of a test set")
    shared.add_argument(
        "--unescape_html", action="store_true", help="replace HTML entities of captions, such as &amp;, by characters"
    )
    return shared


def _add_nlvr(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="+", help="archive (such as .tar.xz) or folder in the published layout")
    parser.add_argument("--split", nargs="+", help="take these splits only")


def _nlvr(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import Nlvr

    return Nlvr(arguments.path, arguments.split)


def _add_img2dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="output folder of img2dataset")
    parser.add_argument(
        "--id_field",
        default="url",
        metavar="NAME",
        help="field of the metadata that identifies an image (default: %(default)s)",
    )


def _img2dataset(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import Img2dataset

    return Img2dataset(arguments.path, arguments.id_field)


def _add_karpathy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="dataset_coco.json or dataset_flickr30k.json")
    _add_images(parser)
    parser.add_argument(
        "--split", nargs="+", default=["train", "restval"], help="take these splits only (default: train restval)"
    )


def _karpathy(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import Karpathy

    return Karpathy(arguments.path, arguments.images, arguments.split, arguments.strip_prefix, arguments.follow_links)


def _add_caption_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="+", help="annotation files")
    _add_images(parser)


def _caption_json(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import CaptionJson

    return CaptionJson(arguments.path, arguments.images, arguments.strip_prefix, arguments.follow_links)


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="file with a header row")
    _add_images(parser)
    parser.add_argument(
        "--image_column", default="image", metavar="NAME", help="column of image paths (default: %(default)s)"
    )
    parser.add_argument(
        "--caption_column", default="caption", metavar="NAME", help="column of captions (default: %(default)s)"
    )
    parser.add_argument("--id_column", metavar="NAME", help="column of image ids (default: the image path is the id)")
    parser.add_argument(
        "--delimiter",
        type=delimiter,
        metavar="C",
        help=r"character between columns, \t for a tab (default: tab for .tsv, comma otherwise)",
    )


def _table(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import Table

    columns = (arguments.image_column, arguments.caption_column, arguments.id_column)
    rules = (arguments.strip_prefix, arguments.follow_links)
    return Table(arguments.path, arguments.images, *columns, arguments.delimiter, *rules)


def _add_scenes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num_samples", type=positive, default=100_000, metavar="N", help="number of scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--level", choices=["easy", "hard"], default="easy", help="difficulty of the scenes (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the scenes (default: %(default)s)")
    parser.add_argument(
        "--split",
        choices=["train", "val", "test"],
        default="train",
        help="split of the generated scenes (default: %(default)s)",
    )


def _scenes(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import GeneratedScenes

    return GeneratedScenes(arguments.num_samples, arguments.level, arguments.seed, arguments.split)


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", nargs="+", required=True, metavar="DIR", help="folders of shards")
    parser.add_argument(
        "--vocab_size", type=positive, required=True, metavar="N", help="maximum number of tokens, with special ones"
    )
    parser.add_argument("--out", type=output, required=True, metavar="DIR", help="folder to write")
    parser.set_defaults(run=prepare_tokenizer)


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="DIR", help="folder of the image paths (default: the annotations' folder)")
    parser.add_argument(
        "--strip_prefix", metavar="TEXT", help="remove this start of image paths, such as the folder on another machine"
    )
    parser.add_argument(
        "--follow_links", action="store_true", help="read images through symbolic links that leave the image folder"
    )


def delimiter(text: str) -> str:
    """One character, or a tab in its escaped form, which a shell passes on as two characters."""
    character = "\t" if text == r"\t" else text
    if len(character) != 1 or character in '\r\n"':
        raise argparse.ArgumentTypeError(rf"{text!r} must be one character, or \t for a tab")
    return character


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
        arguments.exclude_ids,
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
    from eve_ds.data.shard_writer import OutputError, read_captions

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
