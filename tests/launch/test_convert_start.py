"""`convert.py import`, `convert.py upcycle` and `--format official`, run in this process."""

import re

import pytest
import torch
from tiny import MODEL as TINY
from tiny import overrides
from transformers import ViTConfig, ViTModel

from eve_ds.cli.convert import main
from eve_ds.config import load_config
from eve_ds.export import load
from eve_ds.export.official import write_official
from eve_ds.model.eve import EVE

MODEL = overrides()
OFFICIAL = ["model.profile=official", "model.moe.routing=capacity"]
CONFIG = ["--config", "eve_tiny", "--set", *MODEL]


@pytest.fixture
def convert(capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()  # output of fixtures
        code = main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(convert):
    """Expects exit code 2 and one line on stderr; returns it."""

    def call(*arguments):
        code, stdout, stderr = convert(*arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        return stderr

    return call


@pytest.fixture
def state():
    torch.manual_seed(0)
    return EVE(load_config("eve_tiny", MODEL).model).state_dict()


@pytest.fixture
def file(state, tmp_path):
    write_official(state, tmp_path / "eve.pth")
    return tmp_path / "eve.pth"


@pytest.fixture
def dense(tmp_path):
    sizes = {
        name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    ViTModel(ViTConfig(**sizes, image_size=64, patch_size=8)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_released_weights_become_a_folder_that_loads(convert, state, file, tmp_path):
    out = tmp_path / "imports" / "eve"
    code, stdout, _ = convert(
        "import", file, "--out", out, "--image_size", "96", "--tokenizer", "scenes", *CONFIG, *OFFICIAL
    )
    assert code == 0
    model, config, _ = load(out)
    assert config.model.image_size == 96
    assert torch.equal(model.backbone.blocks[2].moe.experts.fc1_weight[3], expert(state, 2, 3))
    lines = dict(re.split(r"\s{2,}|: ", line, maxsplit=1) for line in stdout.splitlines())
    assert lines[str(out)] == f"initial weights, converted from {file}"
    assert re.fullmatch(r"\d+, of which \d+ drawn: pixel_decoder\.blocks\.0\..* and \d+ more", lines["tensors"])
    assert lines["experts"] == "4 in layer 1, 4 in layer 2"
    assert lines["note"] == "backbone.image_embedding.position: 65 rows of the file became 145"


def expert(state, layer, index):
    return state[f"backbone.blocks.{layer}.moe.experts.{index}.fc1.weight"]


def test_a_dense_checkpoint_becomes_a_folder_that_loads(convert, dense, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = convert("upcycle", dense, "--out", out, "--noise", "0", "--text_from_image", *CONFIG)
    assert code == 0
    assert f"{out}: initial weights, converted from {dense}" in stdout
    assert "note        the checkpoint was trained with gelu, the model uses quick_gelu" in stdout
    blocks = load(out)[0].backbone.blocks
    assert torch.equal(blocks[1].moe.experts.fc1_weight[0], blocks[1].moe.experts.fc1_weight[3])
    assert torch.equal(blocks[0].ffn.text.fc1.weight, blocks[0].ffn.image.fc1.weight)


@pytest.fixture
def beit2(tmp_path):
    """File as the authors of BEiTv2 publish it, with random tensors in the sizes of the tests' model."""
    shapes = {"cls_token": (1, 1, 32), "patch_embed.proj.weight": (32, 3, 8, 8), "patch_embed.proj.bias": (32,)}
    shapes |= {"norm.weight": (32,), "norm.bias": (32,), "mask_token": (1, 1, 32)}
    shapes |= {"rel_pos_bias.relative_position_bias_table": (15 * 15 + 3, 4)}
    for layer in range(3):
        of_layer = dict.fromkeys(("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias", "attn.proj.bias"), (32,))
        of_layer |= {f"{norm}.{kind}": (32,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        of_layer |= {"attn.qkv.weight": (96, 32), "attn.proj.weight": (32, 32)}
        of_layer |= {
            "mlp.fc1.weight": (48, 32),
            "mlp.fc1.bias": (48,),
            "mlp.fc2.weight": (32, 48),
            "mlp.fc2.bias": (32,),
        }
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in of_layer.items()}
    torch.save({"model": {name: torch.randn(shape) for name, shape in shapes.items()}}, tmp_path / "beitv2.pth")
    return tmp_path / "beitv2.pth"


def test_a_beit2_file_becomes_a_folder_that_loads(convert, refused, beit2, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = convert("upcycle", beit2, "--out", out, "--noise", "0", *CONFIG)
    assert code == 0
    assert "note        not taken, relative position biases: rel_pos_bias.relative_position_bias_table" in stdout
    assert "note        the checkpoint has no position table: that of images is newly initialized" in stdout
    published = torch.load(beit2, weights_only=True)["model"]
    blocks = load(out)[0].backbone.blocks
    assert torch.equal(blocks[0].attention.qkv.weight, published["blocks.0.attn.qkv.weight"])
    assert torch.equal(blocks[1].moe.experts.fc2_weight[3], published["blocks.1.mlp.fc2.weight"])
    assert f"{beit2} has num_attention_heads 4 where the model has 2: take a" in refused(
        "upcycle", beit2, "--out", tmp_path / "other", *CONFIG, "model.num_attention_heads=2"
    )


def test_help_names_the_formats_of_beitv2(convert, capsys):
    with pytest.raises(SystemExit, match="0"):
        convert("upcycle", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "BEiTv2: .pth file of its authors, folder of timm, or its file" in text


def test_unusable_input_is_refused_in_one_line(refused, file, dense, tmp_path):
    out = tmp_path / "out"
    assert "nowhere.pth does not exist: name a file" in refused(
        "import", tmp_path / "nowhere.pth", "--out", out, *CONFIG
    )
    assert "convert: " + str(file) + " has backbone." in refused(
        "import", file, "--out", out, *CONFIG, "model.intermediate_size=64"
    )
    assert "unknown key 'model.image'; did you mean 'image_size'?" in refused(
        "import", file, "--out", out, *CONFIG, "model.image=3"
    )
    assert "image_size (60) must be divisible" in refused("import", file, "--out", out, "--image_size", "60", *CONFIG)
    assert "tokenizer folder ./nowhere does not exist" in refused(
        "import", file, "--out", out, "--tokenizer", "./nowhere", *CONFIG
    )
    assert "hidden_size 32 where the model has 128" in refused("upcycle", dense, "--out", out, "--config", "eve_tiny")
    assert "tokenizer 'scenes' has a vocabulary of" in refused(
        "upcycle", dense, "--out", out, *CONFIG, "model.vocab_size=10"
    )
    assert f"--out {dense} is not empty, it holds config.json, model.safetensors: name" in refused(
        "upcycle", dense, "--out", dense, *CONFIG
    )
    assert "--out " + str(file) + " is a file" in refused("import", file, "--out", file, *CONFIG)
    assert "eve.pth/.out.writing cannot be used: Not a directory" in refused(
        "import", file, "--out", file / "out", *CONFIG
    )
    assert not out.exists()


@pytest.mark.parametrize("number", ["-1", "nan", "inf", "some"])
def test_noise_must_be_a_finite_number_of_at_least_0(convert, capsys, dense, tmp_path, number):
    with pytest.raises(SystemExit, match="2"):
        convert("upcycle", dense, "--out", tmp_path / "out", "--noise", number, *CONFIG)
    assert "argument --noise: " in capsys.readouterr().err
