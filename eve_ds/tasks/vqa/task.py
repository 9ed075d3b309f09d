"""The task of visual question answering."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import Config, ConfigError, ExamplesConfig
from eve_ds.log import get_logger
from eve_ds.model.eve import MoEFactory
from eve_ds.model.moe import MoE
from eve_ds.objectives.router import router_losses
from eve_ds.tasks.batches import TaskBatch
from eve_ds.tasks.classification import ClassificationTask, ClassifierOutput
from eve_ds.tasks.examples import Example, SceneExamples, Section
from eve_ds.tasks.features.class_token import Classifier
from eve_ds.tasks.task import Reader, Record, task_section
from eve_ds.tasks.vqa.answer_accuracy import soft_targets, vqa_accuracy
from eve_ds.tasks.vqa.examples import SceneQuestions, read_released, read_vqav2
from eve_ds.tasks.vqa.vocabulary import build_vocabulary, read_vocabulary, write_vocabulary


class VQA(ClassificationTask):
    """Visual question answering with a fixed vocabulary.

    Args:
        config: configuration with `model` and `task`.
        answers: normalized vocabulary in the order of the logits.
    """

    name = "vqa"
    recipe = "tasks/vqa"
    scenes_recipe = "tasks/scenes_vqa"
    readers: ClassVar[Mapping[str, Reader]] = {"json": read_released, "vqav2": read_vqav2}

    def __init__(self, config: Config, answers: list[str]) -> None:
        super().__init__(config)
        self.answers = answers
        self.softmax = self.section.answer_loss == "softmax"
        self._ids = {answer: number for number, answer in enumerate(answers)}

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ConfigError for features of masked words."""
        if task_section(config).features != "class_token":
            raise ConfigError("task.features ('words') is for the tasks nlvr and retrieval: leave it out")

    @classmethod
    def from_examples(cls, config: Config, examples: Sequence[Example]) -> Self:
        """Collect the vocabulary; raises ConfigError if no answer is frequent enough."""
        return cls(config, build_vocabulary(examples, task_section(config).min_answer_count))

    @classmethod
    def load(cls, config: Config, folder: Path) -> Self:
        """The task with the vocabulary of a saved model; raises ConfigError if it cannot be read."""
        return cls(config, read_vocabulary(folder))

    def save(self, folder: Path) -> None:
        """Write the vocabulary."""
        write_vocabulary(self.answers, folder)

    @classmethod
    def scene_examples(cls, config: Config, source: ExamplesConfig, section: Section) -> SceneExamples:
        """Questions about generated scenes."""
        return SceneQuestions.of(source, section)

    def model(self, moe_cls: MoEFactory = MoE) -> nn.Module:
        """A model with one logit per answer, weights not drawn yet."""
        return Classifier(self.config, moe_cls, 1, len(self.answers))

    def trainable(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Questions with an answer in the vocabulary; raises ConfigError for a set without answers."""
        if isinstance(examples, SceneExamples):
            return examples
        if not any(example.answers for example in examples):
            raise ConfigError("the training questions have no answers: give VQAv2's file of annotations beside them")
        kept = [example for example in examples if any(answer in self._ids for answer in soft_targets(example.answers))]
        if len(kept) < len(examples):
            get_logger().info(
                "%d of %d training questions have no answer in the vocabulary of %d and are left out",
                len(examples) - len(kept),
                len(examples),
                len(self.answers),
            )
        return kept

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """(B, A) float32 soft scores; answers outside the vocabulary are left out."""
        scores = torch.zeros(len(examples), len(self.answers))
        for row, example in enumerate(examples):
            for answer, score in soft_targets(example.answers).items():
                if answer in self._ids:
                    scores[row, self._ids[answer]] = score
        return scores

    def losses(self, output: ClassifierOutput, batch: TaskBatch) -> dict[str, Tensor]:
        """Cross-entropy summed over answers, mean over questions: binary (official: mean times 3128), or softmax."""
        assert batch.targets is not None
        logits = output.logits.float()
        if self.softmax:
            entropy = -(batch.targets * logits.log_softmax(dim=1)).sum()
        else:
            entropy = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="sum")
        return {"vqa": entropy / len(batch)} | router_losses(output.moe, output.num_tokens)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., A) -> (..., A), the probability of each answer under the training loss."""
        return super().probabilities(logits) if self.softmax else logits.sigmoid()

    def settings(self) -> dict[str, Any]:
        """Size of the vocabulary."""
        return {"answers": len(self.answers)}

    def record(self, logits: Tensor) -> Record:
        """The best answer and its probability."""
        best = int(logits.argmax())
        return {"answer": self.answers[best], "score": round(float(self.probabilities(logits)[best]), 5)}

    def metrics(self, examples: Sequence[Example], predictions: dict[str, Record]) -> dict[str, Any]:
        """Official accuracy, the same by type of question, and the share of questions answerable by the vocabulary."""
        scores: dict[str, list[float]] = defaultdict(list)
        reachable: list[float] = []
        for example in examples:
            answer = predictions[example.key].get("answer")
            if answer is None or not example.answers:
                continue
            scores[example.group].append(vqa_accuracy(answer, example.answers))
            targets = soft_targets(example.answers)
            reachable.append(float(any(known in self._ids for known in targets)))
        everything = [score for kind in scores.values() for score in kind]
        return {
            "accuracy": _mean(everything),
            "by_type": {kind: _mean(scores[kind]) for kind in sorted(scores) if kind},
            "answerable": _mean(reachable),
            "num_examples": len(everything),
        }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
