"""Turn a run, or one of its checkpoints, into plain weights: model.safetensors, config.json and the tokenizer.

    python launcher/convert.py runs/demo --out exports/demo
    python launcher/convert.py runs/demo/checkpoints/step-00000500 --out exports/demo-500

Needs neither DeepSpeed nor a process group. `eve_ds.export.load("exports/demo")` gives model, config and tokenizer.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository root holds a folder `kernels`, the name of a package that transformers looks for; multi-node
# `deepspeed` puts the root on the path, and Python puts the folder of this script there.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "launcher")]

import argparse

from eve_ds.config import ConfigError
from eve_ds.export import CheckpointError, ExportError, ExportReport, export


def main() -> int:
    """Exit code 0, or 2 for input that cannot be used and folders that cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a run, or a checkpoint folder in it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    arguments = parser.parse_args()
    try:
        report = export(arguments.run, arguments.out)
    except (CheckpointError, ConfigError, ExportError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"convert: cannot write {error.filename or arguments.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    print_report(report, arguments.out)
    return 0


def print_report(report: ExportReport, out: Path) -> None:
    """What was written and how it was checked, one fact per line."""
    experts = ", ".join(f"{count} in layer {layer}" for layer, count in report.experts.items()) or "none"
    print(f"{out}: plain weights of step {report.step} ({report.checkpoint}), fp32 masters")
    print(f"tensors     {report.tensors}")
    print(f"parameters  {report.parameters:,}")
    print(f"experts     {experts}")
    print(f"bytes       {report.bytes:,}")
    print(f"sha256      {report.sha256}")
    print(f"check       {check_line(report)}")


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
