"""Fixtures of the launch tests: the run that all of them start, processes with a limit, free ports and daemons."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tiny import overrides

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LIMIT = 240.0
"""Seconds a launch may take; on an idle machine it is about ten."""


@dataclass(frozen=True)
class PretrainRun:
    """One short run of launcher/pretrain.py with the tiny model: most of the time here is imports."""

    folder: Path

    def arguments(self, *, ep_size: int = 2, max_steps: int = 2) -> list[str]:
        """Command-line arguments; `ep_size` 2 refuses a world of one, so a run that succeeds had two ranks."""
        loop = ["train.train_batch_size=8", "train.metrics_every=1", f"parallel.ep_size={ep_size}"]
        files = ["--config", "eve_tiny", "--deepspeed_config", "ds_configs/zero1_ep2_cpu.json"]
        limits = ["--max_steps", str(max_steps), "--output_dir", str(self.folder)]
        return [*files, *limits, "--set", *overrides(), *loop]

    def losses(self) -> list[float]:
        """Loss of every step in metrics.jsonl, in order of steps."""
        records = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if record["kind"] == "train"]

    def steps(self) -> list[int]:
        """Steps in metrics.jsonl, in the order of their records."""
        records = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [record["step"] for record in records if record["kind"] == "train"]


@pytest.fixture
def run(tmp_path: Path) -> PretrainRun:
    """A run in a folder of its own."""
    return PretrainRun(tmp_path / "run")


@pytest.fixture(scope="session")
def require() -> Callable[..., list[str]]:
    """`require(*programs)`: their full paths; skips the test where one is missing."""

    def find(*programs: str) -> list[str]:
        path = f"{BIN}:{os.environ['PATH']}:/usr/sbin"
        found = {program: shutil.which(program, path=path) for program in programs}
        missing = [program for program, where in found.items() if where is None]
        if missing:
            pytest.skip(f"needs {', '.join(missing)}: apt-get install slurm-wlm munge pdsh openssh-server")
        return [str(where) for where in found.values()]

    return find


@dataclass(frozen=True)
class Launched:
    """Exit code and output of a launch."""

    returncode: int
    output: str


@pytest.fixture(scope="session")
def launch() -> Callable[..., Launched]:
    """`launch(command, **environment)`: start it in the repository's root, as a user would; ends within LIMIT."""

    def start(command: list[str], **environment: str) -> Launched:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI_", "OMPI_"))}
        env |= {"PATH": f"{BIN}:{env['PATH']}:/usr/sbin", **environment}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            # Not SIGTERM: `deepspeed` answers it with a pkill of every DeepSpeed launch of this interpreter.
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"{' '.join(command)} did not end within {LIMIT:.0f} seconds:\n{output[-6000:]}", False)
        return Launched(process.returncode, output)

    return start


@pytest.fixture(scope="session")
def two_rank_losses(tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Launched]) -> list[float]:
    """Losses of the run under torchrun, which every other launcher must reproduce to the last bit."""
    run = PretrainRun(tmp_path_factory.mktemp("torchrun") / "run")
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", "launcher/pretrain.py"]
    launched = launch([*command, *run.arguments()])
    assert launched.returncode == 0, launched.output
    assert len(run.losses()) == 2
    return run.losses()


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """`free_ports(count)`: distinct TCP ports that were free a moment ago on every address of this machine."""

    def find(count: int) -> list[int]:
        probes = [socket.socket() for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        return ports

    return find


class Daemons:
    """Servers in the foreground, their output in `folder`; all that they started ends with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str]) -> None:
        """Start `command`, which must not fork itself away."""
        log = self.folder / f"daemon{len(self._processes)}.log"
        with log.open("wb") as output:
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            )

    def wait_until(self, condition: Callable[[], bool], what: str, limit: float = 30.0) -> None:
        """Return when `condition` holds; otherwise fail the test with the servers' output."""
        deadline = time.monotonic() + limit
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(log.read_text(errors="replace")[-2000:] for log in self.folder.glob("*.log"))
                pytest.fail(f"not within {limit:.0f} seconds: {what}\n{logs}", False)
            time.sleep(0.2)

    def stop(self) -> None:
        """End the servers, the last one first."""
        for process in reversed(self._processes):
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """Servers that live as long as the tests of one file."""
    servers = Daemons(tmp_path_factory.mktemp("daemons"))
    yield servers
    servers.stop()
