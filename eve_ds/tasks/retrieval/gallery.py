"""Search by features over all images and captions of a set, shared among the ranks, and re-ranking of the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eve_ds.data.errors import BadSample
from eve_ds.distributed import gather_objects
from eve_ds.tasks.batches import Inference, TaskBatch, chunks
from eve_ds.tasks.examples import Example
from eve_ds.tasks.retrieval.pair_models import PairScorer
from eve_ds.topology import Topology

RECALL_AT = (1, 5, 10)
"""Ranks at which recall is measured; the last is the number of candidates in a record."""
IMAGE, TEXT = "image:", "text:"
"""Prefix of the key of a query by image, whose candidates are texts, and of a query by text."""


class Gallery:
    """Features of all images and captions, each computed on one rank and known to all.

    Args:
        inference: a :class:`PairScorer`, and how to run it.
        examples: captions with their images, equal on every rank.
    """

    def __init__(self, inference: Inference, examples: Sequence[Example]) -> None:
        self.inference, self.model = inference, cast(PairScorer, inference.model)
        self.examples = list(examples)
        self.first = {example.group: example for example in reversed(self.examples)}
        """Image -> its first example."""
        self.groups = list(dict.fromkeys(example.group for example in self.examples))
        self.pixels: dict[str, NDArray[np.uint8]] = {}
        images = _over_ranks(self._image_features, self.groups)
        self.skipped = {group: reason for group, reason in images.items() if isinstance(reason, str)}
        self.groups = [group for group in self.groups if group not in self.skipped]
        self.examples = [example for example in self.examples if example.group not in self.skipped]
        self.text_of = {example.key: (number, example) for number, example in enumerate(self.examples)}
        self.image_number = {group: number for number, group in enumerate(self.groups)}
        if not self.groups:
            return  # no image can be read, so every query is skipped
        texts = _over_ranks(self._text_features, [example.key for example in self.examples])
        self.image_features = torch.stack([images[group] for group in self.groups])
        if self.model.centered:
            self.image_features -= self.image_features.mean(dim=0)
        self.text_features = torch.stack([texts[example.key] for example in self.examples])

    def search(self, key: str, rerank: int) -> dict[str, Any]:
        """Best candidates of a query, or the reason why it is skipped.

        Args:
            key: IMAGE or TEXT and the name of the image or caption.
            rerank: number of candidates that the model scores again pair by pair; 0: none.

        Returns:
            `dot`: names by dot product; with `rerank` also `reranked`; or only `skipped`.
        """
        by_image = key.startswith(IMAGE)
        name = key.removeprefix(IMAGE if by_image else TEXT)
        if by_image:
            if name in self.skipped:
                return {"skipped": self.skipped[name]}
            scores = self.text_features @ self.image_features[self.image_number[name]]
            names = [example.key for example in self.examples]
        else:
            if name not in self.text_of:
                return {"skipped": "image of the caption could not be read"}
            scores = self.image_features @ self.text_features[self.text_of[name][0]]
            names = self.groups
        order = scores.sort(descending=True, stable=True).indices.tolist()
        found: dict[str, Any] = {"dot": [names[number] for number in order[: RECALL_AT[-1]]]}
        if rerank:
            candidates = [names[number] for number in order[:rerank]]
            matching = self._match([(name, other) if by_image else (other, name) for other in candidates])
            best = matching.sort(descending=True, stable=True).indices.tolist()
            # Candidates that the model did not score again keep their order, behind those that it did.
            found["reranked"] = [candidates[number] for number in best[: RECALL_AT[-1]]] + found["dot"][rerank:]
        return found

    def _image_features(self, groups: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        readable = []
        for group in groups:
            try:
                self._pixels(group)
                readable.append(group)
            except BadSample as error:
                found[group] = error.reason
        for chunk in chunks(readable, self.inference.batch_size):
            batch = self._batch([self.first[group] for group in chunk], chunk)
            features = self.model.image_features(batch.normalized_pixels.squeeze(1))
            found |= dict(zip(chunk, features.cpu(), strict=True))
        return found

    def _batch(self, examples: Sequence[Example], groups: Sequence[str]) -> TaskBatch:
        """Examples, each with the image of a group, on the device of the model."""
        batch = self.inference.collate(examples, [self._pixels(group) for group in groups])
        return batch.to(self.inference.device)

    def _pixels(self, group: str) -> NDArray[np.uint8]:
        if group not in self.pixels:
            self.pixels[group] = self.inference.reader(self.first[group])
        return self.pixels[group]

    def _text_features(self, keys: list[str]) -> dict[str, Any]:
        by_key = {example.key: example.text for example in self.examples}
        found: dict[str, Any] = {}
        for chunk in chunks(keys, self.inference.batch_size):
            input_ids, mask = self.inference.collate.encode([by_key[key] for key in chunk])
            features = self.model.text_features(input_ids.to(self.inference.device), mask.to(self.inference.device))
            found |= dict(zip(chunk, features.cpu(), strict=True))
        return found

    def _match(self, pairs: list[tuple[str, str]]) -> Tensor:
        """(N,) log odds of pairs (image, caption)."""
        scores = []
        for chunk in chunks(pairs, self.inference.batch_size):
            examples = [self.text_of[caption][1] for _, caption in chunk]
            batch = self._batch(examples, [group for group, _ in chunk])
            pixels = batch.normalized_pixels.squeeze(1)
            scores.append(self.model.match_logits(pixels, batch.input_ids, batch.attention_mask).cpu())
        return torch.cat(scores)


def _over_ranks(compute: Callable[[list[str]], dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Results of all ranks, each of which computes its share of the names."""
    merged: dict[str, Any] = {}
    topology = Topology.current()
    rank, world_size = topology.data_rank, topology.data_size
    for part in gather_objects(compute(names[rank::world_size])):
        merged |= part
    return merged
