"""Measure the data pipeline: the whole loader beside other loops, and the decoders, memory and times of its parts."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image

from eve_ds.benchmark.harness import Absent, Figures, Measure, Run, compare, interleave, is_quick, kilobytes
from eve_ds.benchmark.peers import find
from eve_ds.benchmark.photographs import Photographs
from eve_ds.config import Config, load_config
from eve_ds.data.image_decoding import DECODER, Box, Decoding, decode_part
from eve_ds.data.image_file import open_image
from eve_ds.data.importers.generated import GeneratedScenes
from eve_ds.data.masking import sample_rng
from eve_ds.data.pipeline import Loader, build_loader
from eve_ds.data.shard_writer import WriterOptions, write_shards
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.data.transforms import TrainTransform, channels_first, crop_box, resize
from eve_ds.objectives.registry import objectives_of

BATCH = 32
SIZE = 224
"""Height and width of the images of photographs, in pixels."""
CROP_SCALE = (0.2, 1.0)
SHARES = ((0.2, 1.0), (0.6, 1.0))
"""Scales of crops for which the loss of shrunk shards is measured."""
EARLIER = Decoding("pillow", "pillow")
"""What earlier versions did, before they turned bytes into floats on the host."""
DECODINGS = {
    "Pillow, resized by Pillow": EARLIER,
    "Pillow, resized by torch": Decoding("pillow"),
    "simplejpeg, resized by torch": Decoding("simplejpeg"),
}
Found = Iterator[list[Measure] | Absent | Figures]


class Crop(NamedTuple):
    """One image to decode and crop."""

    data: bytes
    box: Box


def data(seconds: float) -> Found:
    """Time the loader on generated scenes and on photographs, and the parts of its work."""
    with tempfile.TemporaryDirectory(prefix="eve_ds_benchmark_") as folder:
        yield from _scenes(Path(folder) / "scenes", seconds)
        pictures = find("skimage.data")
        if pictures is None:
            yield Absent("data, photographs", "scikit-image", "not installed")
            return
        photographs = Photographs(pictures, BATCH if is_quick(seconds) else 3 * BATCH)
        yield from _stages(photographs.files, seconds)
        for max_size in (None, 256) if is_quick(seconds) else (None, 384, 256):
            name = "as they are" if max_size is None else f"shorter side {max_size}"
            shards = Path(folder) / f"photographs-{max_size}"
            write_shards(photographs, shards, WriterOptions(max_size=max_size))
            yield from _photographs(shards, name, len(photographs.files) // BATCH, seconds)
            yield from _shrunk(photographs.files, shards, name)
        yield _processes(Path(folder) / "photographs-None", batches=4 if is_quick(seconds) else 60)


def _scenes(shards: Path, seconds: float) -> Found:
    """Compare with a plain webdataset loop with the same decoding and cropping."""
    count = 512 if is_quick(seconds) else 2048
    write_shards(GeneratedScenes(count), shards, WriterOptions())
    config = load_config(
        "eve_tiny", [f"data.sources=[{{kind: shards, shards: {shards}}}]", "data.crop_scale=[0.5, 1.0]"]
    )
    loader = _loader(config)
    ours = partial(_take_batches, loader, count // BATCH)
    bare = partial(_bare_webdataset, _tars(shards), config)
    yield compare("data", torch.uint8, f"{count} samples of 64x64", ours, {"webdataset": bare}, seconds)
    loader.close()


def _photographs(shards: Path, name: str, batches: int, seconds: float) -> Found:
    """Compare the loader with itself in earlier versions, and with a loop that decodes and crops as open_clip does."""
    config = _config(shards)
    now, before = _loader(config), _loader(config, EARLIER)
    peers: dict[str, Run] = {"earlier versions": partial(_take_batches, before, batches, as_floats=True)}
    transforms = find("torchvision.transforms")
    if transforms is None:
        yield Absent(f"data, photographs, {name}", "webdataset, as open_clip", "torchvision cannot be imported")
    else:
        peers["webdataset, as open_clip"] = partial(_as_open_clip, transforms, _tars(shards))
    ours = partial(_take_batches, now, batches)
    yield compare(f"data, photographs, {name}", torch.uint8, f"{batches * BATCH} to {SIZE}", ours, peers, seconds)
    now.close()
    before.close()


def _stages(files: Sequence[bytes], seconds: float) -> Found:
    """Yield images per second of one core, and the difference from exact Pillow, for each decoder and resampler."""
    crops = crops_of(files, CROP_SCALE)
    sides: dict[str, Run] = {"header": lambda: [open_image(crop.data) for crop in crops]}
    for decoder in ("pillow", "simplejpeg"):
        if decoder == "simplejpeg" and find("simplejpeg") is None:
            yield Absent("data, stages", "simplejpeg", "not installed: pip install 'eve_ds[turbo]'")
        else:
            sides[f"{decoder}, decoded"] = partial(_decode_all, crops, decoder)
    chosen = {name: decoding for name, decoding in DECODINGS.items() if f"{decoding.decoder}, decoded" in sides}
    sides |= {name: partial(_resize_all, crops, decoding) for name, decoding in chosen.items()}
    times = interleave(sides, seconds)
    for name in sides:
        quality = _difference(crops, chosen[name]) if name in chosen else {}
        rate = len(crops) / statistics.median(times[name]) * 1e3
        yield Figures("data, stages", name, {"images_s": rate, **quality})


def _shrunk(files: Sequence[bytes], shards: Path, name: str) -> Found:
    """Yield size and detail of the images of shards, relative to those of the source."""
    stored = [sample["jpg"] for sample in _samples(_tars(shards))]
    figures: dict[str, float] = {"kilobytes": statistics.mean(map(len, stored)) / 1e3}
    for scale in SHARES:
        figures[f"gradient_energy_{scale[0]:g}"] = _gradient_energy(stored, scale) / _gradient_energy(files, scale)
    yield Figures("data, photographs", name, figures)


def _processes(shards: Path, batches: int) -> Figures:
    """Memory, rate and bytes of a worker process, and seconds until the first batch of a new and of a resumed loader.

    The rate is that of the worker and this process together, which includes their messages.
    """
    config = _config(shards, num_workers=1)
    started = time.perf_counter()
    loader = _loader(config)
    batch = next(loader)
    first = time.perf_counter() - started
    memory = [_proportional_megabytes(child.pid) for child in multiprocessing.active_children() if child.pid]
    seconds = _cpu_seconds()
    for _ in range(batches):
        next(loader)
    seconds = _cpu_seconds() - seconds
    state = loader.state_dict()
    loader.close()
    started = time.perf_counter()
    resumed = _loader(config, state=state)
    next(resumed)
    again = time.perf_counter() - started
    resumed.close()
    pixels = batch.pixel_values
    assert pixels is not None
    return Figures(
        "data, a worker process",
        "simplejpeg" if state[DECODER] == "simplejpeg" else "Pillow",
        {
            "images_s": batches * BATCH / seconds,
            "pss_mb": max(memory),
            "first_batch_s": first,
            "first_batch_resumed_s": again,
            "pixel_bytes": pixels.nbytes / len(batch),
            "bytes": sum(tensor.nbytes for tensor in batch.tensors()) / len(batch),
            "pixel_bytes_as_floats": pixels.numel() * 4 / len(batch),
        },
    )


# ------------------------------------------------------------------------------------------------------------- sides


def _sources(shards: Path) -> str:
    return f"data.sources=[{{kind: shards, shards: {shards}}}]"


def _config(shards: Path, num_workers: int = 0) -> Config:
    settings = [_sources(shards), f"data.crop_scale={list(CROP_SCALE)}"]
    settings += [f"model.image_size={SIZE}", "model.patch_size=16", f"data.num_workers={num_workers}"]
    return load_config("eve_tiny", settings)


def _loader(config: Config, decoding: Decoding | None = None, state: dict[str, Any] | None = None) -> Loader:
    """Build the loader of one rank; another decoding than the best is that of a saved position."""
    make = partial(
        build_loader,
        config,
        load_tokenizer(config.data.tokenizer),
        objectives_of(config.model),
        rank=0,
        world_size=1,
        micro_batch_size=BATCH,
    )
    if decoding is not None:
        state = {**make().state_dict(), **decoding.position()}
    return make(state=state)


def _take_batches(loader: Loader, batches: int, as_floats: bool = False) -> None:
    for _ in range(batches):
        batch = next(loader)
        if as_floats:
            batch.normalized_pixels  # noqa: B018, computed on first use


def _bare_webdataset(files: list[str], config: Config) -> None:
    """Decode, crop and stack images, without tokens, masks, checks and position."""
    transform = TrainTransform(config.model.image_size, config.data.crop_scale, config.data.horizontal_flip, seed=0)
    images = []
    for sample in _samples(files):
        images.append(transform(sample["png"], sample["txt"].decode(), 0, sample["__key__"]))
        if len(images) == BATCH:
            channels_first(images)
            images.clear()


def _as_open_clip(transforms: Any, files: list[str]) -> None:
    """Decode by Pillow, crop, resize and normalize by torchvision, and stack, without tokens and masks."""
    preprocess = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, CROP_SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )
    stream = webdataset.WebDataset(files, shardshuffle=False, empty_check=False).decode("pilrgb").to_tuple("jpg", "txt")
    for _ in stream.map_tuple(preprocess, str).batched(BATCH):
        pass


def _decode_all(crops: Sequence[Crop], decoder: Any) -> None:
    for data, box in crops:
        decode_part(open_image(data), box, SIZE, decoder)


def _resize_all(crops: Sequence[Crop], decoding: Decoding) -> None:
    for data, box in crops:
        resize(open_image(data), box, SIZE, decoding)


# ----------------------------------------------------------------------------------------------------------- figures


def _tars(shards: Path) -> list[str]:
    return sorted(str(path) for path in shards.glob("*.tar"))


def _samples(files: list[str]) -> Iterator[dict[str, Any]]:
    return iter(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))


def crops_of(files: Sequence[bytes], scale: tuple[float, float]) -> list[Crop]:
    """Draw a crop of each file, the same in every call."""
    return [
        Crop(data, crop_box(*open_image(data).size, scale, sample_rng(0, 0, str(number))))
        for number, data in enumerate(files)
    ]


def _difference(crops: Sequence[Crop], decoding: Decoding) -> dict[str, float]:
    """Mean and largest difference from images that Pillow decodes whole and resizes, of 255."""
    found = [np.abs(resize(open_image(data), box, SIZE, decoding) - exact(data, box)) for data, box in crops]
    return {"mean": float(np.mean([item.mean() for item in found])), "max": float(max(item.max() for item in found))}


def exact(data: bytes, box: Box) -> NDArray[np.int64]:
    """(SIZE, SIZE, 3) by Pillow alone, from the whole image; its filter sees pixels around the box."""
    whole = open_image(data).convert("RGB")
    return np.asarray(whole.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)).astype(int)


def _gradient_energy(files: Sequence[bytes], scale: tuple[float, float]) -> float:
    """Mean squared difference of neighboring pixels of the crops, a measure of their detail."""
    images = np.stack([resize(open_image(data), box, SIZE) for data, box in crops_of(files, scale)]).astype(float)
    return float(np.mean(np.diff(images, axis=1) ** 2) + np.mean(np.diff(images, axis=2) ** 2))


def _cpu_seconds() -> float:
    """CPU time of this process and its worker processes."""
    return time.process_time() + sum(map(_child_cpu_seconds, multiprocessing.active_children()))


def _child_cpu_seconds(child: BaseProcess) -> float:
    """CPU time of a process that runs; 0 where the system does not tell."""
    file = Path(f"/proc/{child.pid}/stat")
    if not file.exists():
        return 0.0
    user, system = file.read_text().rpartition(")")[2].split()[11:13]  # the name in brackets may hold spaces
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _proportional_megabytes(process: int) -> float:
    """Memory of a process in MB, its part of shared pages included; 0 where the system does not tell."""
    file = Path(f"/proc/{process}/smaps_rollup")
    return kilobytes(file, "Pss:") * 1024 / 1e6 if file.exists() else 0.0
