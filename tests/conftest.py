"""Environment and fixtures of all tests, such as `run_ranks`, which runs a function on several gloo processes."""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Set before the first import of torch. On shared cores, two OpenMP threads per rank can be ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A killed DeepSpeed build leaves a lock in the shared extension cache, and the next run would wait for it.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp(prefix="eve_ds_extensions_"))

import hypothesis
import pytest
from tiny import MODEL

# The same examples in every run, and no limit on the time of one, which other programs on the machine could exceed.
hypothesis.settings.register_profile("eve_ds", derandomize=True, deadline=None)
hypothesis.settings.load_profile("eve_ds")

RANK_MAIN = Path(__file__).parent / "distributed" / "rank_main.py"
SUPPORT = Path(__file__).parent / "support"
"""Folder of modules that test files share."""
GRACE_SECONDS = 3.0
"""Seconds for the other ranks to write their traceback after one rank has failed or run out of time."""


@pytest.fixture
def free_port() -> int:
    """TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def task_tree() -> Callable[..., dict[str, Any]]:
    """Function `task_tree(task, **of_task)`: configuration, as a tree, of a model that fine-tunes in a second."""

    def tree(task: str, **of_task: Any) -> dict[str, Any]:
        return {
            "model": MODEL | {"num_hidden_layers": 2, "moe_layers": [1], "patch_size": 16},
            "optimizer": {"lr": 1e-3, "warmup_steps": 0},
            "train": {"train_batch_size": 8, "max_steps": 3, "metrics_every": 1},
            "task": {"name": task, "val": {"num_examples": 20}, "rerank": 4, **of_task},
        }

    return tree


@pytest.fixture
def pretrained(tmp_path: Path, task_tree: Callable[..., dict[str, Any]]) -> Callable[[str], Path]:
    """Function `pretrained("mim+mlm")`: exports the model of `task_tree` with drawn weights, whose biases are not 0."""

    def write(objectives: str) -> Path:
        import torch

        from eve_ds.config import parse_config
        from eve_ds.data.tokenizer import load_tokenizer
        from eve_ds.export.start import DRAWN, draw_weights, write_start

        tree = {key: value for key, value in task_tree("retrieval").items() if key != "task"}
        config = parse_config(tree | {"model": tree["model"] | {"objectives": objectives.split("+")}})
        weights = draw_weights(config)
        weights = {
            name: weight + 0.1 * torch.randn_like(weight) if name.endswith("bias") else weight
            for name, weight in weights.items()
        }
        folder = tmp_path / objectives
        tokenizer, origins = load_tokenizer("scenes"), dict.fromkeys(weights, DRAWN)
        write_start(folder, config, tokenizer, weights, source="x", origins=origins, notes=[])
        return folder

    return write


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """Function `run_ranks(function, world_size, *arguments, timeout=120.0)`.

    Starts `world_size` Python processes in one gloo group, calls `function(rank, world_size, *arguments)` in each, and
    returns the results in rank order. `function` must be a top-level function of a test file. The file is loaded by
    path, so its import must have no side effects. Arguments and results are pickled: tensors and plain data, no classes
    of the test file. One start can run many configurations: loop over them inside `function`.

    If a rank raises, the test fails with that rank's traceback. After `timeout` seconds every rank writes the stacks of
    all its threads, and the test fails with them. No process outlives the call.
    """
    starts = 0

    def run(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
        nonlocal starts
        starts += 1
        folder = tmp_path / f"ranks{starts}"
        folder.mkdir()
        (folder / "arguments.pickle").write_bytes(pickle.dumps(arguments))
        target = [inspect.getfile(function), function.__name__, str(folder), str(timeout)]
        processes = [_start_rank(target, folder, rank, world_size) for rank in range(world_size)]
        try:
            problem = _wait(processes, timeout + 2 * GRACE_SECONDS)
        finally:
            for process in processes:
                _kill_group(process)
        if problem:
            pytest.fail(f"{function.__name__} on {world_size} ranks: {problem}\n{_logs(folder, world_size)}", False)
        return [pickle.loads((folder / f"result{rank}.pickle").read_bytes()) for rank in range(world_size)]

    return run


def _start_rank(target: list[str], folder: Path, rank: int, world_size: int) -> subprocess.Popen[bytes]:
    # A file store needs no port; the address is set only for code that reads it.
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with (folder / f"log{rank}.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(RANK_MAIN), *target],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: list[subprocess.Popen[bytes]], limit: float) -> str | None:
    """Wait for all ranks, or for the first failure and a grace period; return a description of the problem, or None."""
    deadline = time.monotonic() + limit
    problem = None
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        if failed and problem is None:
            problem = f"rank {failed[0]} exited with {processes[failed[0]].returncode}"
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.02)
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    hanging = [rank for rank, process in enumerate(processes) if process.returncode is None]
    if problem is None and failed:
        problem = f"rank {failed[0]} exited with {processes[failed[0]].returncode}"
    if problem is None and hanging:
        problem = f"ranks {hanging} did not return within {limit:.0f} seconds"
    return problem


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the rank has its own session, so this kills its children too
    process.wait()


def _logs(folder: Path, world_size: int) -> str:
    parts = []
    for rank in range(world_size):
        text = (folder / f"log{rank}.txt").read_text(errors="replace")
        parts.append(f"--- rank {rank} ---\n{text[-6000:]}")
    return "\n".join(parts)
