"""Turn a published data set into WebDataset shards with an index, or train a tokenizer on the captions of shards.

    python launcher/prepare.py nlvr nlvr-dev.tar.xz --out datasets/nlvr-dev
    python launcher/prepare.py img2dataset cc3m/ --out datasets/cc3m --exclude_ids datasets/coco-test/ids.txt
    python launcher/prepare.py karpathy dataset_coco.json --images coco/ --split train restval --out datasets/coco
    python launcher/prepare.py json coco_train.json --images coco/ --out datasets/coco
    python launcher/prepare.py table captions.tsv --images photos/ --out datasets/photos
    python launcher/prepare.py scenes --num_samples 100000 --out datasets/scenes
    python launcher/prepare.py tokenizer --shards datasets/coco --vocab_size 8000 --out tokenizers/coco

Interrupted or killed, the same command continues. Options may be written with dashes or underscores.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository root holds a folder `kernels`, the name of a package that transformers looks for; multi-node
# `deepspeed` puts the root on the path, and Python puts the folder of this script there.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "launcher")]

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from eve_ds.config import ConfigError
from eve_ds.data import importers
from eve_ds.data.importers import Source, SourceError
from eve_ds.data.shard_writer import OutputError, Progress, WriterOptions, read_captions, write_shards

PLAIN_SECONDS = 10.0
"""Between progress lines where there is no terminal."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, without the usage text."""
        self.exit(2, f"prepare: {message} (see --help)\n")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


positive.__name__ = "whole number"  # argparse: "invalid whole number value: 'x'"


def build_parser() -> argparse.ArgumentParser:
    """The command line; each subcommand sets `build`, which makes its source from the arguments."""
    parser = Parser(prog="prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SOURCE", parser_class=Parser)
    shared = _shared_options()

    nlvr = commands.add_parser("nlvr", parents=[shared], help="NLVR 1.0: archives or extracted folders")
    nlvr.add_argument("path", nargs="+", help="archive (such as .tar.xz) or folder in the published layout")
    nlvr.add_argument("--split", nargs="+", help="take these splits only")
    nlvr.set_defaults(build=lambda a: importers.Nlvr(a.path, a.split))

    img2dataset = commands.add_parser("img2dataset", parents=[shared], help="output of img2dataset, tars or files")
    img2dataset.add_argument("path", help="its output folder")
    img2dataset.add_argument("--id_field", default="url", help="metadata that names an image (default: %(default)s)")
    img2dataset.set_defaults(build=lambda a: importers.Img2dataset(a.path, a.id_field))

    karpathy = commands.add_parser("karpathy", parents=[shared], help="COCO or Flickr30K with Karpathy's splits")
    karpathy.add_argument("path", help="dataset_coco.json or dataset_flickr30k.json")
    _add_images(karpathy)
    karpathy.add_argument("--split", nargs="+", default=["train", "restval"], help="(default: train restval)")
    karpathy.set_defaults(build=lambda a: importers.Karpathy(a.path, a.images, a.split))

    caption_json = commands.add_parser(
        "json", parents=[shared], help="[{image, caption, image_id}] of EVE, ALBEF, X-VLM"
    )
    caption_json.add_argument("path", nargs="+", help="annotation files")
    _add_images(caption_json)
    caption_json.set_defaults(build=lambda a: importers.CaptionJson(a.path, a.images))

    table = commands.add_parser("table", parents=[shared], help="CSV or TSV of image path and caption")
    table.add_argument("path", help="file with a header row")
    _add_images(table)
    table.add_argument("--image_column", default="image", metavar="NAME", help="(default: %(default)s)")
    table.add_argument("--caption_column", default="caption", metavar="NAME", help="(default: %(default)s)")
    table.add_argument("--id_column", metavar="NAME", help="(default: the image path is the id)")
    table.add_argument("--delimiter", help="(default: tab for .tsv, comma otherwise)")
    table.set_defaults(
        build=lambda a: importers.Table(a.path, a.images, a.image_column, a.caption_column, a.id_column, a.delimiter)
    )

    scenes = commands.add_parser("scenes", parents=[shared], help="generated scenes")
    scenes.add_argument("--num_samples", type=positive, default=100_000, help="(default: %(default)s)")
    scenes.add_argument("--level", choices=["easy", "hard"], default="easy", help="(default: %(default)s)")
    scenes.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    scenes.add_argument("--split", choices=["train", "val", "test"], default="train", help="(default: %(default)s)")
    scenes.set_defaults(build=lambda a: importers.GeneratedScenes(a.num_samples, a.level, a.seed, a.split))

    tokenizer = commands.add_parser("tokenizer", help="train a BPE tokenizer on the captions of shards")
    tokenizer.add_argument("--shards", nargs="+", required=True, metavar="DIR", help="folders of shards")
    tokenizer.add_argument("--vocab_size", type=positive, required=True, help="most tokens, special ones included")
    tokenizer.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser


def _shared_options() -> Parser:
    shared = Parser(add_help=False)
    shared.add_argument("--out", type=Path, required=True, help="folder to write")
    shared.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)), help="(default: every core)")
    shared.add_argument("--samples_per_shard", type=positive, default=1000, metavar="N", help="(default: %(default)s)")
    shared.add_argument("--max_size", type=positive, metavar="PIXELS", help="shrink longer shorter sides, as JPEG")
    shared.add_argument("--limit", type=positive, metavar="N", help="take the first N images of the source only")
    shared.add_argument("--exclude_ids", metavar="FILE", help="leave out these image ids: ids.txt of a test set")
    return shared


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="DIR", help="folder of the image paths (default: the annotations' folder)")


# ------------------------------------------------------------------------------------------------- what is shown


class Tally:
    """Counts of the shards so far."""

    def __init__(self) -> None:
        self.images = self.kept_images = self.samples = self.skipped = self.shards = self.kept_shards = 0
        self.started = time.monotonic()

    def add(self, progress: Progress) -> None:
        """Count one more shard."""
        record = progress.record
        self.images += record.candidates
        self.samples += record.samples
        self.skipped += sum(entry["count"] for entry in record.skipped.values())
        self.shards += 1
        if progress.kept:
            self.kept_images += record.candidates
            self.kept_shards += 1

    @property
    def rate(self) -> float:
        """Images per second of this run."""
        return (self.images - self.kept_images) / max(time.monotonic() - self.started, 1e-9)

    def __str__(self) -> str:
        return f"{self.images:,} images, {self.shards} shards, {self.skipped:,} skipped, {self.rate:,.0f} images/s"


@contextmanager
def shown_progress(tally: Tally) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on a terminal, a plain line now and then elsewhere."""
    if sys.stdout.isatty():
        with _bar(tally) as on_shard:
            yield on_shard
        return
    last = time.monotonic()

    def on_shard_plain(progress: Progress) -> None:
        nonlocal last
        tally.add(progress)
        if time.monotonic() - last >= PLAIN_SECONDS:
            last = time.monotonic()
            of_total = f" of {progress.total:,}" if progress.total else ""
            print(f"{tally.images:,}{of_total}: {tally}", flush=True)

    yield on_shard_plain


@contextmanager
def _bar(tally: Tally) -> Iterator[Callable[[Progress], None]]:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
    with RichProgress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("starting", total=None)

        def on_shard(progress: Progress) -> None:
            tally.add(progress)
            bar.update(task, total=progress.total, completed=tally.images, description=str(tally))

        yield on_shard


def print_report(report: dict[str, Any], tally: Tally, out: Path) -> None:
    """What was written and what was left out."""
    reused = "" if tally.shards else " (already there, nothing to do)"
    print(
        f"{out}: {report['samples']:,} samples of {report['images']:,} images in {report['shards']} shards, "
        f"{report['bytes'] / 1e6:,.1f} MB{reused}"
    )
    if tally.shards:
        seconds = time.monotonic() - tally.started
        kept = f", {tally.kept_shards} shards kept from an earlier run" if tally.kept_shards else ""
        print(f"{seconds:,.1f} s, {tally.rate:,.0f} images/s{kept}")
    for reason, entry in report["skipped"].items():
        print(
            f"skipped {entry['count']:,}: {reason} (as {', '.join(entry['examples'])})".encode(
                "utf-8", "replace"
            ).decode()
        )
    excluded = report["excluded_ids"]
    if excluded["listed"]:
        print(f"excluded ids: {excluded['matched']:,} of {excluded['listed']:,} listed ids occur in this source")


# ------------------------------------------------------------------------------------------------- the commands


def prepare_shards(arguments: argparse.Namespace) -> None:
    """Write the shards of a source."""
    options = WriterOptions(arguments.samples_per_shard, arguments.max_size, arguments.limit, arguments.exclude_ids)
    source: Source = arguments.build(arguments)
    tally = Tally()
    with shown_progress(tally) as on_shard:
        report = write_shards(source, arguments.out, options, arguments.workers, on_shard)
    print_report(report, tally, arguments.out)


def prepare_tokenizer(arguments: argparse.Namespace) -> None:
    """Train a tokenizer on the captions of shards."""
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


def with_underscores(argument: str) -> str:
    """`--exclude-ids=x-y` as `--exclude_ids=x-y`."""
    name, equals, value = argument.partition("=")
    return (name[:2] + name[2:].replace("-", "_") if name.startswith("--") else name) + equals + value


def main() -> int:
    """Exit code 0, 2 for input that cannot be used, 1 where writing failed, 130 interrupted."""
    arguments = build_parser().parse_args([with_underscores(argument) for argument in sys.argv[1:]])
    try:
        (prepare_tokenizer if arguments.command == "tokenizer" else prepare_shards)(arguments)
    except (SourceError, OutputError, ConfigError) as error:
        print(f"prepare: {error}".encode("utf-8", "replace").decode(), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare: {error}; the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
