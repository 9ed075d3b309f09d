"""Sources of samples: generated scenes, or shards. A source knows its sizes and reads one sample at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Protocol

from eve_ds.config import Config, ConfigError, DataConfig, SourceConfig
from eve_ds.data.batch import Sample
from eve_ds.data.caption_text import clean_caption
from eve_ds.data.errors import BadSample
from eve_ds.data.image_decoding import Decoding
from eve_ds.data.image_file import IMAGE_EXTENSIONS
from eve_ds.data.masking import sample_rng
from eve_ds.data.open_shards import OpenShards
from eve_ds.data.order import Place
from eve_ds.data.remote.addresses import is_remote
from eve_ds.data.remote.storage import RemoteStorage
from eve_ds.data.sample_names import TOGETHER, image_key
from eve_ds.data.shard_file import StoredSample
from eve_ds.data.shard_paths import name_of
from eve_ds.data.shard_table import ShardTable
from eve_ds.data.shards import Shard, find_shards
from eve_ds.data.synthetic.scenes import Scenes
from eve_ds.data.transforms import TrainTransform
from eve_ds.printable import without_credentials
from eve_ds.together import from_rank_zero

if TYPE_CHECKING:
    import torch.distributed as dist

GENERATED_PER_SHARD = 1000
"""Generated samples are ordered as if stored in shards of this size."""
MOST_LISTED = 8
"""Members that a message lists."""


def _keep(image: str) -> bool:
    return False


class SampleSource(Protocol):
    """One source of the mixture."""

    shard_sizes: list[int]
    """Number of samples of each shard."""
    has_images: bool
    """Whether samples can have an image."""
    has_captions: bool
    """Whether samples can have a caption."""

    def read(self, place: Place, left_out: Callable[[str], bool] = _keep) -> Sample | None:
        """Read the sample at a place; None if `left_out` is true for the name of its image.

        Raises:
            BadSample: the sample cannot be used.
        """

    def want(self, place: Place) -> None:
        """Announce a :meth:`read` of a place, whose bytes may come in the background until then.

        Raises:
            UnusableData: the source cannot be used.
        """

    def images(self, shard: int) -> Iterator[str]:
        """Yield the name of the image of each sample of a shard, without reading its members.

        All captions of an image have one name. That of a sample that is missing is empty.
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

    def read(self, place: Place, left_out: Callable[[str], bool] = _keep) -> Sample | None:
        """Generate one sample."""
        key, epoch = self.describe(place.shard, place.number), place.epoch
        if left_out(key):
            return None
        in_order = self._reading_order.holds(place.slot, epoch, key)
        scene = self._scenes.scene(place.shard * GENERATED_PER_SHARD + place.number, reading_order=in_order)
        caption = scene.caption if self.has_captions else None
        image = self._transform(scene.image, caption, epoch, key) if self.has_images else None
        return Sample(key, epoch, image, caption)

    def want(self, place: Place) -> None:
        """Do nothing: a sample is computed."""

    def images(self, shard: int) -> Iterator[str]:
        """Yield the keys of the scenes of a shard."""
        return (self.describe(shard, number) for number in range(self.shard_sizes[shard]))

    def describe(self, shard: int, number: int) -> str:
        """Return the key of a scene, made of level, seed and index; generated samples have no shards."""
        return f"{self._name}-{shard * GENERATED_PER_SHARD + number:08d}"

    def fingerprint(self) -> str:
        """Return level, seed and number of samples, and the order of captions if it is not random."""
        return f"{self._name} x {sum(self.shard_sizes)}{self._reading_order}"

    def contents(self) -> dict[str, str]:
        """Return nothing: the fingerprint determines the samples."""
        return {}

    def close(self) -> None:
        """Do nothing: no file is open."""


class ShardsSource:
    """Samples from WebDataset shards: an image KEY.jpg, .png, ... and its caption KEY.txt, or captions KEY.0.txt, ...

    Args:
        config: section of the source.
        transform: decodes and crops the images, whose extensions are :data:`IMAGE_EXTENSIONS`.
        shards: shards of the source, from :func:`find_shards`.
        remote: storage of shards at addresses; None: one with the default settings.
    """

    def __init__(
        self,
        config: SourceConfig,
        transform: TrainTransform,
        shards: Sequence[Shard],
        remote: RemoteStorage | None = None,
    ) -> None:
        self._modalities, self._transform = config.modalities, transform
        self.has_images, self.has_captions = config.modalities != "text", config.modalities != "image"
        self._shards = ShardTable(shards)
        self._is_remote = any(is_remote(shard.address) for shard in shards)
        self.shard_sizes = [shard.num_samples for shard in shards]
        self._names = _digest(f"{name_of(shard.address)} {shard.num_samples}" for shard in shards)
        self._contents = {"sizes": _digest(str(shard.bytes) for shard in shards)}
        if all(shard.sha256 for shard in shards):
            self._contents["hashes"] = _digest(str(shard.sha256) for shard in shards)
        self._open = OpenShards(self._shards, RemoteStorage(DataConfig()) if remote is None else remote)

    def read(self, place: Place, left_out: Callable[[str], bool] = _keep) -> Sample | None:
        """Read, decode and crop one sample."""
        stored = self._stored(place.shard, place.number)
        if left_out(image_key(stored.image)):
            return None
        try:
            return self._sample(stored, place.epoch)
        except BadSample:
            if not is_remote(self._shards[place.shard].address):
                raise
        # A server may send wrong bytes in place of those of a sample; a cache would keep them for good.
        return self._sample(self._stored(place.shard, place.number, again=True), place.epoch)

    def _sample(self, stored: StoredSample, epoch: int) -> Sample:
        """Decode and crop a stored sample."""
        key, fields, _ = stored
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

    def want(self, place: Place) -> None:
        """Begin to read one sample of a source with addresses."""
        if self._is_remote:
            self._open.want(place.shard, place.number)

    def images(self, shard: int) -> Iterator[str]:
        """Yield the keys of the images, those of their members; shards that repeat an image have it once as well."""
        found = chain(self._open.images(shard), repeat(None))
        return ("" if key is None else image_key(key) for key in islice(found, self.shard_sizes[shard]))

    def _stored(self, shard: int, number: int, again: bool = False) -> StoredSample:
        try:
            return self._open.get(shard).read(number, again)
        except OSError as error:
            raise BadSample("unreadable shard", str(error)) from None

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
        """Return the path of the shard, the index of the sample in it, and that of the caption if there are several."""
        file = self._open.known(shard)
        caption = "" if file is None else file.describe_caption(number)
        return f"shard {without_credentials(self._shards[shard].address)}, sample {number}{caption}"

    def fingerprint(self) -> str:
        """Return a digest of names and sizes of the shards in their order, independent of their folder."""
        return f"{len(self._shards)} shards, {sum(self.shard_sizes)} samples, {self._names}"

    def contents(self) -> dict[str, str]:
        """Return a digest of the sizes of all shards and, if an index has all of them, one of their hashes."""
        return self._contents

    def close(self) -> None:
        """Close the open shards."""
        self._open.close()


def _listed(fields: dict[str, bytes]) -> str:
    return ", ".join(list(fields)[:MOST_LISTED])


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def open_sources(
    config: Config, group: dist.ProcessGroup | None = None, decoding: Decoding | None = None
) -> list[SampleSource]:
    """Open the sources of the training mixture, in the order of `data.sources`; collective.

    Rank 0 looks for the shards and reads their indices, for all ranks of `group` (default: all ranks).

    `decoding` is the decoder and resampler of images; None: the fastest that are installed.

    Raises:
        ConfigError: no source, or shards that are missing or empty.
    """
    if not config.data.sources:
        raise ConfigError("data.sources is empty; name at least one source")
    data, seed = config.data, config.train.seed
    transform = TrainTransform(config.model.image_size, data.crop_scale, data.horizontal_flip, seed, decoding)
    found = from_rank_zero(partial(shards_of, data.sources, data), group)
    return [open_source(*source, transform, config) for source in zip(data.sources, found, strict=True)]


def shards_of(sources: Sequence[SourceConfig], data: DataConfig) -> list[list[Shard]]:
    """Find the shards of each source; none for generated samples. `data` has the settings of addresses.

    Raises:
        ConfigError: see :func:`find_shards`.
        RemoteError: a server cannot be read.
    """
    remote = RemoteStorage(data)
    return [find_shards(source.shards or [], remote) if source.kind == "shards" else [] for source in sources]


def open_source(
    source: SourceConfig, shards: Sequence[Shard], transform: TrainTransform, config: Config
) -> SampleSource:
    """Open one source of a run, with its shards if it has any, whose images are transformed by `transform`."""
    if source.kind == "shards":
        return ShardsSource(source, transform, shards, RemoteStorage(config.data))
    return GeneratedSource(source, transform, config.train.seed)
