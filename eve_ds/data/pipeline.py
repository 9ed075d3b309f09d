"""The training pipeline: shards or scenes to an endless, resumable stream of batches.

Every batch is a pure function of the configuration, the slots it covers and the data; see :mod:`eve_ds.data.order`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from eve_ds.config import Config, ConfigError, SourceConfig
from eve_ds.data.batch import Batch
from eve_ds.data.masking import mask_patches, mask_tokens, sample_rng
from eve_ds.data.order import Position, StreamOrder, layout_for
from eve_ds.data.scenes import Scenes

SCENES_PER_SHARD = 1000
"""Scenes are ordered as if they lay in shards of this many."""


@dataclass(frozen=True)
class Sample:
    """One decoded sample, before masking."""

    key: str
    epoch: int
    image: NDArray[np.uint8] | None
    """(H, W, 3) in the model's image size."""
    caption: str | None


class ScenesSource:
    """Generated scenes of one level and seed."""

    def __init__(self, config: SourceConfig) -> None:
        self._scenes = Scenes(config.level, config.seed, "train")
        self._name = f"scenes-{config.level}-{config.seed}"
        full, rest = divmod(config.num_samples, SCENES_PER_SHARD)
        self.shard_sizes = [SCENES_PER_SHARD] * full + ([rest] if rest else [])

    def read(self, shard: int, number: int, epoch: int) -> Sample:
        """Sample `number` of a virtual shard."""
        index = shard * SCENES_PER_SHARD + number
        scene = self._scenes[index]
        return Sample(f"{self._name}-{index:08d}", epoch, scene.image, scene.caption)


class Collator:
    """Turns samples into a masked :class:`Batch`."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerFast) -> None:
        self._model, self._masking, self._seed = config.model, config.masking, config.train.seed
        self._encode = tokenizer.backend_tokenizer.encode
        self._pad_id, self._mask_id, self._sep_id = (
            tokenizer.pad_token_id,
            tokenizer.mask_token_id,
            tokenizer.sep_token_id,
        )
        special = set(tokenizer.all_special_ids)
        self._random_ids = np.array([token for token in range(len(tokenizer)) if token not in special], dtype=np.int64)

    def __call__(self, samples: list[Sample]) -> Batch:
        """Stack, normalise, tokenise and mask."""
        rngs = [sample_rng(self._seed, sample.epoch, sample.key) for sample in samples]
        patches = [mask_patches(self._model.num_patches, self._masking.patch_mask_ratio, rng) for rng in rngs]
        pixels = torch.from_numpy(np.stack([sample.image for sample in samples if sample.image is not None]))
        input_ids, attention_mask, masked, labels = self._text(samples, rngs)
        return Batch(
            keys=[sample.key for sample in samples],
            pixel_values=pixels.permute(0, 3, 1, 2).float().mul_(2 / 255).sub_(1).contiguous(),
            visible_patch_ids=torch.from_numpy(np.stack([visible for visible, _ in patches])),
            masked_patch_ids=torch.from_numpy(np.stack([hidden for _, hidden in patches])),
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention_mask),
            masked_token_ids=torch.from_numpy(masked),
            token_labels=torch.from_numpy(labels),
        )

    def _text(self, samples: list[Sample], rngs: list[np.random.Generator]) -> tuple[NDArray[Any], ...]:
        tokens = [self._tokens(sample.caption) for sample in samples]
        length = max(len(row) for row in tokens)
        input_ids = np.full((len(samples), length), self._pad_id, dtype=np.int64)
        attention_mask = np.zeros((len(samples), length), dtype=np.bool_)
        positions, labels = [], []
        for row, (token_ids, rng) in enumerate(zip(tokens, rngs, strict=True)):
            maskable = np.ones(len(token_ids), dtype=np.bool_)
            maskable[[0, -1]] = False
            masked = mask_tokens(
                token_ids,
                maskable,
                self._masking.text_mask_ratio,
                rng,
                mask_token_id=self._mask_id,
                random_token_ids=self._random_ids,
                random_share=self._masking.random_token_share,
                keep_share=self._masking.keep_token_share,
            )
            input_ids[row, : len(token_ids)] = masked.input_ids
            attention_mask[row, : len(token_ids)] = True
            positions.append(masked.positions + row * length)
            labels.append(masked.labels)
        return input_ids, attention_mask, np.concatenate(positions), np.concatenate(labels)

    def _tokens(self, caption: str | None) -> NDArray[np.int64]:
        ids = self._encode(caption or "").ids
        if len(ids) > self._model.text_length:
            ids = [*ids[: self._model.text_length - 1], self._sep_id]
        return np.array(ids, dtype=np.int64)


class Loader:
    """Endless iterator of batches over epochs, for one rank."""

    def __init__(self, sources: list[ScenesSource], order: StreamOrder, collate: Collator, position: Position) -> None:
        self.skipped: Counter[str] = Counter()
        self.num_samples = 0
        self._sources, self._order, self._collate = sources, order, collate
        self._position = position
        self._slots = position.slots(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        samples = []
        for _ in range(self._position.batch):
            place = self._order.locate(next(self._slots))
            samples.append(self._sources[place.source].read(place.shard, place.number, place.epoch))
        self._position = self._position.advance(0, self._position.consumed[0] + len(samples))
        self.num_samples += len(samples)
        return self._collate(samples)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position just after the last batch handed out by this rank."""
        return {"consumed": list(self._position.consumed), "num_samples": self.num_samples}

    def close(self) -> None:
        """Release processes and files."""


def build_loader(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    state: dict[str, Any] | None = None,
) -> Loader:
    """Batches of one rank, from the start or from the position in `state`."""
    if len(tokenizer) > config.model.vocab_size:
        raise ConfigError(
            f"tokenizer '{config.data.tokenizer}' has {len(tokenizer)} tokens, more than model.vocab_size "
            f"({config.model.vocab_size}); raise model.vocab_size or use a smaller tokenizer"
        )
    sources = [ScenesSource(source) for source in config.data.sources]
    order = StreamOrder(
        [source.shard_sizes for source in sources],
        [source.weight for source in config.data.sources],
        layout_for(config.train.train_batch_size),
        config.data.shuffle_buffer,
        config.train.seed,
    )
    consumed = tuple(state["consumed"]) if state else (0,)
    loader = Loader(
        sources, order, Collator(config, tokenizer), Position(rank, world_size, micro_batch_size, 1, consumed=consumed)
    )
    loader.num_samples = state["num_samples"] if state else 0
    return loader
