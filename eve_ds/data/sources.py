"""Where samples come from: generated scenes, or shards. A source knows its sizes and reads one sample at a time."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

from eve_ds.config import Config, ConfigError, SourceConfig
from eve_ds.data.batch import Sample
from eve_ds.data.errors import BadSample
from eve_ds.data.masking import sample_rng
from eve_ds.data.order import Place
from eve_ds.data.shards import ShardFile, find_shards
from eve_ds.data.synthetic.scenes import Scenes
from eve_ds.data.transforms import TrainTransform

GENERATED_PER_SHARD = 1000
"""Generated samples are ordered as if they lay in shards of this many."""
MAX_OPEN_SHARDS = 128
"""Two per lane: the one being read and the next."""
IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")


class UnusableData(ValueError):
    """The data cannot be trained on; the message names shard, key and reason."""


class SampleSource(Protocol):
    """One source of the mixture."""

    shard_sizes: list[int]
    has_images: bool
    has_captions: bool

    def read(self, place: Place) -> Sample:
        """The sample that lies at the place; raises :class:`BadSample`."""

    def key(self, shard: int, number: int) -> str:
        """Key of a sample, without reading its members; raises :class:`BadSample`."""

    def describe(self, shard: int, number: int) -> str:
        """Shard and sample in words, for messages."""

    def fingerprint(self) -> str:
        """Changes when other samples would come, or in another order: a saved position is not used for other data."""

    def close(self) -> None:
        """Close files; they are opened again when needed."""


class ReadingOrder:
    """Which captions of scenes have their phrases in reading order: a share of them that falls linearly over the run.

    A caption is in reading order where a hash of (seed, epoch, key), as a fraction of its range, is below the share at
    the slot. Ranks, workers and a resumed run therefore agree, and what is in order late would have been so earlier.

    Args:
        share: of the captions at slot 0.
        num_samples: slots over which the share falls to 0; None: it never falls.
        seed: of the run.
    """

    def __init__(self, share: float, num_samples: int | None, seed: int) -> None:
        self._share, self._num_samples, self._seed = share, num_samples, seed

    def share(self, slot: int) -> float:
        """The share at slot number `slot` of the stream, which counts the samples of all sources and ranks."""
        left = 1.0 if self._num_samples is None else max(1 - slot / self._num_samples, 0.0)
        return self._share * left

    def holds(self, slot: int, epoch: int, key: str) -> bool:
        """Whether this caption is in reading order at that slot."""
        share = self.share(slot)
        # Not the masks' generator: captions in order and others are to be masked alike.
        return share > 0 and sample_rng(self._seed, epoch, f"{key}/order").random() < share

    def __str__(self) -> str:
        """The setting in words; nothing where the share is 0, as before there was one."""
        if self._share == 0:
            return ""
        falling = "" if self._num_samples is None else f" falling to 0 over {self._num_samples} samples"
        return f", reading_order_share {self._share}{falling}"


class GeneratedSource:
    """Generated scenes of one level and one seed.

    Args:
        transform: from a generated image to one of the model's size.
        seed: of the run, which captions in reading order are drawn from.
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
        """World and number of the scene."""
        return f"{self._name}-{shard * GENERATED_PER_SHARD + number:08d}"

    def describe(self, shard: int, number: int) -> str:
        """The key; what is generated has no shards."""
        return self.key(shard, number)

    def fingerprint(self) -> str:
        """Level, seed and number of samples, and the order of captions where it is not random."""
        return f"{self._name} x {sum(self.shard_sizes)}{self._reading_order}"

    def close(self) -> None:
        """Nothing is open."""


class ShardsSource:
    """Samples of WebDataset shards: KEY.jpg, png, jpeg or webp, and KEY.txt."""

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
        """Name of the sample's members without extension."""
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
            caption = fields.get("txt", b"").decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadSample("non-UTF-8 caption", str(error)) from None
        if not caption and self._modalities != "any":
            raise BadSample("missing caption", "empty" if "txt" in fields else "no .txt member")
        return caption or None

    def _encoded_image(self, fields: dict[str, bytes]) -> bytes | None:
        if not self.has_images:
            return None
        encoded = next((fields[name] for name in IMAGE_EXTENSIONS if name in fields), None)
        if encoded is None and self._modalities != "any":
            raise BadSample("missing image", f"members: {', '.join(fields)}")
        return encoded

    def describe(self, shard: int, number: int) -> str:
        """Path of the shard and number of the sample in it."""
        return f"shard {self._shards[shard].path}, sample {number}"

    def fingerprint(self) -> str:
        """Names and sizes of the shards in their order, wherever their folder lies."""
        listing = "\n".join(f"{Path(shard.path).name} {shard.num_samples}" for shard in self._shards)
        digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
        return f"{len(self._shards)} shards, {sum(self.shard_sizes)} samples, {digest}"

    def close(self) -> None:
        """Close the open shards."""
        while self._open:
            self._open.popitem()[1].close()


def open_sources(config: Config) -> list[SampleSource]:
    """Sources of the training mixture, in its order; raises :class:`ConfigError` for missing or empty shards."""
    if not config.data.sources:
        raise ConfigError("data.sources is empty; name at least one source")
    data, seed = config.data, config.train.seed
    transform = TrainTransform(config.model.image_size, data.crop_scale, data.horizontal_flip, seed)
    return [open_source(source, transform, seed) for source in data.sources]


def open_source(source: SourceConfig, transform: TrainTransform, seed: int) -> SampleSource:
    """One source whose images go through `transform`; raises :class:`ConfigError` for missing or empty shards."""
    if source.kind == "shards":
        return ShardsSource(source, transform)
    return GeneratedSource(source, transform, seed)
