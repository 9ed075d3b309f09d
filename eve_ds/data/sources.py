"""Sources of samples: generated scenes, or shards. A source knows its sizes and reads one sample at a time."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from eve_ds.config import Config, ConfigError, SourceConfig
from eve_ds.data.batch import Sample
from eve_ds.data.caption_text import clean_caption
from eve_ds.data.errors import BadSample
from eve_ds.data.image_decoding import Decoding
from eve_ds.data.image_file import IMAGE_EXTENSIONS
from eve_ds.data.masking import sample_rng
from eve_ds.data.order import Place
from eve_ds.data.shards import ShardFile, find_shards
from eve_ds.data.synthetic.scenes import Scenes
from eve_ds.data.transforms import TrainTransform

GENERATED_PER_SHARD = 1000
"""Generated samples are ordered as if stored in shards of this size."""
MAX_OPEN_SHARDS = 128
"""Shards that a source keeps open: two per lane, the current one and the next."""
MOST_LISTED = 8
"""Members that a message lists."""
TOGETHER = "members of a sample, as KEY.jpg and KEY.txt, must stand together in a shard, without a dot in KEY"


class UnusableData(ValueError):
    """Raised if the data cannot be used for training; the message names shard, key and reason."""


class SampleSource(Protocol):
    """One source of the mixture."""

    shard_sizes: list[int]
    """Number of samples of each shard."""
    has_images: bool
    """Whether samples can have an image."""
    has_captions: bool
    """Whether samples can have a caption."""

    def read(self, place: Place) -> Sample:
        """Read the sample at a place.

        Raises:
            BadSample: the sample cannot be used.
        """

    def key(self, shard: int, number: int) -> str:
        """Return the key of a sample without reading its members.

        Raises:
            BadSample: the sample is missing.
        """

    def describe(self, shard: int, number: int) -> str:
        """Name shard and sample, for messages."""

    def fingerprint(self) -> str:
        """Text that changes with the samples or their order, so that a saved position is not used with other data."""

    def contents(self) -> dict[str, str]:
        """Digests of the stored bytes, by name; a digest that two sources have is equal if they hold the same data."""

    def close(self) -> None:
        """Close all files; :meth:`read` opens them again."""


class ReadingOrder:
    """Choice of the scene captions whose phrases are in reading order; their share falls linearly over the run.

    A caption is in reading order if a hash of (seed, epoch, key), as a fraction of its range, is below the share at the
    slot. Ranks, workers and a resumed run therefore agree, and a caption in order at a late slot would also be in order
    at an earlier one.

    Args:
        share: share of the captions at slot 0.
        num_samples: number of slots over which the share falls to 0; None: the share is constant.
        seed: seed of the run.
    """

    def __init__(self, share: float, num_samples: int | None, seed: int) -> None:
        self._share, self._num_samples, self._seed = share, num_samples, seed

    def share(self, slot: int) -> float:
        """Return the share at stream slot `slot`; slots count the samples of all sources and ranks."""
        left = 1.0 if self._num_samples is None else max(1 - slot / self._num_samples, 0.0)
        return self._share * left

    def holds(self, slot: int, epoch: int, key: str) -> bool:
        """Whether the caption of sample `key` is in reading order at stream slot `slot`."""
        share = self.share(slot)
        # Not the generator of the masks, so that captions in order are masked like others.
        return share > 0 and sample_rng(self._seed, epoch, f"{key}/order").random() < share

    def __str__(self) -> str:
        """Text of the setting for fingerprints; empty if the share is 0, as before the setting existed."""
        if self._share == 0:
            return ""
        falling = "" if self._num_samples is None else f" falling to 0 over {self._num_samples} samples"
        return f", reading_order_share {self._share}{falling}"


class GeneratedSource:
    """Generated scenes of one level and one seed.

    Args:
        config: section of the source.
        transform: transform from a generated image to the image size of the model.
        seed: seed of the run, which determines the captions in reading order.
    """

    def __init__(self, config: SourceConfig, transform: TrainTransform, seed: int) -> None:
        self._scenes, self._name = Scenes(config.level, config.seed, "train"), f"scenes-{config.level}-{config.seed}"
        self._transform = transform
        self._reading_order = ReadingOrder(config.reading_order_share, config.reading_order_samples, seed)
        self.has_images, self.has_captions = config.modalities != "text", config.modalities != "image"
        full, rest = divmod(config.num_samples, GENERATED_PER_SHARD)
        self.shard_sizes = [GENERATED_PER_SHARD] * full + ([rest] if rest else [])

    def read(self, place: Place) -> Sample:
        """Generate one sample."""
        key, epoch = self.key(place.shard, place.number), place.epoch
        in_order = self._reading_order.holds(place.slot, epoch, key)
        scene = self._scenes.scene(place.shard * GENERATED_PER_SHARD + place.number, reading_order=in_order)
        caption = scene.caption if self.has_captions else None
        image = self._transform(scene.image, caption, epoch, key) if self.has_images else None
        return Sample(key, epoch, image, caption)

    def key(self, shard: int, number: int) -> str:
        """Return the key of a scene, made of level, seed and index."""
        return f"{self._name}-{shard * GENERATED_PER_SHARD + number:08d}"

    def describe(self, shard: int, number: int) -> str:
        """Return the key of the sample; generated samples have no shards."""
        return self.key(shard, number)

    def fingerprint(self) -> str:
        """Return level, seed and number of samples, and the order of captions if it is not random."""
        return f"{self._name} x {sum(self.shard_sizes)}{self._reading_order}"

    def contents(self) -> dict[str, str]:
        """Return nothing: the fingerprint determines the samples."""
        return {}

    def close(self) -> None:
        """Do nothing: no file is open."""


class ShardsSource:
    """Samples from WebDataset shards: caption KEY.txt and an image KEY.jpg, .png, ...; see `IMAGE_EXTENSIONS`."""

    def __init__(self, config: SourceConfig, transform: TrainTransform) -> None:
        self._modalities, self._transform = config.modalities, transform
        self.has_images, self.has_captions = config.modalities != "text", config.modalities != "image"
        self._shards = find_shards(config.shards or [])
        self.shard_sizes = [shard.num_samples for shard in self._shards]
        self._open: OrderedDict[int, ShardFile] = OrderedDict()

    def read(self, place: Place) -> Sample:
        """Read, decode and crop one sample."""
        epoch = place.epoch
        key, fields = self._fields(place.shard, place.number)
        try:
            caption = self._caption(fields)
            encoded = self._encoded_image(fields)
            image = self._transform(encoded, caption, epoch, key) if encoded is not None else None
            if image is None and caption is None:
                raise BadSample("empty sample", "neither image nor caption")
        except BadSample as error:
            error.key = key
            raise
        return Sample(key, epoch, image, caption)

    def key(self, shard: int, number: int) -> str:
        """Return the name of the sample's members without extension."""
        try:
            return self._shard_file(shard).key(number)
        except OSError as error:
            raise BadSample("unreadable shard", str(error)) from None

    def _fields(self, shard: int, number: int) -> tuple[str, dict[str, bytes]]:
        try:
            return self._shard_file(shard).read(number)
        except OSError as error:
            raise BadSample("unreadable shard", str(error)) from None

    def _shard_file(self, shard: int) -> ShardFile:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        file = ShardFile(self._shards[shard].path)
        if len(file) > self._shards[shard].num_samples:
            raise UnusableData(
                f"shard {file.path} holds {len(file)} samples, its index says {self._shards[shard].num_samples}: "
                "write the index again with launcher/prepare.py, or remove it to have the shards scanned"
            )
        self._open[shard] = file
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return file

    def _caption(self, fields: dict[str, bytes]) -> str | None:
        if not self.has_captions:
            return None
        try:
            caption = clean_caption(fields.get("txt", b"").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadSample("non-UTF-8 caption", str(error)) from None
        if not caption and self._modalities != "any":
            detail = "empty" if "txt" in fields else f"no .txt but {_listed(fields)}: {TOGETHER}"
            raise BadSample("missing caption", detail)
        return caption or None

    def _encoded_image(self, fields: dict[str, bytes]) -> bytes | None:
        if not self.has_images:
            return None
        encoded = next((fields[name] for name in IMAGE_EXTENSIONS if name in fields), None)
        if encoded is None and self._modalities != "any":
            raise BadSample("missing image", f"no image but {_listed(fields)}: {TOGETHER}")
        return encoded

    def describe(self, shard: int, number: int) -> str:
        """Return the path of the shard and the index of the sample in it."""
        return f"shard {self._shards[shard].path}, sample {number}"

    def fingerprint(self) -> str:
        """Return a digest of names and sizes of the shards in their order, independent of their folder."""
        digest = _digest(f"{Path(shard.path).name} {shard.num_samples}" for shard in self._shards)
        return f"{len(self._shards)} shards, {sum(self.shard_sizes)} samples, {digest}"

    def contents(self) -> dict[str, str]:
        """Return a digest of the sizes of all shards and, if an index has all of them, one of their hashes."""
        found = {"sizes": _digest(str(shard.bytes) for shard in self._shards)}
        if all(shard.sha256 for shard in self._shards):
            found["hashes"] = _digest(str(shard.sha256) for shard in self._shards)
        return found

    def close(self) -> None:
        """Close the open shards."""
        while self._open:
            self._open.popitem()[1].close()


def _listed(fields: dict[str, bytes]) -> str:
    return ", ".join(list(fields)[:MOST_LISTED])


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def open_sources(config: Config, decoding: Decoding | None = None) -> list[SampleSource]:
    """Open the sources of the training mixture, in the order of `data.sources`.

    `decoding` is the decoder and resampler of images; None: the fastest that are installed.

    Raises:
        ConfigError: no source, or shards that are missing or empty.
    """
    if not config.data.sources:
        raise ConfigError("data.sources is empty; name at least one source")
    data, seed = config.data, config.train.seed
    transform = TrainTransform(config.model.image_size, data.crop_scale, data.horizontal_flip, seed, decoding)
    return [open_source(source, transform, seed) for source in data.sources]


def open_source(source: SourceConfig, transform: TrainTransform, seed: int) -> SampleSource:
    """Open one source whose images are transformed by `transform`.

    Raises:
        ConfigError: shards are missing or empty.
    """
    if source.kind == "shards":
        return ShardsSource(source, transform)
    return GeneratedSource(source, transform, seed)
