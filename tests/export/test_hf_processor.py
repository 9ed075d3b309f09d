"""Processor of the transformers model compared with image transform and tokens of training."""

import io

import numpy as np
import pytest
import torch
from hf_export import CONFIG
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, DataCollatorWithPadding

from eve_ds.data.batch import Sample
from eve_ds.data.collate import Collator
from eve_ds.data.errors import BadSample
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.data.transforms import TrainTransform, normalize
from eve_ds.export.hf import EveImageProcessor, EveProcessor
from eve_ds.export.hf.image_processor import TRANSFORM
from eve_ds.objectives.registry import objectives_of

SIZE = CONFIG.model.image_size
CAPTIONS = ["a red circle", "blue", "a green square left of " * 9]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def picture(width, height, mode="RGB"):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image, kind, orientation=1):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


def evaluation_transform(image):
    return normalize([TrainTransform(SIZE, (1.0, 1.0), 0.0, seed=0)(image, None, 0, "key")])


@pytest.mark.parametrize(
    "data",
    [
        encode(picture(90, 70), "PNG"),
        encode(picture(SIZE, SIZE), "PNG"),
        encode(picture(40, 300, "L"), "PNG"),
        encode(picture(50, 80, "RGBA"), "PNG"),
        encode(picture(90, 70), "JPEG"),
        encode(picture(700, 530), "JPEG"),  # decoded at a fraction of its size
        encode(picture(90, 70), "JPEG", orientation=6),
        encode(picture(90, 70), "PNG", orientation=8),
    ],
    ids=["png", "right size", "gray", "alpha", "jpeg", "large jpeg", "turned jpeg", "turned png"],
)
def test_images_are_processed_by_the_evaluation_transform(exported, data, tmp_path):
    processor = AutoImageProcessor.from_pretrained(exported)
    expected = evaluation_transform(data)
    (tmp_path / "image").write_bytes(data)
    with Image.open(tmp_path / "image") as opened:
        size, mode = opened.size, opened.mode
        assert torch.equal(processor(opened)["pixel_values"], expected)
        assert torch.equal(processor([opened, data])["pixel_values"], expected.repeat(2, 1, 1, 1))
        assert (opened.size, opened.mode) == (size, mode)
        array = np.asarray(opened.convert("RGB"))
    assert torch.equal(processor(array)["pixel_values"], evaluation_transform(array))
    assert expected.shape == (1, 3, SIZE, SIZE)


def test_captions_are_processed_like_in_the_collator(exported):
    processor = AutoProcessor.from_pretrained(exported)
    images = [picture(SIZE, SIZE), picture(SIZE, SIZE), picture(SIZE, SIZE)]
    collate = Collator(
        CONFIG, load_tokenizer("scenes"), objectives_of(CONFIG.model), has_images=True, has_captions=True
    )
    samples = zip(images, CAPTIONS, strict=True)
    batch = collate([Sample(str(i), 0, np.asarray(image), text) for i, (image, text) in enumerate(samples)])
    found = processor(images=images, text=CAPTIONS, return_tensors="pt")
    names = ("pixel_values", "input_ids", "attention_mask")
    assert_same(dict(found), {name: batch.model_inputs()[name] for name in names})
    assert found["input_ids"].shape == (3, CONFIG.model.text_length)
    assert torch.equal(processor(text="blue")["input_ids"], processor(text=["blue"])["input_ids"])


def test_tokenizer_with_other_settings_is_used_like_in_the_collator():
    tokenizer = load_tokenizer("scenes")
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[MASK]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("[CLS] [MASK] $A [SEP]", special_tokens=special)
    tokenizer.truncation_side = tokenizer.padding_side = "left"
    tokenizer.pad_token = "[UNK]"
    tokenizer.model_max_length = CONFIG.model.text_length
    collate = Collator(CONFIG, tokenizer, objectives_of(CONFIG.model), has_images=False, has_captions=True)
    batch = collate([Sample(str(i), 0, None, text) for i, text in enumerate(CAPTIONS)])
    found = EveProcessor(EveImageProcessor(SIZE), tokenizer)(text=CAPTIONS)
    assert_same(dict(found), {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})


def test_model_accepts_the_output_of_the_processor(exported):
    model, processor = AutoModel.from_pretrained(exported), AutoProcessor.from_pretrained(exported)
    with torch.no_grad():
        output = model(**processor(images=picture(80, 60), text="a red circle"))
    assert output.last_hidden_state.shape == (1, 1 + CONFIG.model.num_patches + 5, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "these are neither"),
        ({"images": [picture(9, 9)], "text": ["a", "b"]}, "'pixel_values': 1, 'input_ids': 2"),
        ({"images": np.zeros((9, 9, 5), np.uint8)}, r"shape \(9, 9, 5\) must be \(H, W\), \(H, W, C\) or \(C, H, W\)"),
        ({"images": np.full((9, 9, 3), -0.5)}, r"float64 has values from -0\.5 to -0\.5, which must be within 0\.\.1"),
    ],
)
def test_processor_refuses_inputs_that_form_no_batch(exported, arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoProcessor.from_pretrained(exported)(**arguments)


def test_damaged_image_is_a_bad_sample(exported):
    with pytest.raises(BadSample, match="truncated image"):
        AutoImageProcessor.from_pretrained(exported)(encode(picture(90, 70), "PNG")[:300])


PIXELS = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FORMS = {
    "tensor": PIXELS,
    "tensor with channels last": PIXELS.permute(1, 2, 0),
    "array": PIXELS.permute(1, 2, 0).numpy(),
    "array with channels first": PIXELS.numpy(),
    "pillow": Image.fromarray(PIXELS.permute(1, 2, 0).numpy()),
    "float tensor": PIXELS.float() / 255,
    "float64 array": PIXELS.double().numpy() / 255,
    "float64 tensor": (PIXELS.float() / 255).double(),
    "int64 tensor": PIXELS.long(),
    "list of one": [PIXELS],
    "tuple of one": (PIXELS.numpy(),),
    "nested list": [[PIXELS]],
    "batched tensor": PIXELS[None],
    "batched array": PIXELS.permute(1, 2, 0)[None].numpy(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_gives_the_same_pixels(exported, form):
    expected = evaluation_transform(PIXELS.permute(1, 2, 0).numpy())
    assert torch.equal(AutoProcessor.from_pretrained(exported)(images=FORMS[form])["pixel_values"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floating_tensors_of_small_dtypes_are_read(exported, dtype):
    small = (PIXELS.double() / 255).to(dtype)
    processor = AutoImageProcessor.from_pretrained(exported)
    assert torch.equal(processor(small)["pixel_values"], processor(small.float())["pixel_values"])


OTHER_TRANSFORMS = {
    "do_resize": False,
    "do_rescale": False,
    "do_normalize": False,
    "do_convert_rgb": False,
    "do_center_crop": True,
    "do_pad": True,
    "rescale_factor": 1.0,
    "resample": 2,
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@pytest.mark.parametrize("loads", [AutoImageProcessor, AutoProcessor])
@pytest.mark.parametrize("name", OTHER_TRANSFORMS)
def test_setting_of_another_transform_is_refused(exported, loads, name):
    with pytest.raises(ValueError, match=rf"{name} \(.*\) must be .*, as in training: leave it out") as caught:
        loads.from_pretrained(exported, **{name: OTHER_TRANSFORMS[name]})
    assert "\n" not in str(caught.value)


def test_settings_of_the_transform_of_training_are_taken(exported):
    settings = TRANSFORM | {"size": {"height": SIZE, "width": SIZE}, "image_std": None}
    processor = AutoImageProcessor.from_pretrained(exported, **settings)
    expected = AutoImageProcessor.from_pretrained(exported)(PIXELS)["pixel_values"]
    assert torch.equal(processor(PIXELS)["pixel_values"], expected)


def test_files_and_gray_arrays_are_read(exported, tmp_path):
    processor = AutoImageProcessor.from_pretrained(exported)
    gray = picture(70, 50, "L")
    gray.save(tmp_path / "gray.png")
    expected = processor(gray)["pixel_values"]
    array = np.asarray(gray)
    for form in (tmp_path / "gray.png", str(tmp_path / "gray.png"), array, array[..., None], torch.tensor(array)[None]):
        assert torch.equal(processor(form)["pixel_values"], expected)


def test_several_images_form_a_batch(exported):
    processor = AutoProcessor.from_pretrained(exported)
    one, two = (processor(images=image)["pixel_values"] for image in (PIXELS, PIXELS.flip(2)))
    for several in ([PIXELS, PIXELS.flip(2)], torch.stack([PIXELS, PIXELS.flip(2)])):
        assert torch.equal(processor(images=several)["pixel_values"], torch.cat([one, two]))


def test_padding_truncation_and_kinds_of_result(exported):
    processor = AutoProcessor.from_pretrained(exported)
    long, short = processor(text=CAPTIONS[:2], padding=False, return_tensors=None)["input_ids"]
    assert (len(long), len(short)) == (5, 3)
    padded = processor(text=CAPTIONS[:2], padding="max_length", max_length=8)
    assert padded["input_ids"].tolist() == [[*long, 0, 0, 0], [*short, 0, 0, 0, 0, 0]]
    assert padded["attention_mask"].sum(dim=1).tolist() == [5, 3]
    assert processor(text=CAPTIONS[:2], padding="longest")["input_ids"].shape == (2, 5)
    assert processor(text=CAPTIONS[0], max_length=4)["input_ids"].tolist() == [[*long[:3], long[-1]]]
    whole = processor(text=CAPTIONS[2], truncation=False)["input_ids"]
    assert whole.shape[1] > CONFIG.model.text_length
    assert processor(text=CAPTIONS[2], truncation=True)["input_ids"].shape == (1, CONFIG.model.text_length)
    arrays = processor(images=PIXELS, text=CAPTIONS[0], return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    assert processor.batch_decode(padded["input_ids"], skip_special_tokens=True) == CAPTIONS[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": CAPTIONS[:2], "padding": False}, "captions have different lengths: pass padding=True"),
        ({"text": "a", "padding": "left"}, "left is not a valid PaddingStrategy"),
        ({"text": "a", "max_length": 1}, r"max_length \(1\) must be at least 2"),
        ({"text": [3]}, "a caption of type int must be a string"),
        ({"text": []}, "text is empty"),
        ({"images": []}, "images is empty"),
        ({"images": PIXELS.float()}, r"float32 has values from 0 to 255, which must be within 0\.\.1"),
        ({"images": PIXELS.long() - 1}, r"int64 has values from -1 to 254, which must be within 0\.\.255"),
        ({"images": PIXELS[:2]}, r"an image of shape \(2, 50, 70\) must be"),
        ({"images": PIXELS > 3}, "an image of dtype bool must hold"),
        ({"images": [3]}, "an image of type int cannot be read"),
    ],
)
def test_unusable_argument_is_refused_in_one_line(exported, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        AutoProcessor.from_pretrained(exported)(**arguments)
    assert "\n" not in str(caught.value)


def test_processor_is_saved_and_loaded(exported, tmp_path):
    first = AutoProcessor.from_pretrained(exported)
    first.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert_same(dict(again(images=PIXELS, text="blue")), dict(first(images=PIXELS, text="blue")))
    assert first.model_input_names == ["pixel_values", "input_ids", "attention_mask"]


def test_tokenizer_alone_gives_the_same_ids(exported):
    tokenizer, processor = AutoTokenizer.from_pretrained(exported), AutoProcessor.from_pretrained(exported)
    batch = DataCollatorWithPadding(tokenizer)([tokenizer(caption) for caption in CAPTIONS[:2]])
    expected = processor(text=CAPTIONS[:2])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"].bool(), expected["attention_mask"])
