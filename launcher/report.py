"""Report of a run, finished or not: `python launcher/report.py runs/tiny --model exports/tiny`.

Writes report.md with tables, loss curves and, with an export of the run, a grid of masked and reconstructed images with
the words that the model guessed, and the use of its experts by modality. Needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository root holds a folder `kernels`, the name of a package that transformers looks for; multi-node
# `deepspeed` puts the root on the path, and Python puts the folder of this script there.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "launcher")]

import argparse
import json
from typing import Any

from eve_ds.config import ConfigError
from eve_ds.distributed import get_logger
from eve_ds.export import ExportError, load
from eve_ds.report.records import ReportError, with_current_names
from eve_ds.report.run_report import Exported, write_report


def main() -> int:
    """Exit code 0, or 2 for input that cannot be used and folders that cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--model", type=Path, metavar="DIR", help="export of that run, for the pictures that need it")
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="what `evaluate.py scenes --json FILE` wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: RUN/report)")
    arguments = parser.parse_args()
    get_logger()  # shows what reading the configuration has to say
    out = arguments.out or arguments.run / "report"
    try:
        evaluation = None if arguments.evaluation is None else read_json(arguments.evaluation)
        exported = None if arguments.model is None else Exported(*load(arguments.model))
        written = write_report(arguments.run, out, exported, evaluation)
    except (ConfigError, ExportError, ReportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report: cannot write {error.filename or out}: {error.strerror}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


def read_json(path: Path) -> dict[str, Any]:
    """The result of an evaluation; raises :class:`ReportError` if it is not one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"--evaluation {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"--evaluation {path} is not JSON: {error}") from None
    result = with_current_names(result) if isinstance(result, dict) else {}
    if not {"pixel_loss", "color"} & result.keys():
        raise ReportError(
            f"--evaluation {path} is not what `evaluate.py scenes --json` writes: it has neither color nor pixel_loss"
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
