"""Time decoding and resizing of JPEG files on a GPU (nvJPEG, by torchvision) beside a core of the host.

The loader has no such path. These rows tell whether one would pay: a GPU that trains has to spend its own time on it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.benchmark.data import CROP_SCALE, SIZE, Crop, crops_of, exact
from eve_ds.benchmark.inputs import device
from eve_ds.benchmark.peers import find
from eve_ds.benchmark.photographs import Photographs
from eve_ds.data.image_file import open_image
from eve_ds.data.transforms import resize
from eve_ds.printable import excerpt, printable

REPEATS = 5


def images(count: int) -> Iterator[dict[str, Any]]:
    """Yield images per second on the host and on the device, and the difference of both from exact Pillow."""
    pictures, decoders = find("skimage.data"), find("torchvision.io")
    if pictures is None or decoders is None:
        absent = [name for name, found in (("scikit-image", pictures), ("torchvision", decoders)) if found is None]
        yield {"what": "images", "absent": ", ".join(absent)}
        return
    crops = crops_of(Photographs(pictures, count).files, CROP_SCALE)
    yield {"what": "images, one core", **_figures(crops, partial(_on_host, crops))}
    try:
        yield {"what": f"images, {device().type}", **_figures(crops, partial(_on_device, decoders, crops))}
    except RuntimeError as error:  # a torchvision without its extension for images, or without nvJPEG
        yield {"what": f"images, {device().type}", "absent": printable(excerpt(str(error)))}


def _figures(crops: Sequence[Crop], run: Callable[[], Tensor]) -> dict[str, float]:
    made = run().cpu().numpy()  # also loads the libraries
    differences = [
        np.abs(image.transpose(1, 2, 0) - exact(*crop)) for image, crop in zip(made.astype(int), crops, strict=True)
    ]
    seconds = statistics.median(_seconds(run) for _ in range(REPEATS))
    return {"images_s": len(crops) / seconds, "mean": float(np.mean(differences)), "max": float(np.max(differences))}


def _seconds(run: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    run().cpu()  # waits for the device
    return time.perf_counter() - started


def _on_host(crops: Sequence[Crop]) -> Tensor:
    """(B, 3, SIZE, SIZE) uint8 by the decoder and resampler of the loader."""
    images = [resize(open_image(data), box, SIZE) for data, box in crops]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _on_device(decoders: Any, crops: Sequence[Crop]) -> Tensor:
    """(B, 3, SIZE, SIZE) uint8: decoded in one call, then cropped and resized in floating point."""
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data, _ in crops]
    decoded = decoders.decode_jpeg(files, mode=decoders.ImageReadMode.RGB, device=device())
    resized = []
    for image, (_, (left, top, right, bottom)) in zip(decoded, crops, strict=True):
        part = image[None, :, top:bottom, left:right].float()
        resized.append(F.interpolate(part, (SIZE, SIZE), mode="bicubic", antialias=True))
    return torch.cat(resized).round_().clamp_(0, 255).to(torch.uint8)
