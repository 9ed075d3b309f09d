"""Blocks `optimizer` and `scheduler` of the DeepSpeed JSON: compare them with the YAML, which builds both."""

from __future__ import annotations

from typing import Any, NamedTuple

from eve_ds.parallel.deepspeed_json.check import JSON
from eve_ds.parallel.deepspeed_json.shared import SharedSettings
from eve_ds.parallel.deepspeed_json.values import AUTO, BOOL, NUMBER, TEXT, Kind, or_null, show, whole


class Field(NamedTuple):
    """Field of the YAML that a parameter of a block sets."""

    kind: Kind
    section: str
    name: str


class Fixed(NamedTuple):
    """Only value of a parameter that eve_ds computes with; None: the parameter changes no result."""

    kind: Kind
    value: Any


ADAM = ("adam", "adamw")
"""Names of AdamW: DeepSpeed's `Adam` decays weights as AdamW does, unless `adam_w_mode` is false."""
ADAM_PARAMS: dict[str, Field | Fixed] = {
    "lr": Field(NUMBER, "optimizer", "lr"),
    "betas": Field(Kind("numbers"), "optimizer", "betas"),
    "eps": Field(NUMBER, "optimizer", "eps"),
    "weight_decay": Field(NUMBER, "optimizer", "weight_decay"),
    "max_grad_norm": Field(NUMBER, "optimizer", "clip_grad_norm"),
    "adam_w_mode": Fixed(BOOL, True),
    "bias_correction": Fixed(BOOL, True),
    "fp32_optimizer_states": Fixed(BOOL, True),
    "amsgrad": Fixed(BOOL, False),
    "maximize": Fixed(BOOL, False),
    "torch_adam": Fixed(BOOL, None),
    "fused": Fixed(or_null(BOOL), None),
    "foreach": Fixed(or_null(BOOL), None),
}
DECAYS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's schedules -> `optimizer.decay`."""
SCHEDULE_PARAMS: dict[str, Field | Fixed] = {
    "warmup_max_lr": Field(NUMBER, "optimizer", "lr"),
    "warmup_num_steps": Field(whole(0), "optimizer", "warmup_steps"),
    "total_num_steps": Field(whole(1), "train", "max_steps"),
    "cos_min_ratio": Field(NUMBER, "optimizer", "final_lr_share"),
    "warmup_min_lr": Fixed(NUMBER, 0),
    "warmup_min_ratio": Fixed(NUMBER, 0),
    "warmup_type": Fixed(TEXT, "linear"),
    "last_batch_iteration": Fixed(whole(-1), -1),
}


def compare_optimizer(block: dict[str, Any], shared: SharedSettings) -> None:
    """Compare `optimizer` with AdamW and the YAML's section `optimizer`; every difference becomes a problem."""
    kind = block.get("type", "AdamW")
    if kind.lower() not in ADAM:
        shared.problems.add(
            "optimizer.type",
            f'optimizer.type ({show(kind)}) {JSON} cannot be used: eve_ds trains with AdamW: write "AdamW", or '
            "remove optimizer",
        )
    _compare_params("optimizer.params", block.get("params", {}), ADAM_PARAMS, shared)


def compare_scheduler(block: dict[str, Any], shared: SharedSettings) -> None:
    """Compare `scheduler` with the schedule of the YAML's section `optimizer`; differences become problems.

    A block whose parameters are all "auto" leaves the whole schedule to the YAML, the shape of the decay included.
    """
    kind, params = block.get("type"), block.get("params", {})
    if kind is not None and kind not in DECAYS:
        shared.problems.add(
            "scheduler.type",
            f"scheduler.type ({show(kind)}) {JSON} cannot be used: write one of {', '.join(DECAYS)}, or remove "
            "scheduler and set the section optimizer of the YAML",
        )
    elif kind is not None and any(value != AUTO for value in params.values()):
        decay = shared.get("optimizer", "decay")
        if shared.is_explicit("optimizer", "decay") and DECAYS[kind] != decay:
            shared.problems.add(
                "scheduler.type",
                f"optimizer.decay ({decay}) in the YAML contradicts scheduler.type ({kind}, which means "
                f"{DECAYS[kind]}) {JSON}: remove scheduler, or make them equal",
            )
        else:
            shared.take("scheduler.type", DECAYS[kind], "optimizer", "decay")
    _compare_params("scheduler.params", params, SCHEDULE_PARAMS, shared)


def _compare_params(
    prefix: str, given: dict[str, Any], known: dict[str, Field | Fixed], shared: SharedSettings
) -> None:
    for name, value in given.items():
        path, rule = f"{prefix}.{name}", known.get(name)
        if value == AUTO or name.startswith(("_", "//")):
            continue
        if rule is None:
            shared.problems.add(path, f"{path} {JSON} has no counterpart here: remove it (known: {', '.join(known)})")
        elif not rule.kind.fits(value):
            shared.problems.add(path, f"{path} ({show(value)}) {JSON} must be {rule.kind.rule}")
        elif isinstance(rule, Field):
            shared.take(path, rule.kind.plain(value), rule.section, rule.name)
        elif rule.value is not None and value != rule.value:
            shared.problems.add(
                path, f"{path} ({show(value)}) {JSON} cannot be used: eve_ds computes with {show(rule.value)}"
            )


def describe_optimizer(shared: SharedSettings) -> str:
    """Return a line about the optimizer that stands for the block."""
    names = ("lr", "betas", "eps", "weight_decay")
    values = ", ".join(f"{name} {show(shared.get('optimizer', name))}" for name in names)
    return f"optimizer {JSON} is read as AdamW of the YAML: {values}"


def describe_scheduler(shared: SharedSettings) -> str:
    """Return a line about the schedule that stands for the block."""
    steps, decay = shared.get("optimizer", "warmup_steps"), shared.get("optimizer", "decay")
    return f"scheduler {JSON} is read as the schedule of the YAML: linear warm-up of {steps} steps, decay: {decay}"
