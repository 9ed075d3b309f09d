"""EVE initialized from tiny BEiTv2 files with published names and random tensors: taken tensors, refused files."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import tiny_config

from eve_ds.export import WeightFileError, upcycle
from eve_ds.model.embeddings import resize_positions
from eve_ds.model.eve import EVE
from eve_ds.views import Layout, Packing

WIDTH, LAYERS, HEADS, FFN, PATCH, SIDE = 32, 3, 4, 48, 8, 4
DISTANCES = (2 * SIDE - 1) ** 2 + 3
"""Number of distances: between patches, and three for the class token."""
TOLERANCE = 1e-5
"""Absolute tolerance of hidden states of order 1 to 10 after one layer in fp32."""


def config_of(*overrides):
    """One MoE layer, and images of four by four patches."""
    return tiny_config("model.moe_layers=[1]", f"model.image_size={SIDE * PATCH}", *overrides)


def layer_shapes(prefix):
    return {
        f"{prefix}.gamma_1": (WIDTH,),
        f"{prefix}.gamma_2": (WIDTH,),
        **affine(f"{prefix}.norm1"),
        f"{prefix}.attn.q_bias": (WIDTH,),
        f"{prefix}.attn.v_bias": (WIDTH,),
        f"{prefix}.attn.qkv.weight": (3 * WIDTH, WIDTH),
        **affine(f"{prefix}.attn.proj", WIDTH),
        **affine(f"{prefix}.norm2"),
        f"{prefix}.mlp.fc1.weight": (FFN, WIDTH),
        f"{prefix}.mlp.fc1.bias": (FFN,),
        **affine(f"{prefix}.mlp.fc2", FFN),
    }


def affine(name, *inputs):
    return {f"{name}.weight": (WIDTH, *inputs), f"{name}.bias": (WIDTH,)}


def body(layers=LAYERS):
    shapes = {"cls_token": (1, 1, WIDTH), **affine("patch_embed.proj", 3, PATCH, PATCH)}
    for layer in range(layers):
        shapes |= layer_shapes(f"blocks.{layer}")
    return shapes


def drawn(shapes, indices=()):
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return state | {name: torch.zeros(SIDE**2 + 1, SIDE**2 + 1, dtype=torch.int64) for name in indices}


def pretrained(layers=LAYERS):
    """Tensors that the authors publish after pre-training: shared biases, a second decoder, a head for codes."""
    table = {"rel_pos_bias.relative_position_bias_table": (DISTANCES, HEADS)}
    heads = {"mask_token": (1, 1, WIDTH), **affine("norm"), "lm_head.weight": (64, WIDTH), "lm_head.bias": (64,)}
    decoder = layer_shapes("cls_pt_layers.0") | layer_shapes("cls_pt_layers.1")
    return drawn(body(layers) | table | heads | decoder, ["rel_pos_bias.relative_position_index"])


def finetuned():
    """Tensors that the authors publish after fine-tuning as a classifier: biases of each layer, no norm but fc_norm."""
    state = timm()
    return state | drawn({}, [f"blocks.{layer}.attn.relative_position_index" for layer in range(LAYERS)])


def timm():
    tables = {f"blocks.{layer}.attn.relative_position_bias_table": (DISTANCES, HEADS) for layer in range(LAYERS)}
    return drawn(body() | tables | affine("fc_norm") | {"head.weight": (10, WIDTH), "head.bias": (10,)})


FORMS = {"pretrained": pretrained, "finetuned": finetuned, "timm": timm}


@pytest.fixture(params=FORMS)
def state(request):
    return FORMS[request.param]()


@pytest.fixture
def write(tmp_path):
    """Function that writes a state dict like the authors and returns the file."""

    def call(state, key="model"):
        torch.save({key: state}, tmp_path / "beitv2.pth")
        return tmp_path / "beitv2.pth"

    return call


@pytest.fixture
def refused():
    def call(source, *overrides):
        with pytest.raises(WeightFileError) as error:
            upcycle(source, config_of(*overrides))
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix(f"{source} ")

    return call


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


def expected_layer(state, layer):
    """Return the tensors of one of our layers, without noise."""
    ours, theirs = f"backbone.blocks.{layer}", f"blocks.{layer}"
    made = {f"{ours}.{name}": state[f"{theirs}.{name}"] for name in ("gamma_1", "gamma_2")}
    made |= {f"{ours}.attention.{name}": state[f"{theirs}.attn.{name}"] for name in ("q_bias", "v_bias", "qkv.weight")}
    for kind in ("weight", "bias"):
        made[f"{ours}.norm1.{kind}"] = state[f"{theirs}.norm1.{kind}"]
        made[f"{ours}.attention.proj.{kind}"] = state[f"{theirs}.attn.proj.{kind}"]
        made[f"{ours}.{'norm2' if layer == 1 else 'ffn.norm_image'}.{kind}"] = state[f"{theirs}.norm2.{kind}"]
        for part in ("fc1", "fc2"):
            for network in [f"moe.experts.{index}" for index in range(4)] if layer == 1 else ["ffn.image"]:
                made[f"{ours}.{network}.{part}.{kind}"] = state[f"{theirs}.mlp.{part}.{kind}"]
    return made


def test_taken_tensors_equal_those_of_the_file(state, write):
    config = config_of()
    upcycled = upcycle(write(state), config, noise=0.0)
    expected = {"backbone.image_embedding.class_token": state["cls_token"].reshape(WIDTH)}
    for kind in ("weight", "bias"):
        expected[f"backbone.image_embedding.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        if f"norm.{kind}" in state:
            expected[f"backbone.norm.{kind}"] = state[f"norm.{kind}"]
    for layer in range(LAYERS):
        expected |= expected_layer(state, layer)
    assert {name for name, origin in upcycled.origins.items() if origin != "drawn"} == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(upcycled.weights[name], tensor), name
    torch.manual_seed(config.train.seed)
    new = EVE(config.model).state_dict()
    assert upcycled.weights.keys() == new.keys()
    assert all(torch.equal(upcycled.weights[name], new[name]) for name in new.keys() - expected.keys())
    assert upcycled.origins["backbone.blocks.0.attention.qkv.weight"] == "blocks.0.attn.qkv.weight"
    assert upcycled.origins["backbone.blocks.1.moe.experts.3.fc1.bias"] == "blocks.1.mlp.fc1.bias, noise 0"


def plain_layer(state, layer, x):
    """Layer of BEiTv2 with relative position biases of 0 and quick_gelu: (B, S, D) -> (B, S, D)."""

    def of(name):
        return state[f"blocks.{layer}.{name}"]

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), of(f"{name}.weight"), of(f"{name}.bias"), 1e-6)

    y = norm("norm1", x) @ of("attn.qkv.weight").T
    y = y + torch.cat([of("attn.q_bias"), torch.zeros(WIDTH), of("attn.v_bias")])
    q, k, v = y.reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)  # (B, heads, S, D / heads)
    scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
    y = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(x.shape)
    x = x + of("gamma_1") * (y @ of("attn.proj.weight").T + of("attn.proj.bias"))
    y = norm("norm2", x) @ of("mlp.fc1.weight").T + of("mlp.fc1.bias")
    y = (y * torch.sigmoid(1.702 * y)) @ of("mlp.fc2.weight").T + of("mlp.fc2.bias")
    return x + of("gamma_2") * y


def test_blocks_compute_the_outputs_of_layers_without_relative_biases(state, write):
    config = config_of()
    model = EVE(config.model).eval()
    model.load_state_dict(upcycle(write(state), config, noise=0.0).weights)
    for layer, block in enumerate(model.backbone.blocks):
        x = torch.randn(2, SIDE**2 + 1, WIDTH)
        packing = Packing.of([Layout.of(torch.ones(x.shape[:2], dtype=torch.bool), x.shape[1])])
        with torch.no_grad():
            found = block(x.flatten(0, 1), packing)[0].view_as(x)
        torch.testing.assert_close(found, plain_layer(state, layer, x), rtol=0, atol=TOLERANCE)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_every_file_format_gives_the_same_tensors(write, tmp_path):
    state = timm()
    expected = upcycle(write(state), config_of())
    save_file(state, tmp_path / "bare.safetensors")
    torch.save(state, tmp_path / "bare.bin")
    for source in (write(state, "module"), tmp_path / "bare.safetensors", tmp_path / "bare.bin"):
        found = upcycle(source, config_of())
        assert same(found.weights, expected.weights)
        assert found.notes == expected.notes


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_folders_of_timm_are_read(write, tmp_path, name):
    state = timm()
    folder = tmp_path / "timm"
    folder.mkdir()
    about = {"architecture": "beitv2_base_patch16_224", "num_classes": 10, "num_features": WIDTH}
    (folder / "config.json").write_text(json.dumps(about))
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, folder / name)
    found, expected = upcycle(folder, config_of()), upcycle(write(state), config_of())
    assert same(found.weights, expected.weights)
    assert found.notes == expected.notes


ALWAYS_NOTED = [
    "the checkpoint was trained with gelu, the model uses quick_gelu",
    "the checkpoint was trained on pixels with ImageNet's mean and deviation, the model has .5 and .5",
]


def test_unused_tensors_of_a_pretrained_file_are_noted(write):
    assert upcycle(write(pretrained()), config_of()).notes == [
        "not taken, relative position biases: rel_pos_bias.relative_position_bias_table, "
        "rel_pos_bias.relative_position_index",
        "not taken, token of masked patches: mask_token",
        "not taken, heads: lm_head.bias, lm_head.weight",
        "not taken, second decoder of the class token: cls_pt_layers.0.attn.proj.bias, "
        "cls_pt_layers.0.attn.proj.weight, cls_pt_layers.0.attn.q_bias and 27 more",
        "the checkpoint has no position table: that of images is newly initialized",
        *ALWAYS_NOTED,
    ]


def test_unused_tensors_of_a_finetuned_file_are_noted(write):
    assert upcycle(write(finetuned()), config_of()).notes == [
        "not taken, relative position biases: blocks.0.attn.relative_position_bias_table, "
        "blocks.0.attn.relative_position_index, blocks.1.attn.relative_position_bias_table and 3 more",
        "not taken, heads: fc_norm.bias, fc_norm.weight, head.bias and 1 more",
        "the checkpoint has no position table: that of images is newly initialized",
        "the checkpoint has no LayerNorm of every token after its last layer: the final one is newly initialized",
        *ALWAYS_NOTED,
    ]


def test_second_decoder_with_its_own_head_is_noted(write):
    own = drawn({**affine("cls_pt_norm"), "cls_pt_lm_head.weight": (64, WIDTH), "cls_pt_lm_head.bias": (64,)})
    notes = upcycle(write(pretrained() | own), config_of()).notes
    assert "not taken, heads: cls_pt_lm_head.bias, cls_pt_lm_head.weight, lm_head.bias and 1 more" in notes
    assert notes[3].endswith("cls_pt_layers.0.attn.q_bias and 29 more")


def test_layers_beyond_those_of_the_model_are_noted(write):
    state = pretrained(layers=12)
    upcycled = upcycle(write(state), config_of("model.num_hidden_layers=2"))
    assert torch.equal(upcycled.weights["backbone.blocks.0.gamma_1"], state["blocks.0.gamma_1"])
    assert upcycled.notes[4] == (
        "not taken, layers beyond the model's: blocks.10.attn.proj.bias, blocks.10.attn.proj.weight, "
        "blocks.10.attn.q_bias and 147 more"
    )


def test_position_table_is_taken_if_present(write):
    state = pretrained() | drawn({"pos_embed": (1, SIDE**2 + 1, WIDTH)})
    upcycled = upcycle(write(state), config_of("model.image_size=48"))
    assert torch.equal(
        upcycled.weights["backbone.image_embedding.position"], resize_positions(state["pos_embed"][0], 6)
    )
    assert not any("position table" in note for note in upcycled.notes)


def test_number_of_heads_without_bias_tables_is_that_of_the_config(write):
    state = {name: tensor for name, tensor in timm().items() if "relative_position" not in name}
    notes = upcycle(write(state), config_of("model.num_attention_heads=8")).notes
    assert "the checkpoint does not determine num_attention_heads: the config's 8 is used" in notes


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
def test_other_sizes_are_refused(state, write, refused, override, text):
    assert refused(write(state), override) == f"has {text}: take a checkpoint or a config of the same size"


@pytest.mark.parametrize("name", ["blocks.1.gamma_2", "blocks.2.attn.q_bias", "blocks.0.attn.qkv.weight", "norm.bias"])
def test_missing_tensors_are_named(write, refused, name):
    source = write(without(pretrained(), name))
    assert refused(source) == f"lacks {name}, which a BEiTv2 has: take a complete one"


def test_missing_final_norm_is_an_error_unless_there_is_fc_norm(write, refused):
    source = write(without(timm(), "fc_norm.weight", "fc_norm.bias"))
    assert refused(source) == "lacks norm.bias, norm.weight, which a BEiTv2 has: take a complete one"


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.qkv.bias", "blocks.2.mlp.w1.weight", "encoder.cls_token", "mask_token.weight", "head.norm"]
)
def test_unknown_tensors_are_named(state, write, refused, name):
    source = write(state | {name: torch.zeros(3)})
    assert refused(source) == f"holds {name}, no part of a BEiTv2: take it as its authors or timm publish it"


@pytest.mark.parametrize("name", ["cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"])
def test_files_of_another_kind_are_refused(write, refused, name):
    published = "take it as its authors or timm publish it"
    assert refused(write(without(timm(), name))) == f"lacks {name}, which a BEiTv2 has: {published}"
    message = refused(write(timm() | {name: torch.zeros(3)}))
    assert message.startswith(f"has {name} (3,), which is (")
    assert message.endswith(f") in a BEiTv2: {published}")


def test_tensors_of_another_shape_are_named(write):
    with pytest.raises(
        ValueError, match=r"beitv2\.pth has backbone\.blocks\.0\.attention\.q_bias \(31,\) where the mod"
    ):
        upcycle(write(timm() | {"blocks.0.attn.q_bias": torch.zeros(31)}), config_of())


def test_other_architectures_of_timm_are_refused(tmp_path, refused):
    about = {"architecture": "vit_base_patch16_224"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert refused(tmp_path) == (
        f"{tmp_path / 'config.json'} has architecture 'vit_base_patch16_224': only vit, beit and timm's beitv2_... "
        "are read"
    )


class Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_references_in_pickles_are_not_called(write, refused, tmp_path):
    source = write(timm() | {"head.bias": Harmful(tmp_path / "harmed")})
    assert refused(source) == (
        "refers to io.open, which could run code: give a file of tensors alone, such as .safetensors"
    )
    assert not (tmp_path / "harmed").exists()
    torch.load(source, weights_only=False)  # an unsafe load runs the code
    assert (tmp_path / "harmed").exists()


def test_missing_sources_are_refused(refused, tmp_path):
    assert refused(tmp_path / "nowhere.pth") == "does not exist: name a file of weights"
    assert refused(tmp_path) == (
        f"{tmp_path / 'config.json'} cannot be read (No such file or directory): name a folder of save_pretrained or "
        "timm, or a file of BEiTv2"
    )
