"""What `make demo` runs once everything is installed: pre-train a small EVE, export, evaluate, draw, show figures.

    python launcher/demo.py --out runs/demo              one seed
    python launcher/demo.py --out runs/demo --seeds 3    seeds 0, 1 and 2

Every step is a command that is printed and can be typed by hand. What the folder holds already is reused, so after an
interruption the same command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository root holds a folder `kernels`, the name of a package that transformers looks for; multi-node
# `deepspeed` puts the root on the path, and Python puts the folder of this script there.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "launcher")]

import argparse
import json
import math
import os
import shlex
import signal
import socket
import subprocess
from typing import Any, NamedTuple, NoReturn

from eve_ds.config import Config, ConfigError, load_config

PRESET = "eve_tiny"
BUDGET = ("train.max_steps=1000000", "train.max_seconds=175", "optimizer.decay_by=seconds")
"""Time instead of the preset's number of steps: a slower machine learns less, but goes through the whole schedule."""
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
STOP_SECONDS = 20.0
"""What an interrupted step gets to end its own processes."""


class Machine(NamedTuple):
    """How a run starts here."""

    ranks: int
    deepspeed_config: str
    environment: dict[str, str]


CPU = Machine(2, "ds_configs/zero1_ep2_cpu.json", {"DS_ACCELERATOR": "cpu"})


class StepFailed(RuntimeError):
    """A step that did not do its work."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, without the usage text."""
        self.exit(EXIT_BAD_INPUT, f"demo: {message} (see --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 (default: 1)")
    which.add_argument("--seed", type=int, action="append", metavar="S", help="this seed; may be given several times")
    parser.add_argument("--max_steps", type=int, help="train for so many steps instead of the preset's budget")
    return parser


def main() -> int:
    """Exit code 0, 2 for input that cannot be used, 130 interrupted, otherwise that of the step that failed."""
    parser = build_parser()
    arguments = parser.parse_args()
    seeds = arguments.seed or list(range(arguments.seeds))
    if not seeds or len(set(seeds)) < len(seeds):
        parser.error("name at least one seed, and each once")
    signal.signal(signal.SIGTERM, _interrupt)
    out = arguments.out.resolve()
    try:
        entries = [run_seed(seed, out / f"seed-{seed}", arguments.max_steps) for seed in seeds]
        write_summary(entries, out / "summary.json")
    except ConfigError as error:
        return _complain(str(error), EXIT_BAD_INPUT)
    except StepFailed as error:
        return _complain(str(error), error.exit_code)
    except OSError as error:
        return _complain(f"cannot write {error.filename or out}: {error.strerror}", EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        return _complain("interrupted; the same command continues", EXIT_INTERRUPTED)
    show(entries, out)
    return 0


def run_seed(seed: int, run: Path, max_steps: int | None) -> dict[str, Any]:
    """Train, export, evaluate and report one seed, or reuse what `run` holds; its entry in the summary."""
    limit = BUDGET if max_steps is None else (f"train.max_steps={max_steps}",)
    settings = [f"train.seed={seed}", *limit]
    config = load_config(PRESET, settings)
    check_same_settings(run, config)
    export, evaluation, report = run / "export", run / "evaluation.json", run / "report"
    if is_finished(run, config):
        say(f"seed {seed}: reusing the finished training in {shown(run)}")
    else:
        say(f"seed {seed}: training; its scenes are generated on the fly, so there is no data to download or to store")
        train(run, config, settings)
    steps = {
        export / "export.json": ["launcher/convert.py", shown(run), "--out", shown(export)],
        evaluation: ["launcher/evaluate.py", "scenes", "--model", shown(export), "--json", shown(evaluation)],
        report / "report.md": [
            *("launcher/report.py", shown(run), "--model", shown(export)),
            *("--evaluation", shown(evaluation), "--out", shown(report)),
        ],
    }
    for result, command in steps.items():
        if result.is_file():
            say(f"seed {seed}: reusing {shown(result)}")
        else:
            run_step([sys.executable, *command], run)
    return summarize(seed, run)


def train(run: Path, config: Config, settings: list[str]) -> None:
    """Pre-train under DeepSpeed's own launcher."""
    program = Path(sys.executable).with_name("deepspeed")
    if not program.is_file():
        raise ConfigError(f"{program} does not exist: install the package into the environment of {sys.executable}")
    machine = this_machine(config.train.train_batch_size)
    command = [
        *(str(program), "--num_accelerators", str(machine.ranks), "--master_port", str(free_port())),
        *("launcher/pretrain.py", "--config", PRESET, "--deepspeed_config", machine.deepspeed_config),
        *("--set", *settings, "--output_dir", shown(run)),
    ]
    run_step(command, run)
    if not is_finished(run, config):  # DeepSpeed's launcher returns 0 when a signal killed what it had started
        raise StepFailed(f"training ended early, {shown(run)} holds no checkpoint of its end; see above", 1)


def is_finished(run: Path, config: Config) -> bool:
    """Whether the newest checkpoint of a run is the one of its last step."""
    pointer = run / "checkpoints" / "latest"
    if not pointer.is_file():
        return False
    state = _read_json(pointer.parent / pointer.read_text(encoding="utf-8").strip() / "state.json")
    steps, seconds, budget = state.get("step", 0), state.get("seconds", 0.0), config.train.max_seconds
    if steps >= config.train.max_steps:
        return True
    # A run with a time budget stops before the step that would exceed it.
    return budget is not None and steps > 0 and seconds * (1 + 1 / steps) >= budget


def check_same_settings(run: Path, config: Config) -> None:
    """Refuse a folder that holds a run of other settings; raises :class:`ConfigError`."""
    if not (run / "config.json").is_file():
        return
    now = config.model_dump(mode="json")
    before = _read_json(run / "config.json")
    # Not compared: what the preset may leave open and the run has settled.
    settled = {
        "micro_batch_size",
        "gradient_accumulation_steps",
        "precision",
        "clip_grad_norm",
        "ep_size",
        "output_dir",
    }
    for section, values in now.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            other = before.get(section, {}).get(key)
            if key not in settled and other != value:
                raise ConfigError(
                    f"{shown(run)} holds a run with {section}.{key} {other}, now it is {value}: "
                    "remove that folder, or name another --out"
                )


def run_step(command: list[str], run: Path) -> None:
    """Print a command and run it from the repository's root; raises :class:`StepFailed` with its exit code."""
    line = [Path(command[0]).name, *command[1:]]
    print(f"\n$ {shlex.join(line)}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(run))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        _stop(process)
        raise
    if code:
        name = next(Path(part).name for part in command[1:] if part.endswith(".py"))
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        raise StepFailed(f"{name} failed with {how}; see above", code if code > 0 else 128 - code)


def environment(run: Path) -> dict[str, str]:
    """One thread per rank, extensions in the run's own folder, and the accelerator of this machine."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        # A killed DeepSpeed build leaves a lock in the shared cache of extensions that a later one waits for.
        "TORCH_EXTENSIONS_DIR": str(run / "extensions"),
    }
    return this_machine().environment | env


def this_machine(train_batch_size: int = 1) -> Machine:
    """One rank on each GPU, in bf16; two ranks on the CPU where there is none.

    Of the GPUs as many are taken as the largest common divisor of their number and the batch says. A `DS_ACCELERATOR`
    that is set decides.
    """
    gpus = num_gpus() if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0
    if gpus == 0:
        return CPU
    return Machine(math.gcd(gpus, train_batch_size), "ds_configs/zero1_bf16.json", {})


def num_gpus() -> int:
    """NVIDIA GPUs that a driver answers for."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def free_port() -> int:
    """A port that nobody listens on now, so that two demos, or a run and the demo, can share a machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def summarize(seed: int, run: Path) -> dict[str, Any]:
    """What one seed learnt and took, from the files of its run."""
    from eve_ds.report.records import read_records, throughput, with_current_names

    check = _read_json(run / "export" / "export.json")["check"]
    return {
        "seed": seed,
        **with_current_names(_read_json(run / "evaluation.json")),
        **throughput(read_records(run)),
        "export_max_abs_diff": None if check is None else check["max_abs_diff"],
    }


def write_summary(entries: list[dict[str, Any]], path: Path) -> None:
    """All seeds, and the costs of the first one at the top."""
    costs = ("train_seconds", "steps", "samples_per_second", "peak_memory_bytes", "export_max_abs_diff")
    summary = {name: entries[0][name] for name in costs} | {"seeds": entries}
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def show(entries: list[dict[str, Any]], out: Path) -> None:
    """The table, and where everything lies."""
    from rich.console import Console

    from eve_ds.report.tables import seeds_table

    print(flush=True)
    Console().print(seeds_table(entries).to_rich())
    for entry in entries:
        run = out / f"seed-{entry['seed']}"
        report = run / "report"
        print(f"seed {entry['seed']}")
        print(f"  plain weights  {shown(run / 'export')}")
        print(f"  report         {shown(report / 'report.md')}")
        print(f"  pictures       {', '.join(shown(path) for path in sorted(report.glob('*.png')))}")
        print(f"  every number   {shown(run / 'metrics.jsonl')}")
    print(f"summary          {shown(out / 'summary.json')}")


def say(message: str) -> None:
    """A line of the demo itself."""
    print(f"\n{message}", flush=True)


def shown(path: Path) -> str:
    """A path as one would type it in the repository's root."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown(path)} cannot be read ({error}): remove {shown(path.parent)}") from None


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a step with everything that it started; a terminal's Ctrl-C has reached it already."""
    try:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _complain(message: str, code: int) -> int:
    print(f"demo: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
