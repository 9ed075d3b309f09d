"""Import of released files in all forms, and error messages for refused files."""

import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import tiny_config

from eve_ds.checkpoint.files import listed
from eve_ds.config import ConfigError
from eve_ds.export import ExportError, WeightFileError, import_weights, load
from eve_ds.export.official import to_official, write_official
from eve_ds.export.start import draw_decoders, draw_weights
from eve_ds.model.embeddings import cut_positions, resize_positions
from eve_ds.model.eve import EVE


@pytest.fixture(scope="module")
def weights():
    """State dict of a model whose biases and norms differ from their initial values."""
    torch.manual_seed(1)
    return {
        name: tensor + torch.randn_like(tensor) / 10 for name, tensor in EVE(tiny_config().model).state_dict().items()
    }


@pytest.fixture
def released(weights):
    return to_official(weights)


@pytest.fixture
def file(weights, tmp_path):
    write_official(weights, tmp_path / "eve.pth")
    return tmp_path / "eve.pth"


@pytest.fixture
def refused(tmp_path):
    """Function that expects a WeightFileError of one line and no folder; returns the message."""

    def call(file, config=None, **options):
        with pytest.raises(WeightFileError) as error:
            import_weights(file, tmp_path / "out", config=config or tiny_config(), **options)
        assert not list(tmp_path.glob("*out*"))
        assert "\n" not in str(error.value)
        return str(error.value)

    return call


def save(state, file):
    if file.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, file)
    else:
        torch.save(state, file)
    return file


def renamed(start, state):
    return {start + name: tensor for name, tensor in state.items()}


def without_prefix(state):
    return {name.removeprefix("backbone."): tensor for name, tensor in state.items()}


FORMS = {
    "flat": ("eve.pth", lambda state: state),
    "without prefix": ("eve.pt", without_prefix),
    "under model": ("eve.bin", lambda state: {"model": state, "epoch": 3, "optimizer": {"lr": 1e-3}}),
    "under state_dict": ("eve.pth", lambda state: {"state_dict": without_prefix(state)}),
    "safetensors": ("eve.safetensors", lambda state: state),
    "suffix in capitals": ("eve.PTH", lambda state: state),
    "Lightning's suffix": ("eve.ckpt", lambda state: {"state_dict": state}),
    "names of DistributedDataParallel": ("eve.pth", lambda state: renamed("module.", state)),
    "names of torch.compile within it": ("eve.pth", lambda state: {"model": renamed("module._orig_mod.", state)}),
    "without buffers": (
        "eve.pth",
        lambda state: {name: tensor for name, tensor in state.items() if "position_ids" not in name},
    ),
    "parameters": (
        "eve.pth",
        lambda state: {n: torch.nn.Parameter(t) if t.is_floating_point() else t for n, t in state.items()},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_gives_the_same_model(weights, released, tmp_path, form):
    name, wrap = FORMS[form]
    file = save(wrap(released), tmp_path / name)
    report = import_weights(file, tmp_path / "out", config=tiny_config("train.seed=5"))
    model, config, tokenizer = load(tmp_path / "out")
    assert (config.model, tokenizer.mask_token_id) == (tiny_config().model, 4)
    torch.manual_seed(5)
    drawn = EVE(config.model).state_dict()
    for tensor_name, tensor in model.state_dict().items():
        taken = tensor_name.startswith("backbone.")
        assert torch.equal(tensor, (weights if taken else drawn)[tensor_name]), tensor_name
        assert report.origins[tensor_name] == (file.name if taken else "drawn")
    assert report.notes == ["the released numbers need model.profile=official and model.moe.routing=capacity"]
    assert report.parameters == sum(tensor.numel() for tensor in drawn.values())
    assert json.loads((tmp_path / "out" / "export.json").read_text())["origins"] == report.origins


def test_files_of_torch_before_1_6_are_read(weights, released, tmp_path):
    torch.save(released, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    import_weights(tmp_path / "old.pth", tmp_path / "out", config=tiny_config())
    assert torch.equal(load(tmp_path / "out")[0].backbone.norm.bias, weights["backbone.norm.bias"])


def test_half_precision_is_converted_to_fp32(weights, tmp_path):
    write_official(weights, tmp_path / "eve.pth", torch.bfloat16)
    import_weights(tmp_path / "eve.pth", tmp_path / "out", config=tiny_config())
    norm = load(tmp_path / "out")[0].backbone.norm.bias
    assert norm.dtype == torch.float32
    assert torch.equal(norm, weights["backbone.norm.bias"].bfloat16().float())


@pytest.mark.parametrize("draw", [draw_decoders, draw_weights])
def test_initialization_keeps_the_default_generator(draw):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    draw(tiny_config())
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    "heads",
    [
        "model.pixel_decoder.kind=self",
        "model.pixel_decoder.kind=cross",
        "model.objectives=[itc,itm]",
        "model.objectives=[mlm,itc,itm]",
    ],
)
def test_heads_equal_those_of_a_new_model(heads):
    config = tiny_config("train.seed=3", heads, "model.position_init=normal")
    new, decoders = draw_weights(config), draw_decoders(config)
    assert decoders.keys() == {name for name in new if not name.startswith("backbone.")}
    assert all(torch.equal(tensor, new[name]) for name, tensor in decoders.items())


def test_official_profile_has_no_note(file, tmp_path):
    config = tiny_config("model.profile=official", "model.moe.routing=capacity")
    assert import_weights(file, tmp_path / "out", config=config).notes == []


def test_position_tables_are_fitted_to_another_image_size(weights, file, tmp_path):
    report = import_weights(file, tmp_path / "out", config=tiny_config("model.text_positions=30"), image_size=96)
    model, config, _ = load(tmp_path / "out")
    assert config.model.image_size == 96
    position = weights["backbone.image_embedding.position"]
    grid = position[1:].T.reshape(1, 32, 8, 8)
    expected = F.interpolate(grid, size=(12, 12), mode="bicubic", align_corners=False).reshape(32, 144).T
    assert torch.equal(model.backbone.image_embedding.position[0], position[0])
    torch.testing.assert_close(model.backbone.image_embedding.position[1:].detach(), expected)
    assert torch.equal(model.backbone.text_embedding.position, weights["backbone.text_embedding.position"][:30])
    assert report.notes[1:] == [
        "backbone.image_embedding.position: 65 rows of the file became 145",
        "backbone.text_embedding.position: 40 rows of the file became 30",
    ]
    assert model(pixel_values=torch.randn(1, 3, 96, 96)).moe["mim"][0].load_balancing_loss.isfinite()


def cubic(distance):
    """Kernel of bicubic interpolation with a = -0.75 (Keys 1981, eq. 15)."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize(("old", "new"), [(2, 5), (6, 4), (3, 3), (1, 2)])
def test_positions_are_interpolated_like_in_a_loop(old, new):
    position = torch.randn(1 + old * old, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    expected = torch.zeros(1 + new * new, 3)
    expected[0] = position[0]
    for row in range(new):
        for column in range(new):
            y, x = ((place + 0.5) * old / new - 0.5 for place in (row, column))
            for i in range(int(y // 1) - 1, int(y // 1) + 3):
                for j in range(int(x // 1) - 1, int(x // 1) + 3):
                    inside = min(max(i, 0), old - 1) * old + min(max(j, 0), old - 1)
                    expected[1 + row * new + column] += cubic(y - i) * cubic(x - j) * position[1 + inside]
    torch.testing.assert_close(resize_positions(position, new), expected, rtol=1e-5, atol=1e-5)


def test_resized_positions_keep_their_dtype():
    assert resize_positions(torch.randn(5, 4).bfloat16(), 3).dtype == torch.bfloat16


def test_positions_that_form_no_square_are_refused():
    with pytest.raises(ValueError, match="a position table of 7 rows is not a class token and a square of patches"):
        resize_positions(torch.zeros(7, 4), 3)


def test_text_positions_are_cut_but_never_extended():
    table = torch.arange(6.0).view(3, 2)
    assert torch.equal(cut_positions(table, 2), table[:2])
    with pytest.raises(ValueError, match=r"text position table of 3 rows cannot serve text_positions \(4\)"):
        cut_positions(table, 4)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("where", [("backbone.norm.bias",), ("args",), ("model", "args")])
@pytest.mark.parametrize("new", [True, False])
def test_code_in_pickles_is_not_run(refused, released, tmp_path, monkeypatch, where, new):
    monkeypatch.chdir(tmp_path)
    state = {"model": released} if len(where) > 1 else released
    inner = state["model"] if len(where) > 1 else state
    inner[where[-1]] = Harmful()
    torch.save(state, tmp_path / "eve.pth", _use_new_zipfile_serialization=new)
    assert re.search(
        r"eve\.pth refers to \w+\.system, which could run code: give a file of", refused(tmp_path / "eve.pth")
    )
    assert not (tmp_path / "harmed").exists()
    torch.load(tmp_path / "eve.pth", weights_only=False)  # an unsafe load runs the code
    assert (tmp_path / "harmed").exists()


HEADS = {
    "answers": ["output.0.weight", "output.0.bias", "output.3.weight"],
    "retrieval": ["mitc_vision.weight", "mitc_text.weight", "mitm_head.weight", "mitm_head.bias", "itc_vl_scale"],
}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_heads_of_the_released_code_are_left_out_by_name(weights, released, tmp_path, heads, prefix):
    state = released if prefix else without_prefix(released)
    file = save(state | {name: torch.zeros(2) for name in HEADS[heads]}, tmp_path / "best.th")
    report = import_weights(file, tmp_path / "out", config=tiny_config())
    assert report.notes[1] == f"left out, no part of the backbone: {listed(HEADS[heads])}"
    assert torch.equal(load(tmp_path / "out")[0].backbone.norm.bias, weights["backbone.norm.bias"])


def test_unknown_tensors_of_the_backbone_are_refused(refused, released, tmp_path):
    line = refused(save(released | {"backbone.adapter.weight": torch.zeros(2)}, tmp_path / "eve.pth"))
    assert line.endswith(
        "holds backbone.adapter.weight, no part of the backbone: it is not the backbone that the config describes"
    )
    line = refused(save(without_prefix(released) | {"adapter.weight": torch.zeros(2)}, tmp_path / "eve.pth"))
    assert "holds adapter.weight, no part of the backbone" in line


def test_missing_tensors_are_named_with_the_prefix_of_the_file(refused, released, tmp_path):
    del released["backbone.encoder.layers.1.mlp_moe.moe.text_embed"]
    line = refused(save(released, tmp_path / "eve.pth"))
    assert " lacks backbone.encoder.layers.1.mlp_moe.moe.text_embed: it is not" in line
    line = refused(save(without_prefix(released), tmp_path / "eve.pth"))
    assert " lacks encoder.layers.1.mlp_moe.moe.text_embed: it is not" in line


def test_differences_of_another_architecture_are_named(refused, file):
    line = refused(file, tiny_config("model.moe.num_experts=2"))
    assert "holds backbone.encoder.layers.1.mlp_moe.moe.experts.experts.2.fc1.bias, " in line
    assert "and 13 more, no part of the backbone; " in line
    assert "has backbone.encoder.layers.1.mlp_moe.moe.gate.wg.weight (4, 32) where the model has (2, 32)" in line
    line = refused(file, tiny_config("model.patch_size=16"))
    assert "has backbone.patch_embed.weight (32, 3, 8, 8) where the model has (32, 3, 16, 16)" in line


def test_position_tables_that_cannot_be_fitted_are_refused(refused, released, tmp_path):
    file = save(released | {"backbone.pos_embed_vision": torch.zeros(65, 31)}, tmp_path / "eve.pth")
    assert "has backbone.pos_embed_vision (65, 31) where the model has (65, 32)" in refused(file)
    file = save(released | {"backbone.pos_embed_vision": torch.zeros(66, 32)}, tmp_path / "eve.pth")
    assert "eve.pth: a position table of 66 rows is not a class token and a square" in refused(file)
    file = save(released, tmp_path / "eve.pth")
    assert "eve.pth: a text position table of 40 rows cannot serve text_positions (41)" in refused(
        file, tiny_config("model.text_positions=41")
    )


def test_integer_weights_are_refused(refused, released, tmp_path):
    released["backbone.norm.bias"] = released["backbone.norm.bias"].to(torch.int8)
    assert "has backbone.norm.bias in int8: it is not" in refused(save(released, tmp_path / "eve.pth"))


def test_weights_that_are_not_finite_are_refused(released, tmp_path):
    file = save(released | {"backbone.norm.bias": torch.full((32,), float("nan"))}, tmp_path / "eve.pth")
    with pytest.raises(ValueError, match=r"eve\.pth: backbone\.norm\.bias not finite \(NaN or infinity\)"):
        import_weights(file, tmp_path / "out", config=tiny_config())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"epoch": 3, "backbone.norm.bias": torch.zeros(32)}, "holds epoch, not a dense tensor"),
        (
            {"model": {"backbone.norm.bias": torch.zeros(32).to_sparse()}},
            "holds backbone.norm.bias, not a dense tensor",
        ),
        ({3: torch.zeros(32)}, "holds 3, not a dense tensor"),
        ({}, "holds no dictionary of tensors, neither at the top level nor under ('model', 'state_dict', 'module')"),
        ([torch.zeros(3)], "holds no dictionary of tensors"),
    ],
)
def test_files_without_a_dictionary_of_tensors_are_refused(refused, tmp_path, state, text):
    assert text in refused(save(state, tmp_path / "eve.pth"))


def test_damaged_files_are_refused(refused, released, file, tmp_path):
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"hello" * 100):
        file.write_bytes(damaged)
        assert "eve.pth is not a file that torch.save wrote, or not all of it" in refused(file)
    torch.save(released, file, _use_new_zipfile_serialization=False)
    old = file.read_bytes()
    for damaged in (old[:60], old[:5000], old[: len(old) // 2]):
        file.write_bytes(damaged)
        assert re.search(r"eve\.pth (cannot be read|holds more than tensors, or is damaged)", refused(file))
    other = save(released, tmp_path / "eve.safetensors")
    other.write_bytes(other.read_bytes()[:1000])
    assert "eve.safetensors cannot be read (" in refused(other)


def test_paths_that_are_no_weight_file_are_refused(refused, file, tmp_path):
    assert "nowhere.pth does not exist: name a file of weights" in refused(tmp_path / "nowhere.pth")
    assert f"{tmp_path} is not a file: name a file of weights" in refused(tmp_path)
    other = file.rename(tmp_path / "eve.onnx")
    known = ".bin, .ckpt, .pt, .pth, .th, .safetensors"
    assert f"eve.onnx has the suffix '.onnx': only files named {known} are read" in refused(other)


def test_tokenizer_larger_than_the_word_embedding_is_refused(released, file, tmp_path):
    word = "backbone.word_embedding.weight"
    save(released | {word: released[word][:100]}, file)
    with pytest.raises(ConfigError, match=r"tokenizer 'scenes' has a vocabulary of \d+ tokens, larger than "):
        import_weights(file, tmp_path / "out", config=tiny_config("model.vocab_size=100"), tokenizer="scenes")


def test_tokenizer_can_be_a_folder(file, tmp_path):
    from eve_ds.data.tokenizer import train_tokenizer

    train_tokenizer(["a red circle", "a blue square"], 60).save_pretrained(tmp_path / "mine")
    import_weights(file, tmp_path / "out", config=tiny_config(), tokenizer=str(tmp_path / "mine"))
    _, config, tokenizer = load(tmp_path / "out")
    assert len(tokenizer) < 60
    assert config.data.tokenizer == str(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"tokenizer folder .*nowhere does not exist"):
        import_weights(file, tmp_path / "other", config=tiny_config(), tokenizer=str(tmp_path / "nowhere"))


def test_image_size_that_is_no_multiple_of_the_patch_size_is_refused(file, tmp_path):
    with pytest.raises(ConfigError, match=r"image_size \(60\) must be divisible by patch_size \(8\)"):
        import_weights(file, tmp_path / "out", config=tiny_config(), image_size=60)


def test_nonempty_output_folder_is_refused(file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    import_weights(file, out, config=tiny_config())
    with pytest.raises(ExportError, match=r"out is not empty, it holds config\.json, export\.json, model\.safetensors"):
        import_weights(file, out, config=tiny_config())
    with pytest.raises(ExportError, match=r"eve\.pth is a file: name a new or empty folder"):
        import_weights(file, file, config=tiny_config())
