"""Annotation files to examples: the released code's JSON, VQAv2, NLVR2, NLVR, Karpathy's splits; scenes beside them.

An entry that cannot be meant is an error that names file, entry and rule. An image that is missing or damaged is found
when it is read, and counted there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from eve_ds.config import Config, ConfigError, ExamplesConfig
from eve_ds.data.formats import karpathy, nlvr, nlvr2, released, vqav2
from eve_ds.data.formats.entries import Entry, list_entries
from eve_ds.data.formats.images import first_existing, probe_step, require_some_image
from eve_ds.data.formats.sniff import sniff
from eve_ds.tasks.examples import Example, scene_examples

TASKS_OF = {
    "json": ("vqa", "nlvr", "retrieval"),
    "vqav2": ("vqa",),
    "nlvr2": ("nlvr",),
    "nlvr": ("nlvr",),
    "karpathy": ("retrieval",),
}
"""Format -> tasks it has examples of."""


def load_examples(config: Config, section: Literal["train", "val"]) -> Sequence[Example]:
    """Examples of `config.task.train` or `config.task.val`.

    Raises:
        ConfigError: files that cannot be read or are of another form, an entry against the rules, a key or question id
            twice, or an image folder in which nothing is found.
    """
    assert config.task is not None
    task, source = config.task, getattr(config.task, section)
    if source.format == "scenes":
        if task.name == "nlvr" and task.num_images == 1:
            raise ConfigError("statements about scenes need two images: set task.num_images to 2")
        return scene_examples(task.name, source, section)
    if not source.annotations:
        raise ConfigError(f"task.{section} has no annotations: name files, or take format scenes")
    kind = sniff(source.annotations[0]) if source.format == "auto" else source.format
    if task.name not in TASKS_OF[kind]:
        raise ConfigError(f"{source.annotations[0]} is of format {kind}, which has no examples of task '{task.name}'")
    examples = _read(task.name, kind, source, section)[: source.num_examples]
    if not examples:
        raise ConfigError(f"{source.annotations[0]} holds no example")
    _check(examples, task.num_images if task.name == "nlvr" else 1, source.annotations[0])
    return _unseen(examples, load_examples(config, "train")) if source.unseen_texts and section == "val" else examples


def _unseen(examples: Sequence[Example], known: Sequence[Example]) -> list[Example]:
    """Those whose text none of the known ones has."""
    texts = {example.text for example in known}
    kept = [example for example in examples if example.text not in texts]
    if not kept:
        raise ConfigError("task.val.unseen_texts leaves no example: the texts of all are in task.train too")
    return kept


def _read(task: str, kind: str, source: ExamplesConfig, section: str) -> list[Example]:
    files = source.annotations
    images = source.images or (files[0].parent if files[0].is_file() else files[0])
    split = source.split or section
    if kind == "vqav2":
        return list(_vqav2(files, images))
    if kind == "nlvr":
        return [example for path in files for example in _nlvr(path, source.split)]
    if kind == "karpathy":
        return list(_karpathy(files[0], images, split))
    read = {"nlvr2": _nlvr2, "vqa": _questions, "nlvr": _statements, "retrieval": _captions}
    return list(read["nlvr2" if kind == "nlvr2" else task](list_entries(files), images))


def _questions(entries: Iterable[Entry], images: Path) -> Iterator[Example]:
    """Questions of the released code."""
    for item in map(released.question, entries):
        yield Example(item.question_id, (images / item.image,), item.question, item.question_type, item.answers)


def _statements(entries: Iterable[Entry], images: Path) -> Iterator[Example]:
    """Statements of the released code; a key is the number of the statement."""
    for number, item in enumerate(map(released.statement, entries)):
        paths = tuple(images / name for name in item.images)
        yield Example(str(number), paths, item.sentence, item.sentence, label=item.label)


def _captions(entries: Iterable[Entry], images: Path) -> Iterator[Example]:
    """Captions of the released code; a key is the number of the caption."""
    number = 0
    for item in map(released.captioned_image, entries):
        if not item.captions:
            raise item.entry.error(f"image {item.image} has no caption: give one, or leave the image out")
        group = item.image if item.image_id is None else item.image_id
        for caption in item.captions:
            yield Example(str(number), (images / item.image,), caption, group)
            number += 1


def _nlvr2(entries: Iterable[Entry], images: Path) -> Iterator[Example]:
    """Statements of NLVR2; statements with the same sentence are one group."""
    for item in map(nlvr2.statement, entries):
        paths = tuple(first_existing(images, names) for names in item.images)
        yield Example(item.identifier, paths, item.sentence, item.sentence, label=item.label)


def _vqav2(files: Sequence[Path], images: Path) -> Iterator[Example]:
    """Questions of VQAv2."""
    for item in vqav2.read_questions(files):
        path = first_existing(images, item.images)
        yield Example(item.question_id, (path,), item.question, item.question_type, item.answers)


def _karpathy(path: Path, images: Path, split: str) -> Iterator[Example]:
    """Captions of one of Karpathy's splits; `restval` belongs to `train`; a key is the number of the caption."""
    entries = karpathy.read_entries(path)
    for entry in entries:
        entry.text("split")
    number = 0
    for entry in karpathy.of_splits(entries, karpathy.TRAIN_SPLITS if split == "train" else (split,), path):
        item = karpathy.captioned_image(entry)
        if not item.captions or not all(item.captions):
            raise entry.error(f"image {item.path} has no sentences or an empty one: give one, or leave the image out")
        for caption in item.captions:
            yield Example(str(number), (images / item.path,), caption, item.path)
            number += 1


def _nlvr(path: Path, split: str | None) -> Iterator[Example]:
    """Statements of NLVR 1.0, each about each of its six images; statements with the same sentence are one group."""
    corpus = nlvr.read_corpus(path, split)
    for item in corpus.statements:
        for key in item.image_names:
            image = corpus.images.get(key, Path(f"{key}.png"))  # an image that is missing is found when it is read
            yield Example(key, (image,), item.sentence, item.identifier.partition("-")[0], label=item.label)


def _check(examples: Sequence[Example], num_images: int, where: Path) -> None:
    twice = [key for key, count in Counter(example.key for example in examples).items() if count > 1]
    if twice:
        raise ConfigError(f"{where}: question id or identifier {twice[0]} is there more than once: remove all but one")
    for example in examples:
        if len(example.images) != num_images:
            raise ConfigError(
                f"{where}: example {example.key} has {len(example.images)} images where task.num_images is "
                f"{num_images}: set it, or give the other data"
            )
    _probe(examples, where)


def _probe(examples: Sequence[Example], where: Path) -> None:
    """Raise :class:`SourceError` where no image of a few examples spread over the set exists."""
    chosen = examples[:: probe_step(len(examples))]
    paths = [source for example in chosen for source in example.images if isinstance(source, Path)]
    if len(paths) >= len(chosen):
        require_some_image(paths, where)
