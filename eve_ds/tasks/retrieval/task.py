"""Image-text retrieval: contrast over the global batch (ITC), matching on hard negatives (ITM), re-ranking.

Li et al., ALBEF (NeurIPS 2021), sections 3.2 and 4, with one backbone for images, texts and pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eve_ds.config import Config
from eve_ds.data.captions import CaptionEncoder
from eve_ds.data.errors import BadSample
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.distributed import gather_objects
from eve_ds.model.eve import MoEFactory
from eve_ds.model.moe import MoE
from eve_ds.objectives.router import router_losses
from eve_ds.tasks.batches import ImageReader, TaskBatch, TaskCollator
from eve_ds.tasks.examples import Example
from eve_ds.tasks.pair_models import IGNORED, PairScorer, RetrievalModel, RetrievalOutput
from eve_ds.tasks.words import Template, WordRetrievalModel
from eve_ds.topology import Topology

RECALL_AT = (1, 5, 10)
IMAGE, TEXT = "image:", "text:"
"""Start of the key of a query by image, which asks for texts, and by text."""
LOOKED_AT = 4096
"""Captions that a template is made from."""


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of (B, G) logits with the right columns, (B, G) bool, sharing the target evenly; mean over rows."""
    target = same.float() / same.sum(dim=1, keepdim=True)
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


class Retrieval:
    """The task.

    Args:
        config: with `model` and `task`.
        template: where features are those of masked words.
        centred: see :class:`eve_ds.tasks.words.WordRetrievalModel`.
    """

    def __init__(self, config: Config, template: Template | None = None, centred: bool = False) -> None:
        assert config.task is not None
        self.config, self.task, self.template, self.centred = config, config.task, template, centred

    @classmethod
    def from_examples(cls, config: Config, examples: Sequence[Example]) -> Retrieval:
        """Features of masked words are those of the longest caption, by a look at some of them."""
        assert config.task is not None
        if config.task.features == "class_token":
            return cls(config)
        encoder = CaptionEncoder(load_tokenizer(config.data.tokenizer), config.model.text_length)
        step = max(1, len(examples) // LOOKED_AT)
        captions = (examples[number].text for number in range(0, len(examples), step))
        return cls(config, Template.of(captions, encoder, most=1))

    @classmethod
    def load(cls, config: Config, folder: Path) -> Retrieval:
        """With the template of a saved model; raises ConfigError if it cannot be read."""
        assert config.task is not None
        if config.task.features == "class_token":
            return cls(config)
        return cls(config, Template.load(folder))

    def save(self, folder: Path) -> None:
        """Write the template, if there is one."""
        if self.template is not None:
            self.template.save(folder)

    def model(self, moe_cls: MoEFactory = MoE) -> nn.Module:
        """The model with weights not yet drawn."""
        if self.template is not None:
            return WordRetrievalModel(self.config, moe_cls, self.template, self.centred)
        return RetrievalModel(self.config, moe_cls)

    def pretrained_names(self) -> dict[str, str]:
        """Those of the objectives that have learnt the features."""
        if self.template is not None:
            return {"head.text_head.": "text_head."}
        return {
            "head.image_projection.": "matching.image_projection.",
            "head.text_projection.": "matching.text_projection.",
            "head.log_temperature": "matching.log_temperature",
            "head.matching.": "matching.classifier.",
        }

    def trainable(self, examples: Sequence[Example]) -> Sequence[Example]:
        """All."""
        return examples

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """(B,) int64, equal for captions of the same image."""
        digests = (hashlib.blake2b(example.group.encode(), digest_size=8).digest() for example in examples)
        return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])

    def losses(self, output: RetrievalOutput, batch: TaskBatch) -> dict[str, Tensor]:
        """ITC, the mean of both directions, and ITM over true and drawn pairs."""
        contrast = [contrastive_loss(logits, output.same) for logits in (output.image_logits, output.text_logits)]
        terms = {"itc": torch.stack(contrast).mean()}
        if output.matching_logits is not None and output.matching_labels is not None:
            terms["itm"] = F.cross_entropy(output.matching_logits.float(), output.matching_labels, ignore_index=IGNORED)
        return terms | router_losses(output.moe, output.num_tokens)

    def settings(self) -> dict[str, Any]:
        """What predictions depend on besides model and examples."""
        return {"rerank": self.task.rerank}

    def queries(self, examples: Sequence[Example]) -> list[str]:
        """Every image once, then every caption."""
        groups = dict.fromkeys(example.group for example in examples)
        return [*(IMAGE + group for group in groups), *(TEXT + example.key for example in examples)]

    @torch.no_grad()
    def predict(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        todo: Sequence[str],
        collate: TaskCollator,
        batch_size: int,
    ) -> Iterator[dict[str, Any]]:
        """A record for each key of `todo`: the best candidates by dot product, and after re-ranking.

        A collective, as features are computed once over all ranks. Decoded images are kept in memory for re-ranking.
        """
        reader = ImageReader(self.config, training=False)
        gallery = _Gallery(cast(PairScorer, model), examples, reader, collate, batch_size)
        for key in todo:
            yield {"key": key} | gallery.search(key, self.task.rerank)

    def metrics(self, examples: Sequence[Example], predictions: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """R@1, 5 and 10 in both directions, by dot product and after re-ranking.

        `text_retrieval` asks for texts with an image: any caption of the image is right.
        """
        image_of = {example.key: example.group for example in examples}
        orders = ("dot", "reranked") if self.task.rerank else ("dot",)
        asked = [key for key in self.queries(examples) if "skipped" not in predictions[key]]
        result: dict[str, Any] = {"num_examples": len(asked)}
        for order in orders:
            result[order] = {}
            for start, name in ((IMAGE, "text_retrieval"), (TEXT, "image_retrieval")):
                hits = [_hits(key, predictions[key][order], image_of) for key in asked if key.startswith(start)]
                result[order][name] = {
                    f"R@{k}": sum(any(row[:k]) for row in hits) / len(hits) if hits else None for k in RECALL_AT
                }
        return result


def _hits(key: str, candidates: Sequence[str], image_of: dict[str, str]) -> list[bool]:
    """Which of the candidates are right for the query."""
    if key.startswith(IMAGE):
        return [image_of[candidate] == key.removeprefix(IMAGE) for candidate in candidates]
    return [candidate == image_of[key.removeprefix(TEXT)] for candidate in candidates]


class _Gallery:
    """Features of all images and captions, each computed on one rank and known to all."""

    def __init__(
        self,
        model: PairScorer,
        examples: Sequence[Example],
        reader: ImageReader,
        collate: TaskCollator,
        batch_size: int,
    ) -> None:
        self.model, self.reader, self.collate, self.batch_size = model, reader, collate, batch_size
        self.device = next(cast(nn.Module, model).parameters()).device
        self.examples = list(examples)
        self.first = {example.group: example for example in reversed(self.examples)}
        """Image -> its first example."""
        self.groups = list(dict.fromkeys(example.group for example in self.examples))
        self.pixels: dict[str, NDArray[np.uint8]] = {}
        images = _over_ranks(self._image_features, self.groups)
        self.skipped = {group: reason for group, reason in images.items() if isinstance(reason, str)}
        self.groups = [group for group in self.groups if group not in self.skipped]
        self.examples = [example for example in self.examples if example.group not in self.skipped]
        texts = _over_ranks(self._text_features, [example.key for example in self.examples])
        self.image_features = torch.stack([images[group] for group in self.groups])
        if model.centred:
            self.image_features -= self.image_features.mean(dim=0)
        self.text_features = torch.stack([texts[example.key] for example in self.examples])
        self.text_of = {example.key: (number, example) for number, example in enumerate(self.examples)}
        self.image_number = {group: number for number, group in enumerate(self.groups)}

    def search(self, key: str, rerank: int) -> dict[str, Any]:
        """The names of the best candidates, images or captions, or why the query cannot be asked."""
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
            found["reranked"] = [candidates[number] for number in best[: RECALL_AT[-1]]]
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
        for chunk in _chunks(readable, self.batch_size):
            batch = self.collate([self.first[group] for group in chunk], [self._pixels(group) for group in chunk])
            features = self.model.image_features(batch.to(self.device).normalized_pixels.squeeze(1))
            found |= dict(zip(chunk, features.cpu(), strict=True))
        return found

    def _pixels(self, group: str) -> NDArray[np.uint8]:
        if group not in self.pixels:
            self.pixels[group] = self.reader(self.first[group])
        return self.pixels[group]

    def _text_features(self, keys: list[str]) -> dict[str, Any]:
        by_key = {example.key: example.text for example in self.examples}
        found: dict[str, Any] = {}
        for chunk in _chunks(keys, self.batch_size):
            input_ids, mask = self.collate.encode([by_key[key] for key in chunk])
            features = self.model.text_features(input_ids.to(self.device), mask.to(self.device))
            found |= dict(zip(chunk, features.cpu(), strict=True))
        return found

    def _match(self, pairs: list[tuple[str, str]]) -> Tensor:
        """Log odds of (image, caption) pairs, (N,)."""
        scores = []
        for chunk in _chunks(pairs, self.batch_size):
            examples = [self.text_of[caption][1] for _, caption in chunk]
            batch = self.collate(examples, [self._pixels(group) for group, _ in chunk]).to(self.device)
            pixels = batch.normalized_pixels.squeeze(1)
            scores.append(self.model.match_logits(pixels, batch.input_ids, batch.attention_mask).cpu())
        return torch.cat(scores)


def _over_ranks(compute: Callable[[list[str]], dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """`compute` on this rank's share of the names; the results of all ranks."""
    merged: dict[str, Any] = {}
    topology = Topology.current()
    rank, world_size = topology.data_rank, topology.data_size
    for part in gather_objects(compute(names[rank::world_size])):
        merged |= part
    return merged


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
