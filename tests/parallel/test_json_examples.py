"""DeepSpeed JSONs with the keys and values of widely used projects: each trains a step, or says what to change."""

import copy

import pytest
from one_step import one_step, small_config

from eve_ds.config import ConfigError
from eve_ds.parallel.settings import resolve_deepspeed_config

BATCH = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
AUTO = {**BATCH, "gradient_clipping": "auto"}
LOSS_SCALE = {
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
FP16, BF16 = {"enabled": "auto", **LOSS_SCALE}, {"enabled": "auto"}
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}
CPU = {"device": "cpu", "pin_memory": True}
STAGE3 = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
}
ACTIVATIONS = {
    "partition_activations": True,
    "cpu_checkpointing": False,
    "contiguous_memory_optimization": False,
    "number_checkpoints": 1,
    "synchronize_checkpoint_boundary": False,
    "profile": False,
}
BUCKETS = {"allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": False, "reduce_scatter": True}
FACTORY = {"zero_allow_untested_optimizer": True, **AUTO, "fp16": FP16, "bf16": BF16}
FACTORY_ZERO = {**BUCKETS, "reduce_bucket_size": 5e8, "contiguous_gradients": True, "round_robin_gradients": True}

TRAINED = {
    "transformers zero2": {
        "fp16": FP16,
        "bf16": BF16,
        "optimizer": ADAMW,
        "scheduler": WARMUP,
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": CPU,
            **BUCKETS,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_bucket_size": 2e8,
            "contiguous_gradients": True,
        },
        **AUTO,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    "transformers zero2 without offload": {
        "bf16": {"enabled": True},
        "optimizer": ADAMW,
        "scheduler": WARMUP | {"type": "WarmupDecayLR", "params": {**WARMUP["params"], "total_num_steps": "auto"}},
        "zero_optimization": {"stage": 2, **dict.fromkeys((*BUCKETS, "reduce_bucket_size"), "auto")},
        **AUTO,
    },
    "LLaVA zero2": {
        "fp16": FP16,
        "bf16": BF16,
        **BATCH,
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
        },
    },
    "LLaMA-Factory z0": {**FACTORY, "zero_optimization": {"stage": 0, **FACTORY_ZERO}},
    "LLaMA-Factory z2": {**FACTORY, "zero_optimization": {"stage": 2, **FACTORY_ZERO}},
    "LLaMA-Factory z2_offload": {
        **FACTORY,
        "zero_optimization": {"stage": 2, "offload_optimizer": CPU, **FACTORY_ZERO},
    },
    "accelerate, ZeRO 1 with everything off": {
        **AUTO,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "auto_cast": True},
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}},
        "amp": {"enabled": "auto", "opt_level": "auto"},
        "flops_profiler": {"enabled": False},
        "data_efficiency": {"enabled": False, "data_sampling": {"enabled": False}},
        "elasticity": {"enabled": False},
        "sparse_gradients": False,
    },
    "everything that repeats the YAML": {
        "train_batch_size": 4,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 5e-4, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.05, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 5e-4, "warmup_num_steps": 2, "total_num_steps": 1},
        },
        "zero_optimization": {"stage": 1},
    },
    "transformers zero3": {
        "fp16": {**FP16, "enabled": False},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": CPU,
            "offload_param": CPU,
            **STAGE3,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "optimizer": ADAMW,
        "scheduler": WARMUP,
        **AUTO,
        "steps_per_print": 2000,
    },
    "LLaVA zero3": {
        "fp16": FP16,
        "bf16": BF16,
        **BATCH,
        "zero_optimization": {"stage": 3, **STAGE3, "stage3_gather_16bit_weights_on_model_save": True},
    },
    "LLaVA zero3_offload": {
        "fp16": FP16,
        "bf16": {"enabled": True},
        "optimizer": ADAMW,
        "scheduler": WARMUP,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": CPU,
            "offload_param": CPU,
            **STAGE3,
            "gather_16bit_weights_on_model_save": True,
        },
        **AUTO,
        "steps_per_print": 1e5,
        "wall_clock_breakdown": False,
    },
}
"""Name -> content of a file that runs unchanged."""

REFUSED = {
    "LLaMA-Factory z2_autotp": (
        {
            "_comment": "models that it knows",
            **FACTORY,
            "zero_optimization": {"stage": 2, **FACTORY_ZERO},
            "tensor_parallel": {"autotp_size": 2},
        },
        ["tensor_parallel.autotp_size (2) in the DeepSpeed JSON cannot be used: DeepSpeed's own way does not know"],
    ),
    "GPT-NeoX zero2": (
        {
            "train_batch_size": 1280,
            "gradient_accumulation_steps": 80,
            "gradient_clipping": 1.0,
            "wall_clock_breakdown": True,
            "tensorboard": {"enabled": True, "output_path": "./logs", "job_name": "gptneox"},
            "optimizer": {"type": "OneBitAdam", "params": {"lr": 2e-4, "freeze_step": 2, "cuda-aware": True}},
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_min_lr": 0, "warmup_max_lr": 1.5e-4, "warmup_num_steps": 5000},
            },
            "zero_optimization": {"stage": 2, "contiguous_gradients": True, "cpu_offload": True, "overlap_comm": True},
            "logging": {"steps_per_print": 100, "wall_clock_breakdown": True},
            "activation_checkpointing": ACTIVATIONS,
        },
        [
            "train.train_batch_size (4) in the YAML contradicts train_batch_size (1280) in the DeepSpeed JSON: set the",
            'optimizer.type ("OneBitAdam") in the DeepSpeed JSON cannot be used: eve_ds trains with AdamW',
            "optimizer.params.freeze_step in the DeepSpeed JSON has no counterpart here: remove it",
            "optimizer.params.cuda-aware in the DeepSpeed JSON has no counterpart here: remove it",
            "scheduler.params.warmup_max_lr (0.00015) contradicts optimizer.params.lr (0.0002) in the DeepSpeed JSON",
            "optimizer.warmup_steps (2) in the YAML contradicts scheduler.params.warmup_num_steps (5000) in the DeepSp",
            "logging in the DeepSpeed JSON is no key of DeepSpeed 0.19.8: ",
        ],
    ),
    "Megatron-DeepSpeed universal": (
        {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 4,
            "steps_per_print": 1,
            "zero_optimization": {"stage": 3, "ignore_missing_optim_state": True},
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "wall_clock_breakdown": False,
        },
        [
            "train.train_batch_size (4) in the YAML contradicts train_batch_size (16) in the DeepSpeed JSON",
            "zero_optimization.ignore_missing_optim_state in the DeepSpeed JSON is no key of DeepSpeed 0.19.8",
        ],
    ),
    "DeepSpeedExamples AutoEP": (
        {
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1},
            "expert_parallel": {
                "enabled": True,
                "autoep_size": 8,
                "preset_model": "qwen3_5_moe",
                "load_balance_coeff": None,
            },
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {
                    "total_num_steps": 1000,
                    "warmup_min_ratio": 0,
                    "warmup_num_steps": 100,
                    "cos_min_ratio": 0.001,
                    "warmup_type": "linear",
                },
            },
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 10,
        },
        [
            "expert_parallel.enabled (true) in the DeepSpeed JSON cannot be used: AutoEP replaces the experts of known",
            "train.max_steps (1) in the YAML contradicts scheduler.params.total_num_steps (1000) in the DeepSpeed JSON",
            "optimizer.warmup_steps (2) in the YAML contradicts scheduler.params.warmup_num_steps (100) in the DeepSpe",
            "train_batch_size (4) must equal micro_batch_size (2) * gradient_accumulation_steps (1) * data ranks (1)",
        ],
    ),
    "DeepSpeedExamples ZenFlow": (
        {
            "train_batch_size": 4,
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": CPU,
                "zenflow": {"topk_ratio": 0.1, "update_interval": 4, "full_warm_up_rounds": 0, "overlap_step": True},
            },
            "optimizer": ADAMW,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
        },
        ["zero_optimization.zenflow ("],
    ),
}
"""Name -> content of a file, starts of all problems that the one message tells."""


def train_all(rank, world_size):
    dictionaries = copy.deepcopy(TRAINED)
    results = {name: one_step(dictionary, small_config()) for name, dictionary in dictionaries.items()}
    return results, dictionaries


def test_files_as_people_have_them_train_and_save_unchanged(run_ranks):
    ((results, dictionaries),) = run_ranks(train_all, 1)
    assert dictionaries == TRAINED, "a dictionary that was passed must not change"
    for name, result in results.items():
        assert (result["refused"], result["steps"], result["saved"]) == (None, 1, True), name
    assert [line.partition(" in the")[0] for line in results["transformers zero2"]["notes"]] == [
        "optimizer",
        "scheduler",
    ]
    assert results["transformers zero2"]["notes"][1].endswith("linear warm-up of 2 steps, decay: linear")
    (line,) = results["LLaMA-Factory z0"]["notes"]
    assert line == (
        "zero_optimization.round_robin_gradients (true) in the DeepSpeed JSON has no effect: it acts at ZeRO 1 and 2 "
        "only, and the stage is 0"
    )
    assert results["LLaVA zero2"]["notes"] == results["LLaMA-Factory z2"]["notes"] == []
    (line,) = results["LLaVA zero3"]["notes"]
    assert line == (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save (true) in the DeepSpeed JSON has no effect: "
        "eve_ds writes and reads its own checkpoints, which load on any number of ranks"
    )


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_need_a_change_say_all_of_it_in_one_message(name):
    dictionary, starts = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        resolve_deepspeed_config(dictionary, small_config(), 1)
    problems = str(caught.value).split("; ")
    assert [part[: len(start)] for part, start in zip(problems, starts, strict=True)] == starts


@pytest.mark.parametrize("name", ["transformers zero3", "LLaVA zero3", "LLaVA zero3_offload"])
def test_a_zero_3_file_runs_with_another_stage(name):
    dictionary = copy.deepcopy(TRAINED[name])
    dictionary["zero_optimization"]["stage"] = 2
    _, resolved = resolve_deepspeed_config(dictionary, small_config(), 1)
    assert resolved["zero_optimization"].keys() <= {"stage", "offload_optimizer", "overlap_comm"}


BLOCKS = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": 7, "total_num_steps": 70, "cos_min_ratio": 0.1, "warmup_type": "linear"},
    },
}


def test_values_that_only_the_blocks_give_enter_the_configuration():
    from eve_ds.config import parse_config

    settled, resolved = resolve_deepspeed_config(BLOCKS, parse_config({"train": {"train_batch_size": 4}}), 1)
    ours = settled.optimizer
    assert (ours.lr, ours.betas, ours.eps, ours.weight_decay) == (1e-3, (0.8, 0.99), 1e-6, 0.1)
    assert (ours.warmup_steps, settled.train.max_steps, ours.decay, ours.final_lr_share) == (7, 70, "cosine", 0.1)
    assert not {"optimizer", "scheduler"} & resolved.keys()


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("optimizer.params.lr", 2e-3, "optimizer.lr (0.001) in the YAML contradicts optimizer.params.lr (0.002)"),
        (
            "optimizer.params.betas",
            [0.9, 0.9],
            "optimizer.betas ([0.8, 0.99]) in the YAML contradicts optimizer.params",
        ),
        (
            "optimizer.params.betas",
            [0.9],
            "optimizer.params.betas ([0.9]) in the DeepSpeed JSON cannot be optimizer.bet",
        ),
        ("optimizer.params.eps", 1e-8, "optimizer.eps (1e-06) in the YAML contradicts optimizer.params.eps (1e-08)"),
        (
            "optimizer.params.weight_decay",
            0,
            "optimizer.weight_decay (0.1) in the YAML contradicts optimizer.params.wei",
        ),
        (
            "optimizer.params.max_grad_norm",
            2,
            "optimizer.clip_grad_norm (1.0) in the YAML contradicts optimizer.params",
        ),
        ("optimizer.params.lr", "1e-3", 'optimizer.params.lr ("1e-3") in the DeepSpeed JSON must be a number'),
        (
            "optimizer.params.lr",
            0,
            "optimizer.params.lr (0) in the DeepSpeed JSON cannot be optimizer.lr: Input should",
        ),
        ("optimizer.params.adam_w_mode", False, "optimizer.params.adam_w_mode (false) in the DeepSpeed JSON cannot be"),
        ("optimizer.type", "Muon", 'optimizer.type ("Muon") in the DeepSpeed JSON cannot be used'),
        ("optimizer.params", [], "optimizer.params ([]) in the DeepSpeed JSON must be a JSON object"),
        (
            "scheduler.type",
            "WarmupLR",
            "optimizer.decay (cosine) in the YAML contradicts scheduler.type (WarmupLR, which",
        ),
        (
            "scheduler.type",
            "OneCycle",
            'scheduler.type ("OneCycle") in the DeepSpeed JSON cannot be used: write one of',
        ),
        ("scheduler.params.warmup_type", "log", 'scheduler.params.warmup_type ("log") in the DeepSpeed JSON cannot be'),
        ("scheduler.params.warmup_num_steps", 8, "optimizer.warmup_steps (7) in the YAML contradicts scheduler.params"),
        (
            "scheduler.params.warmup_max_lr",
            1,
            "optimizer.lr (0.001) in the YAML contradicts scheduler.params.warmup_max",
        ),
    ],
)
def test_a_value_of_a_block_that_differs_is_named(path, value, text):
    settled, _ = resolve_deepspeed_config(
        BLOCKS, small_config(optimizer={"warmup_steps": 7}, train={"max_steps": 70}), 1
    )
    dictionary = copy.deepcopy(BLOCKS)
    *parents, key = path.split(".")
    place = dictionary
    for parent in parents:
        place = place[parent]
    place[key] = value
    explicit = settled.optimizer.model_copy(update={"clip_grad_norm": 1.0})
    with pytest.raises(ConfigError) as caught:
        resolve_deepspeed_config(dictionary, settled.model_copy(update={"optimizer": explicit}), 1)
    assert str(caught.value).startswith(text)
