"""launcher/demo.py: its own commands end to end at 8 steps, reuse of results, and errors."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eve_ds.cli.demo import is_finished, main
from eve_ds.cli.demo_steps import StepFailed, environment, run_step, this_machine
from eve_ds.config import ConfigError, load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launcher" / "demo.py"
SEED = 3
PROBES = ("position_to_color", "position_to_shape", "color_to_shape", "shape_to_color")
SIDES = {name: {"right", "wrong"} for name in ("color", "shape", "size", "position", "hidden_words", "pixel_loss")}
SIDES |= {name: {"target", "distractor"} for name in PROBES}
LIMIT = 800.0
"""Seconds a demo of 8 steps may take; on an idle machine it is about one minute."""


def run_demo(out, max_steps=8):
    """Run it as `make demo` does, from another working directory; end all its processes."""
    arguments = ["--out", str(out), "--seed", str(SEED), "--max_steps", str(max_steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(SCRIPT), *arguments]
    process = subprocess.Popen(command, cwd=out.parent, start_new_session=True, **pipes)
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(folder, completed process) of a first demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    completed = run_demo(out)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return out, completed


@pytest.mark.timeout(900)
def test_launch_line_is_printed_and_real(first):
    out, completed = first
    (line,) = (line for line in completed.stdout.splitlines() if line.startswith("$ deepspeed"))
    assert line.startswith("$ deepspeed --num_accelerators 2 ")
    assert "launcher/pretrain.py --config eve_tiny --deepspeed_config ds_configs/zero1_ep2_cpu.json" in line
    state = json.loads((out / f"seed-{SEED}/checkpoints/step-00000008/state.json").read_text())
    assert state["topology"] == {"world_size": 2, "ep_size": 2, "tp_size": 1, "zero_stage": 1}
    assert json.loads((out / f"seed-{SEED}/config.json").read_text())["train"]["seed"] == SEED


@pytest.mark.timeout(900)
def test_terminal_shows_our_lines_and_the_log_those_of_libraries(first):
    out, completed = first
    log = out / f"seed-{SEED}" / "demo.log"
    assert completed.stdout.splitlines().count(f"seed {SEED}: messages of DeepSpeed and torch are in {log}") == 1
    for line in completed.stderr.splitlines():
        assert re.match(r"\d\d:\d\d:\d\d (INFO|WARNING) ", line), line
    assert "INFO Done. 8 steps" in completed.stderr
    assert "[launch.py:" not in completed.stdout
    text = log.read_text()
    assert "[launch.py:" in text
    assert [line for line in completed.stdout.splitlines() if line.startswith("$ ")] == [
        line for line in text.splitlines() if line.startswith("$ ")
    ]


@pytest.mark.timeout(900)
def test_summary_holds_every_figure(first):
    out, _ = first
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["train_seconds"] > 0
    assert summary["samples_per_second"] * summary["train_seconds"] == pytest.approx(8 * 64)
    assert summary["peak_memory_bytes"] > 100e6
    assert 0 <= summary["export_max_abs_diff"] <= 1e-6
    (entry,) = summary["seeds"]
    assert entry["seed"] == SEED
    assert entry["steps"] == 8
    figures = {name: entry[name] for name in entry if name in SIDES} | entry["binding"]
    assert {name: set(sides) for name, sides in figures.items()} == SIDES
    assert all(0 <= value <= 1.5 for sides in figures.values() for value in sides.values())
    assert figures["pixel_loss"]["right"] > 0


@pytest.mark.timeout(900)
def test_demo_ends_with_a_table_and_the_paths_of_its_results(first):
    out, completed = first
    table, _, paths = completed.stdout.partition("Results of the demo")[2].partition(f"seed {SEED}\n  plain weights")
    for row in ("color", "lower by", "position -> color", "samples/s", "peak memory of a rank", "export: largest"):
        assert any(line.strip().startswith(row) for line in table.splitlines()), row
    for name in ("export", "report/report.md", "report/curves.png", "metrics.jsonl"):
        path = out / f"seed-{SEED}" / name
        assert str(path) in paths
        assert path.exists()
    assert str(out / "summary.json") in paths


@pytest.mark.timeout(900)
def test_pictures_are_not_blank(first):
    out, _ = first
    pictures = sorted((out / f"seed-{SEED}" / "report").glob("*.png"))
    assert [picture.name for picture in pictures] == ["curves.png", "experts.png", "reconstructions.png"]
    for picture in pictures:
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert pixels.std() > 10


@pytest.mark.timeout(900)
def test_second_run_reuses_everything_and_reports_it(first):
    out, _ = first
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = run_demo(out)
    assert again.returncode == 0, again.stderr
    assert "$ " not in again.stdout
    for what in ("the finished training in", "export.json", "evaluation.json", "report.md"):
        assert any(what in line and "reusing" in line for line in again.stdout.splitlines()), what
    assert "Results of the demo" in again.stdout
    changed = {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed <= {"summary.json"}


@pytest.mark.timeout(900)
def test_other_settings_are_not_mixed_into_the_folder(first):
    refused = run_demo(first[0], max_steps=30)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"demo: {first[0] / f'seed-{SEED}'} holds a run with train.max_steps 8, now it is 30: "
        "remove that folder, or name another --out\n"
    )


@pytest.mark.timeout(900)
def test_a_step_that_fails_stops_the_demo_with_its_exit_code(first, tmp_path):
    run = tmp_path / "out" / f"seed-{SEED}"
    for name in ("checkpoints/latest", "checkpoints/step-00000008/state.json", "config.json", "export/export.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes((first[0] / run.name / name).read_bytes())
    stopped = run_demo(tmp_path / "out")  # the export has lost its weights
    assert stopped.returncode == 2
    first_line, second_line = stopped.stderr.splitlines()
    assert first_line.startswith(f"evaluate: {run / 'export'} is not an export, it lacks")
    assert second_line == f"demo: evaluate.py failed with exit code 2; see above and {run / 'demo.log'}"
    assert not (tmp_path / "out" / "summary.json").exists()


# ----------------------------------------------------------------------------------------------- without a training


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"ended_at": [2000, 100.0]}, True),
        ({"ended_at": [1000, 100.0]}, False),  # longer now
        ({}, False),  # saved within the run
    ],
)
def test_last_checkpoint_decides_whether_a_run_is_finished(tmp_path, state, expected):
    config = load_config("eve_tiny", ["train.max_steps=2000", "train.max_seconds=100"])
    assert not is_finished(tmp_path, config)
    folder = tmp_path / "checkpoints" / "step-00000500"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text(f"{folder.name}\n")
    (folder / "state.json").write_text(json.dumps({"step": 500, "seconds": 99.9} | state))
    assert is_finished(tmp_path, config) is expected
    (folder / "state.json").unlink()
    with pytest.raises(ConfigError, match=r"state\.json cannot be read .*: remove"):
        is_finished(tmp_path, config)


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        ("raise SystemExit(7)", 7, "step.py failed with exit code 7; see above and "),
        ("import os; os.kill(os.getpid(), 9)", 137, "step.py failed with signal 9; see above and "),
    ],
)
def test_a_failed_step_shows_its_last_lines_and_its_exit_code(tmp_path, capfd, code, exit_code, message):
    (tmp_path / "demo.log").write_text("earlier\n")
    (tmp_path / "step.py").write_text(f"import sys\nprint(*range(50), sep='\\n', file=sys.stderr, flush=True)\n{code}")
    with pytest.raises(StepFailed, match=message) as raised:
        run_step([sys.executable, str(tmp_path / "step.py")], tmp_path)
    assert raised.value.exit_code == exit_code
    assert capfd.readouterr().err.splitlines() == [str(number) for number in range(40, 50)]
    assert (tmp_path / "demo.log").read_text().splitlines()[0] == "earlier"


@pytest.mark.parametrize(
    ("gpus", "chosen", "ranks", "config", "accelerator"),
    [
        (0, None, 2, "zero1_ep2_cpu.json", "cpu"),
        (1, None, 1, "zero1_bf16.json", None),
        (8, None, 8, "zero1_bf16.json", None),
        (6, None, 2, "zero1_bf16.json", None),  # of a batch of 64
        (8, "cuda", 8, "zero1_bf16.json", "cuda"),
        (8, "cpu", 2, "zero1_ep2_cpu.json", "cpu"),
        (0, "cuda", 2, "zero1_ep2_cpu.json", "cuda"),
    ],
)
def test_run_takes_as_many_gpus_as_divide_the_batch(tmp_path, monkeypatch, gpus, chosen, ranks, config, accelerator):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if chosen:
        monkeypatch.setenv("DS_ACCELERATOR", chosen)
    fake = tmp_path / "nvidia-smi"
    lines = "".join(f"echo 'GPU {number}: some name (UUID: {number})'\n" for number in range(gpus))
    fake.write_text(f"#!/bin/sh\n{lines or 'echo NVIDIA-SMI has failed; exit 9'}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    machine = this_machine(64)
    assert (machine.ranks, machine.deepspeed_config) == (ranks, f"ds_configs/{config}")
    env = environment(tmp_path)
    assert env.get("DS_ACCELERATOR") == accelerator
    assert (env["OMP_NUM_THREADS"], env["OMP_WAIT_POLICY"]) == ("1", "PASSIVE")
    assert env["TORCH_EXTENSIONS_DIR"].startswith(str(tmp_path))


def test_terminated_demo_ends_its_step(tmp_path):
    step = tmp_path / "step.py"
    step.write_text(f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    code = f"""
import sys
from pathlib import Path
from eve_ds.cli.command import run_command
from eve_ds.cli.demo_steps import run_step
sys.exit(run_command("demo", lambda: run_step([sys.executable, {str(step)!r}], Path({str(tmp_path)!r}))))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 4
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "demo: argument --seeds: 0 must be at least 1 (see --help)\n"),
        (["--seed", "1", "--seed", "1"], "demo: --seed (1 1) must name each seed once (see --help)\n"),
        (["--seeds", "2", "--seed", "1"], "demo: argument --seed: not allowed with argument --seeds (see --help)\n"),
    ],
)
def test_wrong_arguments_exit_with_code_2_and_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == message
