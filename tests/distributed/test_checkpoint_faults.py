"""Failed saves, saves in the background, damaged checkpoints and signals, in runs on two ranks that are not killed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from tiny import overrides

from eve_ds.config import ConfigError, load_config

SMALL = [
    *overrides(),
    "parallel.ep_size=2",
    "train.train_batch_size=8",
    "train.metrics_every=1",
    "train.save_every_steps=2",
    "train.max_seconds=null",
    "optimizer.decay_by=steps",
]
ZERO = {"zero_optimization": {"stage": 1}}
LIMIT = 200
pytestmark = pytest.mark.timeout(LIMIT + 60)


def config_of(folder, *settings):
    return load_config("eve_tiny", [*SMALL, f"train.output_dir={folder}", *settings])


def pretrain(config, at=None, resume="auto"):
    """Train; `at` maps a step to an action of this rank before that step. Returns (summary or error, log)."""
    from eve_ds.log import get_logger
    from eve_ds.storage import SaveError
    from eve_ds.training import pretrain as pretraining
    from eve_ds.training import start
    from eve_ds.training.trainer import Trainer

    class Watched(Trainer):
        def _train_step(self):
            action = (at or {}).get(self.step + 1)
            if action is not None:
                action(self)
            return super()._train_step()

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    get_logger().addHandler(handler)
    try:
        with (
            mock.patch.object(start, "Trainer", Watched),
            mock.patch.object(pretraining, "trains_on_scenes", return_value=False),
        ):
            result = pretraining.pretrain(config, ZERO, resume)
    except (SaveError, ConfigError) as error:
        result = error
    finally:
        get_logger().removeHandler(handler)
    return result, lines


def start():
    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    initialize_deepspeed_distributed()


def folders(run):
    root = Path(run) / "checkpoints"
    return sorted(path.name for path in root.iterdir()) if root.is_dir() else []


def losses(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {item["step"]: item["loss"] for item in lines if item["kind"] == "train"}


# --- background saves -------------------------------------------------------------------------------------------------


def background(rank, world_size, folder):
    start()
    sync, summary = config_of(f"{folder}/sync", "train.max_steps=8"), None
    pretrain(sync)
    config = config_of(f"{folder}/async", "train.max_steps=8", "train.async_save=true", "train.keep_last=2")
    summary, lines = pretrain(config)
    return summary.checkpoint.name, [line for line in lines if "saved" in line]


def test_background_save_holds_the_state_of_its_step(run_ranks, tmp_path):
    from eve_ds.checkpoint.files import PieceReader
    from eve_ds.checkpoint.manifest import committed, problems

    results = run_ranks(background, 2, str(tmp_path), timeout=LIMIT)
    assert results[0][0] == results[1][0] == "step-00000008"
    assert losses(tmp_path / "sync") == losses(tmp_path / "async")
    assert [path.name for path in committed(tmp_path / "sync")] == [f"step-0000000{n}" for n in (8, 6, 4, 2)]
    assert [path.name for path in committed(tmp_path / "async")] == ["step-00000008", "step-00000006"]
    for name in ("step-00000006", "step-00000008"):
        one, other = (tmp_path / kind / "checkpoints" / name for kind in ("sync", "async"))
        assert problems(one) == problems(other) == []
        left, right = PieceReader(one), PieceReader(other)
        assert left.names("exp_avg") == right.names("exp_avg")
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            for tensor in left.names(kind):
                assert left.read(kind, tensor).equal(right.read(kind, tensor)), (name, kind, tensor)
    events = [json.loads(line) for line in (tmp_path / "async" / "metrics.jsonl").read_text().splitlines()]
    saved = [event for event in events if event["kind"] == "save"]
    assert [event["checkpoint"] for event in saved] == [f"step-0000000{n}" for n in (2, 4, 6, 8)]
    assert all(0 < event["stall_seconds"] < 5 and event["bytes"] > 1e5 for event in saved)


# --- failed writes ----------------------------------------------------------------------------------------------------


def await_writer(trainer):
    """Wait for the background writer, so that the next action does not affect it."""
    if trainer.saves.saver.pending is not None:
        trainer.saves.saver.pending.thread.join()


def limit_files(size):
    def action(trainer):
        if trainer is not None:
            await_writer(trainer)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return action


def file_limits(rank, world_size, folder):
    """Rank 1 cannot write large files from step 3 to 6; later it cannot for the rest of the run."""
    start()
    few = limit_files(20_000) if rank == 1 else None
    back = limit_files(resource.RLIM_INFINITY)
    found = []
    for mode in ("false", "true"):
        config = config_of(f"{folder}/{mode}", "train.max_steps=8", f"train.async_save={mode}")
        result, lines = pretrain(config, {3: few, 7: back})
        found.append((str(result), [line for line in lines if "not saved" in line], folders(config.train.output_dir)))
    config = config_of(f"{folder}/ends", "train.max_steps=20", "train.max_failed_saves=1")
    result, _ = pretrain(config, {3: few, 19: back})
    back(None)
    found.append((type(result).__name__, str(result), folders(config.train.output_dir)))
    config = config_of(f"{folder}/last", "train.max_steps=4")
    result, _ = pretrain(config, {3: few})
    back(None)
    found.append((type(result).__name__, str(result), folders(config.train.output_dir)))
    result, _ = pretrain(config)
    found.append((str(result.steps), "", folders(config.train.output_dir)))
    config = config_of(f"{folder}/apart", "train.max_steps=10", "train.max_failed_saves=1")
    result, _ = pretrain(config, {3: few, 5: back, 7: few, 9: back})
    found.append((str(result.steps), "", folders(config.train.output_dir)))
    return found


def test_failed_saves_do_not_affect_training(run_ranks, tmp_path):
    results = run_ranks(file_limits, 2, str(tmp_path), timeout=LIMIT)
    for result in results:
        for _, _, left in result[:2]:
            assert left == ["latest", "step-00000002", "step-00000008"]
        kind, text, left = result[2]
        assert (kind, left) == ("SaveError", ["latest", "step-00000002"])
        assert "the checkpoint of step 6 was not saved (rank 1: File too large)" in text
        assert "Failures in a row: 2, limit train.max_failed_saves (1). Free space or change permissions of " in text
        kind, text, left = result[3]
        assert (kind, left) == ("SaveError", ["latest", "step-00000002"])
        assert "the run ends at step 4 without a checkpoint of it" in text
        assert result[4] == ("4", "", ["latest", "step-00000002", "step-00000004"])
        assert result[5] == ("10", "", ["latest", "step-00000002", "step-00000006", "step-00000010"]), "in a row"
    for _, warnings, _ in results[0][:2]:
        assert [line.split("(")[0] for line in warnings] == [
            f"the checkpoint of step {step} was not saved " for step in (4, 6)
        ]
        assert "older checkpoints are unchanged. Failures in a row: 2, limit " in warnings[1]


def lost_files(rank, world_size, folder):
    """Rank 1 writes where rank 0 does not see the files, then fails with an unforeseen error."""
    start()
    from eve_ds.checkpoint import saving

    write = saving.write_pieces

    def elsewhere(path, pieces):
        record = write(path, pieces)
        path.unlink()
        return record

    def fail(path, pieces):
        raise RuntimeError("out of ideas")

    def use(function):
        def action(trainer):
            await_writer(trainer)
            saving.write_pieces = function

        return action

    found = []
    for function, mode in ((elsewhere, "false"), (fail, "true")):
        config = config_of(f"{folder}/{function.__name__}", "train.max_steps=8", f"train.async_save={mode}")
        actions = {3: use(function), 6: use(write)} if rank == 1 else None
        _, lines = pretrain(config, actions)
        found.append(([line for line in lines if "not saved" in line], folders(config.train.output_dir)))
    return found


def test_incomplete_save_is_not_published(run_ranks, tmp_path):
    (elsewhere, failed), _ = run_ranks(lost_files, 2, str(tmp_path), timeout=LIMIT)
    for warnings, left in (elsewhere, failed):
        assert len(warnings) == 1
        assert left == ["latest", *(f"step-0000000{step}" for step in (2, 6, 8))]
    assert "tensors-00001.safetensors is missing: train.output_dir must be one folder for all ranks" in elsewhere[0][0]
    assert "(rank 1: RuntimeError: out of ideas)" in failed[0][0]


def disk(rank, world_size, folder):
    """A disk that is too small for a checkpoint, and a disk that becomes read-only."""
    start()

    def remount(trainer):
        subprocess.run(["mount", "-o", "remount,ro", f"{folder}/readonly/checkpoints"], check=True)

    found = []
    for name, at in (("small", None), ("readonly", {3: remount if rank == 0 else None})):
        result, lines = pretrain(config_of(f"{folder}/{name}", "train.max_steps=5", "train.max_failed_saves=9"), at)
        found.append((str(result), [line for line in lines if "not saved" in line], folders(f"{folder}/{name}")))
    return found


@pytest.fixture
def mounts(tmp_path):
    """Two small file systems in memory: one is smaller than a checkpoint, one is larger."""
    made = []
    try:
        for name, size in (("small", "300k"), ("readonly", "20m")):
            folder = tmp_path / name / "checkpoints"
            folder.mkdir(parents=True)
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False)
            if done.returncode:
                pytest.skip("mounting a file system needs root")
            made.append(folder)
        yield tmp_path
    finally:
        for folder in made:
            subprocess.run(["umount", folder], check=False)


def test_full_and_read_only_disks_are_reported(run_ranks, mounts):
    (small, readonly), _ = run_ranks(disk, 2, str(mounts), timeout=LIMIT)
    assert "No space left on device" in small[1][0]
    assert "the run ends at step 5 without a checkpoint of it, and without another one: make room" in small[0]
    assert small[2] == []
    assert readonly[1][0].count("Read-only file system") == 1, "a problem of rank 0 is that of all ranks"
    assert "without a checkpoint of it, the newest is " in readonly[0]
    assert readonly[2] == ["latest", "step-00000002"]


# --- damage, and concurrent runs --------------------------------------------------------------------------------------


def resume_after_damage(rank, world_size, folder):
    start()
    run = Path(folder) / "run"
    config = config_of(run, "train.max_steps=6")
    pretrain(config)
    found = []
    newest = run / "checkpoints" / "step-00000006" / "tensors-00001.safetensors"
    if rank == 0:
        content = bytearray(newest.read_bytes())
        content[-5] ^= 16
        newest.write_bytes(content)
    again = config_of(run, "train.max_steps=7")
    result, lines = pretrain(again)
    found.append((result.steps, [line for line in lines if "damaged" in line or "resumed" in line]))
    if rank == 0:
        for checkpoint in (run / "checkpoints").glob("step-*"):
            (checkpoint / "manifest.json").write_text("{}")
    result, _ = pretrain(config_of(run, "train.max_steps=8"))
    found.append((type(result).__name__, str(result)))
    result, _ = pretrain(config_of(f"{folder}/other"), resume=run / "checkpoints" / "step-00000004")
    found.append((type(result).__name__, str(result)))
    return found


def test_damaged_checkpoint_is_skipped_for_the_previous_one(run_ranks, tmp_path):
    results = run_ranks(resume_after_damage, 2, str(tmp_path), timeout=LIMIT)
    (steps, lines), *_ = results[0]
    assert steps == 7
    assert "step-00000006 is damaged: tensors-00001.safetensors has other content than was written" in lines[0]
    assert lines[0].endswith("going back to step-00000004")
    assert lines[1].startswith("resumed from ")
    for _, (kind, text), (other_kind, other) in results:
        assert (kind, other_kind) == ("ConfigError", "ConfigError")
        assert "no good checkpoint to resume from" in text
        assert "step-00000004 is damaged: manifest.json has format None" in other
        assert other.count("step-") == 1


def two_runs(rank, world_size, folder):
    """Rank 0 starts a second run in the same folder, as a separate process, while the first run trains."""
    start()
    launcher = Path(__file__).resolve().parents[2] / "launcher" / "pretrain.py"
    found = []

    def second(trainer):
        if rank == 0:
            hidden = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
            env = {name: value for name, value in os.environ.items() if name not in hidden}
            settings = [item for item in SMALL if not item.startswith("parallel")]
            run = str(trainer.config.train.output_dir)
            command = [sys.executable, str(launcher), "--output_dir", run, "--set", *settings]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
            found.append((done.returncode, [line for line in done.stderr.splitlines() if "ERROR" in line]))

    result, _ = pretrain(config_of(f"{folder}/run", "train.max_steps=3"), {2: second})
    return result.steps, os.getpid(), found


def test_second_run_in_the_same_folder_is_refused(run_ranks, tmp_path):
    (steps, pid, ((code, errors),)), _ = run_ranks(two_runs, 2, str(tmp_path), timeout=LIMIT)
    assert (steps, code) == (3, 2)
    assert len(errors) == 1
    assert f"is being written by another run (process {pid} on " in errors[0]
    assert "wait until it ends, or name another folder" in errors[0]


# --- initial weights --------------------------------------------------------------------------------------------------


def start_from_weights(rank, world_size, folder):
    """Start from a run and from its export, on both ranks; then from sources that do not fit."""
    import torch.distributed as dist

    from eve_ds.export import export
    from eve_ds.model.moe import local_plain_state_dict

    start()
    base = config_of(f"{folder}/base", "train.max_steps=2")
    pretrain(base)
    if rank == 0:
        export(Path(folder) / "base", Path(folder) / "export")
    dist.barrier()
    found = []
    for source in ("base", "base/checkpoints/step-00000002", "export"):
        weights = {}

        def look(trainer, weights=weights):
            state = local_plain_state_dict(trainer.model)
            weights.update({name: weight.clone() for name, weight in state.items()})

        config = config_of(
            f"{folder}/from-{source.replace('/', '-')}", "train.max_steps=1", f"train.init={folder}/{source}"
        )
        pretrain(config, {1: look})
        found.append(weights)
    errors = []
    for source, setting in (("export", "model.intermediate_size=64"), ("nowhere", "train.seed=1")):
        config = config_of(f"{folder}/wrong", f"train.init={folder}/{source}", setting)
        errors.append(str(pretrain(config)[0]))
    return found, errors


def test_run_can_start_from_weights_of_another(run_ranks, tmp_path):
    from eve_ds.export import load

    results = run_ranks(start_from_weights, 2, str(tmp_path), timeout=LIMIT)
    expected = load(tmp_path / "export")[0].state_dict()
    for found, errors in results:
        for weights in found:
            assert weights
            assert all(weight.equal(expected[name]) for name, weight in weights.items())
        assert "train.init: " in errors[0]
        assert "(48,) where the model has (64,)" in errors[0]
        assert "nowhere does not exist: name a run or a checkpoint" in errors[1]
    assert set().union(*(found[0].keys() for found, _ in results)) == expected.keys()


# --- signals ----------------------------------------------------------------------------------------------------------


def signals(rank, world_size, folder):
    """Signal one rank, between steps and inside a step; return the saved checkpoints, and whether a rerun resumes."""
    start()
    pretrain(config_of(f"{folder}/whole", "train.max_steps=7", "train.gradient_accumulation_steps=2"))
    found = []
    for number, (name, to, mode) in enumerate((("SIGTERM", 0, "false"), ("SIGUSR1", 1, "true"))):
        settings = ["train.gradient_accumulation_steps=2", "train.max_steps=7", f"train.async_save={mode}"]
        config = config_of(f"{folder}/{number}", *settings, "train.save_every_steps=null")

        def send(trainer, name=name, to=to):
            if rank == to:
                os.kill(os.getpid(), getattr(signal, name))

        stopped, _ = pretrain(config, {4: send})
        held = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        done, lines = pretrain(config)
        found.append((stopped.stopped, stopped.steps, stopped.checkpoint.name, held, done.stopped, done.steps, lines))
    return found


def test_signal_to_any_rank_saves_and_stops_all_ranks(run_ranks, tmp_path):
    for result in run_ranks(signals, 2, str(tmp_path), timeout=LIMIT):
        for stopped, steps, checkpoint, held, stopped_again, steps_again, _ in result:
            assert (stopped, steps, checkpoint, held) == (True, 4, "step-00000004", True)
            assert (stopped_again, steps_again) == (False, 7)
    for number in range(2):
        assert losses(tmp_path / str(number)) == losses(tmp_path / "whole")
        assert not list((tmp_path / str(number) / "checkpoints").glob(".*"))


with contextlib.suppress(ValueError):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # makes a file over the limit an error of the write
