"""What pre-training is worth: objectives given the same seconds, then the same fine-tunes, beside none.

Every job is a command that anybody could type, in a folder of its own; a job whose result is there is not run again.
Seconds are those of training: of the process in fine-tuning, of the clock in pre-training, so that no more jobs should
run at a time than there are idle cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

LAUNCHERS = Path(__file__).resolve().parents[2] / "launcher"
OBJECTIVES = ("msm", "itc_itm", "itc_itm_mlm")
COLOUR_AND_SHAPE = ("task.train.question_types=[color,shape]", "task.val.question_types=[color,shape]")
UNBOUND = {"color": 0.5625, "shape": 0.625}
"""Accuracy of naming the attribute of any one of two objects (:func:`eve_ds.data.scene_tasks.unbound_accuracy`)."""


class Budget(NamedTuple):
    """Seconds of training."""

    pretrain: float = 200.0
    vqa: float = 45.0
    nlvr: float = 45.0
    retrieval: float = 30.0


class Job(NamedTuple):
    """One command."""

    name: str
    """Folder under that of the seed."""
    command: list[str]
    result: str
    """File in the folder that says it is done."""
    needs: str | None = None
    """Name of the job whose model it starts from."""


def jobs_of(seed: int, folder: Path, budget: Budget, objectives: Sequence[str] = OBJECTIVES) -> list[Job]:
    """Pre-training by each objective, every task from each and from random weights, for its seconds and for both."""
    jobs = [_pretrain(objective, seed, folder, budget.pretrain) for objective in objectives]
    for task in ("vqa", "nlvr", "retrieval"):
        seconds = getattr(budget, task)
        jobs += [_finetune(task, objective, seed, folder, seconds) for objective in objectives]
        jobs.append(_finetune(task, "none", seed, folder, seconds))
        jobs.append(_finetune(task, "scratch", seed, folder, seconds + budget.pretrain))
    return jobs


def _pretrain(objective: str, seed: int, folder: Path, seconds: float) -> Job:
    settings = [f"model.objective={objective}", f"train.seed={seed}", f"train.max_seconds={seconds:g}"]
    command = [sys.executable, str(LAUNCHERS / "pretrain.py"), "--config", "eve_tiny"]
    return Job(objective, [*command, "--output_dir", str(folder / objective), "--set", *settings], "checkpoints/latest")


def _finetune(task: str, start: str, seed: int, folder: Path, seconds: float) -> Job:
    """`start` names an objective; `none` and `scratch` draw the weights."""
    name = f"{task}-{start}"
    drawn = start in ("none", "scratch")
    settings = [f"train.seed={seed}", f"train.max_seconds={seconds:g}"]
    settings += COLOUR_AND_SHAPE if task == "vqa" else ()
    command = [sys.executable, str(LAUNCHERS / "finetune.py"), "--task", task, "--model", "eve_tiny"]
    command += ["--init", "none" if drawn else str(folder / start), "--output_dir", str(folder / name)]
    return Job(name, [*command, "--set", *settings], "evaluation/metrics.json", None if drawn else start)


def run_jobs(jobs: Sequence[Job], folder: Path, at_a_time: int, say: Callable[[str], None] = print) -> None:
    """Run what has no result yet, `at_a_time` of them together, each after the one it needs.

    Raises:
        RuntimeError: a command failed; names its log. Those under way are waited for.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started: dict[str, Future[None]] = {}

    def run(job: Job) -> None:
        if job.needs is not None:
            started[job.needs].result()
        out = folder / job.name
        if (out / job.result).is_file():
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        log = folder / f"{job.name}.log"
        with log.open("w") as file:
            done = subprocess.run(job.command, env=environment, stdout=file, stderr=file, check=False)
        if done.returncode:
            raise RuntimeError(f"{job.name} ended with code {done.returncode}: see {log}")
        say(f"{out}: done")

    folder.mkdir(parents=True, exist_ok=True)
    # What is needed comes first in the list, so that whoever waits for it does not keep it from running.
    with ThreadPoolExecutor(at_a_time) as pool:
        for job in jobs:
            started[job.name] = pool.submit(run, job)
    for future in started.values():
        future.result()


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """Measure -> start -> value, of one seed, as far as there are results."""
    found: dict[str, dict[str, float]] = {}
    for file in sorted(folder.glob("*/evaluation/metrics.json")):
        task, _, start = file.parent.parent.name.partition("-")
        metrics = json.loads(file.read_text(encoding="utf-8"))
        for name, value in _figures_of(task, metrics).items():
            found.setdefault(name, {})[start] = value
    return found


def _figures_of(task: str, metrics: dict[str, Any]) -> dict[str, float]:
    if task == "retrieval":
        dot = metrics["dot"]
        return {
            "retrieval of texts, R@1": dot["text_retrieval"]["R@1"],
            "retrieval of images, R@1": dot["image_retrieval"]["R@1"],
        }
    if task == "nlvr":
        return {"statements": metrics["accuracy"]}
    kinds = {f"questions on {kind} (unbound {UNBOUND[kind]})": value for kind, value in metrics["by_type"].items()}
    unbound = statistics.mean(UNBOUND[kind] for kind in metrics["by_type"])
    return {f"questions (unbound {unbound:.3f})": metrics["accuracy"], **kinds}


def table(seeds: Sequence[dict[str, dict[str, float]]]) -> str:
    """Markdown: a row a measure, a column a start; mean over seeds and, of several, the lowest and highest."""
    starts = [
        start for start in ("none", *OBJECTIVES, "scratch") if any(start in row for s in seeds for row in s.values())
    ]
    titles = {"none": "random weights", "scratch": "random weights, all the seconds"}
    lines = [f"| | {' | '.join(titles.get(start, start) for start in starts)} |", f"|---|{'---:|' * len(starts)}"]
    for measure in dict.fromkeys(name for seed in seeds for name in seed):
        cells = []
        for start in starts:
            values = [seed[measure][start] for seed in seeds if start in seed.get(measure, {})]
            cells.append(_cell(values) if values else "")
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
