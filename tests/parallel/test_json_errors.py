"""What DeepSpeed raises about its configuration becomes one line that names the key."""

import importlib.util

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from eve_ds.config import ConfigError, parse_config
from eve_ds.parallel.deepspeed_json.errors import deepspeed_errors
from eve_ds.parallel.settings import resolve_deepspeed_config

CONFIG = parse_config({"train": {"train_batch_size": 8}})


def line_of(dictionary, error=None):
    def read():
        with deepspeed_errors(dictionary):
            if error is not None:
                raise error
            DeepSpeedConfig(dictionary)

    with pytest.raises(ConfigError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("dictionary", "text"),
    [
        (
            {"zero_optimization": {"stage": 4}},
            "zero_optimization.stage (4) in the DeepSpeed JSON is refused by DeepSpeed: Input should be 0, 1, 2",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 2}}},
            "zero_optimization.offload_optimizer.ratio (2) in the DeepSpeed JSON is refused by DeepSpeed: Input should",
        ),
        ({"communication_data_type": "fp8"}, ": look at communication_data_type in the DeepSpeed JSON"),
        ({"progressive_layer_drop": {}}, ": look at progressive_layer_drop in the DeepSpeed JSON"),
        ({"checkpoint": {"tag_validation": "x"}}, ": look at checkpoint.tag_validation in the DeepSpeed JSON"),
    ],
)
def test_every_exception_of_deepspeeds_parser_names_the_key(dictionary, text):
    assert text in line_of({"train_batch_size": 1, **dictionary})


def test_a_key_written_with_spaces_is_found():
    error = AssertionError("Contiguous Gradients in ZeRO Stage 2 must be set to True for MoE")
    dictionary = {"zero_optimization": {"stage": 2, "contiguous_gradients": False}}
    assert line_of(dictionary, error).endswith(": look at zero_optimization.contiguous_gradients in the DeepSpeed JSON")


def test_an_exception_without_a_key_repeats_deepspeeds_words_in_one_line():
    text = line_of({"wandb": {"enabled": True}}, ImportError("If you want\nto use wandb, \n  install it"))
    assert text == "DeepSpeed cannot use its configuration (If you want to use wandb, install it) in the DeepSpeed JSON"
    assert line_of({}, AssertionError()).startswith("DeepSpeed cannot use its configuration (AssertionError)")


@pytest.mark.parametrize("error", [ConfigError("ours"), torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
def test_errors_that_are_not_about_settings_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, deepspeed_errors({}):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")]
)
def test_a_monitor_without_its_package_is_refused(monkeypatch, name, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == package else find(asked))
    with pytest.raises(ConfigError) as caught:
        resolve_deepspeed_config({name: {"enabled": True}}, CONFIG, 1)
    assert str(caught.value) == (
        f"{name}.enabled (true) in the DeepSpeed JSON needs the package {package}, which is not installed: run pip "
        f"install {package}, or set it to false"
    )
    resolve_deepspeed_config({name: {"enabled": False}}, CONFIG, 1)


BF16 = {"bf16": {"enabled": True}}
FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("dictionary", "text"),
    [
        (
            {**BF16, **FP32, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "cannot be used with precision bf16, zero_optimization.stage 1 and offload_optimizer: use stage 2",
        ),
        (
            {**BF16, **FP32, "zero_optimization": {"stage": 1}, "communication_data_type": "bf16"},
            'communication_data_type ("bf16") in the DeepSpeed JSON cannot be used with data_types.grad_accum_dtyp',
        ),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            'data_types.grad_accum_dtype ("bf16") in the DeepSpeed JSON must be fp32, since',
        ),
        (
            {**BF16, "data_types": {"param_dtype": "fp16"}, "zero_optimization": {"stage": 1}},
            'data_types.param_dtype ("fp16") in the DeepSpeed JSON must be bf16, since the model computes in bf16',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            'zero_optimization.offload_optimizer.device ("nvme") in the DeepSpeed JSON cannot be used: checkpoints do',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}},
            'zero_optimization.offload_param.device ("nvme") in the DeepSpeed JSON cannot be used: checkpoints do not '
            'read NVMe: write "cpu", or remove it',
        ),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload_param": True, "offload_param": {"device": "nvme"}}},
            "zero_optimization.cpu_offload_param (true) in the DeepSpeed JSON is the former name of offload_para",
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.cpu_offload (true) in the DeepSpeed JSON is the former name of offload_optimizer.device",
        ),
        (
            {"bfloat16": {"enabled": True}, "bf16": {"enabled": False}},
            "bfloat16 in the DeepSpeed JSON is the former name",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(dictionary, text):
    with pytest.raises(ConfigError) as caught:
        resolve_deepspeed_config(dictionary, CONFIG, 1)
    assert text in str(caught.value)


def test_former_names_are_read_as_the_present_ones():
    old = {"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 2, "cpu_offload": True}}
    new = {**BF16, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert resolve_deepspeed_config(old, CONFIG, 1) == resolve_deepspeed_config(new, CONFIG, 1)
    old = {"zero_optimization": {"stage": 3, "cpu_offload_param": True}}
    new = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    assert resolve_deepspeed_config(old, CONFIG, 1) == resolve_deepspeed_config(new, CONFIG, 1)


@pytest.mark.parametrize("name", ["fp32", "float32", "torch.float32", "float"])
def test_sums_in_fp32_have_all_names_of_the_type(name):
    dictionary = {**BF16, "data_types": {"grad_accum_dtype": name}, "zero_optimization": {"stage": 2}}
    assert resolve_deepspeed_config(dictionary, CONFIG, 1)[1]["data_types"] == {"grad_accum_dtype": "fp32"}
    without = resolve_deepspeed_config(FP32 | {"data_types": {"grad_accum_dtype": name}}, CONFIG, 1)[1]
    assert "data_types" not in without, "the model computes in fp32 anyway"
