"""The task of judging statements about images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import Config, ConfigError, ExamplesConfig
from eve_ds.data.captions import CaptionEncoder
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.eve import MoEFactory
from eve_ds.model.moe import MoE
from eve_ds.objectives.router import router_losses
from eve_ds.tasks.batches import TaskBatch
from eve_ds.tasks.classification import ClassificationTask, ClassifierOutput
from eve_ds.tasks.examples import Example, SceneExamples, Section
from eve_ds.tasks.features.class_token import Classifier
from eve_ds.tasks.features.words import Template
from eve_ds.tasks.nlvr.agreement import AgreementModel
from eve_ds.tasks.nlvr.examples import SceneStatements, read_nlvr, read_nlvr2, read_released
from eve_ds.tasks.task import Reader, Record, task_section


class NLVR(ClassificationTask):
    """Judgment of statements; class 0 is false, class 1 is true.

    Args:
        config: configuration with `model` and `task`.
        template: hidden caption of the features `words`; None for the features `class_token`.
    """

    name = "nlvr"
    recipe = "tasks/nlvr2"
    scenes_recipe = "tasks/scenes_nlvr"
    readers: ClassVar[Mapping[str, Reader]] = {"json": read_released, "nlvr2": read_nlvr2, "nlvr": read_nlvr}
    answers = ("false", "true")

    def __init__(self, config: Config, template: Template | None = None) -> None:
        super().__init__(config)
        self.template = template

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ConfigError for a hidden caption that is longer than the model's text."""
        task, positions = task_section(config), config.model.text_positions
        if task.features == "words" and task.hidden_words + 2 > positions:
            raise ConfigError(
                f"task.hidden_words ({task.hidden_words}) and two special tokens must not exceed "
                f"model.text_positions ({positions})"
            )

    @classmethod
    def from_examples(cls, config: Config, examples: Sequence[Example]) -> Self:
        """The task, for the features `words` with a hidden caption of `task.hidden_words`; examples are not used."""
        task = task_section(config)
        if task.features == "class_token":
            return cls(config)
        encoder = CaptionEncoder(load_tokenizer(config.data.tokenizer), config.model.text_length)
        return cls(config, Template((task.hidden_words,), encoder.cls_id, encoder.sep_id, encoder.mask_id))

    @classmethod
    def load(cls, config: Config, folder: Path) -> Self:
        """The task with the hidden caption of a saved model; raises ConfigError if it cannot be read."""
        return cls(config) if task_section(config).features == "class_token" else cls(config, Template.load(folder))

    def save(self, folder: Path) -> None:
        """Write the hidden caption, if any."""
        if self.template is not None:
            self.template.save(folder)

    @classmethod
    def num_images(cls, config: Config) -> int:
        """`task.num_images`."""
        return task_section(config).num_images

    @classmethod
    def scene_examples(cls, config: Config, source: ExamplesConfig, section: Section) -> SceneExamples:
        """Statements about pairs of scenes; raises ConfigError if the model judges one image."""
        if cls.num_images(config) == 1:
            raise ConfigError("statements about scenes need two images: set task.num_images to 2")
        return SceneStatements.of(source, section)

    def model(self, moe_cls: MoEFactory = MoE) -> nn.Module:
        """A model with two logits, weights not drawn yet."""
        if self.template is not None:
            return AgreementModel(self.config, moe_cls, self.template)
        return Classifier(self.config, moe_cls, self.num_images(self.config), len(self.answers))

    def draw_head(self, model: nn.Module) -> None:
        """Draw the head of the features `words`; see :meth:`eve_ds.tasks.nlvr.agreement.AgreementHead.draw_weights`."""
        if isinstance(model, AgreementModel):
            model.head.draw_weights()

    def pretrained_names(self) -> dict[str, str]:
        """The text head for the features `words`; the rest of the head only from a model that judged statements."""
        return {} if self.template is None else {"head.text_head.": "text_head.", "head.": "head."}

    def trainable(self, examples: Sequence[Example]) -> Sequence[Example]:
        """All examples; raises ConfigError if one has no label."""
        if not isinstance(examples, SceneExamples):
            unlabeled = [example.key for example in examples if example.label is None]
            if unlabeled:
                raise ConfigError(f"training example {unlabeled[0]} has no label: take a split that publishes them")
        return examples

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """(B,) int64 labels."""
        return torch.tensor([int(bool(example.label)) for example in examples])

    def losses(self, output: ClassifierOutput, batch: TaskBatch) -> dict[str, Tensor]:
        """Cross-entropy, mean over statements."""
        assert batch.targets is not None
        entropy = F.cross_entropy(output.logits.float(), batch.targets)
        return {"nlvr": entropy} | router_losses(output.moe, output.num_tokens)

    def settings(self) -> dict[str, Any]:
        """Number of images of an example."""
        return {"num_images": self.num_images(self.config)}

    def record(self, logits: Tensor) -> Record:
        """The judgment and the probability of `true`."""
        chance = float(self.probabilities(logits)[1])
        return {"answer": chance > 0.5, "true": round(chance, 5)}

    def metrics(self, examples: Sequence[Example], predictions: dict[str, Record]) -> dict[str, Any]:
        """Accuracy, and consistency: the fraction of groups in which every prediction is correct."""
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

    @classmethod
    def check_csv(cls, file: Path) -> None:
        """Accept any file."""

    @classmethod
    def write_csv(cls, predictions: Mapping[str, Mapping[str, Any]], file: Path) -> None:
        """Write the rows `dev-1572-0-0.png,true` that NLVR's `metrics_images.py` reads, one per image.

        Keys must be names of images without suffix, as in the format `nlvr`. Skipped examples are left out; the script
        reports them.
        """
        rows = [f"{key}.png,{str(item['answer']).lower()}" for key, item in predictions.items() if "answer" in item]
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")
