"""kill -9 of a rank, of all ranks, and of their launcher, at random moments and inside of saves: the run resumes.

Three kills, 25 in `make soak`, which sets `EVE_DS_SOAK`. Saves are synchronous and in the background in turn.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from eve_ds.checkpoint import manifest

LAUNCHER = Path(__file__).resolve().parents[2] / "launcher" / "pretrain.py"
KILLS = 25 if "EVE_DS_SOAK" in os.environ else 3
STEPS = 40 * (KILLS + 1)
PEERS_DIE_WITHIN = 30
"""Seconds; gloo notices a closed connection at the next collective, and a rank the end of its launcher in a second."""
LIMIT = 120 + 40 * KILLS
pytestmark = pytest.mark.timeout(LIMIT)


class Ranks:
    """Two ranks of launcher/pretrain.py, started by hand or by torchrun."""

    def __init__(self, arguments, port, log, torchrun=False):
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        launch = [sys.executable, str(LAUNCHER), *arguments]
        commands = [(launch, env | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"}) for r in range(2)]
        if torchrun:
            agent = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
            commands = [([*agent, str(LAUNCHER), *arguments], env)]
        self.log = log
        with log.open("ab") as output:
            self.processes = [
                subprocess.Popen(command, env=own, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
                for command, own in commands
            ]

    def wait(self, seconds):
        """Exit codes; kills the processes that have not ended by then."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.log.read_text()[-3000:]}")
        finally:
            for process in self.processes:
                process.kill()


def losses(run):
    """Loss by step; if a resumed run repeated a step, its last record counts."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {item["step"]: item["loss"] for item in records if item["kind"] == "train"}


def await_training(run, ranks, before):
    """Wait for a record that is not among those of `before` bytes of metrics."""
    deadline = time.monotonic() + 90
    file = run / "metrics.jsonl"
    while not (file.is_file() and file.stat().st_size > before and b'"train"' in file.read_bytes()[before:]):
        if time.monotonic() > deadline or any(process.poll() is not None for process in ranks.processes):
            pytest.fail(f"training did not start:\n{ranks.log.read_text()[-3000:]}")
        time.sleep(0.01)


def await_save(run):
    """Wait until a checkpoint is being written; returns whether one was seen."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if any((run / manifest.FOLDER).glob(".saving-*")):
            return True
    return False


def test_killed_runs_resume_to_the_same_losses(run, tmp_path, free_port):
    drawn = random.Random(KILLS)
    settings = ["train.save_every_steps=3", "train.eval_every=null"]
    settings += ["train.max_seconds=null", "optimizer.decay_by=steps"]
    log, whole = tmp_path / "log.txt", type(run)(tmp_path / "whole")
    assert Ranks([*whole.arguments(max_steps=STEPS), *settings], free_port, log).wait(LIMIT / 2) == [0, 0]
    expected = losses(whole.folder)
    arguments = [*run.arguments(max_steps=STEPS), *settings]
    assert sorted(expected) == list(range(1, STEPS + 1))
    seen_inside, kept = 0, []
    for number in range(KILLS):
        how = ("one", "all", "launcher")[number % 3]
        mode = [f"train.async_save={'true' if number % 2 else 'false'}"]
        before = (run.folder / "metrics.jsonl").stat().st_size if (run.folder / "metrics.jsonl").is_file() else 0
        ranks = Ranks([*arguments, *mode], free_port, log, torchrun=how == "launcher")
        await_training(run.folder, ranks, before)
        time.sleep(drawn.uniform(0, 0.5))
        if number % 2 or how == "launcher":
            seen_inside += await_save(run.folder)
        children = [child for process in ranks.processes for child in psutil.Process(process.pid).children()]
        for process in ranks.processes if how != "one" else [ranks.processes[drawn.randrange(2)]]:
            process.kill()
        ranks.wait(PEERS_DIE_WITHIN)
        _, alive = psutil.wait_procs(children, timeout=PEERS_DIE_WITHIN)
        assert not alive
        committed = manifest.committed(run.folder)
        assert set(kept) <= set(committed), "committed checkpoints stay"
        assert {str(path): manifest.problems(path) for path in committed if manifest.problems(path)} == {}
        kept = committed
    assert Ranks(arguments, free_port, log).wait(LIMIT / 2) == [0, 0]
    assert losses(run.folder) == expected
    assert kept, "no run lived to publish a checkpoint: nothing was resumed"  # how many is a matter of speed
    assert seen_inside > 0
    assert not list((run.folder / manifest.FOLDER).glob(".*")), "leftovers are cleaned up"
    print(f"{KILLS} kills, {seen_inside} of them aimed into a save, {len(kept)} checkpoints before the last start")
