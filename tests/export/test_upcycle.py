"""EVE initialized from tiny ViTs and BEiTs with random weights: taken tensors, outputs, and refused checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODEL, tiny_config
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from eve_ds.export import WeightFileError, upcycle
from eve_ds.model.embeddings import resize_positions
from eve_ds.model.eve import EVE
from eve_ds.views import Layout, Packing

SIZES = {
    **{name: MODEL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
    "hidden_act": "quick_gelu",
}
TOLERANCE = 1e-5
"""Absolute tolerance of hidden states of order 1 to 10 after three layers in fp32."""


def config_of(*overrides):
    """One MoE layer, and images of four by four patches."""
    return tiny_config("model.moe_layers=[1]", "model.image_size=32", *overrides)


def randomized(model):
    """Change biases, norms, class tokens and scales from their initial values, which could hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


def vit(**options):
    torch.manual_seed(0)
    return randomized(ViTModel(ViTConfig(**SIZES | options), add_pooling_layer=False))


def beit(**options):
    torch.manual_seed(0)
    return randomized(BeitModel(BeitConfig(**SIZES | options), add_pooling_layer=False))


MODELS = {
    "vit": vit,
    "vit without biases": lambda: vit(qkv_bias=False),
    "beit": lambda: beit(use_mean_pooling=False),
    "beit with positions": lambda: beit(use_mean_pooling=False, use_absolute_position_embeddings=True),
    "beit without scale": lambda: beit(use_mean_pooling=False, layer_scale_init_value=0.0),
}


@pytest.fixture(params=MODELS)
def dense(request):
    return MODELS[request.param]()


@pytest.fixture
def folder(tmp_path):
    """Function that writes a model and returns its folder."""

    def write(model):
        model.save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    return write


@pytest.fixture
def refused():
    def call(folder, *overrides, **options):
        with pytest.raises(WeightFileError) as error:
            upcycle(folder, config_of(*overrides), **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    return call


def model_of(config, upcycled):
    model = EVE(config.model).eval()
    model.load_state_dict(upcycled.weights)
    return model


def run_blocks(backbone, embedded):
    """Return the states of (B, S, D) image tokens after every block, and after the final norm."""
    shape = embedded.shape[:2]
    packing = Packing.of([Layout.of(torch.ones(shape, dtype=torch.bool), shape[1])])
    states, x = [], embedded.flatten(0, 1)
    for block in backbone.blocks:
        x, *_ = block(x, packing)
        states.append(x.view_as(embedded))
    return states, backbone.norm(x).view_as(embedded)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("moe_layers", ["[]", "[1]", "[0, 1, 2]"])
def test_blocks_with_equal_experts_compute_the_outputs_of_the_dense_layers(dense, folder, moe_layers):
    config = config_of(f"model.moe_layers={moe_layers}")
    backbone = model_of(config, upcycle(folder(dense), config, noise=0.0)).backbone
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        embedded = dense.embeddings(pixel_values)
        expected = dense(pixel_values, output_hidden_states=True)
        states, final = run_blocks(backbone, embedded)
    for state, hidden in zip(states, expected.hidden_states[1:], strict=True):
        assert_close(state, hidden)
    assert_close(final, expected.last_hidden_state)


def test_embedded_images_equal_those_of_the_checkpoint_except_for_the_modality(dense, folder):
    config = config_of()
    image = model_of(config, upcycle(folder(dense), config)).backbone.image_embedding
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = dense.embeddings(pixel_values)
        if dense.embeddings.position_embeddings is None:
            expected = expected + image.position  # newly initialized, because the checkpoint has none
        assert_close(image(pixel_values) - image.modality, expected)


def test_text_networks_can_be_initialized_from_image_networks(folder):
    config = config_of()
    ffn = model_of(config, upcycle(folder(vit()), config, text_from_image=True)).backbone.blocks[0].ffn
    for own, other in ((ffn.text, ffn.image), (ffn.norm_text, ffn.norm_image)):
        for name, parameter in own.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name))


def test_other_tensors_are_initialized_as_in_a_new_model(folder):
    config = config_of("train.seed=4")
    upcycled = upcycle(folder(vit()), config)
    torch.manual_seed(4)
    new = EVE(config.model).state_dict()
    drawn = {name for name, origin in upcycled.origins.items() if origin == "drawn"}
    assert all(torch.equal(upcycled.weights[name], new[name]) for name in drawn)
    assert {name.split(".")[1] for name in drawn if name.startswith("backbone.")} == {
        "blocks",
        "image_embedding",
        "pre_norm",
        "text_embedding",
    }
    blocks = {name.split(".", 3)[3] for name in drawn if name.startswith("backbone.blocks.")}
    texts = {f"ffn.text.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert blocks == texts | {"ffn.norm_text.weight", "ffn.norm_text.bias"} | {
        "moe.router.weight",
        "moe.router.modality_embedding",
    }
    assert {name for name in drawn if "image_embedding" in name} == {"backbone.image_embedding.modality"}
    assert upcycled.origins.keys() == upcycled.weights.keys() == new.keys()
    assert upcycled.origins["backbone.blocks.1.moe.experts.3.fc1.weight"] == (
        "encoder.layer.1.intermediate.dense.weight, noise 0.01"
    )
    assert upcycled.origins["backbone.blocks.1.gamma_1"] == "1, the checkpoint has no LayerScale"


def test_experts_differ_by_noise_of_the_given_size(folder):
    dense = vit()
    weights = upcycle(folder(dense), config_of(), noise=0.1).weights
    source = dense.layers[1].mlp.fc1.weight.detach()
    noise = [weights[f"backbone.blocks.1.moe.experts.{expert}.fc1.weight"] - source for expert in range(4)]
    for expert, own in enumerate(noise):
        assert own.std().item() == pytest.approx(0.1 * source.std().item(), rel=0.1)
        assert all((own - other).abs().max() > 0.01 for other in noise[:expert])
    again, other = (upcycle(folder(dense), config_of(f"train.seed={seed}"), noise=0.1).weights for seed in (0, 1))
    name = "backbone.blocks.1.moe.experts.3.fc1.weight"
    assert torch.equal(again[name], weights[name])
    assert not torch.equal(other[name], weights[name])


def test_position_table_is_resized_for_images_of_another_size(folder):
    dense = vit()
    weights = upcycle(folder(dense), config_of("model.image_size=48")).weights
    expected = resize_positions(dense.embeddings.position_embeddings[0].detach(), 6)
    assert torch.equal(weights["backbone.image_embedding.position"], expected)


def test_first_layers_of_a_deeper_checkpoint_are_taken(folder):
    dense = vit(num_hidden_layers=4)
    upcycled = upcycle(folder(dense), config_of())
    assert torch.equal(upcycled.weights["backbone.blocks.2.norm1.bias"], dense.layers[2].layernorm_before.bias)
    assert upcycled.notes == [
        "not taken from the checkpoint: encoder.layer.3.attention.attention.key.weight, "
        "encoder.layer.3.attention.attention.query.bias, encoder.layer.3.attention.attention.query.weight and 12 more"
    ]


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (ViTForImageClassification, ViTConfig(**SIZES)),
        (BeitForImageClassification, BeitConfig(**SIZES, use_relative_position_bias=True)),
        (BeitForMaskedImageModeling, BeitConfig(**SIZES, use_shared_relative_position_bias=True, use_mask_token=True)),
    ],
)
def test_models_with_a_head_are_read(folder, make, config):
    torch.manual_seed(0)
    dense = randomized(make(config))
    upcycled = upcycle(folder(dense), config_of())
    base = dense.base_model
    assert torch.equal(upcycled.weights["backbone.blocks.0.norm1.bias"], base.layers[0].layernorm_before.bias)
    norm = getattr(dense, "layernorm", base.layernorm)
    taken = not isinstance(norm, torch.nn.Identity)
    assert (upcycled.origins["backbone.norm.bias"] == "drawn") is not taken
    if taken:
        assert torch.equal(upcycled.weights["backbone.norm.bias"], norm.bias)


def test_differences_in_computation_are_noted(folder):
    dense = vit(hidden_act="gelu", layer_norm_eps=1e-12)
    assert upcycle(folder(dense), config_of()).notes[-2:] == [
        "the checkpoint was trained with gelu, the model uses quick_gelu",
        "the checkpoint has layer_norm_eps 1e-12, the model 1e-06",
    ]


def test_weights_in_a_pickle_and_in_half_precision_are_read(folder):
    dense = vit()
    path = folder(dense)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save({name: tensor.half() for name, tensor in weights.items()}, path / "pytorch_model.bin")
    norm = upcycle(path, config_of()).weights["backbone.norm.bias"]
    assert torch.equal(norm, dense.layernorm.bias.half().float())


class Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_code_in_pickles_is_not_run(folder, refused, tmp_path):
    path = folder(vit())
    (path / "model.safetensors").unlink()
    torch.save({"embeddings.cls_token": Harmful(tmp_path / "harmed")}, path / "pytorch_model.bin")
    assert "pytorch_model.bin refers to" in refused(path)
    assert not (tmp_path / "harmed").exists()
    torch.load(path / "pytorch_model.bin", weights_only=False)  # an unsafe load runs the code
    assert (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.hidden_size=64", "hidden_size 32 where the model has 64"),
        ("model.num_attention_heads=8", "num_attention_heads 4 where the model has 8"),
        ("model.intermediate_size=64", "intermediate_size 48 where the model has 64"),
        ("model.patch_size=4", "patch_size 8 where the model has 4"),
        ("model.num_hidden_layers=4", "num_hidden_layers 3 where the model has 4"),
    ],
)
def test_other_sizes_are_refused(folder, refused, override, text):
    path = folder(vit())
    assert refused(path, override) == f"{path} has {text}: take a checkpoint or a config of the same size"


def change(path, edit):
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors")


def test_missing_tensors_are_named(folder, refused):
    path = folder(vit())
    change(path, lambda weights: [weights.pop(f"layernorm.{kind}") for kind in ("weight", "bias")])
    assert (
        refused(path)
        == f"{path} lacks layernorm.bias, layernorm.weight, which a vit of its config.json has: take a complete one"
    )


def test_tensors_of_another_shape_are_named(folder, refused):
    path = folder(vit())
    change(path, lambda weights: weights.update({"encoder.layer.0.output.dense.bias": torch.zeros(31)}))
    with pytest.raises(ValueError, match=r"dense has backbone\.blocks\.0\.ffn\.image\.fc2\.bias \(31,\) where the mod"):
        upcycle(path, config_of())
    change(path, lambda weights: weights.update({"embeddings.position_embeddings": torch.zeros(1, 16, 32)}))
    assert refused(path) == (
        f"{path}: backbone.image_embedding.position cannot be made of embeddings.position_embeddings: a position table "
        "of 16 rows is not a class token and a square of patches"
    )


def test_folders_of_another_kind_are_refused(folder, refused, tmp_path):
    path = folder(vit())
    assert f"{tmp_path / 'config.json'} cannot be read (No such file or directory): name a folder" in refused(tmp_path)
    shutil.move(path / "model.safetensors", path / "model-00001-of-00002.safetensors")
    assert refused(path) == (
        f"{path} holds neither model.safetensors nor pytorch_model.bin: only checkpoints of one file are read"
    )
    (path / "config.json").write_text(json.dumps({"model_type": "deit"}))
    assert (
        refused(path) == f"{path / 'config.json'} has model_type 'deit': only vit, beit and timm's beitv2_... are read"
    )
    (path / "config.json").write_text("[]")
    assert "has model_type None" in refused(path)
    (path / "config.json").write_text("{")
    assert "config.json is not JSON (" in refused(path)


def test_negative_noise_is_refused(folder):
    with pytest.raises(ValueError, match=r"noise \(-0\.1\) must not be negative"):
        upcycle(folder(vit()), config_of(), noise=-0.1)
