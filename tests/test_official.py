"""The `official` profile against what the released backbone computes for random weights."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from eve_ds.config import ModelConfig, MoEConfig
from eve_ds.export.official import from_official
from eve_ds.model.eve import Backbone

DATA = os.environ.get("EVE_DS_TEST_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="EVE_DS_TEST_DATA does not name the folder of the golden tensors")
# Two orders of summation in fp32 over rows of 64 to 128 values of order 1: a few 1e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    path = Path(DATA) / "official_golden" / "tiny.safetensors"
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, json.loads(file.metadata()["about"])


def backbone(golden, capacity_factor):
    tensors, about = golden
    sizes = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "moe_layers")
    config = ModelConfig(
        profile="official",
        moe=MoEConfig(num_experts=about["num_experts"], routing="capacity", capacity_factor=capacity_factor),
        **{name: about[name] for name in (*sizes, "vocab_size", "image_size", "patch_size", "text_positions")},
        text_length=about["text_length"],
    )
    model = Backbone(config).eval()
    state = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    model.load_state_dict(from_official(state))
    return model


def inputs(tensors, kind):
    image = {"pixel_values": tensors["input.pixel_values"]}
    text = {"input_ids": tensors["input.input_ids"], "attention_mask": tensors["input.attention_mask"].bool()}
    return {"pair": image | text, "image": image, "text": text}[kind]


@pytest.mark.parametrize(
    ("case", "kind", "capacity_factor"),
    [("pair", "pair", 1.0), ("image", "image", 1.0), ("text", "text", 1.0), ("pair_nodrop", "pair", 8.0)],
)
def test_official_profile_equals_the_released_backbone(golden, case, kind, capacity_factor):
    tensors, about = golden
    with torch.no_grad():
        output = backbone(golden, capacity_factor)(**inputs(tensors, kind))
    torch.testing.assert_close(output.stream.padded(), tensors[f"output.{case}"], rtol=TOLERANCE, atol=TOLERANCE)
    losses = [layer.load_balancing_loss.item() for layer in output.moe]
    assert losses == pytest.approx(about["load_balancing_loss_per_moe_layer"][case], rel=TOLERANCE)
    dropped = [int(layer.statistics.dropped.sum()) for layer in output.moe]
    first = {"pair": 0, "image": 2, "text": 4}
    expected = about["routes_dropped_per_moe_call"][first[case] : first[case] + 2] if case in first else [0, 0]
    assert dropped == expected


def test_default_profile_differs_from_the_released_behaviour(golden):
    tensors, _ = golden
    model = backbone(golden, 1.0)
    for block in model.blocks:
        if block.is_moe:
            block.moe.router.official = False
    with torch.no_grad():
        output = model(**inputs(tensors, "pair"))
    assert (output.stream.padded() - tensors["output.pair"]).abs().max() > 1e-3
