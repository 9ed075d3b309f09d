"""Samples of shards: every format of images is found, and reasons say what is wrong with the shard."""

import io

import numpy as np
import pytest
from PIL import Image, features
from tars import write_tar

from eve_ds.config import SourceConfig
from eve_ds.data.errors import BadSample
from eve_ds.data.order import Place
from eve_ds.data.shards import find_shards
from eve_ds.data.sources import ShardsSource
from eve_ds.data.transforms import TrainTransform

FORMATS = {
    "jpg": "JPEG", "jpeg": "JPEG", "JPG": "JPEG", "jfif": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF",
    "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF", "ppm": "PPM", "avif": "AVIF",
}  # fmt: skip


def image(kind="PNG", color=(200, 30, 10)):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(file, kind)
    return file.getvalue()


def read(folder, members, number=0, modalities="pair"):
    path = str(write_tar(folder / "a.tar", members))
    config = SourceConfig(kind="shards", shards=path, modalities=modalities)
    source = ShardsSource(config, TrainTransform(16, (1.0, 1.0), 0.0, 0), find_shards(path))
    try:
        return source.read(Place(source=0, epoch=0, shard=0, number=number, slot=0))
    finally:
        source.close()


@pytest.mark.parametrize("extension", FORMATS)
def test_an_image_of_every_format_is_found(tmp_path, extension):
    if extension == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    sample = read(tmp_path, [(f"a.{extension}", image(FORMATS[extension])), ("a.txt", b"a cat")])
    assert sample.caption == "a cat"
    assert np.abs(sample.image.astype(int) - [200, 30, 10]).max() <= 6


def test_the_first_of_several_images_is_used(tmp_path):
    members = [("a.gif", image("GIF", (0, 0, 0))), ("a.png", image()), ("a.seg.jpg", b"x"), ("a.txt", b"a cat")]
    assert (read(tmp_path, members).image == [200, 30, 10]).all()


def test_captions_of_an_image_are_samples_with_keys_of_their_own(tmp_path):
    texts = [("k.0.txt", b"a cat"), ("k.1.txt", b""), ("k.2.txt", b"a dog")]
    members = [("a.png", image()), ("a.txt", b"x"), ("k.png", image()), *texts, ("k.json", b"{}")]
    found = {number: read(tmp_path, members, number) for number in (1, 3)}
    assert {number: (sample.key, sample.caption) for number, sample in found.items()} == {
        1: ("k-0", "a cat"),
        3: ("k-2", "a dog"),
    }
    with pytest.raises(BadSample, match=r"missing caption \(empty\)") as caught:
        read(tmp_path, members, 2)
    assert caught.value.key == "k-1"


def test_messages_name_the_caption_of_an_image_that_has_several(tmp_path):
    members = [("a.png", image()), ("a.txt", b"x"), ("k.png", image()), ("k.0.txt", b"y"), ("k.1.txt", b"z")]
    path = str(write_tar(tmp_path / "a.tar", members))
    source = ShardsSource(SourceConfig(kind="shards", shards=path), None, find_shards(path))
    assert source.describe(0, 2) == f"shard {path}, sample 2"  # the shard is not open
    assert list(source.images(0)) == ["a", "k", "k"]
    assert source.describe(0, 0) == f"shard {path}, sample 0"
    assert source.describe(0, 2) == f"shard {path}, sample 2 (caption 1 of the 2 of image 1)"
    assert source.describe(0, 3) == f"shard {path}, sample 3"
    source.close()


APART = "must stand together in a shard, without a dot in KEY"
BAD = {
    "images, then texts": (
        [("a.png", image()), ("b.png", image()), ("a.txt", b"a"), ("b.txt", b"b")],
        rf"missing caption \(no \.txt but png: members of a sample, as KEY\.jpg and KEY\.txt, {APART}\)",
    ),
    "texts, then images": (
        [("a.txt", b"a"), ("b.txt", b"b"), ("a.png", image()), ("b.png", image())],
        rf"missing image \(no image but txt: .* {APART}\)",
    ),
    "keys with dots": (
        [(f"a.{n}.{s}", d) for n in range(30) for s, d in (("png", image()), ("txt", b"x"))],
        rf"missing image \(no image but 0\.png, 1\.png, 2\.png, 3\.png, 4\.png, 5\.png, 6\.png, 7\.png: .*{APART}",
    ),
    "empty caption": ([("a.png", image()), ("a.txt", b" \xe2\x80\x8b")], r"missing caption \(empty\)"),
    "caption of Latin-1": ([("a.png", image()), ("a.txt", b"\xe9")], "non-UTF-8 caption"),
    "EPS called jpg": ([("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n"), ("a.txt", b"a")], r"unreadable image \(EPS\)"),
    "no image": ([("a.jpg", b"<html>"), ("a.txt", b"a")], "no image but a web page"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_sample_that_cannot_be_used_names_the_reason(tmp_path, name):
    members, message = BAD[name]
    with pytest.raises(BadSample, match=message):
        read(tmp_path, members)
