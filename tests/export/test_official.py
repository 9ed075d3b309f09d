"""Conversion to and from released names, and the `official` profile compared with the released backbone."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from eve_ds.config import ModelConfig, MoEConfig, load_config
from eve_ds.export.official import from_official, to_official, write_official
from eve_ds.model.eve import EVE, Backbone

DATA = os.environ.get("EVE_DS_TEST_DATA")
TOLERANCE = 1e-5
"""Two orders of summation in fp32 over rows of 64 to 128 values of order 1 differ by a few 1e-6."""


@pytest.fixture(scope="module")
def golden():
    if DATA is None:
        pytest.skip("EVE_DS_TEST_DATA is not set to the folder of the golden tensors")
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


def test_default_profile_differs_from_the_released_behavior(golden):
    tensors, _ = golden
    model = backbone(golden, 1.0)
    for block in model.blocks:
        if block.is_moe:
            block.moe.router.official = False
    with torch.no_grad():
        output = model(**inputs(tensors, "pair"))
    assert (output.stream.padded() - tensors["output.pair"]).abs().max() > 1e-3


def base_names():
    """Return names and shapes of the released EVE-Base at 224 pixels."""
    vector, ffn = (
        (768,),
        {"fc1.weight": (3072, 768), "fc1.bias": (3072,), "fc2.weight": (768, 3072), "fc2.bias": (768,)},
    )
    shapes = dict.fromkeys(
        ["class_embedding_vision", "type_embed_vision", "type_embed_text", "patch_embed.bias"], vector
    )
    shapes |= {"pos_embed_vision": (197, 768), "pos_embed_text": (196, 768)}
    shapes |= {"position_ids_vision": (1, 197), "position_ids_text": (196,)}
    shapes |= {"patch_embed.weight": (768, 3, 16, 16), "word_embedding.weight": (64000, 768)}
    norms = ["layer_norm_text", "pre_layrnorm", "norm"]
    for layer in range(12):
        block = f"encoder.layers.{layer}."
        names = ["gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias", "attn.proj.bias"]
        shapes |= {block + name: vector for name in names}
        shapes |= {f"{block}attn.qkv.weight": (2304, 768), f"{block}attn.proj.weight": (768, 768)}
        norms.append(f"{block}norm1")
        if layer < 10:
            norms += [f"{block}norm2_imag", f"{block}norm2_text"]
            networks = [f"{block}mlp_imag.", f"{block}mlp_text."]
        else:
            moe = f"{block}mlp_moe.moe."
            norms.append(f"{block}norm2_vl")
            networks = [f"{moe}experts.experts.{expert}." for expert in range(32)]
            shapes |= {f"{moe}gate.wg.weight": (32, 768), f"{moe}vision_embed": vector, f"{moe}text_embed": vector}
        shapes |= {network + name: shape for network in networks for name, shape in ffn.items()}
    shapes |= {f"{norm}.{kind}": vector for norm in norms for kind in ("weight", "bias")}
    return {f"backbone.{name}": shape for name, shape in shapes.items()}


def test_eve_base_has_the_names_and_shapes_of_the_released_file():
    with torch.device("meta"):
        state = to_official(EVE(load_config("eve_base").model).state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == base_names()
    assert len(state) == 510
    assert sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point()) == 475_197_696
    buffers = {name for name, tensor in state.items() if tensor.dtype == torch.int64}
    assert buffers == {"backbone.position_ids_vision", "backbone.position_ids_text"}


def test_conversion_of_the_released_tensors_is_reversible(golden):
    released = {name: tensor for name, tensor in golden[0].items() if name.startswith("backbone.")}
    assert "backbone.position_ids_text" in released
    assert_same(to_official(from_official(released)), released)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return EVE(load_config("eve_tiny").model).state_dict()


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_conversion_of_our_tensors_is_reversible(tiny, prefix):
    released = {prefix + name.removeprefix("backbone."): tensor for name, tensor in to_official(tiny).items()}
    ours = {
        prefix + name.removeprefix("backbone."): tensor
        for name, tensor in tiny.items()
        if not name.startswith(("pixel_decoder.", "text_head."))
    }
    assert len(ours) < len(tiny)
    assert_same(from_official(released), ours)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_rows_of_the_modality_embedding_are_image_then_text(tiny):
    rows = tiny["backbone.blocks.2.moe.router.modality_embedding"]
    released = to_official(tiny)
    assert torch.equal(released["backbone.encoder.layers.2.mlp_moe.moe.vision_embed"], rows[0])
    assert torch.equal(released["backbone.encoder.layers.2.mlp_moe.moe.text_embed"], rows[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_is_one_flat_dictionary(tiny, tmp_path, dtype):
    file = tmp_path / "eve_official.pth"
    write_official(tiny, file, dtype)
    expected = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in to_official(tiny).items()
    }
    assert_same(torch.load(file, weights_only=True), expected)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_failed_write_keeps_the_earlier_file(tiny, tmp_path, monkeypatch):
    file = tmp_path / "eve_official.pth"
    file.write_text("earlier")

    def full(state, opened):
        opened.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_official(tiny, file)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]
