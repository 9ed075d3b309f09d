"""Check and time a machine with a GPU, in one call of at most eight minutes.

    python launcher/gpu.py --out runs/gpu                    where the packages are installed
    python launcher/gpu.py --out runs/gpu --wheels wheels    on a machine without network: see `make gpu-wheels`
    python launcher/gpu.py --out runs/gpu --dry_run          every part on the CPU, small, in about two minutes

Needs nvcc, g++, torch 2.11 or newer for CUDA, the packages of eve_ds and pytest. Every part has its own time limit,
and its rows are written as they come, so that a cut loses least. Writes OUT/rows.jsonl, OUT/<device>-<date>.json and
OUT/table.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from eve_ds.benchmark.commit import commit
from eve_ds.cli.command import (
    BAD_INPUT,
    FAILED,
    PACKAGE,
    SIGNALED,
    Parser,
    complain,
    exit_code_table,
    is_debugging,
    output,
    run_command,
)
from eve_ds.cli.command import REPOSITORY as ROOT
from eve_ds.reading import parse_json

PACKAGES = ("deepspeed", "pydantic", "webdataset", "transformers", "safetensors", "yaml", "PIL", "rich", "pytest")
FILTER = "kernel_substring=eve_ds"
"""Filter of compute-sanitizer: our kernels only. The planted error shows that it matches. `initcheck` is of no use with
it: it does not see writes of other kernels, and reports reads of their results as reads of uninitialized memory."""
LINES_OF_A_FAILURE = 40
PLANTED = """
namespace eve_ds { __global__ void planted(int* x) { x[threadIdx.x + 1024] = 1; } }
int main() {
  int* x;
  cudaMalloc(&x, 4);
  eve_ds::planted<<<1, 32>>>(x);
  return cudaDeviceSynchronize() != cudaSuccess;
}
"""
FOUND = 9
"""Exit code of compute-sanitizer when it finds an error."""
FEW = "shape1 or 70-48-501-32 or 28-7-5"
"""Tests that run under a sanitizer, which is slow."""
RUNS = ("tiny", "base")
"""Folders of the training runs."""
SCENES = ("data.sources=[{kind: scenes, level: easy}]", "data.tokenizer=scenes", "model.vocab_size=1000")


class Part(NamedTuple):
    """One command with its time limit; `expected` is its exit code where all is well."""

    name: str
    seconds: float
    command: list[str]
    environment: dict[str, str] = {}  # noqa: RUF012 - never changed
    expected: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; exit code 0, 1 if one failed or ran out of time, 2 if something is missing."""
    arguments = build_parser().parse_args(argv)
    return run_command("gpu", partial(_run, arguments, time.monotonic()), is_debugging(arguments))


def build_parser() -> Parser:
    """Parser of the command line."""
    codes = exit_code_table(0, FAILED, BAD_INPUT, *SIGNALED, failed="a part failed or ran out of time")
    parser = Parser(prog="gpu", description=__doc__, epilog=codes)
    parser.add_argument(
        "--out", type=output, default=Path("runs/gpu"), metavar="DIR", help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of the wheels that the machine lacks")
    parser.add_argument("--dry_run", action="store_true", help="run every part on the CPU, with eve_tiny")
    parser.add_argument(
        "--seconds", type=float, default=470.0, metavar="S", help="end the last part after S seconds (default: 470)"
    )
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="run these parts only")
    return parser


def _run(arguments: argparse.Namespace, started: float) -> int:
    out = arguments.out.resolve()
    with tempfile.TemporaryDirectory(prefix="eve_ds_gpu_") as site:
        if problem := _prepare(Path(site), arguments.wheels):
            return complain("gpu", problem)
        rows = _clear(out)
        if arguments.dry_run:
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        parts = dry_parts(rows, out) if arguments.dry_run else gpu_parts(rows, out)
        if unknown := sorted(set(arguments.parts or ()) - {part.name for part in parts}):
            names = ", ".join(part.name for part in parts)
            return complain("gpu", f"--parts ({', '.join(unknown)}) must be among {names}")
        chosen = [part for part in parts if not arguments.parts or part.name in arguments.parts]
        outcomes = run_parts(chosen, rows, out, started + arguments.seconds)
    print((out / "table.md").read_text(encoding="utf-8"))
    return FAILED if any(outcome != "ok" for outcome in outcomes.values()) else 0


def _prepare(site: Path, wheels: Path | None) -> str | None:
    """Put the package, and the wheels, into the folder `site` and on the path of the parts; an error, or None."""
    (site / PACKAGE.name).symlink_to(PACKAGE)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    if wheels is None:
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        way_out = "pip install -e '.[dev]' here, or collect `make gpu-wheels` elsewhere and name --wheels"
        return f"packages ({', '.join(missing)}) are missing: {way_out}" if missing else None
    files = sorted(str(file) for file in wheels.glob("*.whl"))
    if not files:
        return f"--wheels ({wheels}) holds no wheel: collect them with `make gpu-wheels`"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    if subprocess.run([*pip, "--target", str(site), *files], check=False).returncode:
        return f"the wheels of {wheels} cannot be installed: see above"
    return None


def _clear(out: Path) -> Path:
    """Create the output folder or remove an earlier result from it; the file of the rows."""
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    for run in RUNS:
        shutil.rmtree(out / run, ignore_errors=True)
    return rows


def run_parts(parts: Sequence[Part], rows: Path, out: Path, end: float) -> dict[str, str]:
    """Run parts until `end` on the monotonic clock, writing the document after each; their outcomes by name."""
    started = time.monotonic()
    outcomes: dict[str, str] = {}
    for part in parts:
        left = end - time.monotonic()
        outcomes[part.name] = run_part(part, min(part.seconds, left), out) if left > 1 else "not run: no time left"
        print(f"{time.monotonic() - started:6.1f} s  {part.name}: {outcomes[part.name]}", flush=True)
        log = log_of(part, out)
        if outcomes[part.name] != "ok" and log.is_file():  # the output is often all that is kept
            print(*log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_A_FAILURE:], sep="\n")
        write_document(rows, outcomes, out)
        if part.name == "build" and outcomes["build"] != "ok":
            break  # the parts below would time the reference ops instead
    return outcomes


def _module(rows: Path, *arguments: str) -> list[str]:
    # -P: the folder `kernels` of the repository root must not be on the path.
    return [sys.executable, "-P", "-m", "eve_ds.benchmark.gpu", *arguments, "--rows", str(rows)]


def _tests(*arguments: str) -> list[str]:
    # Without conftest.py, which makes DeepSpeed use the CPU.
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *arguments]
    return [*command, str(ROOT / "tests/kernels/test_ops_on_a_gpu.py")]


def _training(config: str, run: Path, *settings: str) -> list[str]:
    command = [sys.executable, str(ROOT / "launcher/pretrain.py"), "--config", config]
    command += ["--deepspeed_config", str(ROOT / "ds_configs/zero1_bf16.json"), "--output_dir", str(run)]
    return [*command, "--resume", "none", "--set", *settings]


def gpu_parts(rows: Path, out: Path) -> list[Part]:
    """Parts on a GPU, the most important first, since time may end."""
    planted, program = out / "planted.cu", out / "planted"
    planted.write_text(PLANTED, encoding="utf-8")
    sanitizer = ["compute-sanitizer", "--kernel-name", FILTER, "--error-exitcode", str(FOUND)]
    # The caching allocator hides whatever stays within one of its blocks.
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Part("facts", 30, _module(rows, "facts")),
        Part("build", 90, _module(rows, "build")),
        Part("tests", 60, _tests()),
        Part("step", 50, _module(rows, "step", "--batch", "256", "--profiled")),
        Part("step 512", 40, _module(rows, "step", "--batch", "512")),
        Part("routing", 40, _module(rows, "routing")),
        Part("layers", 40, _module(rows, "layers")),
        Part("train eve_tiny", 60, _training("eve_tiny", out / "tiny", "train.max_steps=200")),
        Part(
            "train eve_base",
            60,
            _training("eve_base", out / "base", *SCENES, "train.train_batch_size=128", "train.max_steps=20"),
        ),
        Part("planted error, compiled", 20, ["nvcc", "-o", str(program), str(planted)]),
        Part("planted error, found", 15, [*sanitizer, "--tool", "memcheck", str(program)], expected=FOUND),
        *(
            Part(tool, 40, [*sanitizer, "--tool", tool, *_tests("-k", FEW)], exact)
            for tool in ("memcheck", "racecheck", "synccheck")
        ),
        Part("engine", 90, _module(rows, "engine", "--batch", "64")),
        Part("images", 40, _module(rows, "images")),
        Part("step, compiled", 120, _module(rows, "step", "--batch", "256", "--compiled")),
    ]


def dry_parts(rows: Path, out: Path) -> list[Part]:
    """The same parts on a CPU with small shapes, without the sanitizers, which need a GPU."""
    tiny = ("step", "--preset", "eve_tiny", "--batch", "2")
    return [
        Part("facts", 60, _module(rows, "facts")),
        Part("build", 240, _module(rows, "build")),
        Part("tests", 60, _tests()),
        Part("step", 60, _module(rows, *tiny, "--profiled")),
        Part("routing", 60, _module(rows, "routing", "--tokens", "64")),
        Part("layers", 60, _module(rows, "layers", "--tokens", "32")),
        Part("engine", 60, _module(rows, "engine", "--preset", "eve_tiny", "--batch", "2")),
        Part("images", 60, _module(rows, "images", "--batch", "4")),
        Part(
            "train eve_tiny", 120, _training("eve_tiny", out / "tiny", "train.max_steps=2", "train.train_batch_size=8")
        ),
    ]


def log_of(part: Part, out: Path) -> Path:
    """File of the output of a part."""
    return out / f"{part.name.replace(' ', '_').replace(',', '')}.log"


def run_part(part: Part, seconds: float, out: Path) -> str:
    """Run one part with its output in OUT/<name>.log; `ok`, or the error in one line."""
    log = log_of(part, out)
    environment = {"OMP_NUM_THREADS": "4", "DS_ACCELERATOR": "cuda"} | os.environ | part.environment
    environment["EVE_DS_OPS"] = "build"
    with log.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.Popen(
                part.command, env=environment, cwd=out, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return f"{part.command[0]} cannot be run ({error.strerror})"
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its child processes, which would keep the GPU busy
            process.wait()
            return f"stopped after {seconds:.0f} s, see {log}"
    return "ok" if code == part.expected else f"exit code {code} instead of {part.expected}, see {log}"


def write_document(rows: Path, outcomes: dict[str, str], out: Path) -> None:
    """Write OUT/<device>-<date>.json and OUT/table.md from the rows so far."""
    found = _records(rows)
    found += [{"part": f"train {run.name}", **_last_training(run)} for run in map(out.joinpath, RUNS) if run.is_dir()]
    about = next((row for row in found if row["what"] == "device"), {"name": "unknown"})
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    name = f"{about['name'].lower().replace(' ', '-').removeprefix('nvidia-')}-{date}.json"
    document = {"date": date, "commit": commit(), "parts": outcomes, "rows": found}
    (out / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(found, outcomes), encoding="utf-8")


def table(rows: Sequence[dict[str, Any]], outcomes: dict[str, str]) -> str:
    """Markdown: the parts that failed, then a table with a line for each row."""
    lines = [f"- {name}: {outcome}" for name, outcome in outcomes.items() if outcome != "ok"]
    lines += [""] if lines else []
    lines += ["| part | what | figures |", "|---|---|---|"]
    for row in rows:
        if row["what"] != "kernel":
            figures = ", ".join(f"{key} {_text(value)}" for key, value in row.items() if key not in ("part", "what"))
            lines.append(f"| {row['part']} | {row['what']} | {figures} |")
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _records(file: Path) -> list[dict[str, Any]]:
    """Records of a file of JSON lines. A stopped part may leave half a line; it is removed, since the next appends."""
    content = file.read_bytes() if file.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        file.write_bytes(whole)
    return [parse_json(line) for line in whole.split(b"\n")[:-1]]


def _last_training(run: Path) -> dict[str, Any]:
    records = [record for record in _records(run / "metrics.jsonl") if record["kind"] == "train"]
    keys = ("step", "loss", "samples_per_second", "model_flops_utilization")
    return {"what": "engine", **({key: records[-1][key] for key in keys if key in records[-1]} if records else {})}
