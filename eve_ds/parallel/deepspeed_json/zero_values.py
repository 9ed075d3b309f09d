"""Values of the DeepSpeed JSON that depend on ZeRO stage and precision together: data types, offload, buckets."""

from __future__ import annotations

from typing import Any

from eve_ds.parallel.deepspeed_json.check import JSON, Problems
from eve_ds.parallel.deepspeed_json.values import show

PRECISIONS = {"half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "float32": "fp32"}
"""Further names of data types in the JSON -> values of `train.precision`."""


def settle_zero(resolved: dict[str, Any], precision: str, problems: Problems) -> list[str]:
    """Settle data types and offload, which depend on stage and precision; return a line per value without effect."""
    zero, types = resolved["zero_optimization"], resolved.pop("data_types", {})
    offload = zero.get("offload_optimizer", {})
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name, {}).get("device") == "nvme":
            path = f"zero_optimization.{name}.device"
            problems.add(
                path, f'{path} ("nvme") {JSON} cannot be used: checkpoints do not read NVMe: write "cpu", or remove it'
            )
    if _accumulates_in_fp32(types, zero, precision, problems):
        resolved["data_types"] = {"grad_accum_dtype": "fp32"}
        return _settle_sums(resolved, problems) if zero["stage"] == 1 else []
    if zero["stage"] == 1 and not (zero.get("overlap_comm") or offload) and "reduce_bucket_size" in zero:
        return [
            f"zero_optimization.reduce_bucket_size ({zero['reduce_bucket_size']}) {JSON} has no effect: ZeRO 1 without "
            "overlap_comm averages all gradients in one buffer"
        ]
    return []


def _settle_sums(resolved: dict[str, Any], problems: Problems) -> list[str]:
    """Remove settings that do not act on ZeRO 1's own sums in fp32; return a line about each."""
    sent = resolved.pop("communication_data_type", "fp32")
    if sent != "fp32":
        problems.add(
            "communication_data_type",
            f"communication_data_type ({show(sent)}) {JSON} cannot be used with data_types.grad_accum_dtype fp32 and "
            'zero_optimization.stage 1, which sends the sums as they are: write "fp32", or use stage 2',
        )
    zero = resolved["zero_optimization"]
    return [
        f"zero_optimization.{key} ({show(zero.pop(key))}) {JSON} has no effect: ZeRO 1 averages sums in fp32 once, "
        "after the last backward pass of a step"
        for key in ("overlap_comm", "use_multi_rank_bucket_allreduce", "reduce_bucket_size")
        if key in zero
    ]


def _accumulates_in_fp32(types: dict[str, Any], zero: dict[str, Any], precision: str, problems: Problems) -> bool:
    """Whether gradients are summed over micro-steps in fp32, although the model computes in less; checks the types."""
    for name in ("param_dtype", "grad_accum_dtype"):
        given = types.get(name)
        if given is None:
            continue
        path, dtype = f"data_types.{name}", given.lower().removeprefix("torch.")
        dtype = PRECISIONS.get(dtype, dtype)
        if dtype == precision:
            continue
        if name == "param_dtype" or dtype != "fp32":
            allowed = " or ".join(dict.fromkeys((precision,) if name == "param_dtype" else ("fp32", precision)))
            problems.add(
                path,
                f"{path} ({show(given)}) {JSON} must be {allowed}, since the model computes in {precision}: remove it, "
                "or change train.precision",
            )
        elif zero["stage"] == 1 and "offload_optimizer" in zero:
            problems.add(
                path,
                f"{path} ({show(given)}) {JSON} cannot be used with precision {precision}, zero_optimization.stage 1 "
                "and offload_optimizer: use stage 2, or remove it",
            )
        else:
            return True
    return False
