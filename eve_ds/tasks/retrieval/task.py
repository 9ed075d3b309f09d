"""The task of image-text retrieval."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eve_ds.config import Config, ConfigError, ExamplesConfig, ModelConfig
from eve_ds.data.captions import CaptionEncoder
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.eve import MoEFactory
from eve_ds.model.moe import MoE
from eve_ds.objectives.contrastive import contrastive_loss, matching_loss
from eve_ds.objectives.router import router_losses
from eve_ds.tasks.batches import Inference, TaskBatch
from eve_ds.tasks.examples import Example, SceneExamples, Section
from eve_ds.tasks.features.words import Template
from eve_ds.tasks.retrieval.examples import SceneCaptions, read_karpathy, read_released
from eve_ds.tasks.retrieval.gallery import IMAGE, RECALL_AT, TEXT, Gallery
from eve_ds.tasks.retrieval.pair_models import PairScorer, RetrievalModel, RetrievalOutput
from eve_ds.tasks.retrieval.word_model import WordRetrievalModel
from eve_ds.tasks.retrieval.zero_shot import MAX_LENGTHS, zero_shot_settings
from eve_ds.tasks.task import Match, Reader, Record, Task, task_section

PROBED_CAPTIONS = 4096
"""Number of captions, spread over the set, that a template is made from."""


class Retrieval(Task):
    """Retrieval of texts by image and of images by text.

    Args:
        config: configuration with `model` and `task`.
        template: hidden captions of the features `words`; None for the features `class_token`.
        centered: see :class:`eve_ds.tasks.retrieval.word_model.WordRetrievalModel`.
    """

    name = "retrieval"
    recipe = "tasks/retrieval_coco"
    scenes_recipe = "tasks/scenes_retrieval"
    readers: ClassVar[Mapping[str, Reader]] = {"json": read_released, "karpathy": read_karpathy}
    searches = True

    def __init__(self, config: Config, template: Template | None = None, centered: bool = False) -> None:
        super().__init__(config)
        self.template, self.centered = template, centered

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ConfigError for re-ranking without a matching loss, or features of words with one."""
        task = task_section(config)
        if task.features == "words" and task.itm_weight > 0:
            raise ConfigError(
                f"task.features ('words') has no matching loss: set task.itm_weight ({task.itm_weight:g}) to 0"
            )
        if task.features == "class_token" and task.itm_weight == 0 and task.rerank > 0:
            raise ConfigError(
                f"task.rerank ({task.rerank}) needs image-text matching: set it to 0, or task.itm_weight "
                f"({task.itm_weight:g}) above 0"
            )

    @classmethod
    def from_examples(cls, config: Config, examples: Sequence[Example]) -> Self:
        """The task, for the features `words` with a template as long as the longest of some captions."""
        if task_section(config).features == "class_token":
            return cls(config)
        encoder = CaptionEncoder(load_tokenizer(config.data.tokenizer), config.model.text_length)
        step = max(1, len(examples) // PROBED_CAPTIONS)
        captions = (examples[number].text for number in range(0, len(examples), step))
        return cls(config, Template.of(captions, encoder, most=1))

    @classmethod
    def load(cls, config: Config, folder: Path) -> Self:
        """The task with the template of a saved model; raises ConfigError if it cannot be read."""
        return cls(config) if task_section(config).features == "class_token" else cls(config, Template.load(folder))

    def save(self, folder: Path) -> None:
        """Write the template, if any."""
        if self.template is not None:
            self.template.save(folder)

    @classmethod
    def zero_shot_settings(cls, model: ModelConfig, features: str | None, rerank: int) -> list[str]:
        """Overrides of the configuration by what pre-training taught.

        Raises:
            ConfigError: pre-training taught no features to compare, not `features`, or no matching for `rerank`.
        """
        return zero_shot_settings(model, features, rerank)

    @classmethod
    def zero_shot(cls, config: Config, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> Self:
        """The task with centered features; for the features `words` with a template of the examples' captions."""
        template = None
        if task_section(config).features == "words":
            encoder = CaptionEncoder(tokenizer, config.model.text_length)
            template = Template.of((example.text for example in examples), encoder, MAX_LENGTHS)
        return cls(config, template, centered=True)

    @classmethod
    def scene_examples(cls, config: Config, source: ExamplesConfig, section: Section) -> SceneExamples:
        """Generated scenes with their captions."""
        return SceneCaptions.of(source, section)

    def model(self, moe_cls: MoEFactory = MoE) -> nn.Module:
        """A :class:`PairScorer`, weights not drawn yet."""
        if self.template is not None:
            return WordRetrievalModel(self.config, moe_cls, self.template, self.centered)
        return RetrievalModel(self.config, moe_cls)

    def pretrained_names(self) -> dict[str, str]:
        """Heads of the objectives that teach the features."""
        if self.template is not None:
            return {"head.text_head.": "text_head."}
        return {
            "head.image_projection.": "matching.image_projection.",
            "head.text_projection.": "matching.text_projection.",
            "head.log_temperature": "matching.log_temperature",
            "head.matching.": "matching.classifier.",
        }

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """(B,) int64, equal for captions of the same image."""
        digests = (hashlib.blake2b(example.group.encode(), digest_size=8).digest() for example in examples)
        return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])

    def losses(self, output: RetrievalOutput, batch: TaskBatch) -> dict[str, Tensor]:
        """ITC, the mean over both directions, and ITM over true and drawn pairs."""
        terms = {"itc": contrastive_loss(output.image_logits, output.text_logits, output.same)}
        if output.matching_logits is not None and output.matching_labels is not None:
            terms["itm"] = matching_loss(output.matching_logits.float(), output.matching_labels)
        return terms | router_losses(output.moe, output.num_tokens)

    def term_weights(self) -> dict[str, float]:
        """`task.itc_weight` and `task.itm_weight`."""
        return {"itc": self.section.itc_weight, "itm": self.section.itm_weight}

    def settings(self) -> dict[str, Any]:
        """Number of re-ranked candidates."""
        return {"rerank": self.section.rerank}

    def queries(self, examples: Sequence[Example]) -> list[str]:
        """One query by each image, then one by each caption."""
        groups = dict.fromkeys(example.group for example in examples)
        return [*(IMAGE + group for group in groups), *(TEXT + example.key for example in examples)]

    @torch.no_grad()
    def predict(self, inference: Inference, examples: Sequence[Example], todo: Sequence[str]) -> Iterator[Record]:
        """One record for each key of `todo`: the best candidates by dot product, and after re-ranking.

        A collective, as the ranks share the computation of features. Decoded images are kept in memory for re-ranking.
        """
        gallery = Gallery(inference, examples)
        for key in todo:
            yield {"key": key} | gallery.search(key, self.section.rerank)

    def metrics(self, examples: Sequence[Example], predictions: dict[str, Record]) -> dict[str, Any]:
        """R@1, 5 and 10 in both directions, by dot product and after re-ranking.

        In `text_retrieval`, the query is an image and any caption of that image is right.
        """
        image_of = {example.key: example.group for example in examples}
        orders = ("dot", "reranked") if self.section.rerank else ("dot",)
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

    def rank(self, model: nn.Module, batch: TaskBatch) -> list[Match]:
        """Captions of one image, best first: by match if the model was trained for it, otherwise by similarity."""
        scorer = cast(PairScorer, model)
        pixels = batch.normalized_pixels.squeeze(1)
        similarity = scorer.text_features(batch.input_ids, batch.attention_mask) @ scorer.image_features(pixels[:1])[0]
        match: list[float | None] = [None] * len(batch)
        if scorer.matching:
            match = list(scorer.match_logits(pixels, batch.input_ids, batch.attention_mask).sigmoid().tolist())
        captions = [example.text for example in batch.examples]
        found = [Match(*item) for item in zip(captions, similarity.tolist(), match, strict=True)]
        return sorted(found, key=lambda item: item.similarity if item.match is None else item.match, reverse=True)


def _hits(key: str, candidates: Sequence[str], image_of: dict[str, str]) -> list[bool]:
    """Return for each candidate whether it is right for the query."""
    if key.startswith(IMAGE):
        return [image_of[candidate] == key.removeprefix(IMAGE) for candidate in candidates]
    return [candidate == image_of[key.removeprefix(TEXT)] for candidate in candidates]
