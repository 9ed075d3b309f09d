"""Every key of DeepSpeed's configuration, and what it may be here.

A rule has one of five uses:

- `TAKEN`: DeepSpeed gets the value, and it has an effect;
- `CHECKED`: the same, after :mod:`eve_ds.parallel.settings` has compared it with the YAML or with other keys;
- `NOTED`: the value has no effect here; it is removed, and a line of the log names it;
- `REFUSED`: a value that would change the run in a way that eve_ds cannot follow is an error;
- `UNUSED`: the key belongs to a feature that another key turns on and that is refused or noted there; it is removed.

Values that mean the same as no key at all (`neutral`) are removed without a word. The classes and functions that read
these keys are in DeepSpeed's `runtime/config.py` of version `FOLLOWED`; a test compares the names with them.
"""

from __future__ import annotations

import sys
from typing import Any, Literal, NamedTuple

from eve_ds.parallel.deepspeed_json.values import (
    ANY,
    BOOL,
    MAPPING,
    NUMBER,
    SHARE,
    TEXT,
    TEXTS,
    Kind,
    choice,
    or_null,
    whole,
)

FOLLOWED = "0.19.8"
"""Version of DeepSpeed whose keys the table lists."""
TAKEN: Literal["taken"] = "taken"
CHECKED: Literal["checked"] = "checked"
NOTED: Literal["noted"] = "noted"
REFUSED: Literal["refused"] = "refused"
UNUSED: Literal["unused"] = "unused"
Use = Literal["taken", "checked", "noted", "refused", "unused"]


class Rule(NamedTuple):
    """What one key may be."""

    kind: Kind
    use: Use = TAKEN
    why: str = ""
    """Reason and remedy, after "KEY (VALUE) has no effect: " or "KEY (VALUE) cannot be used: "."""
    neutral: tuple[Any, ...] = ()
    """Values that change nothing."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages at which the key has an effect or is refused; at the others it is noted."""
    neutral_at: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages at which the neutral values change nothing."""


Section = dict[str, "Rule | Section"]
"""Keys of a JSON object."""
WHOLE = ""
"""Key of a section's rule for the object as a whole."""


def noted(kind: Kind, why: str, *neutral: Any) -> Rule:
    """Rule for a key without effect here."""
    return Rule(kind, NOTED, why, neutral)


def refused(kind: Kind, why: str, *neutral: Any) -> Rule:
    """Rule for a key that must be left out, or have a neutral value."""
    return Rule(kind, REFUSED, why, neutral)


def removed(why: str) -> Rule:
    """Rule for a feature that DeepSpeed no longer has; files may still turn it off."""
    return Rule(ANY, REFUSED, f"DeepSpeed has removed it, and {why}", (False, None, {}, {"enabled": False}))


def unused(**kinds: Kind) -> Section:
    """Rules for the keys of a feature that another key turns on."""
    return {name: Rule(kind, UNUSED) for name, kind in kinds.items()}


def refused_at_3(kind: Kind, why: str, *neutral: Any) -> Rule:
    """Rule for a key of ZeRO 3 that must be left out there."""
    return Rule(kind, REFUSED, why, neutral, WEIGHTS)


def at(stages: tuple[int, ...], kind: Kind, *neutral: Any) -> Rule:
    """Rule for a key of some ZeRO stages."""
    return Rule(kind, TAKEN, "", neutral, stages)


DTYPE = choice("fp16", "bf16", "fp32")
TORCH_DTYPE = choice(*(name for kind in ("float16", "bfloat16", "float32") for name in (kind, f"torch.{kind}")))
ANY_DTYPE = choice(*DTYPE.choices, *TORCH_DTYPE.choices, "half", "float")
SHARDED, GRADIENTS, WEIGHTS = (1, 2, 3), (1, 2), (3,)
"""ZeRO stages that shard anything; that shard no weights; that shard weights."""
BYTES = whole(0)
OWN_CHECKPOINTS = "eve_ds writes and reads its own checkpoints, which load on any number of ranks"
OWN_DATA = "eve_ds loads and orders the data itself: see the section data of the YAML"
NO_NVME = "nothing is offloaded to NVMe here"
NO_CPU_ADAM = "it needs DeepSpeed's own Adam for CPUs, and eve_ds trains with AdamW of torch: remove it"
NO_LEAVES = "a leaf gathers the weights of all its modules at once, which the image embedding cannot do: remove it"
NO_QUANTIZED_WEIGHTS = "training would compute with weights of 8 bits, evaluation and export with whole ones: remove it"
EXPERTS = "EVE spreads its experts by parallel.ep_size in the YAML: remove it"

OFFLOAD_OPTIMIZER: Section = {
    "device": Rule(choice("none", "cpu", "nvme"), CHECKED, "", ("none",), SHARDED),
    "pin_memory": at(SHARDED, BOOL),
    "ratio": refused(SHARE, NO_CPU_ADAM, 1),
    "super_offload": refused(BOOL, NO_CPU_ADAM, False),
    "cpuadam_cores_perc": Rule(SHARE, UNUSED),
    "nvme_path": noted(or_null(TEXT), NO_NVME, None),
    "buffer_count": noted(whole(0), NO_NVME, 4),
    "pipeline_read": noted(BOOL, NO_NVME, False),
    "pipeline_write": noted(BOOL, NO_NVME, False),
    "fast_init": noted(BOOL, NO_NVME, False),
}
OFFLOAD_PARAM: Section = {
    "device": Rule(choice("none", "cpu", "nvme"), CHECKED, "", ("none",), WEIGHTS),
    "pin_memory": at(WEIGHTS, BOOL, False),
    **unused(nvme_path=or_null(TEXT), buffer_count=whole(0), buffer_size=whole(0), max_in_cpu=whole(0)),
}
ZENFLOW: Section = {
    WHOLE: refused(MAPPING, "its optimizer computes other updates than AdamW: remove it", {}),
    **unused(
        topk_ratio=SHARE,
        select_strategy=TEXT,
        select_interval=ANY,
        update_interval=ANY,
        overlap_step=BOOL,
        offload=BOOL,
        auto_ratio=SHARE,
        full_warm_up_rounds=whole(0),
        pt_reserved_cores_perc=SHARE,
        steps_per_epoch=or_null(whole(0)),
    ),
}
PREFETCHING: Section = {
    "prefetch_bucket_size": at(WEIGHTS, whole(0), 50_000_000),
    "param_persistence_threshold": at(WEIGHTS, whole(0), 100_000),
    "model_persistence_threshold": at(WEIGHTS, whole(0), sys.maxsize),
    "max_live_parameters": at(WEIGHTS, whole(0), 1_000_000_000),
    "max_reuse_distance": at(WEIGHTS, whole(0), 1_000_000_000),
    "gather_16bit_weights_on_model_save": noted(BOOL, OWN_CHECKPOINTS, False),
    "module_granularity_threshold": refused_at_3(whole(0), NO_LEAVES, 0),
    "use_all_reduce_for_fetch_params": at(WEIGHTS, BOOL, False),
    "allgather_sequential": at(WEIGHTS, BOOL, False),
}
"""Keys of ZeRO 3 that DeepSpeed also reads with the prefix `stage3_`."""
ZERO: Section = {
    "stage": Rule(whole(0, 3), CHECKED),
    "contiguous_gradients": noted(
        BOOL, "DeepSpeed averages experts of different ranks without it, so it stays on", True
    ),
    "reduce_scatter": noted(BOOL, "DeepSpeed's experts need it, so it stays on", True),
    "reduce_bucket_size": at(SHARDED, whole(1), 500_000_000),
    "use_multi_rank_bucket_allreduce": at(GRADIENTS, BOOL, True),
    "allgather_partitions": noted(BOOL, f"DeepSpeed {FOLLOWED} does not use it", True),
    "allgather_bucket_size": at(GRADIENTS, whole(2, multiple=2), 500_000_000),
    "overlap_comm": at(SHARDED, or_null(BOOL), False, None)._replace(neutral_at=(0, 1, 2)),
    "compute_grad_norm": refused(BOOL, "a gradient that is not finite would be applied: remove it", True),
    "load_from_fp32_weights": noted(BOOL, OWN_CHECKPOINTS, True),
    "elastic_checkpoint": noted(BOOL, OWN_CHECKPOINTS, False),
    "offload_param": OFFLOAD_PARAM,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "zenflow": ZENFLOW,
    "sub_group_size": at(WEIGHTS, whole(0), 1_000_000_000),
    "cpu_offload": Rule(or_null(BOOL), CHECKED, "", (False, None), SHARDED),
    "cpu_offload_param": Rule(or_null(BOOL), CHECKED, "", (False, None), WEIGHTS),
    "cpu_offload_use_pin_memory": noted(
        or_null(BOOL), "DeepSpeed does not use it: set offload_optimizer.pin_memory", False, None
    ),
    **PREFETCHING,
    **{f"stage3_{name}": rule for name, rule in PREFETCHING.items()},
    "stage3_gather_fp16_weights_on_model_save": noted(BOOL, OWN_CHECKPOINTS, False),
    "ignore_unused_parameters": Rule(BOOL, REFUSED, "every step leaves some weights unused: remove it", (True,)),
    "legacy_stage1": refused(BOOL, "DeepSpeed has removed it: remove it", False),
    "round_robin_gradients": at(GRADIENTS, BOOL, False),
    "parameter_alignment": at(GRADIENTS, BOOL, False),
    "zero_hpz_partition_size": refused_at_3(
        whole(0), "DeepSpeed cannot partition experts within nodes and over all ranks at once: remove it", 0, 1
    ),
    "zero_quantized_weights": refused_at_3(BOOL, NO_QUANTIZED_WEIGHTS, False),
    "zero_quantized_nontrainable_weights": refused_at_3(BOOL, NO_QUANTIZED_WEIGHTS, False),
    "zero_quantized_gradients": refused_at_3(
        BOOL, "DeepSpeed cannot send gradients of experts in few bits: remove it", False
    ),
    "memory_efficient_linear": at(WEIGHTS, BOOL, True),
    "pipeline_loading_checkpoint": noted(BOOL, OWN_CHECKPOINTS, False),
    "override_module_apply": noted(BOOL, "eve_ds draws the weights before they are partitioned", True),
    "log_trace_cache_warnings": at(WEIGHTS, BOOL, False),
    "enable_sanity_checks": at(WEIGHTS, BOOL, False),
    "save_muon_momentum_buffer_in_memory": noted(BOOL, "eve_ds trains with AdamW", False),
    "leaf_module": {name: refused_at_3(ANY, NO_LEAVES, []) for name in ("classes", "names", "name_suffixes")},
    "mics_shard_size": removed("the weights would not be sharded that way: remove it")._replace(neutral=(-1, None)),
    "mics_hierarchical_params_gather": removed("it has no effect: remove it"),
    "zeropp_loco_param": removed("it has no effect: remove it"),
}
BF16: Section = {
    "enabled": Rule(BOOL, CHECKED),
    "immediate_grad_update": noted(BOOL, "ZeRO 1 and 2 accumulate gradients in their own way", False),
    "check_grad_overflow": refused(BOOL, "a gradient that is not finite would be applied: remove it", True),
    "bf16_master_weights_and_grads": refused(
        BOOL, "checkpoints and exports hold fp32 weights, which bf16 cannot give: remove it", False
    ),
    "bf16_optimizer_states": refused(BOOL, "checkpoints hold fp32 moments, which bf16 cannot give: remove it", False),
}
FP16: Section = {
    "enabled": Rule(BOOL, CHECKED),
    "auto_cast": noted(BOOL, "the model casts its own inputs", False),
    "loss_scale": Rule(Kind("number", low=0)),
    "initial_scale_power": Rule(whole(0, 127)),
    "loss_scale_window": Rule(whole(1)),
    "hysteresis": Rule(whole(1)),
    "consecutive_hysteresis": Rule(BOOL),
    "min_loss_scale": Rule(whole(1)),
    "fp16_master_weights_and_grads": refused(
        BOOL, "checkpoints and exports hold fp32 weights, which fp16 cannot give: remove it", False
    ),
}
ACTIVATION_CHECKPOINTING: Section = {
    name: noted(kind, "set train.activation_checkpointing in the YAML", *neutral)
    for name, kind, neutral in (
        ("partition_activations", BOOL, (False,)),
        ("number_checkpoints", or_null(ANY), (None, False)),
        ("contiguous_memory_optimization", BOOL, (False,)),
        ("synchronize_checkpoint_boundary", BOOL, (False,)),
        ("profile", BOOL, (False,)),
        ("cpu_checkpointing", BOOL, (False,)),
    )
}
CHECKPOINT: Section = {
    "tag_validation": noted(choice("warn", "ignore", "fail"), OWN_CHECKPOINTS),
    "checkpoint_serialization": noted(BOOL, OWN_CHECKPOINTS),
    "load_universal": noted(BOOL, OWN_CHECKPOINTS, False),
    "use_node_local_storage": noted(BOOL, OWN_CHECKPOINTS, False),
    "parallel_write": {"pipeline_stage": noted(BOOL, OWN_CHECKPOINTS, False)},
    "writer": {
        name: noted(kind, OWN_CHECKPOINTS)
        for name, kind in (
            ("type", choice("mock", "python", "fast")),
            ("io_buffer_size", BYTES),
            ("io_buffer_double", BOOL),
            ("show_statistics", BOOL),
            ("data_parallel", or_null(choice("replica", "socket", "machine"))),
            ("decoupled", BOOL),
            ("io_multiplier", whole(1)),
        )
    },
}
DATA_EFFICIENCY: Section = {
    "enabled": refused(BOOL, f"{OWN_DATA}, and remove it", False),
    **unused(seed=whole(0), data_sampling=MAPPING, data_routing=MAPPING),
}
MONITOR: Section = {"enabled": Rule(BOOL), "output_path": Rule(TEXT), "job_name": Rule(TEXT)}
WANDB: Section = {
    "enabled": Rule(BOOL, CHECKED),
    "group": Rule(or_null(TEXT)),
    "team": Rule(or_null(TEXT)),
    "project": Rule(TEXT),
}
COMET: Section = {
    "enabled": Rule(BOOL, CHECKED),
    "samples_log_interval": Rule(whole(1)),
    "online": Rule(or_null(BOOL)),
    "mode": Rule(or_null(choice("get", "create", "get_or_create"))),
    **{name: Rule(or_null(TEXT)) for name in ("project", "workspace", "api_key", "experiment_name", "experiment_key")},
}
AUTOTUNING: Section = {
    "enabled": refused(BOOL, "DeepSpeed's autotuner cannot start eve_ds: set the values yourself", False),
    **unused(
        **dict.fromkeys(("fast", "overwrite"), BOOL),
        **dict.fromkeys(("results_dir", "exps_dir", "metric", "tuner_type"), or_null(TEXT)),
        **dict.fromkeys(("metric_path", "model_info_path"), or_null(TEXT)),
        **dict.fromkeys(("start_profile_step", "end_profile_step", "mp_size", "tuner_num_trials"), NUMBER),
        **dict.fromkeys(("tuner_early_stopping", "min_train_batch_size", "num_tuning_micro_batch_sizes"), NUMBER),
        **dict.fromkeys(
            ("max_train_micro_batch_size_per_gpu", "min_train_micro_batch_size_per_gpu", "max_train_batch_size"),
            or_null(NUMBER),
        ),
        arg_mappings=or_null(MAPPING),
        model_info=or_null(MAPPING),
    ),
}
HYBRID_ENGINE: Section = {
    "enabled": refused(BOOL, "the hybrid engine generates text, which EVE does not: remove it", False),
    **unused(
        max_out_tokens=whole(1),
        inference_tp_size=whole(1),
        release_inference_cache=BOOL,
        pin_parameters=BOOL,
        tp_gather_partition_size=whole(1),
        enable_cuda_graph=BOOL,
    ),
}
TP_SIZE = "DeepSpeed's own way does not know EVE's attention: remove tensor_parallel, set parallel.tp_size in the YAML"
TENSOR_PARALLEL: Section = {
    "autotp_size": refused(whole(0), TP_SIZE, 0, 1),
    **unused(
        dtype=ANY_DTYPE,
        tp_overlap_comm=BOOL,
        vocab_parallel_lm_head=or_null(BOOL),
        vocab_parallel_ce_backend=choice("torch", "liger"),
        injection_policy_tuple=ANY,
        partition_config=or_null(MAPPING),
        preset_model=or_null(TEXT),
        keep_module_on_host=BOOL,
        replace_with_kernel_inject=BOOL,
        kernel_inject=BOOL,
    ),
    **{
        name: {
            "tp_size": refused(whole(1), TP_SIZE, 1),
            **unused(tp_grain_size=whole(1), mpu=ANY, tp_group=ANY),
        }
        for name in ("tensor_parallel", "tp")
    },
}
AUTO_EP: Section = {
    "enabled": refused(BOOL, f"AutoEP replaces the experts of known language models, and {EXPERTS}", False),
    **unused(
        **dict.fromkeys(
            (
                *("validate_folding_routing", "async_split_plan", "use_grouped_mm", "disable_triton_grouped_mm"),
                *("route_norm", "has_shared_experts"),
            ),
            or_null(BOOL),
        ),
        **dict.fromkeys(
            (
                *("preset_model", "moe_layer_pattern", "expert_pattern", "router_pattern", "score_apply"),
                *("combine_impl", "row_weighting_impl", "gate_up_impl", "comm_backend", "score_func"),
                *("expert_w1", "expert_w2", "expert_w3", "num_experts_attr", "top_k_attr", "shared_experts_pattern"),
                *("shared_experts_gate_pattern", "expert_activation"),
            ),
            or_null(TEXT),
        ),
        **dict.fromkeys(
            (
                *("autoep_size", "expert_tensor_parallel_size", "route_scale", "comm_num_sm", "comm_qp_margin"),
                *("comm_max_tokens_per_rank", "num_expert_groups", "num_limited_groups", "top_k"),
                *("load_balance_coeff", "routed_scaling_factor"),
            ),
            or_null(NUMBER),
        ),
    ),
}
COMPILE: Section = {
    "deepcompile": noted(BOOL, "set train.compile in the YAML", False),
    **unused(
        **dict.fromkeys(
            (
                *("autoep_non_moe", "free_activation", "offload_activation", "offload_activation_pin_memory"),
                *("offload_opt_states", "double_buffer", "symmetric_memory", "debug_log", "offload_parameters"),
                *("sync_before_reduce", "sync_after_reduce", "sync_before_allgather", "sync_after_allgather"),
                *("keep_int_input_tensors", "keep_all_input_tensors"),
            ),
            BOOL,
        ),
        free_activation_threshold=BYTES,
        passes=or_null(TEXTS),
    ),
}
QUANTIZATION: Section = {
    WHOLE: refused(MAPPING, "it quantizes weights for inference: remove it", {}),
    **unused(
        enabled=BOOL,
        num_bits=whole(1),
        q_type=TEXT,
        q_groups=whole(1),
        quantized_initialization=MAPPING,
        post_init_quant=MAPPING,
    ),
}
COMMS_LOGGER: Section = {
    "enabled": Rule(BOOL),
    "prof_all": Rule(BOOL),
    "prof_ops": Rule(TEXTS),
    "verbose": Rule(BOOL),
    "debug": Rule(BOOL),
}
FLOPS_PROFILER: Section = {
    "enabled": Rule(BOOL),
    "recompute_fwd_factor": Rule(Kind("number", low=0)),
    "profile_step": Rule(whole(0)),
    "module_depth": Rule(whole(-1)),
    "top_modules": Rule(whole(1)),
    "detailed": Rule(BOOL),
    "output_file": Rule(or_null(TEXT)),
}
AIO: Section = {
    name: noted(kind, NO_NVME)
    for name, kind in (
        ("block_size", whole(1)),
        ("queue_depth", whole(1)),
        ("intra_op_parallelism", whole(1)),
        ("single_submit", BOOL),
        ("overlap_events", BOOL),
        ("use_gds", BOOL),
    )
}
BLOCK: Section = {"type": Rule(TEXT, CHECKED), "params": Rule(MAPPING, CHECKED), "legacy_fusion": Rule(BOOL, UNUSED)}
"""Keys of `optimizer` and `scheduler`; :mod:`eve_ds.parallel.deepspeed_json.blocks` compares them with the YAML."""

KEYS: Section = {
    "train_batch_size": Rule(whole(1), CHECKED),
    "train_micro_batch_size_per_gpu": Rule(whole(1), CHECKED),
    "gradient_accumulation_steps": Rule(whole(1), CHECKED),
    "gradient_clipping": Rule(Kind("number", low=0), CHECKED),
    "optimizer": BLOCK,
    "scheduler": {name: BLOCK[name] for name in ("type", "params")},
    "bf16": BF16,
    "bfloat16": BF16,
    "fp16": FP16,
    "zero_optimization": ZERO,
    "data_types": {
        "grad_accum_dtype": Rule(or_null(ANY_DTYPE), CHECKED),
        "param_dtype": Rule(or_null(ANY_DTYPE), CHECKED),
        "buffer_dtype": noted(or_null(ANY_DTYPE), "EVE has no buffers", None),
        "keep_in_fp32_modules": noted(ANY, "EVE has no buffers", []),
    },
    "torch_autocast": {
        "enabled": refused(BOOL, "the model computes in train.precision: set that in the YAML", False),
        "dtype": Rule(or_null(ANY_DTYPE), UNUSED),
        "lower_precision_safe_modules": Rule(or_null(TEXTS), UNUSED),
    },
    "communication_data_type": Rule(or_null(DTYPE), CHECKED),
    "seq_parallel_communication_data_type": noted(or_null(DTYPE), "sequences are not split here", None),
    "prescale_gradients": Rule(BOOL, TAKEN, "", (False,), (0,)),
    "gradient_predivide_factor": Rule(Kind("number", low=2.0**-16, high=2.0**16), TAKEN, "", (1,), (0,)),
    "gradient_allreduce_op": Rule(
        choice("mean", "sum"), REFUSED, "losses are weighed for the mean over ranks: remove it", ("mean",)
    ),
    "managed_gradient_accumulation": refused(
        BOOL, "the training loop lets DeepSpeed count micro-steps: remove it", True
    ),
    "steps_per_print": Rule(or_null(whole(1))),
    "wall_clock_breakdown": Rule(BOOL),
    "memory_breakdown": Rule(BOOL),
    "dump_state": Rule(BOOL),
    "log_level": Rule(or_null(choice("debug", "info", "warning", "error", "critical"))),
    "disable_python_gc": Rule(BOOL),
    "timers": {"throughput": {"enabled": Rule(BOOL), "synchronized": Rule(BOOL)}},
    "tensorboard": MONITOR | {"enabled": Rule(BOOL, CHECKED)},
    "csv_monitor": MONITOR,
    "wandb": WANDB,
    "comet": COMET,
    "comms_logger": COMMS_LOGGER,
    "flops_profiler": FLOPS_PROFILER,
    "zero_allow_untested_optimizer": noted(BOOL, "it is always true: ZeRO runs AdamW of torch", True),
    "zero_force_ds_cpu_optimizer": noted(BOOL, "it is always false: AdamW of torch runs on the CPU too", False),
    "disable_allgather": noted(BOOL, f"DeepSpeed {FOLLOWED} does not use it", False),
    "vocabulary_size": noted(or_null(whole(0)), "it is model.vocab_size in the YAML", None),
    "dataloader_drop_last": noted(BOOL, OWN_DATA, False),
    "data_efficiency": DATA_EFFICIENCY,
    "activation_checkpointing": ACTIVATION_CHECKPOINTING,
    "checkpoint": CHECKPOINT,
    "datastates_ckpt": noted(ANY, OWN_CHECKPOINTS, False, None),
    "aio": AIO,
    "compile": COMPILE,
    "pipeline": {
        name: noted(ANY, "EVE is not split into pipeline stages")
        for name in (
            *("stages", "partition", "seed_layers", "activation_checkpoint_interval"),
            *("pipe_partitioned", "grad_partitioned"),
        )
    },
    "autotuning": AUTOTUNING,
    "hybrid_engine": HYBRID_ENGINE,
    "tensor_parallel": TENSOR_PARALLEL,
    "expert_parallel": AUTO_EP,
    "weight_quantization": QUANTIZATION,
    "use_data_before_expert_parallelism": refused(
        BOOL, "an expert-parallel group consists of consecutive ranks here: remove it", False
    ),
    "sequence_parallel_size": refused(whole(1), "EVE does not split sequences over ranks: remove it", 1),
    "data_parallel_size": noted(whole(1), "it is the number of ranks that the launcher starts"),
    "nebula": removed("checkpoints would not go there: remove it"),
    "compression_training": removed("nothing would be compressed: remove it"),
    "amp": removed("set train.precision in the YAML instead"),
    "quantize_training": removed("nothing would be quantized: remove it"),
    "sparse_gradients": removed("gradients are dense: remove it"),
    "eigenvalue": removed("it has no effect: remove it"),
    "sparse_attention": removed("attention would be dense: remove it"),
    "elasticity": removed("a run resumes on any number of ranks anyway: remove it"),
    "graph_harvesting": removed("set train.compile in the YAML instead"),
    "curriculum_learning": removed("the data are not sorted by difficulty: remove it"),
    "progressive_layer_drop": removed("set model.drop_path_rate in the YAML instead"),
}
"""All keys of the JSON."""
