"""Sides of the measures of the data pipeline: the same photographs, the same crops, and absent packages by name."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
from PIL import Image

from eve_ds.benchmark import data as measures
from eve_ds.benchmark.harness import Absent, Figures
from eve_ds.benchmark.photographs import PICTURES, SIZES, Photographs
from eve_ds.data.image_decoding import Decoding
from eve_ds.data.image_file import open_image
from eve_ds.data.transforms import resize


@pytest.fixture(scope="module")
def photographs():
    return Photographs(skimage.data, 2 * len(PICTURES))


def test_photographs_are_different_files_of_two_sizes(photographs):
    assert Photographs(skimage.data, 3).files == photographs.files[:3], "the same in every call"
    assert len(set(photographs.files)) == len(photographs.files)
    for number, data in enumerate(photographs.files):
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == ("JPEG", SIZES[number % 2])
            assert np.asarray(image).std() > 10, "there is something to see"
    assert [candidate.image.read() for candidate in photographs] == photographs.files


@pytest.mark.parametrize("decoding", [None, measures.EARLIER])
def test_loader_makes_the_pixels_of_its_decoding(photographs, tmp_path, decoding):
    """The first epoch of the batch has every photograph once."""
    measures.write_shards(photographs, tmp_path, measures.WriterOptions())
    config = measures._config(tmp_path)
    loader = measures._loader(config, decoding)
    batch = next(loader)
    loader.close()
    count = len(photographs.files)
    assert sorted(int(key) for key in batch.keys[:count]) == list(range(count))
    images = batch.pixel_values.permute(0, 2, 3, 1).numpy()
    for key, pixels in zip(batch.keys[:count], images[:count], strict=True):
        image = open_image(photographs.files[int(key)])
        rng = measures.sample_rng(config.train.seed, 0, f"{key}/crop")
        box = measures.crop_box(*image.size, measures.CROP_SCALE, rng)
        assert (pixels == resize(image, box, measures.SIZE, decoding)).all()


def test_absent_packages_are_named(photographs, tmp_path, monkeypatch):
    found = {"skimage.data": skimage.data}
    monkeypatch.setattr(measures, "find", found.get)
    monkeypatch.setattr(measures, "interleave", lambda sides, seconds: {name: [1.0] for name in sides})
    rows = list(measures._stages(photographs.files[:2], 0.0))
    assert [row.peer for row in rows if isinstance(row, Absent)] == ["simplejpeg"]
    assert [row.what for row in rows if isinstance(row, Figures)][-1] == "Pillow, resized by torch"
    measures.write_shards(photographs, tmp_path / "shards", measures.WriterOptions())
    monkeypatch.setattr(measures, "compare", lambda *arguments: [arguments[4]])
    absent, (peers,) = measures._photographs(tmp_path / "shards", "as they are", 1, 0.0)
    assert (absent.peer, absent.reason) == ("webdataset, as open_clip", "torchvision cannot be imported")
    assert list(peers) == ["earlier versions"]
    monkeypatch.setattr(measures, "_scenes", lambda shards, seconds: iter(()))
    monkeypatch.setattr(measures, "find", lambda name: None)
    assert [(row.peer, row.reason) for row in measures.data(0.0)] == [("scikit-image", "not installed")]


def test_loop_of_open_clip_crops_every_photograph(photographs, tmp_path):
    measures.write_shards(photographs, tmp_path, measures.WriterOptions())
    seen = []

    def crop(image):
        assert image.mode == "RGB"
        seen.append(image.size)
        return np.zeros((3, 224, 224), np.float32)

    transforms = SimpleNamespace(
        Compose=lambda steps: steps[0],
        RandomResizedCrop=lambda size, scale, interpolation: crop,
        ToTensor=lambda: None,
        Normalize=lambda *_: None,
        InterpolationMode=SimpleNamespace(BICUBIC="bicubic"),
    )
    measures._as_open_clip(transforms, measures._tars(tmp_path))
    assert seen == [SIZES[number % 2] for number in range(len(photographs.files))]


def test_difference_is_zero_for_exact_pillow(photographs):
    crops = measures.crops_of(photographs.files[:4], (0.2, 0.5))  # too small for a reduced JPEG
    assert measures._difference(crops, measures.EARLIER) == {"mean": 0.0, "max": 0.0}
    assert 0 < measures._difference(crops, Decoding("pillow"))["mean"] < 0.02
    assert measures._gradient_energy(photographs.files[:4], (0.6, 1.0)) > 0
