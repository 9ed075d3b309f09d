"""`launcher/prepare.py`: its output, its exit codes, and a run that is killed in the middle."""

import hashlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from eve_ds.cli.prepare import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launcher" / "prepare.py"
TEST_DATA = os.environ.get("EVE_DS_TEST_DATA")


def prepare(*arguments, cwd=None, env=None):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=os.environ | (env or {}),
        check=False,
    )


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def test_a_killed_run_continues_to_the_same_bytes(tmp_path):
    arguments = ["scenes", "--num_samples", 3000, "--samples_per_shard", 50]
    clean = prepare(*arguments, "--workers", 1, "--out", tmp_path / "clean")
    assert clean.returncode == 0, clean.stderr
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments), "--workers", "2", "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    workers = []
    try:
        wait_until(lambda: len(list((out / ".prepare").glob("shard-*.tar.json"))) >= 5)
        workers = children(process.pid)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(workers) >= 2
    assert not (out / "index.json").exists(), "the kill must come in the middle"
    wait_until(lambda: not any(map(alive, workers)), 20)

    again = prepare(*arguments, "--workers", 2, "--out", out)
    assert again.returncode == 0, again.stderr
    kept = int(again.stdout.partition(" shards kept from an earlier run")[0].rpartition(" ")[2])
    assert 5 <= kept < 60
    assert digests(out) == digests(tmp_path / "clean")

    third = prepare(*arguments, "--out", out)
    assert third.returncode == 0
    assert "3,000 samples of 3,000 images in 60 shards" in third.stdout
    assert "(already there, nothing to do; to read the source again, remove " in third.stdout


@pytest.mark.skipif(not TEST_DATA, reason="EVE_DS_TEST_DATA names no folder with the NLVR corpus")
def test_nlvr_and_a_tokenizer_of_its_captions(tmp_path):
    archive = Path(TEST_DATA) / "nlvr-dev.tar.xz"
    done = prepare("nlvr", archive, "--limit", 120, "--samples-per-shard", 50, "--out", tmp_path / "nlvr")
    assert done.returncode == 0, done.stderr
    assert "120 samples of 120 images in 3 shards" in done.stdout
    assert "sentence labeled false (as dev-" in done.stdout
    with tarfile.open(tmp_path / "nlvr" / "shard-000000.tar") as tar:
        assert len(tar.getnames()) == 150

    # The first images are the test set now: none of them may come back.
    ids = tmp_path / "nlvr" / "ids.txt"
    rest = prepare("nlvr", archive, "--limit", 150, "--exclude-ids", ids, "--out", tmp_path / "rest")
    assert rest.returncode == 0, rest.stderr
    assert "30 samples of 30 images" in rest.stdout
    assert "skipped 120: excluded id" in rest.stdout
    assert "excluded ids: 120 of 120 listed ids occur in this source" in rest.stdout
    assert not set(ids.read_text().split()) & set((tmp_path / "rest" / "ids.txt").read_text().split())

    arguments = ["tokenizer", "--shards", tmp_path / "nlvr", "--vocab_size", 120, "--out", tmp_path / "tokenizer"]
    trained = prepare(*arguments)
    assert trained.returncode == 0, trained.stderr
    from eve_ds.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert len(tokenizer) == 120
    assert tokenizer.unk_token_id not in tokenizer("there is a box with a yellow circle").input_ids
    again = prepare(*arguments)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "holds a tokenizer already; choose another --out or remove it" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nlvr", "nothing.tar.xz", "--out", "o"], "prepare: source nothing.tar.xz does not exist: check the path"),
        (["json", "list.json", "--out", "o"], "list.json is not a caption JSON: expected ["),
        (["karpathy", "list.json", "--out", "o"], "list.json is not a Karpathy JSON: expected {"),
        (["table", "t.csv", "--out", "o"], "t.csv has no column 'image'; it has: a, b"),
        (["img2dataset", "t.csv", "--out", "o"], "prepare: img2dataset folder t.csv is not a folder: check the path"),
        (["scenes", "--num_samples", "5", "--out", "t.csv"], "prepare: cannot write to t.csv: "),
        (
            ["scenes", "--num_samples", "5", "--exclude_ids", "no", "--out", "o"],
            "cannot read the ids to exclude from no",
        ),
        (["scenes", "--num_samples", "0", "--out", "o"], "argument --num_samples: 0 must be at least 1"),
        (["scenes", "--num_samples", "x", "--out", "o"], "invalid whole number value: 'x'"),
        (["table", "t.csv", "--delimiter", "ab", "--out", "o"], r"--delimiter: 'ab' must be one character, or \t for"),
        (["table", "t.csv", "--delimiter", "", "--out", "o"], "the value of --delimiter is empty"),
        (["scenes"], "the following arguments are required: --out (see --help)"),
        (["parquet", "x"], "invalid choice: 'parquet'"),
        (["tokenizer", "--shards", ".", "--vocab_size", "99", "--out", "o"], "holds no .tar shards"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "list.json").write_text(json.dumps([{"file": "a"}]))
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:  # from the parser
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2
    assert message in shown.err
    assert (shown.err.count("\n"), shown.out) == (1, "")
    assert not (tmp_path / "o").exists()


def test_a_tab_may_be_escaped(tmp_path):
    (tmp_path / "a.txt").write_text("image\tcaption\na.png\ta cat\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    arguments = ["table", str(tmp_path / "a.txt"), "--delimiter", r"\t", "--workers", "1", "--out", str(tmp_path / "o")]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "o" / "report.json").read_text())["samples"] == 1


def test_a_read_only_folder_is_one_line(tmp_path):
    done = prepare("scenes", "--num_samples", 5, "--workers", 1, "--out", "/sys/eve_ds", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("prepare: cannot write to /sys/eve_ds: ")
    assert done.stderr.endswith("; choose another --out\n")
    assert done.stderr.count("\n") == 1


def test_a_terminal_gets_a_progress_bar(tmp_path):
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "scenes", "--num_samples", "200", "--samples_per_shard", "50", "--workers", "1",
         "--out", str(tmp_path / "out")],
        stdout=terminal, stderr=terminal, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    try:
        while select.select([main], [], [], 60)[0]:
            try:
                shown += os.read(main, 65536)
            except OSError:  # the other end is closed
                break
    finally:
        os.close(main)
        assert process.wait(60) == 0
    text = shown.decode()
    assert "100%" in text
    assert "200 images, 4 shards, 0 skipped" in text
    assert "200 samples of 200 images in 4 shards" in text
