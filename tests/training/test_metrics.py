"""Records of metrics.jsonl, progress lines, and FLOP counts, which must match those of torch's counter."""

import errno
import fcntl
import json
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eve_ds.config import load_config
from eve_ds.data.batch import Sample
from eve_ds.data.collate import Collator
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.log import get_logger
from eve_ds.model.eve import EVE
from eve_ds.objectives.pretraining import pretraining_flops
from eve_ds.objectives.registry import objectives_of
from eve_ds.training import progress_line
from eve_ds.training.flops import peak_flops
from eve_ds.training.metrics import Metrics, MetricsWriter, peak_memory_bytes, training_clock
from eve_ds.training.progress_line import ProgressLine

NUMBERS = {"loss": 2.3456, "mim": 0.12345, "mlm": 1.2345, "load_balancing": 1.0123, "lr": 1.2e-3}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, *steps, **numbers):
    writer = MetricsWriter(folder)
    for step in steps:
        writer.write("train", step=step, seconds=step / 3, samples=8 * step, **numbers)
    writer.close()


def test_every_record_has_kind_step_seconds_and_samples(tmp_path):
    write(tmp_path, 1, 2, loss=0.5)
    write(tmp_path, 3, loss=0.25)  # a resumed run appends to the same file
    expected = {"kind": "train", "step": 2, "seconds": 0.667, "samples": 16, "loss": 0.5}
    assert lines(tmp_path)[1] == expected
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_record_is_flushed_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write("event", step=1, seconds=0.0, samples=1, message="now")
    assert lines(tmp_path)[0]["message"] == "now"
    writer.close()


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write(tmp_path, 1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_non_finite_numbers_become_null(tmp_path):
    write(tmp_path, 1, loss=math.nan, grad_norm=math.inf, pixel_loss={"right": math.nan, "wrong": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    record = json.loads(text)
    assert record["loss"] is None
    assert record["grad_norm"] is None
    assert record["pixel_loss"] == {"right": None, "wrong": 1.0}


def test_an_unfinished_last_line_does_not_corrupt_the_next_record(tmp_path):
    write(tmp_path, 1, 2)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    write(tmp_path, 2, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, get_logger().name)
    return caplog


class Disk:
    """Raw file that takes `room` more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        taken = bytes(data[: self.room])
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(taken)
        return self.file.write(taken)

    def close(self):
        self.file.close()


@pytest.mark.parametrize("room", [0, 1, 40, 100])
def test_records_wait_in_memory_while_the_disk_is_full(tmp_path, logged, room):
    writer = MetricsWriter(tmp_path)
    writer._file = disk = Disk(writer._file, room)
    for step in range(1, 4):
        writer.write("train", step=step, seconds=0.0, samples=step)
    assert [record.getMessage() for record in logged.records] == [
        f"{tmp_path}/metrics.jsonl: No space left on device; its records wait in memory until there is room"
    ]
    disk.room = 10**6
    writer.write("train", step=4, seconds=0.0, samples=4)
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert len(logged.records) == 1


def test_records_that_never_reach_the_disk_are_counted_and_leave_no_half_line_to_the_next_run(tmp_path, logged):
    writer = MetricsWriter(tmp_path)
    writer._file = Disk(writer._file, 100)
    for step in range(1, 4):
        writer.write("train", step=step, seconds=0.0, samples=step)
    writer.close()
    assert (
        logged.records[-1].getMessage().endswith("metrics.jsonl lacks its last 2 records, which could not be written")
    )
    write(tmp_path, 2, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_monitor_on_a_full_disk_does_not_end_the_run(tmp_path, logged):
    def refuse(_events):
        raise OSError(errno.ENOSPC, "No space left on device", "train_loss.csv")

    metrics = Metrics(tmp_path, SimpleNamespace(monitor=SimpleNamespace(enabled=True, write_events=refuse)))
    metrics.write("train", step=3, seconds=0.0, samples=3, loss=1.0)
    metrics.close()
    assert logged.records[-1].getMessage() == (
        "a monitor of the DeepSpeed JSON lacks step 3: train_loss.csv: No space left on device"
    )
    assert lines(tmp_path)[0]["loss"] == 1.0


def test_plain_lines_appear_every_log_every_steps(logged):
    with ProgressLine(50) as progress:
        for step in range(10, 101, 10):
            progress.update(step, step / 100, NUMBERS | {"samples_per_second": 267.12})
    messages = [record.getMessage() for record in logged.records]
    assert len(messages) == 2
    start = (
        "step 50  loss 2.346  mim 0.1235  mlm 1.234  load_balancing 1.012  lr 0.0012  samples_per_second 267.1  eta "
    )
    assert messages[0].startswith(start)


@pytest.mark.parametrize(("done", "expected"), [(0.0, 25.0), (0.5, 50.0)])
def test_remaining_time_follows_from_progress_since_the_resume(logged, monkeypatch, done, expected):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: clock.now)
    with ProgressLine(1, done) as progress:
        clock.now += 100.0 - 50 * (done > 0)
        progress.update(1, 0.8 if done == 0 else 0.75, NUMBERS)  # 100 s for 80 %, or 50 s for 25 %
    assert logged.records[0].getMessage().endswith(f"eta {expected:.0f} s")


def test_only_rank_zero_logs_progress(logged, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with ProgressLine(1) as progress:
        progress.update(1, 0.5, NUMBERS)
    assert not logged.records


LIVE = """
import logging, time
from eve_ds.log import get_logger
from eve_ds.training.progress_line import ProgressLine
numbers = {"loss": 2.3456, "mim": .12345, "mlm": 1.2345, "load_balancing": 1.0123, "lr": 1.2e-3}
with ProgressLine(10**6) as progress:
    for step in range(1, 4):
        progress.update(2000 * step, step / 4, numbers | {"samples_per_second": 267.123})
        time.sleep(0.15)
    get_logger().info("a log line in between")
"""


def test_live_line_fits_eighty_columns():
    terminal, child_side = pty.openpty()
    fcntl.ioctl(child_side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    # Standard output is not a terminal, as in `... > log.txt`: the line must go to standard error.
    process = subprocess.Popen([sys.executable, "-c", LIVE], env=env, stdout=subprocess.PIPE, stderr=child_side)
    os.close(child_side)
    written = b""
    try:
        while chunk := os.read(terminal, 4096):
            written += chunk
    except OSError:  # Linux raises this at the end of a pseudo-terminal
        pass
    assert process.stdout.read() == b""
    assert process.wait(60) == 0
    shown = re.split(r"[\r\n]+", re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", written).decode())
    live = [line for line in shown if "step 6000" in line][-1]
    assert re.match(r" 75% eta 0:00:0\d step 6000 loss 2.35 mim 0.123 mlm 1.23 lr 0.0012 267.1/s", live)
    assert len(live) <= 80
    assert any(line.rstrip().endswith("a log line in between") for line in shown)


SETS = (["joint"], ["mim"], ["mlm"], ["mim", "mlm"], ["itc"], ["itc", "itm"], ["mim", "mlm", "itc", "itm"])
CHEAP = [
    "masking.predicted_patch_share=0.5",
    "masking.language_view_patch_share=0.25",
    "masking.image_view_word_share=0.5",
]


@pytest.mark.parametrize("decoder", ["self", "cross"])
@pytest.mark.parametrize("masking", [[], CHEAP], ids=["paper", "cheap"])
@pytest.mark.parametrize("objectives", SETS, ids="+".join)
def test_flops_equal_the_count_of_torch(objectives, masking, decoder, monkeypatch):
    monkeypatch.setenv("EVE_DS_OPS", "reference")
    overrides = [f"model.pixel_decoder.kind={decoder}", "model.pixel_decoder.num_layers=2", "model.moe.top_k=3"]
    overrides += [f"model.objectives={objectives}", "masking.text_to_image_share=0", "masking.predicted_patch_share=1"]
    overrides += ["masking.text_mask_ratio=0.5", "masking.max_text_mask_ratio=null", "masking.image_view_share=1"]
    config = load_config("eve_tiny", [*overrides, "masking.language_view_patch_share=1", *masking])
    collate = Collator(
        config, load_tokenizer("scenes"), objectives_of(config.model), has_images=True, has_captions=True
    )
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    batch = collate([Sample(str(number), 0, image, "a small red cross top left " * 2) for number in range(4)])
    model, text_tokens = EVE(config.model).eval(), 14
    assert batch.input_ids.shape == (4, text_tokens)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**batch.model_inputs()).tensors()
    # Our count leaves out routers and the heads of itc and itm, which process one token per sample. It takes the share
    # of masked words from all tokens of the text, of which two are never masked. It leaves out padding, which attention
    # computes if an image view leaves words out.
    ours = pretraining_flops(config.model, config.masking, text_tokens)
    assert ours == pytest.approx(counter.get_total_flops() / 4, rel=2.5e-2 if masking else 1e-2)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("Some other device", "bf16", None),
    ],
)
def test_peak_flops_depend_on_device_name_and_precision(monkeypatch, name, precision, expected):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops(precision) == expected


def test_an_unused_gpu_has_no_peak_flops(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert peak_flops("bf16") is None
    assert peak_memory_bytes() > 50e6  # resident memory of this process; torch alone takes more


def test_peak_memory_grows_with_allocations():
    before = peak_memory_bytes()
    held = torch.ones(int(before) // 4 + 25_000_000)  # written, and larger than any peak before
    assert peak_memory_bytes() - before > 50e6
    del held


def test_training_clock_on_cpus_counts_this_thread_and_the_one_that_loads():
    feed = SimpleNamespace(cpu_seconds=0.0)
    clock = training_clock(torch.device("cpu"), feed)
    started, other = clock(), threading.Thread(target=spend, args=(0.2,))
    other.start()
    other.join()
    waited = clock() - started
    spend(0.1)
    assert waited < 0.05
    before = clock()
    feed.cpu_seconds = 5.0
    assert 5.0 <= clock() - before < 5.05
    assert before - started >= 0.1
    assert training_clock(torch.device("cuda"), feed) is time.perf_counter


def spend(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
