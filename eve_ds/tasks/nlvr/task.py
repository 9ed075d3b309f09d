"""Statements about two images (NLVR2) or one (NLVR): true or false; accuracy and consistency."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import Config, ConfigError
from eve_ds.data.captions import CaptionEncoder
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.eve import MoEFactory
from eve_ds.model.moe import MoE
from eve_ds.objectives.router import router_losses
from eve_ds.tasks.agreement import AgreementModel
from eve_ds.tasks.batches import ImageReader, TaskBatch, TaskCollator
from eve_ds.tasks.encoder import Classifier, ClassifierOutput, classify
from eve_ds.tasks.examples import Example, SceneExamples
from eve_ds.tasks.words import Template


class NLVR:
    """The task; class 1 is `true`.

    Args:
        config: with `model` and `task`.
        template: of the hidden caption, where statements are compared with the words that an image lets expect.
    """

    def __init__(self, config: Config, template: Template | None = None) -> None:
        assert config.task is not None
        self.config, self.num_images, self.template = config, config.task.num_images, template

    @classmethod
    def from_examples(cls, config: Config, examples: Sequence[Example]) -> NLVR:
        """Nothing is collected from them; the hidden caption of `task.features: words` is that of the tokenizer."""
        assert config.task is not None
        if config.task.features == "class_token":
            return cls(config)
        encoder = CaptionEncoder(load_tokenizer(config.data.tokenizer), config.model.text_length)
        return cls(config, Template((config.task.hidden_words,), encoder.cls_id, encoder.sep_id, encoder.mask_id))

    @classmethod
    def load(cls, config: Config, folder: Path) -> NLVR:
        """With the hidden caption of a saved model; raises ConfigError if it cannot be read."""
        assert config.task is not None
        return cls(config) if config.task.features == "class_token" else cls(config, Template.load(folder))

    def save(self, folder: Path) -> None:
        """Write the hidden caption, if there is one."""
        if self.template is not None:
            self.template.save(folder)

    def model(self, moe_cls: MoEFactory = MoE) -> nn.Module:
        """A model with two logits, false and true, with weights not yet drawn."""
        if self.template is not None:
            return AgreementModel(self.config, moe_cls, self.template)
        return Classifier(self.config, moe_cls, self.num_images, 2)

    def pretrained_names(self) -> dict[str, str]:
        """The text head, where words are asked for; the rest is new unless the model has judged statements before."""
        return {} if self.template is None else {"head.text_head.": "text_head.", "head.": "head."}

    def trainable(self, examples: Sequence[Example]) -> Sequence[Example]:
        """All; raises ConfigError where one has no label."""
        if not isinstance(examples, SceneExamples):
            unlabelled = [example.key for example in examples if example.label is None]
            if unlabelled:
                raise ConfigError(f"training example {unlabelled[0]} has no label: take a split that publishes them")
        return examples

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """(B,) int64 labels."""
        return torch.tensor([int(bool(example.label)) for example in examples])

    def losses(self, output: ClassifierOutput, batch: TaskBatch) -> dict[str, Tensor]:
        """Cross-entropy."""
        assert batch.targets is not None
        entropy = F.cross_entropy(output.logits.float(), batch.targets)
        return {"nlvr": entropy} | router_losses(output.moe, output.num_tokens)

    def settings(self) -> dict[str, Any]:
        """What predictions depend on besides model and examples."""
        return {"num_images": self.num_images}

    def queries(self, examples: Sequence[Example]) -> list[str]:
        """Keys of the predictions that an evaluation makes."""
        return [example.key for example in examples]

    def predict(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        todo: Sequence[str],
        collate: TaskCollator,
        batch_size: int,
    ) -> Iterator[dict[str, Any]]:
        """A record for each key of `todo`: the answer and the probability of `true`."""
        wanted = set(todo)
        chosen = [example for example in examples if example.key in wanted]
        reader = ImageReader(self.config, training=False)
        for example, logits, reason in classify(model, chosen, reader, collate, batch_size):
            if logits is None:
                yield {"key": example.key, "skipped": reason}
            else:
                chance = float(logits.softmax(dim=0)[1])
                yield {"key": example.key, "answer": chance > 0.5, "true": round(chance, 5)}

    def metrics(self, examples: Sequence[Example], predictions: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Accuracy, and consistency: the share of groups of which every example is right."""
        right: dict[str, list[bool]] = defaultdict(list)
        for example in examples:
            answer = predictions[example.key].get("answer")
            if answer is not None and example.label is not None:
                right[example.group].append(answer == example.label)
        everything = [value for group in right.values() for value in group]
        if not everything:
            return {"accuracy": None, "consistency": None, "num_examples": 0}
        return {
            "accuracy": sum(everything) / len(everything),
            "consistency": sum(all(group) for group in right.values()) / len(right),
            "num_examples": len(everything),
        }


def write_published_csv(predictions: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """`dev-1572-0-0.png,true`, one row per image: what NLVR's `metrics_images.py` reads.

    Its keys are the names of images without the suffix, as :mod:`eve_ds.tasks.formats` has them. Examples that were
    skipped are left out, which the script then complains about.
    """
    rows = [f"{key}.png,{str(item['answer']).lower()}" for key, item in predictions.items() if "answer" in item]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
