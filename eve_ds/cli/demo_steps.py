"""Steps of the demo: commands that run on this machine, with a terminal for our lines and a log for the rest."""

from __future__ import annotations

import math
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from eve_ds.cli.command import REPOSITORY
from eve_ds.cli.terminal import TERMINAL_FD

STOP_SECONDS = 20.0
"""Seconds that an interrupted step gets to end its own processes."""
STDERR = 2
LAST_LINES = 10
"""Lines of the log that are shown when a step fails."""


class Machine(NamedTuple):
    """Start of a run on this machine."""

    ranks: int
    deepspeed_config: str
    environment: dict[str, str]


CPU = Machine(2, "ds_configs/zero1_ep2_cpu.json", {"DS_ACCELERATOR": "cpu"})


class StepFailed(RuntimeError):
    """A step ended with an error; the demo ends with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_step(command: list[str], run: Path, *, shows_output: bool = True) -> None:
    """Print a command and run it from the repository's root; raises :class:`StepFailed` with its exit code.

    Standard error, and standard output unless `shows_output`, are appended to the log of the run. Descriptor 0 is the
    demo's own standard error, which log and progress of the step are written to (:mod:`eve_ds.cli.terminal`):
    DeepSpeed's launcher closes all descriptors but 0, 1 and 2 for the ranks that it starts.
    """
    line = shlex.join([Path(command[0]).name, *command[1:]])
    print(f"\n$ {line}", flush=True)
    run.mkdir(parents=True, exist_ok=True)
    with log_of(run).open("ab") as log:
        log.write(f"$ {line}\n".encode())
        log.flush()
        start = log.tell()
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment(run) | {TERMINAL_FD: "0"},
            stdin=STDERR,
            stdout=None if shows_output else log,
            stderr=log,
        )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        _stop(process)
        raise
    if code:
        _show_last_lines(run, start)
        name = next(Path(part).name for part in command[1:] if part.endswith(".py"))
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        message = f"{name} failed with {how}; see above and {shown(log_of(run))}"
        raise StepFailed(message, code if code > 0 else 128 - code)


def log_of(run: Path) -> Path:
    """File that messages of DeepSpeed, torch and other libraries go to."""
    return run / "demo.log"


def _show_last_lines(run: Path, start: int) -> None:
    """Print the end of the log, without anything before the byte `start`."""
    lines = log_of(run).read_bytes()[start:].decode(errors="replace").splitlines()[-LAST_LINES:]
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a step with everything that it started; a terminal's Ctrl-C has reached it already."""
    try:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def environment(run: Path) -> dict[str, str]:
    """Environment of a step: one thread per rank, extensions in the run's own folder, this machine's accelerator."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        # A killed DeepSpeed build leaves a lock in the shared cache of extensions that a later one waits for.
        "TORCH_EXTENSIONS_DIR": str(run / "extensions"),
    }
    return this_machine().environment | env


def this_machine(train_batch_size: int = 1) -> Machine:
    """One rank on each GPU, in bf16; two ranks on the CPU of a machine without a GPU.

    The number of ranks is the largest common divisor of the number of GPUs and the batch size. A `DS_ACCELERATOR` that
    is set decides.
    """
    gpus = num_gpus() if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0
    if gpus == 0:
        return CPU
    return Machine(math.gcd(gpus, train_batch_size), "ds_configs/zero1_bf16.json", {})


def num_gpus() -> int:
    """Number of NVIDIA GPUs that the driver lists."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def free_port() -> int:
    """Return a port without a listener, so that two demos, or a run and the demo, can share a machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shown(path: Path) -> str:
    """Path as one would type it in the repository's root."""
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)
