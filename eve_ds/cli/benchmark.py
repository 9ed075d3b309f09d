"""Measure the project's parts beside other libraries that do the same work.

    python launcher/benchmark.py routing            also: moe, losses, step, objectives, calls, data, overlap
    python launcher/benchmark.py routing losses --quick --json
    python launcher/benchmark.py quality --seeds 3 --jobs 2     pre-training, then fine-tuning, on scenes

Both sides run in one process, in turn: one thread and CPU time on a CPU, device events on CUDA, medians with the spread
of the quartiles, the same allocator for all. Rows are appended to kernels/bench/results.csv with device, versions,
commit and date. Options of quality: `benchmark.py quality --help`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eve_ds.cli.command import (
    BAD_INPUT,
    FAILED,
    REPOSITORY,
    SIGNALED,
    Parser,
    complain,
    exit_code_table,
    is_debugging,
    output,
    positive,
    run_command,
)

if TYPE_CHECKING:
    from eve_ds.benchmark.harness import Measure

RESULTS = REPOSITORY / "kernels" / "bench" / "results.csv"
NAMES = ("routing", "moe", "losses", "step", "objectives", "calls", "data", "overlap")
SECONDS, QUICK_SECONDS = 8.0, 0.3
"""Seconds of each comparison; at least three rounds are run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; exit code 0, 1 if a job of `quality` failed, or 2 for bad input and results that cannot be written."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["quality"]:
        arguments = build_quality_parser().parse_args(given[1:])
        return run_command("benchmark", partial(measure_quality, arguments), is_debugging(arguments))
    arguments = build_parser().parse_args(given)
    return run_command("benchmark", partial(measure, arguments), is_debugging(arguments))


def build_parser() -> Parser:
    """Parser of the command line, without `quality`."""
    parser = Parser(prog="benchmark", description=__doc__, epilog=exit_code_table(0, BAD_INPUT, *SIGNALED))
    parser.add_argument("measure", nargs="+", choices=NAMES, help="parts to measure")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, with fewer repeats")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each row, and nothing else")
    parser.add_argument(
        "--results", type=output, default=RESULTS, metavar="FILE", help="CSV file that rows are added to"
    )
    return parser


def build_quality_parser() -> Parser:
    """Parser of `benchmark.py quality`."""
    from eve_ds.benchmark.quality import OBJECTIVES, PRICES, TASKS, Budget

    parser = Parser(
        prog="benchmark quality",
        description="Measure how much pre-training improves the tasks on scenes.",
        epilog=exit_code_table(0, FAILED, BAD_INPUT, *SIGNALED, failed="a job failed"),
    )
    parser.add_argument(
        "--out",
        type=output,
        default=Path("runs/quality"),
        metavar="DIR",
        help="folder of all runs (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="number of seeds (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="commands at a time, at most the idle cores (default: 1)"
    )
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=OBJECTIVES | PRICES,
        metavar="SET",
        help=f"sets of objectives (default: {' '.join(OBJECTIVES)}; with one mask changed: {' '.join(PRICES)})",
    )
    parser.add_argument(
        "--tasks", nargs="*", choices=TASKS, metavar="TASK", help=f"tasks of {', '.join(TASKS)} (default: all)"
    )
    parser.add_argument(
        "--curve", nargs="+", type=float, default=[], metavar="S", help="add shorter pre-training of S seconds"
    )
    parser.add_argument("--nlvr", type=Path, metavar="DIR", help="folder of NLVR 1.0: add its statements as a task")
    parser.add_argument("--results", type=output, metavar="FILE", help="write every result into this CSV file")
    parser.add_argument("--page", type=output, metavar="FILE", help="put the tables between the marks of this page")
    for name, seconds in Budget()._asdict().items():
        parser.add_argument(
            f"--{name}_seconds",
            type=float,
            default=seconds,
            metavar="S",
            help=f"seconds of {name} (default: {seconds:g})",
        )
    return parser


def measure_quality(arguments: argparse.Namespace) -> int:
    """Run the jobs of every seed and print the tables; exit code 0, or 1 where a job failed."""
    from eve_ds.benchmark.quality import (
        OBJECTIVES,
        TASKS,
        Budget,
        around_marks,
        figures,
        jobs_of,
        put_into,
        run_jobs,
        table,
        write_results,
    )

    budget = Budget(*(getattr(arguments, f"{name}_seconds") for name in Budget._fields))
    objectives = arguments.objectives or list(OBJECTIVES)
    tasks = TASKS if arguments.tasks is None else arguments.tasks
    if arguments.page is not None:
        around_marks(arguments.page)  # refuses a page without marks before hours of jobs
    seeds = []
    for seed in range(arguments.seeds):
        folder = arguments.out / f"seed-{seed}"
        try:
            jobs = jobs_of(seed, folder, budget, objectives, tasks, arguments.curve, arguments.nlvr)
            run_jobs(jobs, folder, arguments.jobs)
        except RuntimeError as error:
            return complain("benchmark", str(error), FAILED)
        seeds.append(figures(folder))
    text = table(seeds)
    (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    if arguments.results is not None:
        from eve_ds.benchmark.harness import provenance

        write_results(seeds, arguments.results, provenance())
    if arguments.page is not None:
        put_into(arguments.page, text)
    print(text)
    return 0


def measure(arguments: argparse.Namespace) -> int:
    """Run the measures and print and append a row for each comparison."""
    # Before torch: one thread, whatever the machine has.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from eve_ds.benchmark.calls import calls
    from eve_ds.benchmark.harness import Absent, Figures, append_results, json_line
    from eve_ds.benchmark.measures import MEASURES
    from eve_ds.benchmark.objectives import objectives
    from eve_ds.benchmark.overlap import overlap

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    measures = MEASURES | {"objectives": objectives, "calls": calls, "overlap": overlap}
    for name in arguments.measure:
        for found in measures[name](QUICK_SECONDS if arguments.quick else SECONDS):
            if isinstance(found, Absent):
                print(f"absent: {found.peer} for {found.measure}: {found.reason}", file=sys.stderr)
                continue
            if isinstance(found, Figures):
                print(found.json_line() if arguments.json else found.text_line(), flush=True)
                continue
            for row in found:
                print(json_line(row) if arguments.json else text_line(row), flush=True)
            append_results(found, arguments.results)  # at once: a run of many minutes may be cut
    return 0


def text_line(row: Measure) -> str:
    """A row as one line of text."""
    line = (
        f"{row.measure:<32} {row.dtype:<9} {row.ours_ms:9.2f} ms (+-{row.ours_spread:4.0%})   "
        f"{row.peer:<38} {row.peer_ms:9.2f} ms (+-{row.peer_spread:4.0%})   x{row.ratio:.2f}"
    )
    if row.ours_gflop is not None and row.peer_gflop is not None:
        line += f"   {row.ours_gflop:.4g} / {row.peer_gflop:.4g} GFLOP, x{row.peer_gflop / row.ours_gflop:.2f}"
    if row.ours_calls is not None:
        line += f"   {row.ours_calls} / {row.peer_calls} calls"
    return line if row.ours_mb is None else f"{line}   {row.ours_mb:.0f} / {row.peer_mb:.0f} MB"
