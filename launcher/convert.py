"""Checkpoints to plain weights and back; needs neither DeepSpeed, a GPU nor a process group.

    python launcher/convert.py runs/demo --out exports/demo                       newest good checkpoint of a run
    python launcher/convert.py runs/demo/checkpoints/step-00000500 --out exports/demo-500
    python launcher/convert.py runs/base --out exports/base --dtype bf16 --format official
    python launcher/convert.py runs/base --out exports/base-hf --format hf        for AutoModel.from_pretrained
    python launcher/convert.py verify runs/demo                                   every file against its hash
    python launcher/convert.py universal runs/demo --out checkpoints/demo         whole tensors, to resume from or read
    python launcher/convert.py import eve_base.pth --out exports/eve --config eve_base --tokenizer tokenizers/eve
    python launcher/convert.py upcycle beit-base/ --out exports/start --config eve_base --tokenizer tokenizers/eve
    python launcher/convert.py upcycle beitv2_base_patch16_224_pt1k.pth --out exports/start --config eve_base

`eve_ds.export.load("exports/demo")` gives model, config and tokenizer; `launcher/pretrain.py --init exports/start`
trains on. A run whose folder is called like a command is ./verify. Options of a command: `convert.py COMMAND --help`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository root holds a folder `kernels`, the name of a package that transformers looks for; multi-node
# `deepspeed` puts the root on the path, and Python puts the folder of this script there.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "launcher")]

import argparse
import inspect
import math
import tempfile

import torch

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import listed
from eve_ds.checkpoint.universal import write_universal
from eve_ds.checkpoint.weights import find_checkpoint
from eve_ds.config import ConfigError, load_config
from eve_ds.distributed import get_logger
from eve_ds.export import (
    CheckpointError,
    ExportError,
    ExportReport,
    StartReport,
    WeightFileError,
    export,
    import_weights,
    load,
    write_upcycled,
)
from eve_ds.export.hf import export_hf
from eve_ds.export.official import write_official
from eve_ds.export.plain import OFFICIAL
from eve_ds.export.start import DRAWN

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    """Exit code 0; 1 for damage that `verify` found; 2 for what cannot be used or written."""
    commands = {
        "verify": verify_command,
        "universal": universal_command,
        "import": import_command,
        "upcycle": upcycle_command,
    }
    get_logger()  # shows what reading the configuration has to say
    name = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in commands else ""
    command = commands.get(name, export_command)
    description = inspect.cleandoc((command.__doc__ if name else __doc__) or "")
    parser = argparse.ArgumentParser(
        prog=f"convert.py {name}".strip(),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    try:
        return command(parser, sys.argv[2:] if name else sys.argv[1:])
    except (CheckpointError, ConfigError, ExportError, WeightFileError) as error:
        print(f"convert: {error}", file=sys.stderr)
    except OSError as error:
        print(f"convert: {error.filename or 'disk'} cannot be used: {error.strerror or error}", file=sys.stderr)
    return 2


def export_command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """A run or checkpoint to plain weights."""
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a run, or a checkpoint folder in it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: %(default)s)")
    parser.add_argument(
        "--format",
        choices=["safetensors", "official", "hf"],
        default="safetensors",
        help=f"official: {OFFICIAL} beside them, for the released fine-tuning code; hf: what transformers loads",
    )
    parser.add_argument(
        "--max_shard_size", type=size, default=5 * 10**9, metavar="N", help="bytes of one file, such as 500MB (5GB)"
    )
    parser.add_argument("--check", action="store_true", help="refuse a checkpoint without outputs to compare with")
    arguments = parser.parse_args(argv)
    options = {"dtype": DTYPES[arguments.dtype], "max_shard_bytes": arguments.max_shard_size}
    if arguments.format == "hf":
        return export_for_transformers(arguments)
    report = export(arguments.run, arguments.out, must_check=arguments.check, **options)
    official = official_line(arguments.out, arguments.dtype) if arguments.format == "official" else ""
    print_report(report, arguments.out)
    if official:
        print(official)
    return 0


def export_for_transformers(arguments: argparse.Namespace) -> int:
    """Export beside `--out`, and from there into the form of transformers."""
    with tempfile.TemporaryDirectory(dir=existing(arguments.out), prefix=".convert-") as folder:
        plain = Path(folder) / "plain"
        report = export(arguments.run, plain, must_check=arguments.check)
        export_hf(plain, arguments.out, DTYPES[arguments.dtype])
    print_report(report, arguments.out)
    print(f"format      transformers, {arguments.dtype}: import eve_ds.export.hf, then AutoModel.from_pretrained")
    return 0


def existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def size(text: str) -> int:
    """Bytes, with or without a unit."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    if not number.isdigit() or not int(number):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 500MB")
    return int(number) * unit


def verify_command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Compare every file of a checkpoint, or of all checkpoints of a run, with its manifest."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of a run, or a checkpoint folder in it")
    folder = parser.parse_args(argv).folder
    folders = manifest.committed(folder) if (folder / manifest.FOLDER).is_dir() else [folder]
    if not folders:
        raise CheckpointError(f"{folder} holds no finished checkpoint: train until one is saved")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: name a run or a checkpoint")
    damaged = 0
    for checkpoint in folders:
        found = manifest.problems(checkpoint)
        damaged += bool(found)
        if found:
            print(f"{checkpoint}: DAMAGED: {'; '.join(found)}")
            continue
        records = manifest.read_json(checkpoint / manifest.MANIFEST)["files"]
        total = sum(record["bytes"] for record in records.values())
        print(f"{checkpoint}: good, {len(records)} files, {total:,} bytes")
    return 1 if damaged else 0


def universal_command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Put the tensors of a checkpoint together; the result is a checkpoint too, of no particular number of ranks."""
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a run, or a checkpoint folder in it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder to write")
    arguments = parser.parse_args(argv)
    report = write_universal(find_checkpoint(arguments.run), arguments.out)
    print(f"{arguments.out}: checkpoint of step {report.step}, whole tensors")
    print(f"tensors     {report.tensors} (fp32 weights and two moments)")
    print(f"files       {report.files}")
    print(f"bytes       {report.bytes:,}")
    return 0


def official_line(folder: Path, dtype: str) -> str:
    """Write the weights of an export under the released names too; a line that says so."""
    model, config, _ = load(folder)
    if config.model.deep_ffn == "shared":
        raise ExportError(
            "--format official: the released code has no place for model.deep_ffn 'shared': leave --format out"
        )
    write_official(model.state_dict(), folder / OFFICIAL, DTYPES[dtype])
    line = f"official    {folder / OFFICIAL}, {dtype}, without the decoders"
    if config.model.profile == "official":
        return line
    return f"{line}; routed as model.profile={config.model.profile}, which the released code does otherwise"


def import_command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Weights under the released names to a folder that loads; see :mod:`eve_ds.export.importing`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="released weights: .pth, .pt, .bin or .safetensors")
    parser.add_argument("--image_size", type=int, metavar="N", help="resize the position table to images of N pixels")
    arguments = parse_start(parser, argv)
    report = import_weights(
        arguments.file,
        arguments.out,
        config=load_config(arguments.config, arguments.set),
        tokenizer=arguments.tokenizer,
        image_size=arguments.image_size,
    )
    print_start(report, arguments.out)
    return 0


def upcycle_command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """A ViT, BEiT or BEiTv2 to an EVE whose experts start from its networks.

    Sizes must be those of the config. Relative position biases, heads, the token of masked patches and the second
    decoder of a BEiTv2 have no place in EVE and are left out; see :mod:`eve_ds.export.upcycle`.
    """
    parser.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT",
        help="folder of a ViT or BEiT of Hugging Face; BEiTv2: .pth file of its authors, folder of timm, or its file",
    )
    parser.add_argument("--noise", type=noise, default=0.01, help="of experts, relative (default: %(default)s)")
    parser.add_argument("--text_from_image", action="store_true", help="start the networks of texts from those too")
    arguments = parse_start(parser, argv)
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


def noise(text: str) -> float:
    """A number that is not negative."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def parse_start(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Add what both commands take, and parse."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder to write")
    parser.add_argument("--config", required=True, metavar="PRESET", help="preset (eve_base, eve_large) or YAML file")
    parser.add_argument("--tokenizer", metavar="T", help="folder, or scenes (default: data.tokenizer of the config)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of the config"
    )
    return parser.parse_args(argv)


def print_start(report: StartReport, out: Path) -> None:
    """What was written and where it is from, one fact per line."""
    drawn = [name for name, origin in report.origins.items() if origin == DRAWN]
    print(f"{out}: weights to start from, of {report.source}")
    print(f"tensors     {report.tensors}, of which {len(drawn)} drawn: {listed(drawn)}")
    print_weights(report)
    for note in report.notes:
        print(f"note        {note}")


def print_report(report: ExportReport, out: Path) -> None:
    """What was written and how it was checked, one fact per line."""
    print(f"{out}: plain weights of step {report.step} ({report.checkpoint}), {report.dtype} of fp32 masters")
    print(f"tensors     {report.tensors}")
    print_weights(report)
    print(f"check       {check_line(report)}")


def print_weights(report: ExportReport | StartReport) -> None:
    """Size and hash of what was written."""
    experts = ", ".join(f"{count} in layer {layer}" for layer, count in report.experts.items()) or "none"
    print(f"parameters  {report.parameters:,}")
    print(f"experts     {experts}")
    print(f"bytes       {report.bytes:,}")
    print(f"sha256      {report.sha256}")


def check_line(report: ExportReport) -> str:
    """The comparison with the engine in words."""
    check = report.check
    if check is None:
        return "none: the checkpoint holds no recorded outputs"
    outputs = ", ".join(f"{name} {tuple(shape)}" for name, shape in check.outputs.items())
    return (
        f"max abs diff {check.max_abs_diff:.2e}, relative {check.relative:.2e} (at most {check.tolerance:.0e} in "
        f"{check.precision}) from the engine's {outputs}"
    )


if __name__ == "__main__":
    sys.exit(main())
