"""Held-out pairs that a run never trains on: from separate sources, or a share of the training samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from eve_ds.config import Config, ConfigError, SourceConfig, ValidationConfig
from eve_ds.data.batch import Sample
from eve_ds.data.errors import BadSample
from eve_ds.data.image_decoding import choose_decoding
from eve_ds.data.order import Place
from eve_ds.data.sample_names import image_key
from eve_ds.data.shards import find_shards
from eve_ds.data.sources import SampleSource, open_source
from eve_ds.data.transforms import TrainTransform


def is_held_out(key: str, share: float) -> bool:
    """Whether a sample belongs to the held-out share; depends only on its key, so all runs agree.

    All captions of an image are held out together, or the image would be trained on with the others.
    """
    name = image_key(key).encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(name, digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def held_out_share(config: Config) -> float:
    """Return the held-out share of the training sources; 0 without one."""
    return 0.0 if config.data.validation is None else config.data.validation.share


def held_out_pairs(config: Config, rank: int, world_size: int) -> list[Sample]:
    """Return this rank's pairs of `data.validation`, with whole, resized images; unusable pairs are omitted.

    Pairs are chosen in the order of the sources, at most `num_samples` over all ranks, and assigned to the ranks in
    turn. Of an image with several captions the first is taken, so that the image of another pair is another image.

    Raises:
        ConfigError: shards are missing, empty, or also used for training; or no pair is held out.
    """
    validation = config.data.validation
    assert validation is not None
    decoding = choose_decoding(config.data.image_decoder)
    transform = TrainTransform(config.model.image_size, (1.0, 1.0), 0.0, config.train.seed, decoding)
    chosen = validation.sources or [item for item in config.data.sources if item.modalities in ("pair", "any")]
    _refuse_shared_shards(validation.sources, config.data.sources)
    sources = [open_source(source, transform, config.train.seed) for source in chosen]
    found = [_read(source, *place) for source, place in list(_places(sources, validation))[rank::world_size]]
    for source in sources:
        source.close()
    return [sample for sample in found if sample is not None]


def _places(
    sources: Sequence[SampleSource], validation: ValidationConfig
) -> Iterator[tuple[SampleSource, tuple[int, int]]]:
    """Yield the first held-out places: source, shard and index in the shard."""
    count = 0
    for source in sources:
        for shard, size in enumerate(source.shard_sizes):
            before = ""
            for number in range(size):
                if count == validation.num_samples:
                    return
                key = _key(source, shard, number)
                image = image_key(key)
                further = image != key and image == before  # captions of an image stand together in a shard
                before = image
                if not further and (not validation.share or is_held_out(key, validation.share)):
                    count += 1
                    yield source, (shard, number)
    if not count:
        raise ConfigError(
            f"data.validation.share ({validation.share:g}) holds out no sample of data.sources: raise it, or name "
            "data.validation.sources"
        )


def _key(source: SampleSource, shard: int, number: int) -> str:
    try:
        return source.key(shard, number)
    except BadSample:
        return ""


def _read(source: SampleSource, shard: int, number: int) -> Sample | None:
    """Read a sample; None if it is unusable or not a pair."""
    try:
        sample = source.read(Place(source=0, epoch=0, shard=shard, number=number, slot=0))
    except BadSample:
        return None
    return None if sample.image is None or sample.caption is None else sample


def _refuse_shared_shards(validation: Sequence[SourceConfig], training: Sequence[SourceConfig]) -> None:
    held, trained = ({_path for source in sources for _path in _paths(source)} for sources in (validation, training))
    if shared := sorted(held & trained):
        raise ConfigError(
            f"data.validation.sources names shard {shared[0]}, which data.sources trains on: name other shards"
        )


def _paths(source: SourceConfig) -> list[Path]:
    return [Path(shard.path).resolve() for shard in find_shards(source.shards)] if source.shards else []
