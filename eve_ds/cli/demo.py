"""Demo that `make demo` runs once everything is installed: pre-train a small EVE, export, evaluate, draw, show results.

    python launcher/demo.py --out runs/demo              one seed
    python launcher/demo.py --out runs/demo --seeds 3    seeds 0, 1 and 2

Every step is a command that is printed and can be typed by hand. Its terminal shows commands, progress, tables and
errors; messages of DeepSpeed and torch go to RUN/demo.log. Results in the folder are reused: rerun the same command to
resume.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eve_ds import reading
from eve_ds.cli.command import (
    BAD_INPUT,
    FAILED,
    SIGNALED,
    Parser,
    complain,
    exit_code_table,
    is_debugging,
    output,
    positive,
    run_command,
)
from eve_ds.cli.demo_steps import StepFailed, free_port, log_of, run_step, shown, this_machine
from eve_ds.storage import cause

if TYPE_CHECKING:
    from eve_ds.config import Config

PRESET = "eve_tiny"
BUDGET = ("train.max_steps=1000000", "train.max_seconds=175", "optimizer.decay_by=seconds")
"""Time instead of the preset's number of steps: a slower machine learns less, but completes the whole schedule."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; exit code 0, 2 for bad input, 4 or 130 for a signal, otherwise that of the step that failed."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    seeds = arguments.seed or list(range(arguments.seeds))
    if len(set(seeds)) < len(seeds):
        parser.error(f"--seed ({' '.join(map(str, seeds))}) must name each seed once")
    action = partial(_run_seeds, seeds, arguments.out.resolve(), arguments.max_steps)
    return run_command("demo", action, is_debugging(arguments))


def build_parser() -> Parser:
    """Parser of the command line."""
    codes = exit_code_table(0, FAILED, BAD_INPUT, *SIGNALED, failed="training ended before its last checkpoint")
    epilog = f"{codes}\nA step that fails ends the demo with its own exit code."
    parser = Parser(prog="demo", description=__doc__, epilog=epilog)
    parser.add_argument(
        "--out", type=output, default=Path("runs/demo"), metavar="DIR", help="folder to write (default: %(default)s)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=positive, default=1, metavar="N", help="seeds 0 to N - 1 (default: 1)")
    which.add_argument("--seed", type=int, action="append", metavar="S", help="this seed; may be given several times")
    parser.add_argument("--max_steps", type=int, metavar="N", help="train for N steps instead of 175 seconds")
    return parser


def _run_seeds(seeds: list[int], out: Path, max_steps: int | None) -> int:
    try:
        entries = [run_seed(seed, out / f"seed-{seed}", max_steps) for seed in seeds]
    except StepFailed as error:
        return complain("demo", str(error), error.exit_code)
    write_summary(entries, out / "summary.json")
    show(entries, out)
    return 0


def run_seed(seed: int, run: Path, max_steps: int | None) -> dict[str, Any]:
    """Train, export, evaluate and report one seed, or reuse results in `run`; its entry in the summary."""
    from eve_ds.config import load_config

    limit = BUDGET if max_steps is None else (f"train.max_steps={max_steps}",)
    settings = [f"train.seed={seed}", *limit]
    config = load_config(PRESET, settings)
    check_same_settings(run, config)
    steps = later_steps(run)
    finished = is_finished(run, config)
    if not finished or not all(result.is_file() for result in steps):
        say(f"seed {seed}: messages of DeepSpeed and torch are in {shown(log_of(run))}")
    if finished:
        say(f"seed {seed}: reusing the finished training in {shown(run)}")
    else:
        say(f"seed {seed}: training on scenes that are generated during the run, so nothing is downloaded or stored")
        train(run, config, settings)
    for result, command in steps.items():
        if result.is_file():
            say(f"seed {seed}: reusing {shown(result)}")
        else:
            run_step([sys.executable, *command], run)
    return summarize(seed, run)


def later_steps(run: Path) -> dict[Path, list[str]]:
    """Commands after the training, by the file that shows that they are done."""
    export, evaluation, report = run / "export", run / "evaluation.json", run / "report"
    return {
        export / "export.json": ["launcher/convert.py", shown(run), "--out", shown(export)],
        evaluation: ["launcher/evaluate.py", "scenes", "--model", shown(export), "--json", shown(evaluation)],
        report / "report.md": [
            *("launcher/report.py", shown(run), "--model", shown(export)),
            *("--evaluation", shown(evaluation), "--out", shown(report)),
        ],
    }


def train(run: Path, config: Config, settings: list[str]) -> None:
    """Pre-train under DeepSpeed's own launcher."""
    from eve_ds.config import ConfigError

    program = Path(sys.executable).with_name("deepspeed")
    if not program.is_file():
        raise ConfigError(f"{program} does not exist: install the package into the environment of {sys.executable}")
    machine = this_machine(config.train.train_batch_size)
    command = [
        *(str(program), "--num_accelerators", str(machine.ranks), "--master_port", str(free_port())),
        *("launcher/pretrain.py", "--config", PRESET, "--deepspeed_config", machine.deepspeed_config),
        *("--set", *settings, "--output_dir", shown(run)),
    ]
    run_step(command, run, shows_output=False)
    if not is_finished(run, config):  # DeepSpeed's launcher returns 0 if a signal killed its processes
        raise StepFailed(
            f"training ended early, {shown(run)} holds no checkpoint of its end; see above and {shown(log_of(run))}",
            FAILED,
        )


def is_finished(run: Path, config: Config) -> bool:
    """Whether the newest checkpoint of a run marks its end."""
    from eve_ds.checkpoint.manifest import STATE, committed

    checkpoints = committed(run)
    if not checkpoints:
        return False
    state = read_json(checkpoints[0] / STATE)
    return bool(state.get("ended_at") == config.train.limits)


def check_same_settings(run: Path, config: Config) -> None:
    """Refuse a folder that holds a run of other settings; raises :class:`ConfigError`."""
    from eve_ds.config import ConfigError

    if not (run / "config.json").is_file():
        return
    now = config.model_dump(mode="json")
    before = read_json(run / "config.json")
    # Not compared: values that the preset may leave open and the run has settled.
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
            former = before.get(section)
            other = former.get(key) if isinstance(former, dict) else None
            if key not in settled and other != value:
                raise ConfigError(
                    f"{shown(run)} holds a run with {section}.{key} {other}, now it is {value}: "
                    "remove that folder, or name another --out"
                )


def summarize(seed: int, run: Path) -> dict[str, Any]:
    """Results and costs of one seed, from the files of its run."""
    from eve_ds.report.records import read_records, throughput, with_current_names

    check = read_json(run / "export" / "export.json")["check"]
    return {
        "seed": seed,
        **with_current_names(read_json(run / "evaluation.json")),
        **throughput(read_records(run)),
        "export_max_abs_diff": None if check is None else check["max_abs_diff"],
    }


def write_summary(entries: list[dict[str, Any]], path: Path) -> None:
    """Write all seeds, and the costs of the first one at the top."""
    costs = ("train_seconds", "steps", "samples_per_second", "peak_memory_bytes", "export_max_abs_diff")
    summary = {name: entries[0][name] for name in costs} | {"seeds": entries}
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def show(entries: list[dict[str, Any]], out: Path) -> None:
    """Print the table and the paths of the results."""
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
    """Print a line of the demo itself."""
    print(f"\n{message}", flush=True)


def read_json(path: Path) -> dict[str, Any]:
    """Content of a file of the run; raises :class:`ConfigError` if it is not a JSON object."""
    from eve_ds.config import ConfigError

    try:
        tree = reading.read_json(path)
        if not isinstance(tree, dict):
            raise ValueError("no JSON object")
        return tree
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown(path)} cannot be read ({cause(error)}): remove {shown(path.parent)}") from None
