"""Tasks whose answer is one of several classes: evaluation of the logits, and answers to a person."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eve_ds.model.moe import MoEOutput
from eve_ds.tasks.batches import Inference, TaskBatch, evaluation_batches
from eve_ds.tasks.examples import Example
from eve_ds.tasks.task import Answer, Record, Task


class ClassifierOutput(NamedTuple):
    """Output of a model that classifies."""

    logits: Tensor
    """(B, classes)."""
    moe: tuple[MoEOutput, ...]
    num_tokens: int
    """Number of tokens that entered the backbone on this rank."""


class Classified(NamedTuple):
    """An example with its logits, or with the reason why it has none."""

    example: Example
    logits: Tensor | None
    """(classes,) fp32 on the host."""
    skipped: str = ""


class ClassificationTask(Task):
    """A task whose model gives one logit per answer."""

    answers: Sequence[str]
    """Names of the classes in the order of the logits."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., classes) -> (..., classes), the probability of each answer."""
        return logits.softmax(dim=-1)

    @abstractmethod
    def record(self, logits: Tensor) -> Record:
        """Prediction without its key, from the (classes,) fp32 logits of one example."""

    def predict(self, inference: Inference, examples: Sequence[Example], todo: Sequence[str]) -> Iterator[Record]:
        """One record for each key of `todo`."""
        wanted = set(todo)
        chosen = [example for example in examples if example.key in wanted]
        for example, logits, reason in classify(inference, chosen):
            answer = {"skipped": reason} if logits is None else self.record(logits)
            yield {"key": example.key} | answer

    def ask(self, model: nn.Module, batch: TaskBatch, top: int) -> list[Answer]:
        """The `top` answers to each text of a batch, best first."""
        scores = self.probabilities(model(**batch.model_inputs()).logits.float())
        found = []
        for example, row in zip(batch.examples, scores, strict=True):
            best = row.topk(min(top, len(self.answers)))
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            found += [Answer(example.text, self.answers[number], score) for score, number in pairs]
        return found


@torch.no_grad()
def classify(inference: Inference, examples: Sequence[Example]) -> Iterator[Classified]:
    """Logits of every example once; within a batch those that could not be read come first."""
    for read in evaluation_batches(inference, examples):
        yield from (Classified(example, None, reason) for example, reason in read.skipped)
        if read.batch is not None:
            batch = read.batch.to(inference.device)
            logits = inference.model(**batch.model_inputs()).logits.float().cpu()
            yield from (Classified(*pair) for pair in zip(read.batch.examples, logits, strict=True))
