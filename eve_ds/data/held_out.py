"""Held-out pairs that a run never trains on: from separate sources, or a share of the training samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from eve_ds.config import Config, ConfigError, SourceConfig, ValidationConfig
from eve_ds.data.batch import Sample
from eve_ds.data.errors import BadSample
from eve_ds.data.image_decoding import choose_decoding
from eve_ds.data.index_file import Indices
from eve_ds.data.order import Place
from eve_ds.data.remote.storage import RemoteStorage
from eve_ds.data.sample_names import image_key
from eve_ds.data.shard_paths import expand, one_name_of
from eve_ds.data.shards import Shard
from eve_ds.data.sources import SampleSource, open_source, shards_of
from eve_ds.data.transforms import TrainTransform
from eve_ds.printable import without_credentials
from eve_ds.together import from_rank_zero

if TYPE_CHECKING:
    import torch.distributed as dist


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


def held_out_pairs(config: Config, rank: int, world_size: int, group: dist.ProcessGroup | None = None) -> list[Sample]:
    """Return this rank's pairs of `data.validation`, with whole, resized images; collective.

    Pairs are chosen in the order of the sources, at most `num_samples` over all ranks, and assigned to the ranks in
    turn; unusable ones are omitted. Of an image with several captions the first is taken, so that the image of another
    pair is another image. Rank 0 looks for shards and pairs, for all ranks of `group` (default: all ranks).

    Raises:
        ConfigError: shards are missing, empty, or also used for training; or no pair is held out.
    """
    validation = config.data.validation
    assert validation is not None
    decoding = choose_decoding(config.data.image_decoder)
    transform = TrainTransform(config.model.image_size, (1.0, 1.0), 0.0, config.train.seed, decoding)
    chosen = validation.sources or [item for item in config.data.sources if item.modalities in ("pair", "any")]
    found = from_rank_zero(partial(_shards, config, chosen), group)
    pairs = zip(chosen, found, strict=True)
    sources = [open_source(source, shards, transform, config) for source, shards in pairs]
    places = from_rank_zero(lambda: list(_places(sources, validation)), group)
    read = [_read(sources[place.source], place) for place in places[rank::world_size]]
    for source in sources:
        source.close()
    return [sample for sample in read if sample is not None]


def _places(sources: Sequence[SampleSource], validation: ValidationConfig) -> Iterator[Place]:
    """Yield the first held-out places."""
    count = 0
    for index, source in enumerate(sources):
        for shard in range(len(source.shard_sizes)):
            before = ""
            for number, image in enumerate(source.images(shard)):
                if count == validation.num_samples:
                    return
                further = image != "" and image == before  # captions of an image stand together in a shard
                before = image
                if not further and (not validation.share or is_held_out(image, validation.share)):
                    count += 1
                    yield Place(source=index, epoch=0, shard=shard, number=number, slot=0)
    if not count:
        raise ConfigError(
            f"data.validation.share ({validation.share:g}) holds out no sample of data.sources: raise it, or name "
            "data.validation.sources"
        )


def _read(source: SampleSource, place: Place) -> Sample | None:
    """Read a sample; None if it is unusable or not a pair."""
    try:
        sample = source.read(place)
    except BadSample:
        return None
    return None if sample is None or sample.image is None or sample.caption is None else sample


def _shards(config: Config, chosen: Sequence[SourceConfig]) -> list[list[Shard]]:
    """Shards of the chosen sources; raises ConfigError if the run trains on some of them by name."""
    if config.data.validation is not None and config.data.validation.sources:
        indices = Indices(RemoteStorage(config.data))
        held_out, trained = _files(chosen, indices), _files(config.data.sources, indices)
        shared = next((shard for name, shard in held_out.items() if name in trained), None)
        if shared is not None:
            raise ConfigError(
                f"data.validation.sources names shard {without_credentials(shared)}, which data.sources trains on: "
                "name other shards"
            )
    return shards_of(chosen, config.data)


def _files(sources: Sequence[SourceConfig], indices: Indices) -> dict[str, str]:
    """Shard by its one name."""
    found = [shard for source in sources if source.shards for shard in expand(source.shards, indices)]
    return {one_name_of(shard): shard for shard in found}
