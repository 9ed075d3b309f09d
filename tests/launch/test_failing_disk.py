"""On a disk that is full, read-only, slow or without locks, results are whole or absent, and a rerun completes them."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drawn_run import write_run
from tiny import overrides

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests" / "support" / "failing_disk.c"
COMPILER = shutil.which("cc") or shutil.which("gcc")
LIMIT = 120
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("shim") / "failing_disk.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-o", path, SHIM, "-ldl"], check=True, timeout=60)
    return path


class Disk:
    """Folder whose state a test sets."""

    def __init__(self, library, parent):
        self.folder, self.state = parent / "disk", parent / "state"
        self.folder.mkdir()
        self.environment = os.environ | {
            "LD_PRELOAD": str(library),
            "FAILING_FOLDER": str(self.folder),
            "FAILING_MODE": str(self.state),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "launch")]),
        }

    def set(self, mode):
        """Change the state; the file is replaced, since the program under test may read it at any time."""
        aside = self.state.with_suffix(".new")
        aside.write_text(mode)
        aside.replace(self.state)


@pytest.fixture
def disk(library, tmp_path):
    return Disk(library, tmp_path)


def commands(source, exported, folder, state):
    """Run in a process with the shim: every command in every state; returns (code, standard error, files left)."""
    from eve_ds.cli import convert, evaluate, prepare

    lines = {
        "export": (convert.main, [source, "--out", "OUT"]),
        "official": (convert.main, [source, "--out", "OUT", "--format", "official"]),
        "hf": (convert.main, [source, "--out", "OUT", "--format", "hf"]),
        "universal": (convert.main, ["universal", source, "--out", "OUT"]),
        "evaluate": (evaluate.main, ["zero_shot", "--model", exported, "--out", "OUT", "--limit", "4"]),
        "scenes": (prepare.main, ["scenes", "--num_samples", "20", "--out", "OUT"]),
    }
    found = {}
    for mode in ("full", "read-only", ""):
        Path(state).write_text(mode)
        for name, (main, arguments) in lines.items():
            out = Path(folder) / name / "out"
            if mode == "full":
                out.parent.mkdir()
            with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()):
                code = main([argument.replace("OUT", str(out)) for argument in arguments])
            left = sorted(str(path.relative_to(out.parent)) for path in out.parent.rglob("*") if path.is_file())
            found[f"{name} {mode}".strip()] = (code, error.getvalue(), left)
    return found


@pytest.fixture(scope="module")
def outcomes(library, tmp_path_factory):
    parent = tmp_path_factory.mktemp("commands")
    disk = Disk(library, parent)
    write_run(parent / "run")
    code = (
        "import json, sys; from test_failing_disk import commands; "
        "from eve_ds.cli.convert import main; main([sys.argv[1], '--out', sys.argv[2]]); "
        "json.dump(commands(*sys.argv[1:5]), open(sys.argv[5], 'w'))"
    )
    given = [parent / "run", parent / "export", disk.folder, disk.state, parent / "found.json"]
    command = [sys.executable, "-c", code, *map(str, given)]
    done = subprocess.run(command, env=disk.environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((parent / "found.json").read_text())


@pytest.mark.parametrize("mode", ["full", "read-only"])
@pytest.mark.parametrize("name", ["export", "official", "hf", "universal", "evaluate", "scenes"])
def test_a_command_ends_in_one_line_and_leaves_no_half_result(outcomes, name, mode):
    code, error, left = outcomes[f"{name} {mode}"]
    reason = {"full": "No space left on device", "read-only": "Read-only file system"}[mode]
    last = error.splitlines()[-1]
    assert code == 5, error
    assert reason in last
    assert "Traceback" not in error
    # An evaluation keeps its complete predictions, and prepare its finished shards, for the next start.
    assert left == [] or name in ("evaluate", "scenes"), left
    assert not [path for path in left if path.endswith(("metrics.json", "index.json", ".writing"))]


@pytest.mark.parametrize("name", ["export", "official", "hf", "universal", "evaluate", "scenes"])
def test_the_same_command_succeeds_when_there_is_room(outcomes, name):
    code, error, left = outcomes[name]
    assert code == 0, error
    assert left


def finetune_twice(folder, state):
    """Run in a process with the shim: fine-tuning whose disk is full when its model is saved, and the same again."""
    from eve_ds.cli import finetune
    from eve_ds.training import finetune as training

    save, found = training.save_task_model, []

    def save_on_a_full_disk(*arguments):
        Path(state).write_text("full")
        save(*arguments)

    options = ["--task", "vqa", "--init", "none", "--max_steps", "3", "--output_dir", f"{folder}/finetuned"]
    settings = ["train.train_batch_size=8", "train.save_every_steps=2", "optimizer.decay_by=steps"]
    for training.save_task_model in (save_on_a_full_disk, save):
        with contextlib.redirect_stderr(io.StringIO()) as error:
            code = finetune.main([*options, "--set", *settings, "task.val.num_examples=4"])
        left = sorted(path.name for path in Path(folder, "finetuned").iterdir())
        found.append((code, error.getvalue(), left))
        Path(state).write_text("")
    return found


def test_fine_tuning_on_a_full_disk_keeps_its_last_step_and_ends_with_the_model_later(disk, tmp_path):
    code = (
        "import json, sys; from test_failing_disk import finetune_twice; "
        "json.dump(finetune_twice(*sys.argv[1:3]), open(sys.argv[3], 'w'))"
    )
    found = tmp_path / "found.json"
    command = [sys.executable, "-c", code, disk.folder, disk.state, found]
    done = subprocess.run(command, env=disk.environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    (code, error, left), (second_code, second_error, finished) = json.loads(found.read_text())
    assert code == 5, error
    assert "No space left on device" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert "model" not in left
    assert second_code == 0, second_error
    assert f"resumed from {disk.folder}/finetuned/checkpoints/step-00000003" in second_error
    assert "model" in finished
    assert not {"checkpoints", ".pieces"} & set(finished)


def test_a_run_on_a_full_disk_ends_after_its_failed_saves_and_resumes(disk):
    run = disk.folder / "run"
    command = [sys.executable, str(ROOT / "launcher" / "pretrain.py"), "--output_dir", str(run), "--max_steps", "12"]
    changes = ["train.train_batch_size=4", "train.save_every_steps=1", "train.max_failed_saves=2"]
    command += ["--set", *overrides(), *changes, "train.metrics_every=1"]
    disk.set("slow")
    process = subprocess.Popen(command, env=disk.environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + LIMIT
    while not list(run.glob("checkpoints/step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    disk.set("full")
    error = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 5, error
    assert "Failures in a row: 3, limit train.max_failed_saves (2). Free space or" in error.splitlines()[-1]
    assert "metrics.jsonl: No space left on device; its records wait in memory until there is room" in error
    assert "Traceback" not in error
    steps = [int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")]
    assert steps
    assert not list(run.glob("checkpoints/.saving-*"))
    disk.set("no-locks")
    done = subprocess.run(command, env=disk.environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{run}/.lock cannot be locked (No locks available), so nothing keeps two processes from" in done.stderr
    assert f"resumed from {run}/checkpoints/step-{max(steps):08d}" in done.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record["step"] for record in records if record["kind"] == "train"]
    assert sorted(set(trained)) == list(range(1, 13))
