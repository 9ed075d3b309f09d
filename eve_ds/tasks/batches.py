"""Batches of examples: images are read and augmented, texts tokenized, both stacked; and the order of training."""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from eve_ds import limits
from eve_ds.config import Config, TaskConfig
from eve_ds.data.captions import CaptionEncoder, check_vocabulary, padded
from eve_ds.data.errors import BadSample, UnusableData
from eve_ds.data.image_decoding import Decoding
from eve_ds.data.masking import sample_rng
from eve_ds.data.pixels import normalized
from eve_ds.data.shared_bytes import SharedBytes
from eve_ds.data.transforms import TrainTransform, channels_first
from eve_ds.data.workers import start_loader
from eve_ds.reading import read_file
from eve_ds.tasks.augment import color_jitter, rand_augment
from eve_ds.tasks.examples import Example, ImageSource, SceneExamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GRAY = 128
"""Pixel value of the images of a blind model."""
MAX_REPLACEMENTS = 100
"""Number of unusable examples in a row at which training stops."""


@dataclass(frozen=True)
class TaskBatch:
    """B examples of I images each."""

    examples: list[Example]
    """Examples without their images in training, where a loader process made the batch."""
    pixel_values: Tensor
    """(B, I, 3, H, W) uint8, or floats that are already normalized."""
    input_ids: Tensor
    """(B, L) int64."""
    attention_mask: Tensor
    """(B, L) bool, True = real token."""
    targets: Tensor | None = None
    """Targets of the task: (B, A) float32 soft scores of answers, (B,) int64 labels, or (B,) int64 image numbers."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of examples that could not be used and were replaced."""
    read_seconds: float = 0.0
    """Time that a loader process took to read the images, by the clock."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def keys(self) -> list[str]:
        """Key of each example."""
        return [example.key for example in self.examples]

    @cached_property
    def normalized_pixels(self) -> Tensor:
        """(B, I, 3, H, W) float32, or the dtype of given floats, with mean = std = 0.5; computed once."""
        return normalized(self.pixel_values)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the batch."""
        return list(self._fields().values())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TaskBatch:
        """The same batch with every tensor on `device`."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._fields().items()}
        return dataclasses.replace(self, **moved)  # type: ignore[arg-type]

    def pin_memory(self) -> TaskBatch:
        """The same batch in page-locked memory, from which copies to a GPU can overlap with computation."""
        pinned = {name: tensor.pin_memory() for name, tensor in self._fields().items()}
        return dataclasses.replace(self, **pinned)  # type: ignore[arg-type]

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a task's model, pixels normalized."""
        return self._fields() | {"pixel_values": self.normalized_pixels}

    def _fields(self) -> dict[str, Tensor]:
        names = ("pixel_values", "input_ids", "attention_mask", "targets")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class ImageReader:
    """Reads the images of an example at the model's size; augments them by (seed, epoch, key) in training.

    Args:
        config: `model.image_size`, `data.crop_scale`, `data.horizontal_flip`, `train.seed`; augmentation in `task`.
        training: whether to augment; otherwise images are only resized.
        decoding: decoder and resampler; None: the fastest that are installed, whatever made the model.
    """

    def __init__(self, config: Config, training: bool, decoding: Decoding | None = None) -> None:
        assert config.task is not None
        data = config.data
        crop_scale, flip = (data.crop_scale, data.horizontal_flip) if training else ((1.0, 1.0), 0.0)
        self._transform = TrainTransform(config.model.image_size, crop_scale, flip, config.train.seed, decoding)
        self._task: TaskConfig | None = config.task if training else None
        self._seed = config.train.seed
        self._blind = config.task.blind

    def __call__(self, example: Example, epoch: int = 0) -> NDArray[np.uint8]:
        """(I, size, size, 3) uint8; raises :class:`BadSample` for an image that is missing or damaged."""
        # A flip can make the question false, or its answer.
        said = " ".join((example.text, *example.answers))
        images = []
        for number, source in enumerate(example.images):
            key = f"{example.key}/{number}"
            image = self._transform(_encoded(source), said, epoch, key)
            images.append(self._augment(image, epoch, key))
        stacked = np.stack(images)
        return np.full_like(stacked, GRAY) if self._blind else stacked

    def _augment(self, image: NDArray[np.uint8], epoch: int, key: str) -> NDArray[np.uint8]:
        task = self._task
        if task is None or not (task.rand_augment_ops or task.color_jitter):
            return image
        rng = sample_rng(self._seed, epoch, f"{key}/augment")
        if task.rand_augment_ops:
            image = rand_augment(image, task.rand_augment_ops, task.rand_augment_magnitude, rng)
        return color_jitter(image, task.color_jitter, rng) if task.color_jitter else image


def _encoded(source: ImageSource) -> bytes | NDArray[np.uint8]:
    if not isinstance(source, Path):
        return source
    try:
        return read_file(source, limits.IMAGE_BYTES)
    except FileNotFoundError:
        raise BadSample("missing image", str(source)) from None
    except OSError as error:
        raise BadSample("unreadable image", f"{source}: {error.strerror}") from None


class TaskCollator:
    """Stacks examples and their images into a :class:`TaskBatch`.

    Args:
        config: texts are cut to `model.text_length`.
        tokenizer: tokenizer of the model.
        targets: computes the targets of examples; None: the batch has none.

    Raises:
        ConfigError: the tokenizer does not fit the model.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerFast,
        targets: Callable[[Sequence[Example]], Tensor] | None = None,
    ) -> None:
        check_vocabulary(tokenizer, config)
        self._model = config.model
        self._texts = CaptionEncoder(tokenizer, config.model.text_length)
        self._targets = targets

    def __call__(
        self, examples: Sequence[Example], images: Sequence[NDArray[np.uint8]], skipped: Counter[str] | None = None
    ) -> TaskBatch:
        """One batch of examples and their (I, H, W, 3) uint8 images."""
        pixels = channels_first([image for of_example in images for image in of_example])
        input_ids, mask = self.encode([example.text for example in examples])
        return TaskBatch(
            examples=list(examples),
            pixel_values=pixels.unflatten(0, (len(images), -1)),
            input_ids=input_ids,
            attention_mask=mask,
            targets=None if self._targets is None else self._targets(examples),
            skipped=skipped or Counter(),
        )

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L) int64 token ids and (B, L) bool mask; see :meth:`ModelConfig.padded_length` for L."""
        rows = [self._texts.encode(text) for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        length = self._model.padded_length(int(lengths.max()))
        return padded(rows, length, self._texts.pad_id), torch.arange(length) < lengths[:, None]


class _Item(NamedTuple):
    example: Example
    images: NDArray[np.uint8]
    skipped: list[str]
    seconds: float


class _Stored:
    """Examples in shared memory: every worker gets all, and a million objects would take it seconds and memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._pickles = SharedBytes(pickle.dumps(example) for example in examples)

    def __len__(self) -> int:
        return len(self._pickles)

    def __getitem__(self, index: int) -> Example:
        example: Example = pickle.loads(self._pickles[index].data)
        return example


class _TrainingExamples(Dataset["_Item | UnusableData"]):
    """Data set whose item (epoch, index) is that example, or the next whose images can be used.

    After MAX_REPLACEMENTS without one, the item is an error, which :func:`training_batches` raises: an exception from a
    worker process would add a traceback to its message.
    """

    def __init__(self, examples: SceneExamples | _Stored, reader: ImageReader) -> None:
        self._examples, self._reader = examples, reader

    def __getitem__(self, place: tuple[int, int]) -> _Item | UnusableData:
        epoch, index = place
        skipped: list[str] = []
        started = time.perf_counter()
        while True:
            example = self._examples[(index + len(skipped)) % len(self._examples)]
            try:
                images = self._reader(example, epoch)
            except BadSample as error:
                skipped.append(error.reason)
                if len(skipped) == MAX_REPLACEMENTS:
                    return UnusableData(
                        f"{MAX_REPLACEMENTS} examples in a row had no usable image, the last error is: {error}; "
                        "check task.train.images"
                    )
                continue
            return _Item(dataclasses.replace(example, images=()), images, skipped, time.perf_counter() - started)


class _Order(Sampler[list[tuple[int, int]]]):
    """Endless batches of one rank: shuffled epochs one after the other, cut into steps, then into ranks.

    The examples of a step depend on the seed and the global batch size, not on the number of ranks.
    """

    def __init__(self, size: int, seed: int, step: int, per_step: int, rank: int, world_size: int, micro: int) -> None:
        self._size, self._seed, self._step, self._per_step = size, seed, step, per_step
        self._rank, self._world_size, self._micro = rank, world_size, micro

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step, epoch, order = self._step, -1, np.empty(0, dtype=np.int64)
        while True:
            for first in range(0, self._per_step, self._micro * self._world_size):
                start = step * self._per_step + first + self._rank * self._micro
                batch = []
                for place in range(start, start + self._micro):
                    if place // self._size != epoch:
                        epoch = place // self._size
                        order = np.random.default_rng([self._seed, epoch]).permutation(self._size)
                    batch.append((epoch, int(order[place % self._size])))
                yield batch
            step += 1


def training_batches(
    examples: Sequence[Example],
    config: Config,
    collate: TaskCollator,
    *,
    step: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    pin_memory: bool = False,
    decoding: Decoding | None = None,
) -> Iterator[TaskBatch]:
    """Endless micro-batches of one rank, beginning with those of optimizer step `step`.

    Args:
        examples: all training examples, equal on every rank.
        config: settings of batch size, seed, images and loader processes.
        collate: makes batches for the model.
        step: number of the first optimizer step.
        rank: number of this rank.
        world_size: number of ranks.
        micro_batch_size: examples per micro-batch.
        pin_memory: whether batches go to page-locked memory, from which copies to a GPU overlap with computation.
        decoding: decoder and resampler of images; None: the fastest that are installed.

    Raises:
        UnusableData: too many unusable examples in a row; raised by the iterator.
    """
    train = config.train
    order = _Order(len(examples), train.seed, step, train.train_batch_size, rank, world_size, micro_batch_size)
    loader = start_loader(
        _TrainingExamples(
            examples if isinstance(examples, SceneExamples) else _Stored(examples),
            ImageReader(config, training=True, decoding=decoding),
        ),
        batch_sampler=order,
        num_workers=config.data.num_workers,
        imports=__name__,
        collate_fn=_Stack(collate),
        pin_memory=pin_memory,
        persistent_workers=config.data.num_workers > 0,
    )
    return map(_usable, loader)


def _usable(batch: TaskBatch | UnusableData) -> TaskBatch:
    if isinstance(batch, UnusableData):
        raise batch
    return batch


class _Stack:
    """Makes a batch of items of the data set, or the error among them.

    A class, because loader processes receive it by pickle.
    """

    def __init__(self, collate: TaskCollator) -> None:
        self._collate = collate

    def __call__(self, found: Sequence[_Item | UnusableData]) -> TaskBatch | UnusableData:
        items: list[_Item] = []
        for item in found:
            if isinstance(item, UnusableData):
                return item
            items.append(item)
        skipped = Counter(reason for item in items for reason in item.skipped)
        batch = self._collate([item.example for item in items], [item.images for item in items], skipped)
        return dataclasses.replace(batch, read_seconds=sum(item.seconds for item in items))


def chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    """Consecutive parts of a sequence, each of `size` items but the last."""
    return (items[start : start + size] for start in range(0, len(items), size))


class Inference(NamedTuple):
    """A model, and what it takes to run it on examples."""

    model: nn.Module
    """The plain model on its device, in evaluation mode."""
    reader: ImageReader
    """Reads images for evaluation."""
    collate: TaskCollator
    batch_size: int
    """Examples, images, captions or pairs per forward; predictions do not depend on it."""

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device


class Read(NamedTuple):
    """A batch to predict, and the examples that could not be read, as (example, reason)."""

    batch: TaskBatch | None
    skipped: list[tuple[Example, str]]


def evaluation_batches(inference: Inference, examples: Sequence[Example]) -> Iterator[Read]:
    """Batches of every example once, in order; a batch is None if none of its examples could be read."""
    for chunk in chunks(examples, inference.batch_size):
        chosen: list[Example] = []
        images: list[NDArray[np.uint8]] = []
        skipped: list[tuple[Example, str]] = []
        for example in chunk:
            try:
                images.append(inference.reader(example))
                chosen.append(example)
            except BadSample as error:
                skipped.append((example, error.reason))
        yield Read(inference.collate(chosen, images) if chosen else None, skipped)
