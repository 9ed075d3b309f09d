"""Pre-training and fine-tuning share one loop: the same records, monitors, skips and progress, whatever the job."""

import gc
import json
import weakref
from pathlib import Path
from unittest import mock

import pytest
from tiny import tiny_config

from eve_ds.config import parse_config

ZERO = {"zero_optimization": {"stage": 2}}
SHORT = ["train.train_batch_size=4", "train.metrics_every=1"]


def run_both(rank, world_size, tree, folder):
    """Pre-train and fine-tune three steps each; the second loss is NaN.

    Returns the log lines of progress, whether the engine of each run still exists, and the order of parts in start-up.
    """
    import torch

    from eve_ds.model import with_losses
    from eve_ds.training import finetune, pretrain, progress_line, start

    calls, lines, engines, parts = [], [], [], []

    def initialize(*arguments, original=start.initialize_engine):
        parts.append("engine")
        engine = original(*arguments)
        engines.append(weakref.ref(engine))
        return engine

    def open_feed(*arguments, original=start.Feed):
        parts.append("data")
        return original(*arguments)

    def poisoned(terms, weights, original=with_losses.weighted_sum):
        calls.append(None)
        loss = original(terms, weights)
        return loss * torch.nan if len(calls) % 3 == 2 else loss

    monitors = {"csv_monitor": {"enabled": True, "output_path": f"{folder}/csv", "job_name": "run"}}
    common = {"max_steps": 3, "on_nonfinite": "skip", "log_every": 1, "save_every_steps": 1}
    settings = [*SHORT, *(f"train.{key}={value}" for key, value in common.items())]
    tree = {**tree, "train": {**tree["train"], **common, "output_dir": f"{folder}/finetune"}}
    with (
        mock.patch.object(with_losses, "weighted_sum", poisoned),
        mock.patch.object(start, "initialize_engine", initialize),
        mock.patch.object(start, "Feed", open_feed),
        mock.patch.object(pretrain, "trains_on_scenes", return_value=False),
        mock.patch.object(progress_line, "get_logger", return_value=mock.Mock(info=lambda *args: lines.append(args))),
    ):
        pretrain.pretrain(tiny_config(*settings, f"train.output_dir={folder}/pretrain"), ZERO | monitors, "none")
        finetune.finetune(parse_config(tree), ZERO | monitors)
    gc.collect()
    return [text for _, text, _ in lines], [engine() is not None for engine in engines], parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture
def runs(folder, run_ranks, task_tree):
    """Records of both runs by kind, their progress lines, whether their engines are left, and the order of start-up."""
    if not (folder / "found.json").exists():
        (found,) = run_ranks(run_both, 1, task_tree("vqa"), str(folder), timeout=200)
        (folder / "found.json").write_text(json.dumps(found))
    records = {}
    for job in ("pretrain", "finetune"):
        found = [json.loads(line) for line in (folder / job / "metrics.jsonl").read_text().splitlines()]
        records[job] = {kind: [r for r in found if r["kind"] == kind] for kind in ("train", "event", "save", "eval")}
    return records, *json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(("job", "terms"), [("pretrain", {"mim", "mlm"}), ("finetune", {"vqa"})])
def test_a_job_writes_losses_rates_waits_and_gradient_norm(runs, job, terms):
    train = runs[0][job]["train"]
    assert [record["step"] for record in train] == [1, 3], "a skipped step has no means"
    shared = {"loss", "load_balancing", "router_z", "lr", "grad_norm", "samples_per_second", "peak_memory_bytes"}
    shared |= {"step_seconds", "data_wait_seconds", "samples_per_second_per_worker"}
    assert all(shared | terms <= record.keys() for record in train)
    assert all(0 < record["data_wait_seconds"] < record["step_seconds"] for record in train)


@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_a_skipped_step_is_an_event_and_a_save_is_recorded(runs, job):
    (event,) = runs[0][job]["event"]
    assert (event["event"], event["step"]) == ("nonfinite", 2)
    assert "step 2: loss is not finite, the update was not applied; rank 0: loss nan, sample keys" in event["message"]
    saved = ["step-00000001", "step-00000002", "step-00000003"]
    assert [record["checkpoint"] for record in runs[0][job]["save"]] == saved


def test_only_pretraining_keeps_its_checkpoints(runs, folder):
    assert (folder / "pretrain" / "checkpoints" / "latest").exists()
    assert not (folder / "finetune" / "checkpoints").exists()
    assert (folder / "finetune" / "model" / "model.safetensors").exists()


def test_progress_lines_show_the_terms_of_the_job(runs):
    lines = runs[1]
    assert sum(" mim " in line and " mlm " in line for line in lines) == 2
    assert sum(" vqa " in line for line in lines) == 2


def test_the_memory_of_an_engine_is_freed_with_its_run(runs):
    assert runs[2] == [False, False]


def test_data_are_opened_before_the_engine_so_that_workers_start_meanwhile(runs):
    assert runs[3] == ["data", "engine"] * 2


def test_monitors_get_the_numbers_of_both_jobs(runs, folder):
    names = {path.name for path in Path(folder, "csv").rglob("*.csv")}
    assert {"train_mim.csv", "train_vqa.csv", "train_grad_norm.csv", "eval_accuracy.csv"} <= names
