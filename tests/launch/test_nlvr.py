"""The commands of a first run on own data, on the real NLVR corpus: shards, tokenizer, 100 steps, report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DATA = os.environ.get("EVE_DS_TEST_DATA")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(DATA is None, reason="EVE_DS_TEST_DATA does not name the folder of nlvr-dev.tar.xz")


def launch(script, *arguments):
    command = [sys.executable, str(ROOT / "launcher" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pretraining_on_nlvr_lowers_the_loss(tmp_path):
    shards, tokenizer, run = tmp_path / "shards", tmp_path / "tokenizer", tmp_path / "run"
    launch("prepare.py", "nlvr", Path(DATA) / "nlvr-dev.tar.xz", "--out", shards, "--limit", 1200)
    launch("prepare.py", "tokenizer", "--shards", shards, "--vocab_size", 1000, "--out", tokenizer)
    settings = [
        f"data.sources=[{{kind: shards, shards: {shards}}}]",
        f"data.tokenizer={tokenizer}",
        "data.crop_scale=[0.5, 1.0]",
        "data.horizontal_flip=0.5",
        "model.vocab_size=1000",
        "train.train_batch_size=16",
    ]
    launch("pretrain.py", "--config", "eve_tiny", "--max_steps", 100, "--output_dir", run, "--set", *settings)
    launch("report.py", run)

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [record["loss"] for record in records if record["kind"] == "train"]
    # Measured on one seed: the loss falls from 14.5 (mean of the first ten steps) to 6.4.
    assert sum(loss[-3:]) / 3 < 0.75 * loss[0]
    report = (run / "report" / "report.md").read_text()
    assert "100" in report
    assert (run / "report" / "curves.png").stat().st_size > 10_000
