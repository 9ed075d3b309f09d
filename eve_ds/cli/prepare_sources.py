"""Data sets that `prepare` turns into shards: the options of each, and the source that they make."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eve_ds.cli.command import positive

if TYPE_CHECKING:
    from eve_ds.data.formats.where import Where
    from eve_ds.data.importers import ImagePaths, Source


def add_sources(commands: Any, shared: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    """Add a command for each data set; it sets `run`, and `build`, which makes the source from the arguments.

    Args:
        commands: result of `add_subparsers`.
        shared: options of all data sets.
        run: function of the commands.
    """
    for name, description, add_options, build in (
        ("nlvr", "NLVR 1.0: archives or extracted folders", _add_nlvr, _nlvr),
        ("img2dataset", "output of img2dataset, tars or files", _add_img2dataset, _img2dataset),
        ("karpathy", "COCO or Flickr30K with Karpathy's splits", _add_karpathy, _karpathy),
        ("coco", "COCO captions of 2014 or 2017", _add_coco, _coco),
        ("visual_genome", "region descriptions of Visual Genome", _add_visual_genome, _visual_genome),
        ("urls", "lists of addresses (SBU, CC3M, CC12M, LAION) with downloaded images", _add_urls, _urls),
        ("json", "[{image, caption, image_id}], JSON lines, X-VLM's elems", _add_caption_json, _caption_json),
        ("imagefolder", "image folder of Hugging Face, with metadata files", _add_image_folder, _image_folder),
        ("table", "CSV, TSV or Parquet of image and caption", _add_table, _table),
        ("scenes", "generated scenes", _add_scenes, _scenes),
    ):
        command = commands.add_parser(name, parents=[shared], help=description)
        add_options(command)
        command.set_defaults(run=run, build=build)


def _add_nlvr(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="+", help="archive (such as .tar.xz) or folder in the published layout")
    parser.add_argument("--split", nargs="+", help="take these splits only")
    _add_follow_links(parser)


def _nlvr(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import Nlvr

    return Nlvr(arguments.path, arguments.split, arguments.follow_links)


def _add_img2dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="output folder of img2dataset")
    parser.add_argument(
        "--id_field",
        metavar="NAME",
        help="field of the metadata that identifies an image (default: url, or the name of the image without it)",
    )
    _add_follow_links(parser)


def _img2dataset(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import Img2dataset

    return Img2dataset(arguments.path, arguments.id_field, arguments.follow_links)


def _add_karpathy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="dataset_coco.json or dataset_flickr30k.json")
    _add_images(parser)
    parser.add_argument(
        "--split", nargs="+", help="take these splits only (default: train and restval, as far as there are any)"
    )


def _karpathy(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import Karpathy

    return Karpathy(arguments.path, _image_paths(arguments), arguments.split)


def _add_coco(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="+", help="captions_train2014.json, captions_train2017.json and the like")
    _add_images(parser)


def _coco(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import Coco

    return Coco(arguments.path, _image_paths(arguments))


def _add_visual_genome(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="region_descriptions.json")
    _add_images(parser)
    _add_boxes(parser)
    parser.add_argument(
        "--image_data",
        metavar="FILE",
        help="image_data.json, which names images of COCO and Flickr30K (default: the file beside the regions)",
    )


def _visual_genome(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import VisualGenome

    source = VisualGenome(arguments.path, _image_paths(arguments), arguments.image_data, arguments.boxes)
    if arguments.exclude_ids and not source.knows_other_names:
        print(
            "prepare: warning: without image_data.json (--image_data), images of COCO and Flickr30K are not recognized "
            "by their ids, and --exclude_ids does not leave them out",
            file=sys.stderr,
        )
    return source


def _add_caption_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="+", help="annotation files")
    _add_images(parser)
    _add_boxes(parser)
    _add_where(parser)


def _caption_json(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import CaptionJson

    return CaptionJson(arguments.path, _image_paths(arguments), arguments.boxes, _where(arguments))


def _add_urls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="+", help="SBU's JSON, TSV of CC3M or CC12M with or without a header row, Parquet of LAION"
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="output folder of img2dataset, as tars or files")
    parser.add_argument("--url_column", metavar="NAME", help="column of addresses (default: url, URL or image_url)")
    parser.add_argument("--caption_column", metavar="NAME", help="column of captions (default: caption, text or TEXT)")
    _add_follow_links(parser)
    _add_where(parser)


def _urls(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.formats.address_lists import ADDRESSED
    from eve_ds.data.importers import Addresses

    columns = ADDRESSED._replace(
        image=arguments.url_column or ADDRESSED.image,
        caption=arguments.caption_column or ADDRESSED.caption,
        where=_where(arguments),
    )
    return Addresses(arguments.path, arguments.images, columns, arguments.follow_links)


def _add_image_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        help="folder with metadata.jsonl, .csv or .parquet at any depth; name that of a split to take it only",
    )
    parser.add_argument(
        "--image_column", metavar="NAME", help="column of image paths (default: file_name, or the one of *_file_name)"
    )
    parser.add_argument("--caption_column", metavar="NAME", help="column of captions (default: text or caption)")
    _add_follow_links(parser)
    _add_where(parser)


def _image_folder(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.importers import MetadataFolder

    return MetadataFolder(
        arguments.path, arguments.caption_column, arguments.follow_links, arguments.image_column, _where(arguments)
    )


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        nargs="+",
        help="files with a header row, Parquet, which may hold the images, or lines of NAME.jpg#N, a tab and a caption",
    )
    _add_images(parser)
    parser.add_argument(
        "--image_column", metavar="NAME", help="column of image paths (default: image, file_name, image_path, filepath)"
    )
    parser.add_argument(
        "--caption_column",
        metavar="NAME",
        help="column of captions, or of lists of them (default: caption, text or TEXT)",
    )
    parser.add_argument("--id_column", metavar="NAME", help="column of image ids (default: the image path is the id)")
    parser.add_argument(
        "--delimiter",
        type=delimiter,
        metavar="C",
        help=r"character between columns, \t for a tab (default: tab for .tsv, comma otherwise)",
    )
    _add_where(parser)


def _table(arguments: argparse.Namespace) -> Source:
    from eve_ds.data.formats.tables import DEFAULT_COLUMNS
    from eve_ds.data.importers import Table

    columns = DEFAULT_COLUMNS._replace(
        image=arguments.image_column or DEFAULT_COLUMNS.image,
        caption=arguments.caption_column or DEFAULT_COLUMNS.caption,
        image_id=arguments.id_column,
        where=_where(arguments),
    )
    return Table(arguments.path, _image_paths(arguments), columns, arguments.delimiter)


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


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        "--image_root",
        metavar="DIR",
        help="folder of the image paths (default: the annotations' folder)",
    )
    parser.add_argument(
        "--strip_prefix", metavar="TEXT", help="remove this start of image paths, such as the folder on another machine"
    )
    _add_follow_links(parser)


def _add_follow_links(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--follow_links", action="store_true", help="read images through symbolic links that leave the image folder"
    )


def _add_boxes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--boxes",
        action="store_true",
        help="cut out the box of each region as an image (default: its caption is one of the whole image)",
    )


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where",
        action="append",
        type=condition,
        default=[],
        metavar="COLUMN=VALUE",
        help="take the rows, or entries, with this value only, such as split=train; repeat it for another value of the "
        "column (either is taken) or for another column (both must hold)",
    )


def _where(arguments: argparse.Namespace) -> Where:
    from eve_ds.data.formats.where import Where

    return Where.of(arguments.where)


def _image_paths(arguments: argparse.Namespace) -> ImagePaths:
    from eve_ds.data.importers import ImagePaths

    return ImagePaths(arguments.images, arguments.strip_prefix, arguments.follow_links)


def condition(text: str) -> tuple[str, str]:
    """Column and value of a condition, as the type of an option."""
    column, equals, value = text.partition("=")
    if not (column and equals):
        raise argparse.ArgumentTypeError(f"{text!r} must be COLUMN=VALUE, such as split=train")
    return column, value


def delimiter(text: str) -> str:
    """One character, or a tab in its escaped form, which a shell passes on as two characters."""
    character = "\t" if text == r"\t" else text
    if len(character) != 1 or character in '\r\n"':
        raise argparse.ArgumentTypeError(rf"{text!r} must be one character, or \t for a tab")
    return character
