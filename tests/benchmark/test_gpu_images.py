"""Decoding on a device, rehearsed on the CPU: equal crops, figures of both sides, and absent packages by name."""

from types import SimpleNamespace

import pytest
import simplejpeg
import skimage.data
import torch

from eve_ds.benchmark import gpu_images


def decode_jpeg(files, mode, device):
    """Stand-in for torchvision's function of this name: a list of (3, H, W) uint8."""
    assert (mode, device.type) == ("RGB", "cpu")
    return [torch.from_numpy(simplejpeg.decode_jpeg(file.numpy().tobytes(), "RGB")).permute(2, 0, 1) for file in files]


DECODERS = SimpleNamespace(decode_jpeg=decode_jpeg, ImageReadMode=SimpleNamespace(RGB="RGB"))


def test_both_sides_make_the_same_crops(monkeypatch):
    found = {"skimage.data": skimage.data, "torchvision.io": DECODERS}
    monkeypatch.setattr(gpu_images, "find", found.get)
    host, on_device = gpu_images.images(5)
    assert (host["what"], on_device["what"]) == ("images, one core", "images, cpu")
    assert 0 < host["mean"] < 0.02
    assert on_device["mean"] < 0.4, "it rounds once, Pillow also between rows and columns"
    assert min(host["images_s"], on_device["images_s"]) > 0


@pytest.mark.parametrize(
    ("found", "absent"),
    [
        ({"skimage.data": skimage.data}, "torchvision"),
        ({"torchvision.io": DECODERS}, "scikit-image"),
        ({}, "scikit-image, torchvision"),
    ],
)
def test_absent_packages_are_named(found, absent, monkeypatch):
    monkeypatch.setattr(gpu_images, "find", found.get)
    assert list(gpu_images.images(2)) == [{"what": "images", "absent": absent}]


def test_a_torchvision_that_cannot_decode_is_a_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Couldn't load the image extension.\nSet TORCHVISION_WARN...")

    lacking = SimpleNamespace(decode_jpeg=fail, ImageReadMode=DECODERS.ImageReadMode)
    monkeypatch.setattr(gpu_images, "find", {"skimage.data": skimage.data, "torchvision.io": lacking}.get)
    host, absent = gpu_images.images(2)
    assert host["images_s"] > 0
    assert absent["absent"] == r"Couldn't load the image extension.\nSet TORCHVISION_WARN..."  # one line of a table
