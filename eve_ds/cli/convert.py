"""Checkpoints to plain weights and back; needs neither DeepSpeed, a GPU nor a process group.

    python launcher/convert.py runs/base --out exports/base                       newest good checkpoint of a run
    python launcher/convert.py runs/base/checkpoints/step-00480000 --out exports/base-480000
    python launcher/convert.py runs/base --out exports/official --dtype bf16 --format official
    python launcher/convert.py runs/base --out exports/base-hf --format hf        for AutoModel.from_pretrained
    python launcher/convert.py verify runs/base                                   every file against its hash
    python launcher/convert.py universal runs/base --out checkpoints/base         whole tensors, to resume from or read
    python launcher/convert.py import eve_base.pth --out exports/eve --config eve_base --tokenizer tokenizers/eve
    python launcher/convert.py upcycle beit-base/ --out exports/start --config eve_base --tokenizer tokenizers/eve
    python launcher/convert.py upcycle beitv2_base_patch16_224_pt1k.pth --out exports/start --config eve_base

`eve_ds.export.load("exports/base")` gives model, config and tokenizer; `launcher/pretrain.py --init exports/start`
starts a run from such a folder. Write ./verify for a run whose folder has the name of a command. Options of a command:
`convert.py COMMAND --help`.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from eve_ds.cli.command import (
    BAD_INPUT,
    FAILED,
    NOT_SAVED,
    SIGNALED,
    Parser,
    add_overrides,
    exit_code_table,
    is_debugging,
    output,
    presets,
    run_command,
    start_log,
)
from eve_ds.cli.conversion_report import print_report, print_start
from eve_ds.printable import printable

if TYPE_CHECKING:
    import torch

RUN_HELP = "output folder of a run, or a checkpoint folder in it"


class Command(NamedTuple):
    """One way to convert; the docstring of `run` is the description in its help text."""

    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; exit code 0; 1 for damage that `verify` found; 2 for bad input and files that cannot be written."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else ""
    command = COMMANDS.get(name, EXPORT)
    parsed = build_parser(name).parse_args(arguments)
    return run_command("convert", partial(_convert, command, parsed), is_debugging(parsed))


def build_parser(name: str = "") -> Parser:
    """Parser of the command `name`, by default of the export."""
    command = COMMANDS.get(name, EXPORT)
    description = inspect.cleandoc((command.run.__doc__ if name else __doc__) or "")
    codes = (0, FAILED, BAD_INPUT, *SIGNALED) if name == "verify" else (0, BAD_INPUT, NOT_SAVED, *SIGNALED)
    epilog = exit_code_table(*codes, failed="damage found")
    parser = Parser(prog=f"convert {name}".strip(), description=description, epilog=epilog)
    command.add_options(parser)
    return parser


def _convert(command: Command, arguments: argparse.Namespace) -> int:
    start_log()
    return command.run(arguments)


# --------------------------------------------------------------------------------------------------------- options


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an export."""
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN_HELP)
    parser.add_argument("--out", type=output, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="dtype of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--format",
        choices=["safetensors", "official", "hf"],
        default="safetensors",
        help="safetensors: loads with eve_ds; official: eve_official.pth beside them, for the released fine-tuning "
        "code; hf: loads with transformers (default: %(default)s)",
    )
    parser.add_argument(
        "--max_shard_size",
        type=size,
        default=5 * 10**9,
        metavar="N",
        help="largest file in bytes, or with a unit such as 500MB (default: 5GB)",
    )
    parser.add_argument("--check", action="store_true", help="refuse a checkpoint without outputs to compare with")


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `verify`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help=RUN_HELP)


def add_universal_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `universal`."""
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN_HELP)
    parser.add_argument("--out", type=output, required=True, metavar="DIR", help="new folder to write")


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `import`."""
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="released weights: .pth, .pt, .th, .bin, .ckpt or .safetensors"
    )
    parser.add_argument("--image_size", type=int, metavar="N", help="resize the position table to images of N pixels")
    _add_start_options(parser)


def add_upcycle_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `upcycle`."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT",
        help="folder of a ViT or BEiT of Hugging Face; BEiTv2: .pth file of its authors, folder of timm, or its file",
    )
    parser.add_argument(
        "--noise",
        type=noise,
        default=0.01,
        help="standard deviation of the noise added to each tensor of an expert, relative to that of the tensor "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--text_from_image", action="store_true", help="also start the text feed-forward networks from the file's"
    )
    _add_start_options(parser)


def _add_start_options(parser: argparse.ArgumentParser) -> None:
    """Options of the two commands that write weights to start from."""
    parser.add_argument("--out", type=output, required=True, metavar="DIR", help="new or empty folder to write")
    parser.add_argument(
        "--config", required=True, metavar="PRESET", help=f"preset of the model: {presets()} or a YAML file"
    )
    parser.add_argument(
        "--tokenizer", metavar="T", help="tokenizer folder, or scenes (default: data.tokenizer of the config)"
    )
    add_overrides(parser)


def size(text: str) -> int:
    """Bytes, with or without a unit."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    if not number.isdigit() or not int(number):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 500MB")
    return int(number) * unit


def noise(text: str) -> float:
    """A number that is not negative."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


# -------------------------------------------------------------------------------------------------------- commands


def run_export(arguments: argparse.Namespace) -> int:
    """Export a run or checkpoint as plain weights."""
    from eve_ds.export import export

    if arguments.format == "hf":
        return export_for_transformers(arguments)
    official = arguments.format == "official"
    report = export(
        arguments.run,
        arguments.out,
        dtype=torch_dtype(arguments.dtype),
        max_shard_bytes=arguments.max_shard_size,
        must_check=arguments.check,
        official=official,
    )
    print_report(report, arguments.out)
    if official:
        print(printable(official_line(arguments.out, arguments.dtype)))
    return 0


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for `fp32` or `bf16`."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def export_for_transformers(arguments: argparse.Namespace) -> int:
    """Export into a temporary folder beside `--out`, and convert that for transformers."""
    from eve_ds.export import export
    from eve_ds.export.hf import check_out, export_hf

    check_out(arguments.out)  # before the temporary folder, which takes minutes to write
    with tempfile.TemporaryDirectory(dir=existing(arguments.out), prefix=".convert-") as folder:
        plain = Path(folder) / "plain"
        report = export(arguments.run, plain, must_check=arguments.check)
        export_hf(plain, arguments.out, torch_dtype(arguments.dtype), arguments.max_shard_size)
    print_report(report, arguments.out)
    print(f"format      transformers, {arguments.dtype}: import eve_ds.export.hf, then AutoModel.from_pretrained")
    return 0


def existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def official_line(folder: Path, dtype: str) -> str:
    """A line of output about the weights with released names in an export."""
    from eve_ds.checkpoint.manifest import CONFIG, read_json
    from eve_ds.export.plain import OFFICIAL

    line = f"official    {folder / OFFICIAL}, {dtype}, without the decoders"
    profile = read_json(folder.resolve() / CONFIG)["model"]["profile"]
    if profile == "official":
        return line
    return f"{line}; routed as model.profile={profile}, which the released code does otherwise"


def run_verify(arguments: argparse.Namespace) -> int:
    """Compare every file of a checkpoint, or of all checkpoints of a run, with its manifest."""
    from eve_ds.checkpoint import manifest
    from eve_ds.checkpoint.files import CheckpointError

    folder: Path = arguments.folder
    folders = manifest.committed(folder) if (folder / manifest.FOLDER).is_dir() else [folder]
    if not folders:
        raise CheckpointError(f"{folder} holds no finished checkpoint: train until one is saved")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: name a run or a checkpoint")
    good = [_print_verified(checkpoint) for checkpoint in folders]
    return 0 if all(good) else FAILED


def _print_verified(checkpoint: Path) -> bool:
    from eve_ds.checkpoint import manifest

    if problems := manifest.problems(checkpoint):
        print(f"{checkpoint}: DAMAGED: {'; '.join(problems)}")
        return False
    records = manifest.read_json(checkpoint / manifest.MANIFEST)["files"]
    print(f"{checkpoint}: good, {len(records)} files, {sum(record['bytes'] for record in records.values()):,} bytes")
    return True


def run_universal(arguments: argparse.Namespace) -> int:
    """Join the tensors of a checkpoint. The result is a checkpoint too, which any number of ranks can resume from."""
    from eve_ds.checkpoint.universal import write_universal
    from eve_ds.checkpoint.weights import find_checkpoint

    report = write_universal(find_checkpoint(arguments.run), arguments.out)
    print(f"{arguments.out}: checkpoint of step {report.step}, whole tensors")
    print(f"tensors     {report.tensors} (fp32 weights and two moments)")
    print(f"files       {report.files}")
    print(f"bytes       {report.bytes:,}")
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    """Convert weights under the released names to a folder that loads; see :mod:`eve_ds.export.importing`."""
    from eve_ds.config import load_config
    from eve_ds.export import import_weights

    report = import_weights(
        arguments.file,
        arguments.out,
        config=load_config(arguments.config, arguments.set),
        tokenizer=arguments.tokenizer,
        image_size=arguments.image_size,
    )
    print_start(report, arguments.out)
    return 0


def run_upcycle(arguments: argparse.Namespace) -> int:
    """Convert a ViT, BEiT or BEiTv2 to an EVE whose experts start from its feed-forward networks.

    Sizes must be those of the config. Relative position biases, heads, the token of masked patches and the second
    decoder of a BEiTv2 have no place in EVE and are left out; see :mod:`eve_ds.export.upcycle`.
    """
    from eve_ds.config import load_config
    from eve_ds.export import write_upcycled

    report = write_upcycled(
        arguments.source,
        arguments.out,
        config=load_config(arguments.config, arguments.set),
        tokenizer=arguments.tokenizer,
        noise=arguments.noise,
        text_from_image=arguments.text_from_image,
    )
    print_start(report, arguments.out)
    return 0


EXPORT = Command(add_export_options, run_export)
COMMANDS = {
    "verify": Command(add_verify_options, run_verify),
    "universal": Command(add_universal_options, run_universal),
    "import": Command(add_import_options, run_import),
    "upcycle": Command(add_upcycle_options, run_upcycle),
}
