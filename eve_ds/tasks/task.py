"""Interface of a downstream task for fine-tuning, evaluation and the commands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eve_ds.config import Config, ConfigError, ExamplesConfig, ModelConfig, TaskConfig
from eve_ds.model.eve import MoEFactory
from eve_ds.model.moe import MoE
from eve_ds.tasks.batches import Inference, TaskBatch
from eve_ds.tasks.examples import Example, SceneExamples, Section

Record = dict[str, Any]
"""Prediction as JSON types, with `key`; if it has no answer, with a reason in `skipped`."""


class Published(NamedTuple):
    """Published files that examples are read from."""

    files: Sequence[Path]
    images: Path
    """Folder that image names are relative to."""
    section: Section
    split: str | None
    """Name of the split in files that hold several; None: all of them, or the one of the section's name."""


Reader = Callable[[Published], Iterable[Example]]


class Answer(NamedTuple):
    """One answer to a question about an image, or one judgment of a statement."""

    question: str
    answer: str
    score: float
    """Probability of the answer."""


class Match(NamedTuple):
    """One caption with scores of its fit to an image."""

    caption: str
    similarity: float
    """Cosine of the two features; for a model of words the log-likelihood of the caption's words, all hidden."""
    match: float | None
    """Probability that image and caption belong together; None for a model that was trained without matching."""


def no_scenes(task: str) -> ConfigError:
    """Error for a task without generated examples whose examples were to be generated."""
    return ConfigError(f"task '{task}' has no generated examples: name annotation files with --data")


class Task(ABC):
    """Base class of a task: head, loss, metric and predictions; a subclass replaces the defaults that do not suit it.

    Args:
        config: configuration with the sections `model` and `task`.
    """

    name: ClassVar[str]
    """`task.name` of the configuration, and by default the name of the only loss term."""
    recipe: ClassVar[str]
    """Preset for data from files."""
    scenes_recipe: ClassVar[str | None] = None
    """Preset for generated scenes; None for a task that has none."""
    readers: ClassVar[Mapping[str, Reader]] = {}
    """Published format (:mod:`eve_ds.data.formats`) -> reader of its examples for this task."""
    searches: ClassVar[bool] = False
    """Whether a prediction depends on the other examples, so that one more usable image changes all of them."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def section(self) -> TaskConfig:
        """Section `task` of the configuration."""
        return task_section(self.config)

    # --- how the task is made -----------------------------------------------------------------------------------------

    @classmethod  # noqa: B027, most tasks have no rules of their own
    def check(cls, config: Config) -> None:
        """Raise ConfigError for settings that contradict each other in this task; by default any are accepted."""

    @classmethod
    def from_examples(cls, config: Config, examples: Sequence[Example]) -> Self:
        """The task with the state that it collects from training examples; by default it collects nothing.

        Raises:
            ConfigError: the task cannot be learned from the examples.
        """
        return cls(config)

    @classmethod
    def load(cls, config: Config, folder: Path) -> Self:
        """The task of a saved model, with the files that :meth:`save` wrote; raises ConfigError if one is damaged."""
        return cls(config)

    def save(self, folder: Path) -> None:  # noqa: B027, most tasks have no state
        """Write the state of the task that belongs to the model besides its weights; by default nothing."""

    @classmethod
    def zero_shot_settings(cls, model: ModelConfig, features: str | None, rerank: int) -> list[str]:
        """Overrides of the configuration with which a pre-trained model does the task without fine-tuning.

        Args:
            model: configuration of the pre-trained model.
            features: `task.features` from the command line; None: the best that pre-training taught.
            rerank: candidates of a query that the model scores again pair by pair.

        Raises:
            ConfigError: the model was not pre-trained for this task; the default always raises.
        """
        raise ConfigError(f"task '{cls.name}' needs a new head: fine-tune the model first")

    @classmethod
    def zero_shot(cls, config: Config, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> Self:
        """The task of a pre-trained model under the settings of :meth:`zero_shot_settings`."""
        return cls(config)

    # --- examples -----------------------------------------------------------------------------------------------------

    @classmethod
    def num_images(cls, config: Config) -> int:
        """Number of images of each example."""
        return 1

    @classmethod
    def scene_examples(cls, config: Config, source: ExamplesConfig, section: Section) -> SceneExamples:
        """Generated examples; raises ConfigError for a task that has none, or an unknown split."""
        raise no_scenes(cls.name)

    def trainable(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Examples that the loss can learn from, by default all.

        Raises:
            ConfigError: the examples lack the published answers that the loss needs.
        """
        return examples

    @abstractmethod
    def targets(self, examples: Sequence[Example]) -> Tensor:
        """Tensor of B rows that the loss compares the model's output with."""

    # --- model and loss -----------------------------------------------------------------------------------------------

    @abstractmethod
    def model(self, moe_cls: MoEFactory = MoE) -> nn.Module:
        """The model with the parts `backbone` and `head`, weights not drawn yet."""

    def draw_head(self, model: nn.Module) -> None:  # noqa: B027, most heads are drawn like the backbone
        """Draw weights of the head for which the distribution of the backbone is unsuitable; by default none.

        Draws from torch's default generator.
        """

    def pretrained_names(self) -> dict[str, str]:
        """Prefix of tensor names of the head -> their prefix in a pre-trained model; by default the head is new."""
        return {}

    @abstractmethod
    def losses(self, output: Any, batch: TaskBatch) -> dict[str, Tensor]:
        """Loss terms by name, each () fp32 and a mean over the rank's micro-batch."""

    def term_weights(self) -> dict[str, float]:
        """Weights of the task's own loss terms; by default one term with the name of the task and weight 1."""
        return {self.name: 1.0}

    def loss_weights(self) -> dict[str, float]:
        """Weights of all loss terms, those of the routers included."""
        loss = self.config.loss
        return {
            **self.term_weights(),
            "load_balancing": loss.load_balancing_weight,
            "router_z": loss.router_z_weight,
        }

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Settings, as JSON types, that predictions depend on besides model and examples; by default none."""
        return {}

    def queries(self, examples: Sequence[Example]) -> list[str]:
        """Keys of the predictions of an evaluation, by default those of the examples."""
        return [example.key for example in examples]

    @abstractmethod
    def predict(self, inference: Inference, examples: Sequence[Example], todo: Sequence[str]) -> Iterator[Record]:
        """One record for each key of `todo`.

        Args:
            inference: the model of this task, and how to run it.
            examples: all examples, equal on every rank.
            todo: keys, among :meth:`queries`, that this rank predicts.
        """

    @abstractmethod
    def metrics(self, examples: Sequence[Example], predictions: dict[str, Record]) -> dict[str, Any]:
        """Compute the metrics of an evaluation, as JSON types."""

    @classmethod
    def check_csv(cls, file: Path) -> None:
        """Raise ConfigError if the data set has no scoring script whose CSV :meth:`write_csv` writes; the default."""
        raise ConfigError(f"--csv {file}: task '{cls.name}' has no published form of predictions: leave --csv out")

    @classmethod
    def write_csv(cls, predictions: Mapping[str, Mapping[str, Any]], file: Path) -> None:
        """Write predictions in the form that the data set's own scoring script reads; see :meth:`check_csv`."""
        cls.check_csv(file)


@runtime_checkable
class AnswersQuestions(Protocol):
    """A task whose models serve `evaluate.py ask`."""

    def ask(self, model: nn.Module, batch: TaskBatch, top: int) -> list[Answer]:
        """The `top` answers to each text of a batch, best first."""


@runtime_checkable
class RanksCaptions(Protocol):
    """A task whose models serve `evaluate.py rank`."""

    def rank(self, model: nn.Module, batch: TaskBatch) -> list[Match]:
        """Texts of a batch of one repeated image, best first."""


def task_section(config: Config) -> TaskConfig:
    """Section `task` of a configuration; raises ConfigError without one."""
    if config.task is None:
        raise ConfigError("the configuration has no section `task`: it is that of a pre-trained model; fine-tune it")
    return config.task
