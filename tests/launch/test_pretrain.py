"""Bad input through launcher/pretrain.py: one clear line, exit code 2, on every rank, and nothing is left behind.

One start of two ranks goes through all cases; one more starts two separate processes as a launcher would, to see that
they exit.
"""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import overrides

from eve_ds.cli.pretrain import main
from eve_ds.config import section

LAUNCHER = Path(__file__).parents[2] / "launcher" / "pretrain.py"
TINY = [
    *overrides(),
    "train.train_batch_size=8",
    "train.max_steps=2",
    "train.max_seconds=null",
    "optimizer.decay_by=steps",
]


def cases(folder):
    """(name, DeepSpeed configuration or its text, more settings, output folder, text of the error)."""
    folder = Path(folder)
    zero1 = {"zero_optimization": {"stage": 1}}
    run, other = folder / "run", folder / "other"
    return [
        ("unknown key", zero1, ["train.max_step=3"], run, "unknown key 'train.max_step'; did you mean 'max_steps'?"),
        ("experts", zero1, ["parallel.ep_size=3"], run, "num_experts (4) must be divisible by parallel.ep_size (3)"),
        (
            "batch",
            zero1,
            ["train.train_batch_size=7"],
            run,
            "train_batch_size (7) must equal micro_batch_size (free) *",
        ),
        (
            "contradiction",
            zero1 | {"train_batch_size": 16},
            [],
            run,
            "train.train_batch_size (8) in the YAML contradicts train_batch_size (16) in the DeepSpeed JSON",
        ),
        (
            "missing shards",
            zero1,
            [f"data.sources=[{{kind: shards, shards: '{folder}/no-{{00..03}}.tar'}}]"],
            run,
            f"{folder}/no-00.tar",
        ),
        (
            "empty shards",
            zero1,
            [f"data.sources=[{{kind: shards, shards: {folder}/empty.tar}}]"],
            run,
            f"{folder}/empty.tar",
        ),
        ("vocabulary", zero1, ["model.vocab_size=20"], run, "larger than model.vocab_size (20)"),
        ("tokenizer", zero1, [f"data.tokenizer={folder}/nowhere.json"], run, f"{folder}/nowhere.json"),
        ("image", zero1, ["model.image_size=60"], run, "image_size (60) must be divisible by patch_size (8)"),
        (
            "zero 3",
            {"zero_optimization": {"stage": 3}},
            ["train.compile=blocks"],
            run,
            "train.compile (blocks) cannot be",
        ),
        (
            "zero 0",
            {},
            ["parallel.ep_size=2"],
            run,
            "cannot be used with zero_optimization.stage 0 and parallel.ep_size",
        ),
        ("other run", zero1, ["model.hidden_size=64"], other, f"({other}) is the folder of another run: its model.hid"),
        ("below a file", zero1, [], folder / "file" / "run", "cannot be written: Not a directory"),
        ("broken JSON", "{'a': 1", [], run, "is not JSON: Expecting property name enclosed in double quotes"),
        ("list", "[1]", [], run, "the DeepSpeed JSON must be a mapping of settings, not a list"),
        ("no JSON", None, [], run, "cannot be read: No such file or directory"),
        (
            "optimizer",
            zero1 | {"optimizer": {"type": "Lamb"}},
            [],
            run,
            'optimizer.type ("Lamb") in the DeepSpeed JSON cannot be used: eve_ds trains with AdamW',
        ),
        ("no checkpoint", zero1, ["--resume", f"{folder}/x"], run, f"{folder}/x to resume from does not exist"),
    ]


def bad_inputs(rank, world_size, folder):
    """(exit code, standard error) of each case on this rank."""
    found = []
    for number, (_, dictionary, settings, output_dir, _) in enumerate(cases(folder)):
        file = Path(folder) / f"deepspeed{number}-{rank}.json"
        if dictionary is not None:
            file.write_text(dictionary if isinstance(dictionary, str) else json.dumps(dictionary))
        files = ["--deepspeed_config", str(file), "--output_dir", str(output_dir)]
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            code = main([*files, "--set", *TINY, *settings])
        found.append((code, stderr.getvalue()))
    return found


@pytest.mark.timeout(400)
def test_bad_input_is_one_line_on_every_rank(run_ranks, tmp_path):
    from eve_ds.config import load_config

    (tmp_path / "file").touch()
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(load_config("eve_tiny", TINY).model_dump_json())
    results = run_ranks(bad_inputs, 2, str(tmp_path), timeout=360)
    for number, (name, *_, text) in enumerate(cases(tmp_path)):
        for code, stderr in (result[number] for result in results):
            assert code == 2, (name, stderr)
            errors = [line for line in stderr.splitlines() if " ERROR " in line]
            assert len(errors) == 1, (name, stderr)
            assert text in errors[0], name
            assert "Traceback" not in stderr, name
    assert not (tmp_path / "run" / "config.json").exists(), "a run that could not start does not claim the folder"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.timeout(300)
def test_refused_clipping_ends_every_process_with_code_2(tmp_path, free_port):
    file = tmp_path / "zero0.json"
    file.write_text("{}")
    command = [sys.executable, str(LAUNCHER), "--deepspeed_config", str(file), "--output_dir", str(tmp_path / "run")]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    processes = [
        subprocess.Popen(
            [*command, "--set", *TINY, "parallel.ep_size=2"],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], outputs
    for stderr in outputs:
        assert "Traceback" not in stderr
        assert len([line for line in stderr.splitlines() if " ERROR " in line]) == 1


def test_a_former_name_is_logged(tmp_path, capsys, monkeypatch):
    section._say_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("eve_ds"), "handlers", [])  # other tests may have left the launcher's
    file = tmp_path / "old.yaml"
    file.write_text("base: eve_tiny\nmodel: {objective: msm}\ntrain: {max_steps: 0}\n")
    assert main(["--config", str(file), "--output_dir", str(tmp_path / "run")]) == 2
    said, refused = capsys.readouterr().err.splitlines()
    assert said.endswith("INFO objective ('msm') is read as objectives (['joint'])")
    assert "ERROR" in refused
    assert "train.max_steps (0)" in refused


def test_ops_that_cannot_be_built_stop_before_anything_is_written(tmp_path):
    command = [sys.executable, str(LAUNCHER), "--set", *TINY, "--output_dir", str(tmp_path / "run")]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    env |= {"EVE_DS_OPS": "fast", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "EVE_DS_OPS (fast) must be one of auto, build, reference" in done.stderr + done.stdout
    assert not (tmp_path / "run" / "config.json").exists()
