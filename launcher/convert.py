"""Turn a run, or one of its checkpoints, into plain weights: model.safetensors, config.json and the tokenizer.

    python launcher/convert.py runs/demo --out exports/demo
    python launcher/convert.py runs/demo/checkpoints/step-00000500 --out exports/demo-500
    python launcher/convert.py runs/base --out exports/base --format official --dtype bf16

The last one adds eve_official.pth, for the released fine-tuning code. And the other way, weights to start from:

    python launcher/convert.py import eve_base.pth --out exports/eve --config eve_base --tokenizer tokenizers/eve
    python launcher/convert.py upcycle beit-base/ --out exports/start --config eve_base --tokenizer tokenizers/eve

Needs neither DeepSpeed nor a process group. `eve_ds.export.load("exports/demo")` gives model, config and tokenizer.
(A run whose folder is called import or upcycle is ./import or ./upcycle.)
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository root holds a folder `kernels`, the name of a package that transformers looks for; multi-node
# `deepspeed` puts the root on the path, and Python puts the folder of this script there.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "launcher")]

import argparse
import math
from collections.abc import Callable

import torch

from eve_ds.config import ConfigError, load_config
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
from eve_ds.export.deepspeed_files import listed
from eve_ds.export.official import write_official
from eve_ds.export.plain import OFFICIAL
from eve_ds.export.start import DRAWN

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    """Exit code 0, or 2 for input that cannot be used and folders that cannot be written."""
    starts = {"import": import_command, "upcycle": upcycle_command}
    if len(sys.argv) > 1 and sys.argv[1] in starts:
        return start_command(sys.argv[1], starts[sys.argv[1]])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a run, or a checkpoint folder in it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--format", choices=["plain", "official"], default="plain", help="official: both of them")
    parser.add_argument("--dtype", choices=DTYPES, help=f"of {OFFICIAL} (default: fp32)")
    arguments = parser.parse_args()
    if arguments.dtype and arguments.format != "official":
        parser.error("--dtype goes with --format official")
    try:
        report = export(arguments.run, arguments.out)
        official = official_line(arguments.out, arguments.dtype or "fp32") if arguments.format == "official" else ""
    except (CheckpointError, ConfigError, ExportError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"convert: cannot write {error.filename or arguments.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    print_report(report, arguments.out)
    if official:
        print(official)
    return 0


def official_line(folder: Path, dtype: str) -> str:
    """Write the weights of an export under the released names too; a line that says so."""
    model, config, _ = load(folder)
    write_official(model.state_dict(), folder / OFFICIAL, DTYPES[dtype])
    line = f"official    {folder / OFFICIAL}, {dtype}, without the decoders"
    if config.model.profile == "official":
        return line
    return f"{line}; routed as model.profile={config.model.profile}, which the released code does otherwise"


def start_command(name: str, command: Callable[[argparse.ArgumentParser, list[str]], int]) -> int:
    """Run one of the commands that write weights to start from; what they raise becomes one line and exit code 2."""
    parser = argparse.ArgumentParser(prog=f"convert.py {name}", description=(command.__doc__ or "").split(";")[0])
    try:
        return command(parser, sys.argv[2:])
    except (CheckpointError, ConfigError, ExportError, WeightFileError) as error:
        print(f"convert: {error}", file=sys.stderr)
    except OSError as error:
        print(f"convert: {error.filename}: {error.strerror or error}", file=sys.stderr)
    return 2


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
    """Hugging Face's ViT or BEiT to an EVE whose experts start from its networks; see :mod:`eve_ds.export.upcycle`."""
    parser.add_argument("folder", type=Path, metavar="HF_FOLDER", help="config.json and weights of a ViT or BEiT")
    parser.add_argument("--noise", type=noise, default=0.01, help="of experts, relative (default: %(default)s)")
    parser.add_argument("--text_from_image", action="store_true", help="start the networks of texts from those too")
    arguments = parse_start(parser, argv)
    report = write_upcycled(
        arguments.folder,
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
    print(f"{out}: plain weights of step {report.step} ({report.checkpoint}), from {report.weights}")
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
