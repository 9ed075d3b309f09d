"""What fine-tuning and evaluation need to know of a task, and which tasks there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from eve_ds.config import Config, ConfigError
from eve_ds.model.eve import MoEFactory
from eve_ds.model.moe import MoE
from eve_ds.tasks.batches import TaskBatch, TaskCollator
from eve_ds.tasks.examples import Example
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.vqa import VQA


class Task(Protocol):
    """A head, a loss, a metric, and how to predict."""

    config: Config

    def save(self, folder: Path) -> None:
        """Write what belongs to the model besides its weights."""

    def model(self, moe_cls: MoEFactory = MoE) -> nn.Module:
        """The model, `backbone` and `head`, with weights not yet drawn."""

    def pretrained_names(self) -> dict[str, str]:
        """Start of a head's tensor names -> how they start in a pre-trained model that has them."""

    def trainable(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Those that the loss can learn from; raises ConfigError where what is to be learnt is not published."""

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """What the loss compares with."""

    def losses(self, output: Any, batch: TaskBatch) -> dict[str, Tensor]:
        """Loss terms of the model's output by name, each () fp32 and a mean over the rank's micro-batch."""

    def settings(self) -> dict[str, Any]:
        """Of an evaluation: what predictions depend on besides model and examples."""

    def queries(self, examples: Sequence[Example]) -> list[str]:
        """Keys of the predictions that an evaluation makes."""

    def predict(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        todo: Sequence[str],
        collate: TaskCollator,
        batch_size: int,
    ) -> Iterator[dict[str, Any]]:
        """JSON-able records with `key`, one for each of `todo`; with `skipped`, a reason, where there is no answer."""

    def metrics(self, examples: Sequence[Example], predictions: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """JSON-able figures of an evaluation."""


_TASKS: dict[str, type[VQA] | type[NLVR] | type[Retrieval]] = {"vqa": VQA, "nlvr": NLVR, "retrieval": Retrieval}


def new_task(config: Config, examples: Sequence[Example]) -> Task:
    """The task of `config.task`, with what it collects from training examples.

    Raises:
        ConfigError: no `task` section, or examples that the task cannot use.
    """
    return _TASKS[_name(config)].from_examples(config, examples)


def saved_task(config: Config, folder: Path) -> Task:
    """The task of a saved model; raises ConfigError if a file of it cannot be read."""
    return _TASKS[_name(config)].load(config, folder)


def _name(config: Config) -> str:
    if config.task is None:
        raise ConfigError("the configuration has no section `task`: it is that of a pre-trained model; fine-tune it")
    return config.task.name
