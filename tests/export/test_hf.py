"""Transformers classes compared with the plain export and with image transform and tokens of training."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hf_export import CONFIG, inputs
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from eve_ds.config import ConfigError, ModelConfig
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.export import ExportError, load
from eve_ds.export.hf import EveConfig, EveModel, export_hf
from eve_ds.export.start import DRAWN, draw_weights, write_start
from eve_ds.model.eve import EVE

SIZE = CONFIG.model.image_size
EXPERT = "backbone.blocks.1.moe.experts.fc1_weight"
WORDS = "backbone.text_embedding.word.weight"
CAPTIONS = ["a red circle", "blue", "a green square left of " * 9]


def fields(config=CONFIG.model, **changes):
    return config.model_dump(mode="json") | changes


@torch.no_grad()
def expected_outputs(eve, kind):
    """Return the same tensors from EVE, for the inputs of `kind`."""
    arguments = inputs(kind)
    prediction = eve.predict(**arguments)
    encoder = {k: v for k, v in arguments.items() if k not in ("masked_patch_ids", "masked_token_ids")}
    encoded = eve.backbone(**encoder)
    states = encoded.stream.padded()
    outputs = {"last_hidden_state": states, "attention_mask": encoded.stream.layout.mask}
    if "pixel_values" in arguments:
        outputs["image_embedding"] = states[:, 0]
    if "input_ids" in arguments:
        outputs["text_embedding"] = states[:, encoded.num_image_tokens]
    if kind == "masked":
        outputs |= {"pixel_predictions": prediction.pixel_predictions, "token_logits": prediction.token_logits()}
        outputs["loss"] = pixel_error(arguments, prediction.pixel_predictions.float())
    return outputs


def pixel_error(arguments, predictions):
    """Mean squared error of the masked patches of the two samples with an image."""
    pixels, total = arguments["pixel_values"], 0.0
    for sample in (0, 1):
        for row, patch in enumerate(arguments["masked_patch_ids"][sample].tolist()):
            top, left = patch // 8 * 8, patch % 8 * 8
            target = pixels[sample, :, top : top + 8, left : left + 8].permute(1, 2, 0).flatten()
            total = total + (predictions[sample, row] - target).square().mean()
    return total / (2 * arguments["masked_patch_ids"].shape[1])


def stacked(eve):
    """Weights of a plain model with the experts of a layer in one tensor."""
    return {name: parameter.detach() for name, parameter in eve.named_parameters()}


def assert_same(found, expected):
    """Compare tensors bit for bit, except the loss, whose terms are summed in another order."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name == "loss":
            torch.testing.assert_close(found[name], tensor)
            continue
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["image", "text", "pair", "masked"])
def test_outputs_equal_those_of_the_plain_model_bit_for_bit(plain, exported, kind, dtype):
    eve = load(plain)[0].to(dtype)
    model = AutoModel.from_pretrained(exported, dtype=dtype)
    assert model.dtype == dtype
    with torch.no_grad():
        assert_same(dict(model(**inputs(kind)).items()), expected_outputs(eve, kind))


def test_encoders_return_the_embeddings_of_one_modality(exported):
    model = AutoModel.from_pretrained(exported)
    with torch.no_grad():
        image = model.encode_image(**inputs("image"))
        text = model.encode_text(**inputs("text"))
        assert torch.equal(image, model(**inputs("image")).image_embedding)
        assert torch.equal(text, model(**inputs("text")).text_embedding)
        assert model(**inputs("image")).text_embedding is None
    assert image.shape == text.shape == (3, 32)


THREE_LINES = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
import eve_ds.export.hf
model = AutoModel.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
with torch.no_grad():
    output = model(**load_file(sys.argv[2]))
    save_file({name: tensor.contiguous() for name, tensor in output.items()}, sys.argv[3])
print(type(processor).__name__, processor(text="a red circle")["input_ids"].tolist())
"""


def test_three_lines_load_the_model_in_a_new_process_without_deepspeed(plain, exported, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['deepspeed'] = None\n")
    save_file(inputs(), tmp_path / "inputs")
    command = [sys.executable, "-c", THREE_LINES, exported, tmp_path / "inputs", tmp_path / "outputs"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same(load_file(tmp_path / "outputs"), expected_outputs(load(plain)[0], "masked"))
    assert done.stdout.strip() == f"EveProcessor [{load_tokenizer('scenes')('a red circle')['input_ids']}]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
def test_saving_and_loading_preserve_every_bit(plain, exported, tmp_path, dtype, max_shard_size):
    first = AutoModel.from_pretrained(exported, dtype=dtype)
    first.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_size == "60KB")
    saved = [load_file(file) for file in files]
    weights = stacked(load(plain)[0])
    merged = {name: weight for part in saved for name, weight in part.items()}
    assert sum(len(part) for part in saved) == len(merged)
    assert_same(merged, {name: weight.to(dtype) for name, weight in weights.items()})
    again = AutoModel.from_pretrained(tmp_path)
    assert not again.training
    assert_same(again.state_dict(), first.state_dict())


def test_text_head_uses_the_word_embedding_which_is_stored_once(exported):
    model = AutoModel.from_pretrained(exported)
    vocabulary = [name for name, weight in load_file(exported / "model.safetensors").items() if len(weight) == 256]
    assert sorted(vocabulary) == [WORDS, "text_head.bias"]
    assert model.all_tied_weights_keys == {}
    with torch.no_grad():
        before = model(**inputs()).token_logits
        model.backbone.text_embedding.word.weight[200:] = 0.0  # words in no caption
        after = model(**inputs()).token_logits
    assert torch.equal(after[:, 200:], model.text_head.bias[200:].expand(4, -1))
    assert torch.equal(after[:, :200], before[:, :200])


def test_torch_dtype_is_accepted(exported):
    assert AutoModel.from_pretrained(exported, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_model_from_a_config_has_the_initialization_of_eve():
    torch.manual_seed(5)
    expected = stacked(EVE(CONFIG.model))
    torch.manual_seed(5)
    assert_same(AutoModel.from_config(EveConfig(**fields())).state_dict(), expected)


def rewrite(exported, folder, change, sharded):
    """Write a copy of the export with changed tensors."""
    model = AutoModel.from_pretrained(exported)
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        if EXPERT in weights:
            change(weights)
            save_file(weights, file, {"format": "pt"})
    if sharded:  # transformers reads names from the index
        index = folder / "model.safetensors.index.json"
        tree = json.loads(index.read_text())
        names = {n: f.name for f in folder.glob("*.safetensors") for n in load_file(f)}
        index.write_text(json.dumps(tree | {"weight_map": names}))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(EXPERT), rf"cannot be loaded: .* lacks {EXPERT}"),
        (lambda w: w.update({"head.weight": torch.zeros(2)}), r"holds head\.weight, unknown to the model"),
        (
            lambda w: w.update({EXPERT: torch.zeros(4, 48, 31)}),
            rf"has {EXPERT} \(4, 48, 31\) where the model has \(4, 48, 32\)",
        ),
        (lambda w: w[EXPERT].fill_(torch.nan), rf"{EXPERT} not finite"),
    ],
)
def test_weights_that_do_not_match_are_named(exported, tmp_path, change, message, sharded):
    rewrite(exported, tmp_path, change, sharded)
    with pytest.raises(ExportError, match=message) as caught:
        AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert "\n" not in str(caught.value)


def test_config_has_every_field_and_can_be_saved_and_loaded(tmp_path):
    config = EveConfig(**fields())
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, EveConfig)
    assert again.to_model_config() == config.to_model_config() == CONFIG.model
    assert {name: getattr(again, name) for name in ModelConfig.model_fields} == fields()
    assert EveConfig().to_model_config() == ModelConfig()


def test_configs_are_equal_if_their_fields_are():
    assert EveConfig(**fields()) == EveConfig(**fields())
    assert EveConfig(**fields()) != EveConfig(**fields(text_length=9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 33}, r"hidden_size \(33\) must be divisible by num_attention_heads \(4\)"),
        ({"moe": {"num_experts": 4, "top_k": 5}}, r"moe\.top_k \(5\) must not exceed moe\.num_experts \(4\)"),
        ({"moe": {"num_expert": 4}}, "unknown key .*num_expert'; did you mean 'num_experts'"),
        ({"hiden_size": 32}, "unknown key .*hiden_size'; did you mean 'hidden_size'"),
        ({"vocab_size": "many"}, r"vocab_size \('many'\): Input should be a valid integer"),
    ],
)
def test_invalid_config_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        EveConfig(**fields(**changes))
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(fields(**changes, model_type="eve")))
    with pytest.raises(ConfigError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_field_that_is_set_later_is_checked(exported):
    with pytest.raises(ConfigError, match=r"hidden_size \(33\) must be divisible"):
        AutoModel.from_pretrained(exported, hidden_size=33)


def test_export_has_a_model_card_and_replaces_an_earlier_export(plain, tmp_path):
    out = tmp_path / "deep" / "model"
    export_hf(plain, out)
    export_hf(plain, out, torch.bfloat16)
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert out.joinpath("model.safetensors").stat().st_mode == out.joinpath("config.json").stat().st_mode
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "step 300" in card
    assert "c0ffee" in card
    assert "- `mim`, " in card
    assert "- `mlm`, " in card
    assert "`itc`" not in card
    assert "bfloat16" in card


def test_export_without_a_report_has_a_model_card_without_an_origin(plain, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer"):
        (source / name).symlink_to(plain / name)
    export_hf(source, tmp_path / "model")
    assert "Weights of step" not in (tmp_path / "model" / "README.md").read_text()


def test_initial_weights_have_a_model_card_that_claims_no_training(tmp_path):
    weights = draw_weights(CONFIG)
    tokenizer, origins = load_tokenizer("scenes"), dict.fromkeys(weights, DRAWN)
    write_start(tmp_path / "start", CONFIG, tokenizer, weights, source="beit.pth", origins=origins, notes=[])
    export_hf(tmp_path / "start", tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Initial weights, converted from beit.pth, " in card
    assert "not trained with eve_ds yet" in card
    assert "pre-trained with eve_ds" not in card
    assert "Weights of step" not in card
    AutoModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "README.md"])
def test_export_does_not_change_other_folders(plain, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ExportError, match="is not empty"):
        export_hf(plain, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_earlier_export_with_an_additional_file_is_kept(plain, tmp_path):
    export_hf(plain, tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ExportError, match=r"holds notes\.txt: name a new"):
        export_hf(plain, tmp_path)


def test_export_onto_a_file_or_its_source_is_refused(plain, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="is a file"):
        export_hf(plain, tmp_path / "file")
    with pytest.raises(ExportError, match="is not empty"):
        export_hf(plain, plain)


def test_failed_export_keeps_the_earlier_export(plain, exported, tmp_path, monkeypatch):
    out = tmp_path / "model"
    export_hf(plain, out)
    before = (out / "model.safetensors").read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(EveModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_hf(plain, out, torch.bfloat16)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
