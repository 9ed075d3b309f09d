"""Hostile results: metrics and evaluations of reports, predictions of a restart, and compiled libraries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

from eve_ds.cli.evaluate import main as evaluate
from eve_ds.cli.report import main as report
from eve_ds.ops import build
from eve_ds.report.tables import Table
from hostile.case import BIGINT, DEEP, Case, endless, pipe, sparse, write

TRAIN = b'{"kind": "train", "step": 1, "seconds": 1.0, "samples": 8, "loss": 1.0, "lr": 0.1, "peak_memory_bytes": 1}\n'
EVAL = b'{"kind": "eval", "step": 1, "seconds": 1.0, "samples": 8, "color": 7}\n'


def _metrics(content: bytes | Callable[[Path], Any], folder: Path, _: Path, config: Any = None) -> int:
    """Report of a run with this metrics.jsonl."""
    folder = folder / "run"
    folder.mkdir()
    content(folder / "metrics.jsonl") if callable(content) else write(folder / "metrics.jsonl", content)
    if config is not None:
        config(folder / "config.json") if callable(config) else write(folder / "config.json", config)
    return report([str(folder)])


def _shown(content: bytes, config: Any, folder: Path, honest: Path) -> int:
    """The same, and print the page."""
    code = _metrics(content, folder, honest, config)
    print((folder / "run/report/report.md").read_text(encoding="utf-8"))
    return code


def _evaluation(content: Any, folder: Path, _: Path) -> int:
    """Report with a result of `evaluate.py scenes --json`."""
    write(folder / "run/metrics.jsonl", TRAIN)
    content(folder / "e.json") if callable(content) else write(folder / "e.json", content)
    return report([str(folder / "run"), "--evaluation", str(folder / "e.json")])


def _restart(name: str, content: Any, folder: Path, honest: Path) -> int:
    """Restart an evaluation that was killed, after one of its files was replaced."""
    copytree(honest / "task", folder / "task")
    words = ["task", "--model", folder / "task", "--out", folder / "out", "--data", "scenes", "--limit", "4"]
    (folder / "out").mkdir()
    content(folder / "out" / name) if callable(content) else write(folder / "out" / name, content)
    return evaluate(list(map(str, words)))


def _terminal(folder: Path, _: Path) -> None:
    """Print a table of hostile text, as commands do."""
    from rich.console import Console

    rows = [("[/red] [bold]", "\x1b[2J"), ("a\nb | c", "[link=http://x]y[/link]")]
    Console(width=200).print(Table("[/] t\x1b[31m", ("[/x]", "b"), rows).to_rich())


def _terminal_of(value: str, folder: Path, _: Path) -> int:
    """Run a command with a descriptor that the demo did not set."""
    os.environ["EVE_DS_TERMINAL_FD"] = value
    return report(["x"])


def _library(change: Callable[[Path], Any], folder: Path, _: Path) -> None:
    """Build the fused ops with a folder of libraries that `change` prepared."""
    cache = folder / "cache"
    cache.mkdir(mode=0o700)
    write(cache / "canary.so", b"")
    change(cache)
    os.environ["EVE_DS_CACHE"] = str(cache)
    build.build("cpu")


def _environment(name: str, value: str, folder: Path, _: Path) -> None:
    os.environ[name] = value
    build._loaded.cache_clear()
    build._loading_problem.cache_clear()
    import torch

    build.use_built(torch.zeros(1))


STRANGE = {"loss | <b>x<b>\n$\\frac$ [l](u)": 1.0}
MARKED = json.dumps(json.loads(TRAIN) | STRANGE).encode() + b"\n"
EVENT = {"kind": "event", "step": 1, "seconds": 1, "samples": 8, "message": "a\n# b <img src=x>\u202e | c"}
LOSSES = json.dumps(json.loads(TRAIN) | {f"l{number}": 1 for number in range(9999)}).encode() + b"\n"
NO_RESULT = "the evaluation is not a result of `evaluate.py scenes`: "


def _with(old: bytes, new: bytes) -> Callable[[Path, Path], int]:
    """Report of one training record in which `old` was replaced."""
    assert old in TRAIN
    return partial(_metrics, TRAIN.replace(old, new))


CASES = {
    "deep metrics": Case(
        partial(_metrics, DEEP + b"\n"), r"metrics.jsonl:1 is not JSON: .*nested deeper than 100 levels"
    ),
    "metrics of a bigint": Case(partial(_metrics, BIGINT + b"\n"), r"metrics.jsonl:1 is not JSON: .*100,000 digits"),
    "metrics in a pipe": Case(partial(_metrics, pipe), "metrics.jsonl cannot be read: not a regular file"),
    "metrics of a terabyte": Case(
        partial(_metrics, partial(sparse, size=2**43)), "metrics.jsonl cannot be read: .*bytes, mo"
    ),
    "metrics that are not UTF-8": Case(
        partial(_metrics, TRAIN + b"\xff\n"), "metrics.jsonl cannot be read: 'utf-8' codec"
    ),
    "a step in words": Case(_with(b'"step": 1', b'"step": "x"'), "has step 'x', which is no number"),
    "a step that is not a number": Case(_with(b'"step": 1', b'"step": NaN'), "has step nan, which is"),
    "a loss in a list": Case(_with(b'"loss": 1.0', b'"loss": [1]'), r"has loss \[1\], which is no"),
    "a loss of 299 digits": Case(_with(b'"loss": 1.0', b'"loss": ' + b"9" * 299), "report.md", 0),
    "ten thousand losses": Case(partial(_metrics, LOSSES), "10,000 loss terms, more than the 100 that are shown"),
    "no loss": Case(_with(b'"loss": 1.0, ', b""), "metrics.jsonl has no loss in a training record"),
    "a deep evaluation in the metrics": Case(partial(_metrics, TRAIN + EVAL), NO_RESULT),
    "a loss of markup": Case(
        partial(_shown, MARKED, None), r"\| loss \\\| \\<b\\>x\\<b\\>\\\\n\\\$\\\\frac\\\$ \\\[l\\\]\(u\) \|", 0
    ),
    "an event of markup": Case(
        partial(_shown, TRAIN + json.dumps(EVENT).encode() + b"\n", None),
        r"- step 1: a\\\\n\\# b \\<img src=x\\>\\\\u202e \\\| c$",
        0,
    ),
    "a configuration of markup": Case(
        partial(_shown, TRAIN, {"name": "x | <b>\n## y", "train": {"seed": 1}}),
        r"\| configuration \| x \\\| \\<b\\>\\\\n\\#\\# y, seed 1 \|",
        0,
    ),
    "a deep configuration": Case(
        partial(_metrics, TRAIN, config=DEEP), "config.json is not the configuration of a run: .*deeper"
    ),
    "a configuration in a list": Case(
        partial(_metrics, TRAIN, config=[1]), "config.json is not the configuration of a run: "
    ),
    "a deep evaluation": Case(
        partial(_evaluation, DEEP), "--evaluation .* is not JSON: .*nested deeper than 100 levels"
    ),
    "an evaluation in a pipe": Case(partial(_evaluation, pipe), "--evaluation .* cannot be read: not a regular file"),
    "an evaluation without an end": Case(
        partial(_evaluation, endless), "--evaluation .* cannot be read: not a regular file"
    ),
    "an evaluation of texts": Case(partial(_evaluation, {"color": {"right": "a", "wrong": "b"}}), NO_RESULT),
    "an evaluation of a list": Case(partial(_evaluation, {"color": 1, "binding": [1]}), NO_RESULT),
    "deep predictions": Case(
        partial(_restart, "predictions.jsonl", DEEP + b"\n"),
        "line 1 of .*predictions.jsonl is no prediction .*deeper than 100",
    ),
    "predictions that are not UTF-8": Case(
        partial(_restart, "predictions.part-00000.jsonl", b"\xff\n"), "part-00000.jsonl cannot be read .'utf-8' codec"
    ),
    "predictions of another form": Case(
        partial(_restart, "predictions.jsonl", b'{"key": [1]}\n'), "is no prediction .no object with a `key`."
    ),
    "a deep identity": Case(
        partial(_restart, "evaluation.json", DEEP), "evaluation.json cannot be read .*nested deeper than"
    ),
    "an identity in a list": Case(
        partial(_restart, "evaluation.json", [1]), "evaluation.json cannot be read .a list, not an"
    ),
    "a table of escapes and markup": Case(_terminal, r"\[/red\] \[bold\] +\\x1b\[2J", 0),
    "a folder of libraries that all can write": Case(
        partial(_library, lambda cache: cache.chmod(0o777)),
        "can be written by other users .mode 777.*chmod go-w .*EVE_DS_CACHE",
    ),
    "a folder of libraries that its group can write": Case(
        partial(_library, lambda cache: cache.chmod(0o770)), "can be written by other users .mode 770"
    ),
    "a wrong mode of the ops": Case(
        partial(_environment, "EVE_DS_OPS", "no"), r"EVE_DS_OPS \(no\) must be one of auto, build"
    ),
    "a terminal that is none": Case(partial(_terminal_of, "x"), "report: x/metrics.jsonl does not exist"),
    "a terminal that is closed": Case(partial(_terminal_of, "999"), "report: x/metrics.jsonl does not exist"),
    "a folder of libraries that is a file": Case(
        partial(_environment, "EVE_DS_CACHE", "/proc/version"),
        "/proc/version cannot be written .*name another folder in EVE_DS",
    ),
}
