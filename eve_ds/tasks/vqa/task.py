"""Visual question answering: one of a vocabulary of answers, soft targets, official accuracy by question type."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import Config, ConfigError
from eve_ds.distributed import get_logger
from eve_ds.model.eve import MoEFactory
from eve_ds.model.moe import MoE
from eve_ds.objectives.router import router_losses
from eve_ds.tasks.batches import ImageReader, TaskBatch, TaskCollator
from eve_ds.tasks.encoder import Classifier, ClassifierOutput, classify
from eve_ds.tasks.examples import Example, SceneExamples, all_scene_answers
from eve_ds.tasks.vqa_metric import normalize_answer, soft_targets, vqa_accuracy

ANSWERS = "answers.json"


class VQA:
    """The task with its vocabulary.

    Args:
        config: with `model` and `task`.
        answers: vocabulary in the order of the logits, normalised.
    """

    def __init__(self, config: Config, answers: list[str]) -> None:
        assert config.task is not None
        self.config, self.answers = config, answers
        self.softmax = config.task.answer_loss == "softmax"
        self._ids = {answer: number for number, answer in enumerate(answers)}

    @classmethod
    def from_examples(cls, config: Config, examples: Sequence[Example]) -> VQA:
        """Collect the vocabulary; raises ConfigError if no answer is frequent enough."""
        assert config.task is not None
        return cls(config, build_vocabulary(examples, config.task.min_answer_count))

    @classmethod
    def load(cls, config: Config, folder: Path) -> VQA:
        """With the vocabulary of a saved model; raises ConfigError if it cannot be read."""
        return cls(config, read_vocabulary(folder / ANSWERS))

    def save(self, folder: Path) -> None:
        """Write the vocabulary."""
        (folder / ANSWERS).write_text(json.dumps(self.answers, indent=0, ensure_ascii=False), encoding="utf-8")

    def model(self, moe_cls: MoEFactory = MoE) -> nn.Module:
        """A model whose logits are the answers, with weights not yet drawn."""
        return Classifier(self.config, moe_cls, 1, len(self.answers))

    def pretrained_names(self) -> dict[str, str]:
        """None: the head is new."""
        return {}

    def trainable(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Questions of which some answer is in the vocabulary; raises ConfigError for a set without answers."""
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
        """(B, A) float32 soft scores; answers outside the vocabulary have no place in them."""
        scores = torch.zeros(len(examples), len(self.answers))
        for row, example in enumerate(examples):
            for answer, score in soft_targets(example.answers).items():
                if answer in self._ids:
                    scores[row, self._ids[answer]] = score
        return scores

    def losses(self, output: ClassifierOutput, batch: TaskBatch) -> dict[str, Tensor]:
        """Cross-entropy summed over answers, a mean over questions: binary (official: mean times 3128), or softmax."""
        assert batch.targets is not None
        logits = output.logits.float()
        if self.softmax:
            entropy = -(batch.targets * logits.log_softmax(dim=1)).sum()
        else:
            entropy = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="sum")
        return {"vqa": entropy / len(batch)} | router_losses(output.moe, output.num_tokens)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., A) -> (..., A): of each answer, by the loss that taught them."""
        return logits.softmax(dim=-1) if self.softmax else logits.sigmoid()

    def settings(self) -> dict[str, Any]:
        """What predictions depend on besides model and examples."""
        return {"answers": len(self.answers)}

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
        """A record for each key of `todo`: the answer and its probability."""
        wanted = set(todo)
        chosen = [example for example in examples if example.key in wanted]
        reader = ImageReader(self.config, training=False)
        for example, logits, reason in classify(model, chosen, reader, collate, batch_size):
            if logits is None:
                yield {"key": example.key, "skipped": reason}
            else:
                best = int(logits.argmax())
                score = round(float(self.probabilities(logits)[best]), 5)
                yield {"key": example.key, "answer": self.answers[best], "score": score}

    def metrics(self, examples: Sequence[Example], predictions: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Official accuracy, plain accuracy by type of question, and the share of answers in the vocabulary."""
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


def build_vocabulary(examples: Sequence[Example], min_count: int) -> list[str]:
    """Normalised answers that at least `min_count` annotators gave, the most frequent first; all those of scenes.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(examples, SceneExamples):
        return sorted({normalize_answer(answer) for answer in all_scene_answers(examples)})
    counts = Counter(normalize_answer(answer) for example in examples for answer in example.answers)
    frequent = sorted((answer for answer, count in counts.items() if count >= min_count), key=lambda a: (-counts[a], a))
    if not frequent:
        raise ConfigError(
            f"none of the {len(counts)} answers was given task.min_answer_count ({min_count}) times: lower it"
        )
    return frequent


def read_vocabulary(file: Path) -> list[str]:
    """A JSON list of strings; raises ConfigError for anything else, and for an answer that is there twice."""
    try:
        answers = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"answer vocabulary {file} cannot be read: {error}") from None
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ConfigError(f"answer vocabulary {file} must be a JSON list of strings")
    twice = [answer for answer, count in Counter(answers).items() if count > 1]
    if twice:
        raise ConfigError(f"answer vocabulary {file} holds '{twice[0]}' twice: remove one")
    return answers


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
