"""Batch sizes, and the values that YAML and DeepSpeed JSON must share."""

import pytest
import torch

from eve_ds.config import ConfigError, parse_config
from eve_ds.parallel.settings import batch_triangle, resolve_deepspeed_config


def config(**sections):
    return parse_config(sections)


@pytest.mark.parametrize(
    ("batch", "micro", "accumulation", "ranks", "expected"),
    [
        (64, None, None, 4, (16, 1)),
        (64, 4, None, 4, (4, 4)),
        (64, None, 2, 4, (8, 2)),
        (64, 8, 2, 4, (8, 2)),
        (6, None, None, 3, (2, 1)),
    ],
)
def test_batch_triangle_fills_in_missing_sizes(batch, micro, accumulation, ranks, expected):
    assert batch_triangle(batch, micro, accumulation, ranks) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "accumulation", "ranks"),
    [(64, None, None, 3), (64, 5, None, 2), (64, 8, 3, 2), (2, None, None, 4), (2, 4, None, 1)],
)
def test_batch_sizes_that_do_not_fit_are_refused(batch, micro, accumulation, ranks):
    with pytest.raises(ConfigError) as caught:
        batch_triangle(batch, micro, accumulation, ranks)
    assert str(caught.value) == (
        f"train_batch_size ({batch}) must equal micro_batch_size ({micro or 'free'}) * gradient_accumulation_steps "
        f"({accumulation or 'free'}) * data ranks ({ranks}): leave one of them out, or change train_batch_size to a "
        "multiple of the others"
    )


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 1},
}


def resolve(dictionary, ranks=2, **sections):
    return resolve_deepspeed_config(dictionary, config(**sections), ranks)


def refused(dictionary, ranks=2, **sections):
    with pytest.raises(ConfigError) as caught:
        resolve(dictionary, ranks, **sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_auto_values_come_from_the_yaml():
    train = {"train_batch_size": 24, "gradient_accumulation_steps": 3, "precision": "bf16"}
    settled, resolved = resolve(AUTO, train=train, optimizer={"clip_grad_norm": 0.7})
    assert resolved["train_batch_size"] == 24
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 3
    assert resolved["gradient_clipping"] == 0.7
    assert (resolved["bf16"]["enabled"], resolved["fp16"]["enabled"]) == (True, False)
    assert resolved["zero_optimization"] == {"stage": 1}
    assert settled.train.micro_batch_size == 4
    assert AUTO["train_batch_size"] == "auto", "the dictionary that was passed must not change"


def test_values_only_in_the_json_enter_the_configuration():
    dictionary = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    }
    settled, resolved = resolve(dictionary)
    assert settled.train.train_batch_size == 12
    assert settled.train.gradient_accumulation_steps == resolved["gradient_accumulation_steps"] == 2
    assert settled.train.precision == "bf16"
    assert settled.optimizer.clip_grad_norm == 2.0


def test_an_empty_json_means_zero_0_in_fp32():
    settled, resolved = resolve({}, train={"train_batch_size": 8})
    assert resolved["zero_optimization"] == {"stage": 0}
    assert settled.train.precision == "fp32"


def test_equal_values_in_yaml_and_json_are_accepted():
    dictionary = {"train_batch_size": 8, "gradient_clipping": 1.0, "fp16": {"enabled": False}}
    resolve(dictionary, train={"train_batch_size": 8, "precision": "fp32"}, optimizer={"clip_grad_norm": 1.0})


END = 'in the DeepSpeed JSON: set the JSON to "auto", or make them equal'


@pytest.mark.parametrize(
    ("dictionary", "sections", "text"),
    [
        (
            {"train_batch_size": 16},
            {"train": {"train_batch_size": 8}},
            f"train.train_batch_size (8) in the YAML contradicts train_batch_size (16) {END}",
        ),
        (
            {"train_micro_batch_size_per_gpu": 2},
            {"train": {"train_batch_size": 8, "micro_batch_size": 4}},
            f"train.micro_batch_size (4) in the YAML contradicts train_micro_batch_size_per_gpu (2) {END}",
        ),
        (
            {"gradient_accumulation_steps": 2},
            {"train": {"train_batch_size": 8, "gradient_accumulation_steps": 4}},
            f"train.gradient_accumulation_steps (4) in the YAML contradicts gradient_accumulation_steps (2) {END}",
        ),
        (
            {"gradient_clipping": 0.5},
            {"optimizer": {"clip_grad_norm": 1.0}},
            f"optimizer.clip_grad_norm (1.0) in the YAML contradicts gradient_clipping (0.5) {END}",
        ),
        (
            {"bf16": {"enabled": True}},
            {"train": {"precision": "fp32"}},
            f"train.precision (fp32) in the YAML contradicts bf16.enabled (true) {END}",
        ),
        (
            {"bf16": {"enabled": False}},
            {"train": {"precision": "bf16"}},
            f"train.precision (bf16) in the YAML contradicts bf16.enabled (false) {END}",
        ),
        (
            {"fp16": {"enabled": True}},
            {"train": {"precision": "bf16"}},
            f"train.precision (bf16) in the YAML contradicts fp16.enabled (true) {END}",
        ),
    ],
)
def test_a_contradiction_names_both_places(dictionary, sections, text):
    assert refused(dictionary, **sections) == text


def test_compiled_blocks_are_refused_at_zero_3():
    text = refused({"zero_optimization": {"stage": 3}}, train={"train_batch_size": 8, "compile": "blocks"})
    assert text == (
        "train.compile (blocks) cannot be used with zero_optimization.stage 3, which gathers the weights of each "
        "module while it runs: use stage 1 or 2, or train.compile=none"
    )


@pytest.mark.parametrize(
    ("dictionary", "text"),
    [
        (
            {"zero_optimization": {"stage": 4}},
            "zero_optimization.stage (4) in the DeepSpeed JSON must be a whole number",
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled and fp16.enabled in the DeepSpeed JSON"),
        ({"bf16": True}, "bf16 (true) in the DeepSpeed JSON must be a JSON object: write it in braces"),
        ({"zero_optimization": 1}, "zero_optimization (1) in the DeepSpeed JSON must be a JSON object"),
        ({"train_batch_size": "64"}, 'train_batch_size ("64") in the DeepSpeed JSON must be a whole number from 1 on'),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu (0) in the DeepSpeed JSON must be"),
        ({"gradient_clipping": -1}, "gradient_clipping (-1) in the DeepSpeed JSON must be a number from 0 on"),
        (
            {"bf16": {"enabled": True, "check_grad_overflow": False}},
            "bf16.check_grad_overflow (false) in the DeepSpeed JSON cannot be used: a gradient that is not finite",
        ),
        (
            {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm (false) in the DeepSpeed JSON cannot be used: a gradient that is not",
        ),
        (
            {"bf16": {"enabled": True}},
            "cannot be used with precision bf16 and zero_optimization.stage 0, where DeepSpeed",
        ),
        ([], "the DeepSpeed JSON must be a mapping of settings, not a list"),
    ],
)
def test_unsupported_deepspeed_settings_are_refused(dictionary, text):
    assert text in refused(dictionary, train={"train_batch_size": 8}, optimizer={"clip_grad_norm": 1.0})


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 runs on this device")
def test_a_precision_that_the_device_lacks_is_refused():
    text = refused({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}})
    assert text == "precision fp16 cannot be used on this device (cpu): take another one of bf16, fp32"


def test_expert_parallelism_that_does_not_fit_is_refused():
    text = refused({"zero_optimization": {"stage": 1}}, ranks=3, parallel={"ep_size": 2}, train={"train_batch_size": 9})
    assert "the number of ranks (3) must be divisible by parallel.ep_size (2)" in text
    text = refused({}, parallel={"ep_size": 2}, train={"train_batch_size": 8})
    assert "optimizer.clip_grad_norm (1) cannot be used with zero_optimization.stage 0 and parallel.ep_size (2)" in text


def test_hard_negatives_need_a_micro_batch_of_two():
    sizes = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings = config(model={"objectives": ["itc", "itm"]}, train=sizes)
    resolve_deepspeed_config({}, settings, 1)
    with pytest.raises(
        ConfigError, match=r"model.objectives \(itc, itm\) needs a micro_batch_size \(1\) of 2 or more.*raise train"
    ):
        resolve_deepspeed_config({}, settings, 2)
