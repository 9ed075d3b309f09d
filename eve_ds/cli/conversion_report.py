"""Output of `convert`: tensors that were written, and their check, one fact per line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eve_ds.printable import printable

if TYPE_CHECKING:
    from eve_ds.export import ExportReport, StartReport


def print_start(report: StartReport, out: Path) -> None:
    """Print the tensors of a folder to start from and their origins, one fact per line."""
    from eve_ds.checkpoint.files import listed
    from eve_ds.export.start import DRAWN

    drawn = [name for name, origin in report.origins.items() if origin == DRAWN]
    print(printable(f"{out}: initial weights, converted from {report.source}"))
    print(f"tensors     {report.tensors}, of which {len(drawn)} drawn: {listed(drawn)}")
    print_weights(report)
    for note in report.notes:
        print(printable(f"note        {note}"))


def print_report(report: ExportReport, out: Path) -> None:
    """Print the tensors of an export and the result of its check, one fact per line."""
    print(f"{out}: plain weights of step {report.step} ({report.checkpoint}), {report.dtype} of fp32 masters")
    print(f"tensors     {report.tensors}")
    print_weights(report)
    print(printable(f"check       {check_line(report)}"))


def print_weights(report: ExportReport | StartReport) -> None:
    """Print size and hash of the weights."""
    experts = ", ".join(f"{count} in layer {layer}" for layer, count in report.experts.items()) or "none"
    print(f"parameters  {report.parameters:,}")
    print(printable(f"experts     {experts}"))
    print(f"bytes       {report.bytes:,}")
    print(f"sha256      {report.sha256}")


def check_line(report: ExportReport) -> str:
    """Result of the comparison with the engine, in words."""
    check = report.check
    if check is None:
        return "none: the checkpoint holds no recorded outputs"
    outputs = ", ".join(f"{name} {tuple(shape)}" for name, shape in check.outputs.items())
    return (
        f"max abs diff {check.max_abs_diff:.2e}, relative {check.relative:.2e} (at most {check.tolerance:.0e} in "
        f"{check.precision}) from the engine's {outputs}"
    )
