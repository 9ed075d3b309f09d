"""State of the dynamic loss scale of fp16, which no CPU trains: DeepSpeed's own scalers in stand-ins for engines."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler

from eve_ds.checkpoint.engine_tensors import load_loss_scale, loss_scale_state

SETTINGS = {"init_scale": 2**16, "scale_window": 3, "min_scale": 1, "delayed_shift": 2, "consecutive_hysteresis": False}


@pytest.fixture(autouse=True)
def without_ranks(monkeypatch):
    monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 1))  # scalers ask it before they log


def engine_with(dtype, overflows=()):
    """Stand-in for an engine of ZeRO 1 to 3, whose scaler has seen these steps."""
    scaler = loss_scaler.CreateLossScaler(dtype, 1.0, dtype == torch.float16, SETTINGS)
    for overflow in overflows:
        scaler.update_scale(overflow)
    return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler, dynamic_loss_scale=scaler.dynamic))


@pytest.mark.parametrize("later", [(False, False, False, False, False), (True, False)])
def test_a_restored_scale_goes_on_as_the_saved_one(later):
    saved, restored = engine_with(torch.float16, [True, True, False, True]), engine_with(torch.float16)
    ours, theirs = restored.optimizer.loss_scaler, saved.optimizer.loss_scaler
    assert theirs.loss_scale < ours.loss_scale
    load_loss_scale(restored, loss_scale_state(saved))
    scales = []
    for overflow in later:
        scales.append((ours.loss_scale, theirs.loss_scale))
        ours.update_scale(overflow)
        theirs.update_scale(overflow)
    assert len(set(scales)) > 1, "the scale must change, or equality proves nothing"
    assert all(one == other for one, other in scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_have_no_scale_and_ignore_one(dtype):
    engine = engine_with(dtype)
    assert loss_scale_state(engine) is None
    load_loss_scale(engine, loss_scale_state(engine_with(torch.float16, [True])))
    assert engine.optimizer.loss_scaler.loss_scale == 1.0
