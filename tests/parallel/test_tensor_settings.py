"""Settings of tensor parallelism: sizes that the ranks must divide, what does not combine, and what is not imported."""

import importlib.util
import subprocess
import sys
from unittest import mock

import pytest
from tiny import tiny_tree

from eve_ds.config import ConfigError, parse_config
from eve_ds.parallel.settings import resolve_deepspeed_config

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")


def resolve(world_size=8, json=None, model=None, train=None, **parallel):
    tree = {
        "model": tiny_tree(**(model or {})),
        "parallel": {"tp_size": 2, **parallel},
        "train": {"train_batch_size": 24, **(train or {})},
        "optimizer": {"clip_grad_norm": 0},
    }
    return resolve_deepspeed_config(json or {}, parse_config(tree), world_size)


def test_tensor_parallel_ranks_share_one_micro_batch():
    config, resolved = resolve(world_size=6)
    assert config.train.micro_batch_size == resolved["train_micro_batch_size_per_gpu"] == 8
    assert resolved["train_batch_size"] == 24


def test_free_ep_size_divides_the_data_ranks():
    assert resolve(ep_size=0)[0].parallel.ep_size == 4
    assert resolve(ep_size=0, tp_size=4)[0].parallel.ep_size == 2


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"world_size": 7},
            "the number of ranks (7) must be divisible by parallel.tp_size (2), since consecutive ranks share the "
            "matrices of each layer: start a multiple of 2 ranks, or take a smaller tp_size",
        ),
        (
            {"world_size": 4, "ep_size": 4},
            "the number of ranks (4) over parallel.tp_size (2) must be divisible by parallel.ep_size (4), since every "
            "expert-parallel group holds one full set of experts: start a multiple of 8 ranks, or take one of 1, 2 as "
            "ep_size",
        ),
        (
            {"world_size": 8, "tp_size": 8},
            "model.num_attention_heads (4) must be divisible by parallel.tp_size (8), since tensor-parallel ranks hold "
            "equal parts of it: take another tp_size, or change model.num_attention_heads",
        ),
        (
            {"model": {"intermediate_size": 45}},
            "model.intermediate_size (45) must be divisible by parallel.tp_size (2)",
        ),
        (
            {"model": {"pixel_decoder": {"num_attention_heads": 3}}},
            "model.pixel_decoder.num_attention_heads (3) must be divisible by parallel.tp_size (2)",
        ),
        ({"train": {"compile": "blocks"}}, "train.compile (blocks) cannot be used with parallel.tp_size (2), whose"),
        (
            {
                "json": {
                    "bf16": {"enabled": True},
                    "zero_optimization": {"stage": 1},
                    "data_types": {"grad_accum_dtype": "fp32"},
                }
            },
            "data_types.grad_accum_dtype (fp32) in the DeepSpeed JSON cannot be used with zero_optimization.stage 1 "
            "and parallel.tp_size (2): use stage 2, or remove it",
        ),
        (
            {"json": {"zero_optimization": {"stage": 3}}, "split_experts": True},
            "parallel.split_experts cannot be used with zero_optimization.stage 3, where DeepSpeed takes the norm of "
            "the experts' gradients over the data ranks only: use stage 1 or 2, or split_experts=false",
        ),
        (
            {"json": {"sequence_parallel_size": 2}},
            "sequence_parallel_size (2) in the DeepSpeed JSON cannot be used: EVE does not split sequences",
        ),
    ],
)
def test_what_cannot_work_is_refused(changes, text):
    with pytest.raises(ConfigError) as caught:
        resolve(**changes)
    assert text in str(caught.value)


def test_a_missing_megatron_core_names_the_command_that_installs_it():
    find = importlib.util.find_spec
    without = mock.patch.object(
        importlib.util, "find_spec", lambda name, *more: None if name.startswith("megatron") else find(name, *more)
    )
    with without, pytest.raises(ConfigError) as caught:
        resolve()
    assert str(caught.value) == (
        "parallel.tp_size (2) needs the package megatron-core, which is not installed: run pip install --no-deps "
        "megatron-core==0.16.1 (its dependencies are not needed), or set tp_size=1"
    )


def test_sizes_of_a_model_without_pixel_decoder_are_free():
    resolve(model={"pixel_decoder": {"num_attention_heads": 3}, "objectives": ["mlm"]})


def test_training_without_tensor_parallelism_does_not_import_megatron():
    modules = "eve_ds.training.pretrain, eve_ds.training.finetune, eve_ds.checkpoint.resuming, eve_ds.cli.convert"
    code = f"import sys, {modules}; print([name for name in sys.modules if name.startswith('megatron')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
