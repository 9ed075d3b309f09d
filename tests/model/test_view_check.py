"""Inputs that do not fit the model or each other are refused in one line; empty batches are not."""

import pytest
import torch
from hf_export import CONFIG, inputs

from eve_ds.export.hf import EveConfig, EveModel
from eve_ds.model.eve import EVE

MODELS = {
    "plain": EVE(CONFIG.model).eval(),
    "transformers": EveModel(EveConfig(**CONFIG.model.model_dump(mode="json"))).eval(),
}


def run(model, batch):
    with torch.no_grad():
        return MODELS[model](**batch) if model == "transformers" else MODELS[model].predict(**batch)


REFUSED = {
    "wide images with the right number of patches": (
        {"pixel_values": torch.zeros(3, 3, 32, 128)},
        "pixel_values (3, 3, 32, 128) must be (batch, 3, 64, 64): convert images to RGB and resize them to image_size "
        "(64)",
    ),
    "larger images": (
        {"pixel_values": torch.zeros(3, 3, 96, 96)},
        "pixel_values (3, 3, 96, 96) must be (batch, 3, 64, 64)",
    ),
    "gray images": (
        {"pixel_values": torch.zeros(3, 1, 64, 64)},
        "pixel_values (3, 1, 64, 64) must be (batch, 3, 64, 64)",
    ),
    "images with opacity": ({"pixel_values": torch.zeros(3, 4, 64, 64)}, "must be (batch, 3, 64, 64)"),
    "channels last": ({"pixel_values": torch.zeros(3, 64, 64, 3)}, "pixel_values (3, 64, 64, 3) must be"),
    "one image without a batch": ({"pixel_values": torch.zeros(3, 64, 64)}, "pixel_values (3, 64, 64) must be"),
    "bytes": (
        {"pixel_values": torch.zeros(3, 3, 64, 64, dtype=torch.uint8)},
        "pixel_values (torch.uint8) must be floating-point: normalize pixels to -1..1",
    ),
    "fewer images than texts": (
        {"pixel_values": torch.zeros(2, 3, 64, 64)},
        "pixel_values has 2 samples and input_ids has 3: pass one text for every image",
    ),
    "one text without a batch": ({"input_ids": torch.arange(9)}, "input_ids (9,) must be (batch, tokens)"),
    "texts without a token": (
        {"input_ids": torch.zeros(3, 0, dtype=torch.int64)},
        "input_ids (3, 0) must have a token",
    ),
    "embedded texts": ({"input_ids": torch.zeros(3, 9)}, "input_ids (torch.float32) must be int64: pass token ids"),
    "mask of another length": ({"attention_mask": torch.ones(3, 8)}, "attention_mask (3, 8) must be (3, 9)"),
    "image mask of another length": ({"image_mask": torch.ones(2)}, "image_mask (2,) must be (3,)"),
    "patches of fewer images": (
        {"visible_patch_ids": torch.zeros(2, 16, dtype=torch.int64)},
        "visible_patch_ids (2, 16) must be (3, patches): a row for every image",
    ),
    "mask of fewer patches": ({"visible_patch_mask": torch.ones(3, 5)}, "visible_patch_mask (3, 5) must be (3, 16)"),
    "mask without patches": (
        {"visible_patch_ids": None, "visible_patch_mask": torch.ones(3, 16), "masked_patch_ids": None},
        "visible_patch_mask needs visible_patch_ids",
    ),
    "words as bytes": (
        {"input_ids": torch.zeros(3, 9, dtype=torch.uint8)},
        "input_ids (torch.uint8) must be int64: pass token ids",
    ),
    "patches as a mask": (
        {"visible_patch_ids": torch.ones(3, 16, dtype=torch.bool)},
        "visible_patch_ids (torch.bool) must be int64: pass the ids of the patches in the view",
    ),
    "list of images": (
        {"pixel_values": list(torch.zeros(3, 3, 64, 64))},
        "pixel_values is of type list: pass a tensor",
    ),
    "array of words": ({"input_ids": torch.zeros(3, 9).numpy()}, "input_ids is of type ndarray: pass a tensor"),
    "list as a mask": ({"attention_mask": [[1] * 9] * 3}, "attention_mask is of type list: pass a tensor"),
    "masked patches of fewer images": (
        {"masked_patch_ids": torch.zeros(2, 4, dtype=torch.int64)},
        "masked_patch_ids (2, 4) must be (3, patches): a row for every image",
    ),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", REFUSED)
def test_input_of_another_form_is_refused_in_one_line(model, case):
    changes, message = REFUSED[case]
    batch = {name: value for name, value in inputs().items() if name not in ("image_mask", "visible_patch_mask")}
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        run(model, batch | changes)
    assert message in str(caught.value)


MASKS = ["attention_mask", "image_mask", "visible_patch_mask"]
OTHER_MASKS = {
    "infinity to add to scores": (lambda real: torch.zeros(real.shape).masked_fill(~real, -torch.inf), "-inf"),
    "lowest number to add to scores": (lambda real: (1 - real.float()) * torch.finfo(torch.float16).min, "-65504"),
    "ten thousand to add to scores": (lambda real: (1 - real.long()) * -10000, "-10000"),
    "numbers of packed segments": (lambda real: real.int() * real.int().cumsum(-1).clamp(max=2), "2"),
    "bytes of a picture": (lambda real: real.byte() * 255, "255"),
    "negated": (lambda real: -real.long(), "-1"),
    "not a number": (lambda real: torch.where(real, 1.0, torch.nan), "nan"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", OTHER_MASKS)
def test_mask_with_other_values_than_0_and_1_is_refused(model, name, kind):
    change, value = OTHER_MASKS[kind]
    batch = inputs()
    with pytest.raises(ValueError, match=f"{name} holds {value}, but only 1 and 0"):
        run(model, batch | {name: change(batch[name])})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("model", MODELS)
def test_mask_of_any_dtype_means_the_same(model, dtype):
    batch = inputs()
    found, expected = run(model, batch | {name: batch[name].to(dtype) for name in MASKS}), run(model, batch)
    assert torch.equal(found.pixel_predictions, expected.pixel_predictions)
    if model == "transformers":
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["image", "text", "pair", "masked"])
def test_empty_batch_gives_empty_outputs(model, kind, training):
    batch = {name: value[:0] for name, value in inputs(kind).items()}
    output = run(model, batch) if not training else MODELS[model].train()
    if training:
        output = output(**batch) if model == "transformers" else output.predict(**batch)
        MODELS[model].eval()
    if kind == "masked":
        logits = output.token_logits if model == "transformers" else output.token_logits()
        assert (output.pixel_predictions.shape, logits.shape) == ((0, 48, 192), (0, 256))
    if model == "transformers":
        length = {"image": 65, "text": 9, "pair": 74, "masked": 26}[kind]
        assert output.last_hidden_state.shape == (0, length, 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_floating_images_of_any_dtype_are_converted_to_that_of_the_model(dtype):
    pixels = inputs("image")["pixel_values"]
    found = run("transformers", {"pixel_values": pixels.to(dtype)}).last_hidden_state
    expected = run("transformers", {"pixel_values": pixels.to(dtype).float()}).last_hidden_state
    assert torch.equal(found, expected)
