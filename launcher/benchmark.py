"""Measure the project's parts beside what others offer for the same work.

    python launcher/benchmark.py routing            also: moe, losses, step, objectives, calls, data, or several
    python launcher/benchmark.py routing losses --quick --json
    python launcher/benchmark.py quality --seeds 3 --jobs 2     pre-training, then fine-tuning, on scenes

Both sides run in one process, in turn: one thread and CPU time on a CPU, device events on CUDA, medians with the spread
of the quartiles, the same allocator for all. Rows are appended to kernels/bench/results.csv with device, versions,
commit and date.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch: one thread, whatever the machine has.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The repository root holds a folder `kernels`, the name of a package that transformers looks for; Python puts the
# folder of this script on the path.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "launcher")]

import argparse

from eve_ds.benchmark.quality import (
    OBJECTIVES,
    PRICES,
    TASKS,
    Budget,
    figures,
    jobs_of,
    put_into,
    run_jobs,
    table,
    write_results,
)

RESULTS = ROOT / "kernels" / "bench" / "results.csv"
NAMES = ("routing", "moe", "losses", "step", "objectives", "calls", "data")
SECONDS, QUICK_SECONDS = 8.0, 0.3
"""Of each comparison; at least three rounds are run."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", nargs="+", choices=NAMES, help="what to measure")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, with fewer repeats")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each row, and nothing else")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="CSV file that rows are added to")
    return parser


def quality(argv: list[str]) -> int:
    """What pre-training is worth for the tasks on scenes; exit code 0, or 1 where a job failed."""
    parser = argparse.ArgumentParser(prog="benchmark.py quality", description=quality.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of all runs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time: idle cores (%(default)s)")
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=OBJECTIVES | PRICES,
        metavar="SET",
        help=f"default: {' '.join(OBJECTIVES)}; with one mask otherwise: {' '.join(PRICES)}",
    )
    parser.add_argument("--tasks", nargs="*", help="vqa, nlvr, nlvr_words, retrieval, retrieval_words (default: all)")
    parser.add_argument("--curve", nargs="+", type=float, default=[], metavar="S", help="shorter pre-training too")
    parser.add_argument("--nlvr", type=Path, metavar="DIR", help="folder of NLVR 1.0: its statements too")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write every figure into this CSV file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the tables between the marks of this page")
    for name, seconds in Budget()._asdict().items():
        parser.add_argument(f"--{name}_seconds", type=float, default=seconds, metavar="S", help="(%(default)s)")
    arguments = parser.parse_args(argv)
    budget = Budget(*(getattr(arguments, f"{name}_seconds") for name in Budget._fields))
    objectives = arguments.objectives or list(OBJECTIVES)
    seeds = []
    for seed in range(arguments.seeds):
        folder = arguments.out / f"seed-{seed}"
        try:
            tasks = TASKS if arguments.tasks is None else arguments.tasks
            jobs = jobs_of(seed, folder, budget, objectives, tasks, arguments.curve, arguments.nlvr)
            run_jobs(jobs, folder, arguments.jobs)
        except RuntimeError as error:
            print(f"benchmark: {error}", file=sys.stderr)
            return 1
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


def main() -> int:
    """Exit code 0, or 2 where the results cannot be written."""
    if sys.argv[1:2] == ["quality"]:
        return quality(sys.argv[2:])
    arguments = build_parser().parse_args()
    import torch

    from eve_ds.benchmark.calls import calls
    from eve_ds.benchmark.harness import Absent, append_results, json_line
    from eve_ds.benchmark.measures import MEASURES
    from eve_ds.benchmark.objectives import objectives

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    measures = MEASURES | {"objectives": objectives, "calls": calls}
    for name in arguments.measure:
        for found in measures[name](QUICK_SECONDS if arguments.quick else SECONDS):
            if isinstance(found, Absent):
                print(f"absent: {found.peer} for {found.measure}: {found.reason}", file=sys.stderr)
                continue
            for row in found:
                print(json_line(row) if arguments.json else text_line(row), flush=True)
            try:  # as they come: a run of many minutes may be cut
                append_results(found, arguments.results)
            except OSError as error:
                print(f"benchmark: {arguments.results} cannot be written: {error.strerror}", file=sys.stderr)
                return 2
    return 0


def text_line(row) -> str:  # noqa: ANN001 - a Measure, which is imported late
    """A row for people."""
    line = (
        f"{row.measure:<32} {row.dtype:<9} {row.ours_ms:9.2f} ms (+-{row.ours_spread:4.0%})   "
        f"{row.peer:<38} {row.peer_ms:9.2f} ms (+-{row.peer_spread:4.0%})   x{row.ratio:.2f}"
    )
    if row.ours_gflop is not None:
        line += f"   {row.ours_gflop:.4g} / {row.peer_gflop:.4g} GFLOP, x{row.peer_gflop / row.ours_gflop:.2f}"
    if row.ours_calls is not None:
        line += f"   {row.ours_calls} / {row.peer_calls} calls"
    return line if row.ours_mb is None else f"{line}   {row.ours_mb:.0f} / {row.peer_mb:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
