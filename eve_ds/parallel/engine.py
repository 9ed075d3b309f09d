"""Engine of a run: the call of `deepspeed.initialize`, and what eve_ds changes before and after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import register_external_parameter
from torch import nn

from eve_ds.config import ConfigError
from eve_ds.model.eve import EVE
from eve_ds.model.with_losses import plain_model
from eve_ds.parallel.deepspeed_json.errors import deepspeed_errors
from eve_ds.parallel.deepspeed_json.keys import FOLLOWED
from eve_ds.parallel.fp32_sums import sum_in_fp32
from eve_ds.parallel.zero import lower_host_calls

DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's default of `reduce_bucket_size`."""
MUON = "deepspeed.runtime.zero.muon.muon_optimizer"
"""Module of an optimizer that eve_ds does not use."""


def initialize_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, deepspeed_config: dict[str, Any], mpu: object = None
) -> DeepSpeedEngine:
    """Call `deepspeed.initialize`, and change what its result does otherwise than eve_ds needs at the ZeRO stage.

    ZeRO 0 and 1 sum in fp32 if the configuration says so, ZeRO 1 and 2 make fewer host calls, and ZeRO 3 gathers what
    losses read.

    Args:
        model: model with the experts of this rank.
        optimizer: optimizer over the groups of :func:`eve_ds.training.optimizer.optimizer_parameter_groups`.
        deepspeed_config: result of :func:`eve_ds.parallel.settings.resolve_deepspeed_config`.
        mpu: result of :func:`eve_ds.parallel.startup.tensor_parallel_unit`.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
    """
    stage = deepspeed_config["zero_optimization"]["stage"]
    own_sums = stage < 2 and "data_types" in deepspeed_config
    config = _fit_bucket(_without_sums(deepspeed_config, stage) if own_sums else deepspeed_config, model)
    muon = nullcontext() if stage == 3 else _without_muon()  # ZeRO 3 needs the import
    with deepspeed_errors(deepspeed_config), muon:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False, mpu=mpu
        )
    if stage == 3:
        _gather_for_losses(engine.module)
    lower_host_calls(engine, torch.float32 if own_sums else None)
    if own_sums and stage == 0:
        sum_in_fp32(engine)
    elif own_sums and getattr(engine.optimizer, "flat_gradients", None) is None:
        raise ConfigError(
            f"data_types.grad_accum_dtype (fp32) in the DeepSpeed JSON needs DeepSpeed {FOLLOWED} at ZeRO 1, and this "
            f"is {deepspeed.__version__}: use stage 2, or remove it"
        )
    return engine


def _without_sums(deepspeed_config: dict[str, Any], stage: int) -> dict[str, Any]:
    """Copy of the configuration for ZeRO 0 or 1 whose sums in fp32 are ours.

    DeepSpeed would refuse them, or take an optimizer whose tensors our checkpoints do not know.
    """
    config = {key: value for key, value in deepspeed_config.items() if key != "data_types"}
    return {"communication_data_type": "fp32", **config} if stage == 0 else config


def _gather_for_losses(module: nn.Module) -> None:
    """Let ZeRO 3 gather what losses read of a model, for as long as the forward of model and losses lasts."""
    model = plain_model(module)
    if isinstance(model, EVE):
        for parameter in model.parameters_of_output():
            register_external_parameter(module, parameter)


@contextmanager
def _without_muon() -> Iterator[None]:
    """Make the import of Muon fail, which DeepSpeed's check of the optimizer tries and can do without.

    The import loads the compiler of torch, which takes 0.7 s of CPU time. DeepSpeed's own ZeRO 2 loads it in a step.
    """
    loaded = sys.modules.get(MUON)
    sys.modules[MUON] = None  # type: ignore[assignment] # as documented: an import of the name fails
    try:
        yield
    finally:
        del sys.modules[MUON]
        if loaded is not None:
            sys.modules[MUON] = loaded


def _fit_bucket(deepspeed_config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Copy of the configuration with a bucket of gradients no larger than the model: DeepSpeed allocates all of it."""
    zero = dict(deepspeed_config["zero_optimization"])
    size = sum(parameter.numel() for parameter in model.parameters())
    zero["reduce_bucket_size"] = min(zero.get("reduce_bucket_size", DEFAULT_BUCKET), size)
    return deepspeed_config | {"zero_optimization": zero}
