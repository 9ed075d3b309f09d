"""Every row of the tables of signals in docs/cluster.md: when a signal arrives, and how launchers pass it on.

`make soak` runs all rows of the launchers, in a step and in start-up; otherwise one row of each launcher.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from tiny import overrides

from eve_ds.checkpoint import manifest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"
SETTINGS = ["train.train_batch_size=8", "train.metrics_every=1", "train.max_seconds=null", "optimizer.decay_by=steps"]
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
ENDS_WITHIN = 60.0
"""Seconds from a signal to the end of the launcher."""
OUTLIVES_BY = 10.0
"""Seconds from the end of the launcher to the end of the last rank."""


@pytest.fixture(autouse=True)
def interruptible():
    """Let programs receive SIGINT, which they would ignore if the tests run as a background job of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def table(header):
    """Rows of the table of docs/cluster.md whose header begins like this, as lists of cells without code marks."""
    lines = PAGE.read_text(encoding="utf-8").split(f"\n| {header} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


# --------------------------------------------------------------------------------------- moments, in one process

LAST = 4
"""Steps of the runs, which evaluate and save after every second step."""


def send_at(moment, number):
    """Patch that sends a signal to this process at a moment of the table, once."""
    from unittest import mock

    from eve_ds.checkpoint.saving import Saver
    from eve_ds.training import start
    from eve_ds.training.feed import Feed
    from eve_ds.training.trainer import Trainer

    places = {
        "in start-up": (start, "build_optimizer", 1),
        "in a step": (Trainer, "_train_step", 2),
        "in a wait for data": (Feed, "_load", LAST),
        "in a save": (Saver, "begin", 1),
        "in an evaluation": (Trainer, "_evaluate", 1),
        "in the last evaluation": (Trainer, "_evaluate", 2),
    }
    owner, name, call = places[moment]
    original, calls = getattr(owner, name), itertools.count(1)

    def patched(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), number)
            if moment == "in a wait for data":
                threading.Event().wait()
        return original(*arguments, **options)

    return mock.patch.object(owner, name, patched)


def moments():
    """(moment, signal): all of them in `make soak`, otherwise each moment with one signal and each signal."""
    rows = [moment for moment, *_ in table("signal arrives")]
    if "EVE_DS_SOAK" in os.environ:
        return list(itertools.product(rows, SIGNALS))
    return list(zip(rows, itertools.cycle(SIGNALS)))


def ends(rank, world_size, folder, command, asynchronous):
    """(exit code, step of the newest checkpoint) for each moment and signal."""
    from eve_ds.cli import finetune, pretrain

    program, found = {"pretrain": pretrain, "finetune": finetune}[command], {}
    more = ["--task", "vqa", "--init", "none"] if command == "finetune" else []
    settings = [f"train.async_save={asynchronous}", "train.eval_every=2", "train.save_every_steps=2"]
    settings += ["task.val.num_examples=4"] if command == "finetune" else []
    for moment, name in moments():
        out = Path(folder, moment.replace(" ", "-"), name)
        options = [*more, "--max_steps", str(LAST), "--output_dir", str(out)]
        model = overrides() if command == "pretrain" else ["train.train_batch_size=8"]
        with send_at(moment, getattr(signal, name)):
            code = program.main([*options, "--set", *model, *SETTINGS, *settings])
        steps = [manifest.step_of(path) for path in manifest.committed(out)]
        found[moment, name] = code, steps[0] if steps else 0
    return found


@pytest.mark.parametrize(("command", "asynchronous"), [("pretrain", True), ("finetune", False)])
def test_moments(run_ranks, tmp_path, command, asynchronous):
    (found,) = run_ranks(ends, 1, str(tmp_path), command, asynchronous)
    last = LAST if command == "pretrain" else 0  # fine-tuning ends with a model instead of a checkpoint
    steps = {"in start-up": 0, "in a step": 2, "in a wait for data": LAST - 1}
    steps |= {"in a save": 3, "in an evaluation": 3, "in the last evaluation": last}
    codes = {moment: int(code) for moment, code, _ in table("signal arrives")}
    assert found == {(moment, name): (codes[moment], steps[moment]) for moment, name in moments()}


# ------------------------------------------------------------------------------------------------- other commands


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 4), ("SIGUSR1", 4), ("SIGINT", 130)])
def test_other_commands_end_at_once_and_resume(tmp_path, name, code):
    """To the process group, as from a terminal: the worker processes must not report their own end."""
    launcher = Path(__file__).resolve().parents[2] / "launcher" / "prepare.py"
    command = ["scenes", "--num_samples", "100000", "--samples_per_shard", "100", "--workers", "2"]
    command = [sys.executable, str(launcher), *command, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    await_condition(lambda: list((tmp_path / "out").glob("*.tar")), process)
    os.killpg(process.pid, getattr(signal, name))
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (code, f"prepare: stopped by {name}; rerun the same command to resume\n")


WRITERS = {
    "export": ["convert", "RUN", "--out", "OUT"],
    "replacement": ["convert", "RUN", "--out", "OUT"],
    "official": ["convert", "RUN", "--out", "OUT", "--format", "official"],
    "hf": ["convert", "RUN", "--out", "OUT", "--format", "hf"],
    "universal": ["convert", "universal", "RUN", "--out", "OUT"],
    "evaluate": ["evaluate", "zero_shot", "--model", "EXPORT", "--limit", "4", "--out", "OUT"],
}
MOMENTS = 12
"""Signals that each of these commands gets, at changes of files from the first to the last."""


class FileChanges:
    """Counts changes of files below a folder, and sends SIGTERM to this process at one of them."""

    def __init__(self, folder):
        self.folder, self.count, self.signal_at = str(folder), 0, None
        sys.addaudithook(self.look)

    def look(self, event, arguments):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if changes or (event == "open" and str(arguments[1]).startswith(("w", "a", "x"))):
            self.count += str(arguments[0]).startswith(self.folder)
            if self.count == self.signal_at:
                self.signal_at = None
                os.kill(os.getpid(), signal.SIGTERM)


def files_below(folder):
    """Name -> size; the order of metadata in safetensors is random."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def stop_writer(main, arguments, out, replaces):
    """Files of a whole run, (code, files) after each signal, and files of a last run without a signal."""
    out.parent.mkdir()
    if replaces:
        main(arguments)
    changes, outcomes = FileChanges(out.parent), []
    main(arguments)
    total, whole = changes.count, files_below(out.parent)
    for moment in range(MOMENTS):
        if not replaces:
            shutil.rmtree(out, ignore_errors=True)
        changes.signal_at = changes.count + 1 + moment * (total - 1) // (MOMENTS - 1)
        outcomes.append((main(arguments), files_below(out.parent)))
    shutil.rmtree(out, ignore_errors=True)
    main(arguments)
    return whole, outcomes, files_below(out.parent)


def stop_writers(rank, world_size, folder):
    from drawn_run import write_run

    from eve_ds.cli import convert, evaluate

    run, exported, found = Path(folder, "run"), Path(folder, "exported"), {}
    write_run(run)
    convert.main([str(run), "--out", str(exported)])
    for name, (command, *words) in WRITERS.items():
        out = Path(folder, name, "out")
        arguments = [{"RUN": str(run), "EXPORT": str(exported), "OUT": str(out)}.get(word, word) for word in words]
        main = {"convert": convert, "evaluate": evaluate}[command].main
        found[name] = stop_writer(main, arguments, out, name == "replacement")
    return found


def test_commands_that_write_leave_whole_results_at_a_signal(run_ranks, tmp_path):
    (found,) = run_ranks(stop_writers, 1, str(tmp_path))
    for name, (whole, outcomes, again) in found.items():
        assert [code for code, _ in outcomes] == [4] * MOMENTS, name
        for _, left in outcomes:
            if name == "evaluate":  # it keeps its predictions
                assert left.get("out/metrics.json") in (None, whole["out/metrics.json"])
                assert not [key for key in left if key.endswith(".writing")]
            else:
                plain = {key: size for key, size in whole.items() if not key.endswith("official.pth")}
                assert left in ([whole] if name == "replacement" else [{}, plain, whole]), (name, sorted(left))
        assert again == whole, name


# ------------------------------------------------------------------------------------------------------ launchers

LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port"],
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port"],
    "mpirun": ["mpirun", "-n", "2", "-genv", "MASTER_PORT"],
}
ROWS = [(*row, moment) for row in table("launcher | signal") for moment in ("step", "start-up")]
DIAGONAL = [
    ("deepspeed", "SIGKILL", "the launcher", "137", "yes", "step"),  # the launcher cannot pass it on
    ("torchrun", "SIGINT", "its process group", "1", "yes", "start-up"),
    ("mpirun", "SIGTERM", "the launcher", "4", "yes", "start-up"),
]
"""Rows of `make test`."""


@pytest.mark.parametrize("row", ROWS if "EVE_DS_SOAK" in os.environ else DIAGONAL, ids=" ".join)
def test_launchers(run, require, free_ports, tmp_path, row):
    launcher, name, to, codes, saves, moment = row
    code = re.findall(r"\d+", codes)[0 if moment == "step" else -1]
    assert row in ROWS
    require(launcher)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    python = ["python"] if launcher == "mpirun" else []
    command = [*LAUNCHERS[launcher], str(*free_ports(1)), *python, "launcher/pretrain.py"]
    command += [*run.arguments(max_steps=1_000_000), *SETTINGS, "data.num_workers=1", "train.log_every=1000000"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=PAGE.parents[1], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    ranks, below = [], []
    try:
        await_condition(lambda: len(ranks_below(process.pid)) == 2, process)
        if moment == "step":
            await_condition(lambda: (run.folder / "metrics.jsonl").is_file() and len(run.losses()) >= 3, process)
        else:  # the thread that watches the launcher starts when the signals are handled
            await_condition(lambda: all(rank.num_threads() > 1 for rank in ranks_below(process.pid)), process)
        ranks = ranks_below(process.pid)
        below = [child for rank in ranks for child in children_of(rank)]
        send(getattr(signal, name), to, process, ranks)
        ended = process.wait(ENDS_WITHIN)
        assert (128 - ended if ended < 0 else ended) == int(code), (tmp_path / "log").read_text()[-3000:]
        _, alive = psutil.wait_procs([*ranks, *below], timeout=OUTLIVES_BY)
        assert not alive
    finally:
        for left in [*ranks, *below, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    text = (tmp_path / "log").read_text()
    committed = [manifest.problems(path) for path in manifest.committed(run.folder)]
    assert committed == ([[]] if saves == "yes" and moment == "step" else []), text[-3000:]
    assert "DataLoader worker" not in text


def send(number, to, process, ranks):
    if to == "its process group":
        os.killpg(process.pid, number)
    else:
        (ranks[0] if to == "a rank" else process).send_signal(number)


def children_of(rank):
    """Processes below a rank: its fork server and loader processes."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return rank.children(recursive=True)
    return []


def ranks_below(process):
    """Processes that run the script and whose parent does not.

    Launchers also start programs that end at once, such as a compiler; these may vanish while they are looked at.
    """

    def runs_script(one):
        return any(word.endswith("launcher/pretrain.py") for word in one.cmdline()[1:3])

    def is_rank(one):
        with contextlib.suppress(psutil.NoSuchProcess):
            return runs_script(one) and not runs_script(psutil.Process(one.ppid()))
        return False

    return [one for one in psutil.Process(process).children(recursive=True) if is_rank(one)]


def await_condition(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
