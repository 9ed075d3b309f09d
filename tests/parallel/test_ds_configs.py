"""The shipped DeepSpeed files contain only keys of DeepSpeed and fit our configuration."""

import json
from pathlib import Path

import deepspeed.runtime.config as deepspeed_config
import pytest

from eve_ds.config import load_config
from eve_ds.parallel.settings import resolve_deepspeed_config

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))


def test_folder_contains_files():
    assert "zero1_ep2_cpu" in [file.stem for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_resolves_and_deepspeed_accepts_it(file):
    overrides = ["optimizer.clip_grad_norm=0"] if file.stem == "zero0" else []
    settings = load_config("eve_tiny", [*overrides, "train.train_batch_size=64"])
    config, resolved = resolve_deepspeed_config(json.loads(file.read_text()), settings, world_size=2)
    parsed = deepspeed_config.DeepSpeedConfig(resolved | {"train_batch_size": 32})  # this process is a world of one
    zero = parsed.zero_config
    assert str(int(zero.stage)) == file.stem[len("zero")]
    assert zero.contiguous_gradients
    assert zero.reduce_scatter, "MoE gradients are wrong without it"
    assert parsed.bfloat16_config.enabled == ("bf16" in file.stem or "offload" in file.stem)
    assert config.train.precision == ("bf16" if parsed.bfloat16_config.enabled else "fp32")
    assert (zero.offload_optimizer is not None) == ("offload" in file.stem)
    assert parsed.monitor_config.tensorboard.enabled == parsed.monitor_config.csv_monitor.enabled
    assert parsed.monitor_config.csv_monitor.enabled == ("monitors" in file.stem)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_says_how_gradients_are_sent(file):
    settings = json.loads(file.read_text())
    zero = settings["zero_optimization"]
    if zero["stage"] < 3:
        assert settings["communication_data_type"] in ("auto", "bf16")
    if zero["stage"] in (1, 2):
        assert zero["overlap_comm"] == (zero["stage"] > 1), "ZeRO 1 is faster with one sum after the backward"
        assert zero["reduce_bucket_size"] == ("auto" if zero["stage"] == 1 else 50_000_000)
        assert zero["allgather_bucket_size"] == 50_000_000


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_deepspeed_reads_every_key(file):
    constants = {value for value in vars(deepspeed_config).values() if isinstance(value, str)}
    known = constants | {"zero_optimization", "tensorboard", "csv_monitor", "zero_allow_untested_optimizer"}
    unknown = set(json.loads(file.read_text())) - known
    assert not unknown
