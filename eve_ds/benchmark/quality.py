"""Compare the quality of pre-training objectives with equal time budgets, followed by the same fine-tuning.

Random weights are the baseline. Every job is a command line of a launcher with its own output folder; a job with a
result is not repeated. Budgets are seconds of training: CPU time of training and loading on CPUs, wall time on a GPU.
Therefore at most as many jobs as idle cores should run at the same time.
"""

from __future__ import annotations

import csv
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from eve_ds.config import ConfigError
from eve_ds.data.synthetic.questions import unbound_accuracy
from eve_ds.data.synthetic.scenes import WORD_CLASSES
from eve_ds.reading import parse_json, read_json, read_lines
from eve_ds.report.records import with_current_names

LAUNCHERS = Path(__file__).resolve().parents[2] / "launcher"
AS_WRITTEN = (
    *("masking.max_text_mask_ratio=null", "masking.predicted_patch_share=1", "masking.text_to_image_share=0"),
    *("masking.image_view_share=1", "masking.language_view_patch_share=1", "loss.mlm_weight=1"),
)
"""Settings of the paper where eve_tiny uses cheaper ones."""
JOINT = (
    *("masking.predicted_patch_share=0.5", "masking.text_to_image_share=0.25", "optimizer.warmup_steps=100"),
    *("optimizer.lr=2e-3", "model.pixel_target=normalized"),
)
"""Settings tuned for `joint`, where those of eve_tiny are tuned for two views."""
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "mim+mlm": (),
    "mim+mlm.as_written": AS_WRITTEN,
    "mim+mlm.normalized": ("model.pixel_target=normalized",),
    "joint": JOINT,
    "itc+itm": (),
    "mlm+itc+itm": (),
}
"""Pre-training runs: objectives, with a variant after a dot -> overrides of eve_tiny."""
PRICES: dict[str, tuple[str, ...]] = {
    f"mim+mlm.{setting}": (f"masking.{setting}",)
    for setting in (
        *("language_view_patch_share=1", "predicted_patch_share=1", "image_view_share=1"),
        "image_view_word_share=0.5",
    )
}
"""Pre-training runs with one mask setting of the paper instead of eve_tiny's cheaper one, and one run with a mask that
is even cheaper."""
ANOTHER = ", wrong image"
"""Suffix of a measure for which the model received the image of another scene."""
TASKS = ("vqa", "nlvr", "nlvr_words", "retrieval", "retrieval_words")
"""Fine-tuning tasks by the names of their recipes; `words` means masked words (:mod:`eve_ds.tasks.features.words`)."""
ZERO_SHOT = "zero_shot"
NLVR, BLIND = "nlvr_real", "blind"
"""NLVR 1.0: trained on split `hidden`, evaluated on sentences of `dev` that are not in it; `blind` sees gray images."""
RERANK = 8
"""Number of candidates to rerank in retrieval without fine-tuning."""
MARKS = ("<!-- quality -->", "<!-- end of quality -->")
"""Marks before and after the tables in a page."""
RESULT_COLUMNS = ("seed", "start", "measure", "value")
PRETRAINED = "checkpoints/latest"
"""File that marks a completed pre-training run."""
RESULT = "evaluation/*/metrics.json"
"""Result of fine-tuning and of zero-shot retrieval."""
COLOR_AND_SHAPE = ("task.train.question_types=[color,shape]", "task.val.question_types=[color,shape]")


class Budget(NamedTuple):
    """Time budgets, in seconds of training."""

    pretrain: float = 200.0
    vqa: float = 45.0
    nlvr: float = 45.0
    retrieval: float = 30.0
    nlvr_real: float = 90.0

    def of(self, task: str) -> float:
        """Return the seconds of one of :data:`TASKS`, equal for class tokens and words."""
        seconds: float = getattr(self, task.partition("_")[0])
        return seconds


class Job(NamedTuple):
    """One command line."""

    name: str
    """Name of the output folder in the folder of the seed."""
    command: list[str]
    result: str
    """Pattern of the file in the output folder that marks completion."""
    needs: str | None = None
    """Name of the job that produces the initial model; None: no such job."""


def jobs_of(
    seed: int,
    folder: Path,
    budget: Budget,
    objectives: Sequence[str] = tuple(OBJECTIVES),
    tasks: Sequence[str] = TASKS,
    curve: Sequence[float] = (),
    nlvr: Path | None = None,
) -> list[Job]:
    """Return the jobs of one seed, each after the job that it needs.

    Every pre-training run is followed by every task. Every task also starts from random weights, once with its own
    budget (`none`) and once with the budget of pre-training added (`scratch`).

    Args:
        seed: seed of all runs.
        folder: folder of the seed.
        budget: time budgets.
        objectives: keys of OBJECTIVES or PRICES to pre-train with.
        tasks: members of :data:`TASKS`.
        curve: shorter budgets of pre-training, in seconds; each is a separate run, followed by `vqa` and zero-shot
            retrieval.
        nlvr: folder of NLVR 1.0, which adds its statements as a task; None: no such task.
    """
    lengths = [(f"{objective}@{seconds:g}", seconds) for seconds in curve for objective in objectives]
    starts = [(objective, budget.pretrain) for objective in objectives] + lengths
    jobs = [_pretrain(start, seed, folder, seconds) for start, seconds in starts]
    for task in tasks:
        seconds = budget.of(task)
        known = starts if task == "vqa" else starts[: len(objectives)]
        jobs += [_finetune(task, start, seed, folder, seconds) for start, _ in known]
        jobs.append(_finetune(task, "none", seed, folder, seconds))
        if not task.endswith("_words"):
            jobs.append(_finetune(task, "scratch", seed, folder, seconds + budget.pretrain))
    if nlvr is not None:
        needs = {objective: objective for objective in objectives} | {"none": None, BLIND: objectives[0]}
        jobs += [_nlvr(start, seed, folder, nlvr, budget.nlvr_real, needs[start]) for start in needs]
    return jobs + [_zero_shot(start, folder) for start, _ in starts]


def _pretrain(start: str, seed: int, folder: Path, seconds: float) -> Job:
    name = start.partition("@")[0]
    tasks = name.partition(".")[0].replace("+", ",")
    settings = [
        f"model.objectives=[{tasks}]",
        *(OBJECTIVES | PRICES)[name],
        f"train.seed={seed}",
        f"train.max_seconds={seconds:g}",
    ]
    # The schedule ends with the time budget, for fast and slow objectives.
    settings += ["train.max_steps=1000000", "optimizer.decay_by=seconds"]
    command = [sys.executable, str(LAUNCHERS / "pretrain.py"), "--config", "eve_tiny"]
    return Job(start, [*command, "--output_dir", str(folder / start), "--set", *settings], PRETRAINED)


def _finetune(task: str, start: str, seed: int, folder: Path, seconds: float) -> Job:
    """Return a fine-tuning job; `start` is a pre-training run, or `none` or `scratch` for random weights."""
    name = f"{task}-{start}"
    drawn = start in ("none", "scratch")
    settings = [f"train.seed={seed}", f"train.max_seconds={seconds:g}"]
    settings += COLOR_AND_SHAPE if task == "vqa" else ()
    command = [sys.executable, str(LAUNCHERS / "finetune.py"), "--task", task.partition("_")[0]]
    command += ["--config", f"tasks/scenes_{task}", "--model", "eve_tiny"]
    command += ["--init", "none" if drawn else str(folder / start), "--output_dir", str(folder / name)]
    return Job(name, [*command, "--set", *settings], RESULT, None if drawn else start)


def _nlvr(start: str, seed: int, folder: Path, data: Path, seconds: float, needs: str | None) -> Job:
    command = [sys.executable, str(LAUNCHERS / "finetune.py"), "--task", "nlvr", "--config", "tasks/nlvr_minutes"]
    command += ["--model", "eve_tiny", "--data", str(data), "--init", str(folder / needs) if needs else "none"]
    settings = [f"train.seed={seed}", f"train.max_seconds={seconds:g}", f"task.blind={start == BLIND}"]
    settings += ["task.train.split=hidden", "task.val.split=dev", "task.val.unseen_texts=true"]
    name = f"{NLVR}-{start}"
    return Job(name, [*command, "--output_dir", str(folder / name), "--set", *settings], RESULT, needs)


def _zero_shot(start: str, folder: Path) -> Job:
    name = f"{ZERO_SHOT}-{start}"
    command = [sys.executable, str(LAUNCHERS / "evaluate.py"), "zero_shot", "--model", str(folder / start)]
    command += ["--out", str(folder / name / "evaluation" / "end"), "--rerank", "0" if "@" in start else str(RERANK)]
    return Job(name, command, RESULT, start)


def run_jobs(jobs: Sequence[Job], folder: Path, at_a_time: int, say: Callable[[str], None] = print) -> None:
    """Run the jobs without a result, `at_a_time` in parallel, each after the job that it needs.

    Args:
        jobs: jobs in an order such that each follows the job that it needs.
        folder: folder of the seed.
        at_a_time: number of parallel jobs.
        say: called with a line for each completed job.

    Raises:
        RuntimeError: a command failed; the message names its log. Running jobs are completed first.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started: dict[str, Future[None]] = {}

    def run(job: Job) -> None:
        if job.needs is not None:
            started[job.needs].result()
        out = folder / job.name
        if any(out.glob(job.result)):
            return
        shutil.rmtree(out, ignore_errors=True)  # left by a killed run
        log = folder / f"{job.name}.log"
        with log.open("w") as file:
            done = subprocess.run(job.command, env=environment, stdout=file, stderr=file, check=False)
        if done.returncode:
            raise RuntimeError(f"{job.name} ended with code {done.returncode}: see {log}")
        say(f"{out}: done")

    folder.mkdir(parents=True, exist_ok=True)
    # A needed job precedes the jobs that need it, so waiting jobs cannot keep it from running.
    with ThreadPoolExecutor(at_a_time) as pool:
        for job in jobs:
            started[job.name] = pool.submit(run, job)
    for future in started.values():
        future.result()


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """Return the available results of one seed: measure -> start -> value."""
    found: dict[str, dict[str, float]] = {}
    for file in sorted(folder.glob(f"*/{PRETRAINED}")):  # others are incomplete, or fine-tuning runs
        run = file.parents[1]
        for name, value in _figures_of_pretraining(run / "metrics.jsonl").items():
            found.setdefault(name, {})[run.name] = value
    for file in sorted(folder.glob(f"*/{RESULT}")):
        task, _, start = file.parents[2].name.partition("-")
        metrics = read_json(file)
        for name, value in _figures_of(task, metrics).items():
            found.setdefault(name, {})[start] = value
    return found


def _figures_of_pretraining(metrics: Path) -> dict[str, float]:
    """Return pairs seen, accuracies of masked words, and the reduction of the pixel error by the caption."""
    records = [with_current_names(parse_json(line)) for line in read_lines(metrics)[:-1]]
    found = {"pairs seen in pre-training": records[-1]["samples"]}
    evaluations = [record for record in records if record.get("kind") == "eval"]
    if not evaluations:
        return found
    last = evaluations[-1]
    asked = {f"words of {kind}": last[kind] for kind in WORD_CLASSES}
    asked["all words of fully masked captions"] = last["hidden_words"]
    asked |= {f"words of {kind}, a quarter of the patches": last["masked_image"][kind] for kind in WORD_CLASSES}
    for name, answers in asked.items():
        found |= {name: round(answers["right"], 4), name + ANOTHER: round(answers["wrong"], 4)}
    error = last["pixel_loss"]
    found["masked object pixels: error lower with the right caption by"] = round(1 - error["right"] / error["wrong"], 4)
    return found


def _figures_of(task: str, metrics: dict[str, Any]) -> dict[str, float]:
    if task == NLVR:
        return {"NLVR, unseen sentences (majority 0.553)": metrics["accuracy"]}
    if task.startswith("nlvr"):
        return {"statements by words" if task == "nlvr_words" else "statements": metrics["accuracy"]}
    if task == "vqa":
        by_type = metrics["by_type"]
        unbound = {kind: unbound_accuracy("easy", kind) for kind in by_type}
        kinds = {f"questions on {kind} (unbound {unbound[kind]})": value for kind, value in by_type.items()}
        return {f"questions (unbound {statistics.mean(unbound.values()):.3f})": metrics["accuracy"], **kinds}
    titles = {"retrieval": "retrieval", "retrieval_words": "retrieval by words", ZERO_SHOT: "zero-shot retrieval"}
    title = titles[task]
    orders = {"dot": "", "reranked": f", best {RERANK} rescored"}
    return {
        f"{title} of {kind}s, R@1{how}": metrics[order][f"{kind}_retrieval"]["R@1"]
        for order, how in orders.items()
        if order in metrics
        for kind in ("text", "image")
    }


def table(seeds: Sequence[dict[str, dict[str, float]]]) -> str:
    """Return Markdown tables of the results of all seeds.

    The first table has a row per measure and a column per start. A cell is the mean over seeds, with the range if there
    are several. If a measure was also taken with the image of another scene, its mean follows after a slash. Further
    tables, if measured, have the same rows for :data:`PRICES`, and a row per budget for shorter pre-training.
    """
    measures = [name for name in dict.fromkeys(key for seed in seeds for key in seed) if not name.endswith(ANOTHER)]
    found = {start for seed in seeds for row in seed.values() for start in row}
    starts = [start for start in ("none", *OBJECTIVES, "scratch", BLIND) if start in found]
    titles = {"none": "random weights", "scratch": "random weights, full time", BLIND: "text alone"}
    lines = _by_measure(seeds, measures, {start: titles.get(start, start) for start in starts})
    prices = {start: start.partition(".")[2] for start in PRICES if start in found}
    if prices:
        rows = [name for name in measures if any(start in seed.get(name, {}) for seed in seeds for start in prices)]
        lines += ["", *_by_measure(seeds, rows, {"mim+mlm": "mim+mlm"} | prices)]
    shorter = {start for start in found if "@" in start}
    if shorter:
        by_budget = sorted(shorter, key=lambda start: (float(start.partition("@")[2]), start))
        rows = [name for name in measures if any(start in s.get(name, {}) for s in seeds for start in shorter)]
        lines += ["", f"| pre-training for | {' | '.join(rows)} |", f"|---|{'---:|' * len(rows)}"]
        for start in by_budget:
            objective, _, seconds = start.partition("@")
            cells = " | ".join(_over_seeds(seeds, measure, start) for measure in rows)
            lines.append(f"| {objective}, {seconds} s | {cells} |")
    return "\n".join(lines)


def _by_measure(
    seeds: Sequence[dict[str, dict[str, float]]], measures: Sequence[str], titles: dict[str, str]
) -> list[str]:
    lines = [f"| | {' | '.join(titles.values())} |", f"|---|{'---:|' * len(titles)}"]
    for measure in measures:
        lines.append(f"| {measure} | {' | '.join(_over_seeds(seeds, measure, start) for start in titles)} |")
    return lines


def write_results(seeds: Sequence[dict[str, dict[str, float]]], file: Path, about: dict[str, str]) -> None:
    """Replace a CSV file by one row for every seed, start and measure.

    Args:
        seeds: results of :func:`figures` for each seed.
        file: CSV file.
        about: provenance columns of new and changed rows; rows whose value is unchanged keep their provenance.
    """
    known: dict[tuple[str, ...], dict[str, str]] = {}
    if file.exists():
        with file.open(newline="", encoding="utf-8") as stream:
            known = {tuple(row[column] for column in RESULT_COLUMNS): row for row in csv.DictReader(stream)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*RESULT_COLUMNS, *about], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for number, seed in enumerate(seeds):
            for measure, values in seed.items():
                for start, value in values.items():
                    cells = (str(number), start, measure, str(value))
                    row = dict(zip(RESULT_COLUMNS, cells, strict=True))
                    writer.writerow(row | about | known.get(cells, {}))


def put_into(page: Path, text: str) -> None:
    """Replace the text between the two marks of a page; raises ConfigError where a mark is missing."""
    before, after = around_marks(page)
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def around_marks(page: Path) -> tuple[str, str]:
    """Text of a page before the first mark and after the second.

    Raises:
        ConfigError: a mark is missing.
    """
    before, opening, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, closing, after = rest.partition(MARKS[1])
    if not opening or not closing:
        raise ConfigError(f"--page {page} lacks the marks {MARKS[0]} and {MARKS[1]}: put them where the tables go")
    return before, after


def _over_seeds(seeds: Sequence[dict[str, dict[str, float]]], measure: str, start: str) -> str:
    def found(name: str) -> list[float]:
        return [seed[name][start] for seed in seeds if start in seed.get(name, {})]

    values, beside_another = found(measure), found(measure + ANOTHER)
    if not values:
        return ""
    return _cell(values) + (f" / {statistics.mean(beside_another):.3f}" if beside_another else "")


def _cell(values: Sequence[float]) -> str:
    if isinstance(values[0], int):
        return " to ".join(f"{number:,}" for number in sorted({min(values), max(values)}))
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
