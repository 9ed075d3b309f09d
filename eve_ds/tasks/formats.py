"""Annotation files to examples: the released code's JSON, VQAv2, NLVR2, NLVR, Karpathy's splits; scenes beside them.

An entry that cannot be meant is an error that names file, entry and rule. An image that is missing or damaged is found
when it is read, and counted there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from eve_ds.config import Config, ConfigError, ExamplesConfig
from eve_ds.data.importers.candidate import SourceError
from eve_ds.data.importers.nlvr import IMAGE_NAME, PERMUTATIONS, annotated_split, archive_members, folder_splits
from eve_ds.tasks.examples import Example, ImageSource, scene_examples

PROBED_IMAGES = 20
"""Images spread over a set of which at least one must exist, or the image folder is taken to be wrong."""
TASKS_OF = {
    "json": ("vqa", "nlvr", "retrieval"),
    "vqav2": ("vqa",),
    "nlvr2": ("nlvr",),
    "nlvr": ("nlvr",),
    "karpathy": ("retrieval",),
}
"""Format -> tasks it has examples of."""
KARPATHY_SPLITS = {"train": ("train", "restval")}
"""Splits that count as one."""


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
    return list(read["nlvr2" if kind == "nlvr2" else task](_entries(files), images))


def sniff(path: Path) -> str:
    """Format of an annotation file, folder or archive; raises ConfigError for none that is known."""
    if path.is_dir() or ".tar" in path.suffixes:
        return "nlvr"
    tree = _read_json(path)
    keys = {"questions": "vqav2", "annotations": "vqav2", "images": "karpathy"}
    if isinstance(tree, dict):
        for key, kind in keys.items():
            if isinstance(tree.get(key), list):
                return kind
    elif tree and isinstance(tree[0], dict):
        return "nlvr2" if "identifier" in tree[0] else "json"
    raise ConfigError(
        f"{path} is in no known form: a list of entries, VQAv2's questions or annotations, JSON lines of NLVR2, "
        "Karpathy's images, or NLVR's folder or archive"
    )


def _read_json(path: Path) -> Any:
    """A JSON document, or the list of those that stand one a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"annotation file {path} cannot be read: {error}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as whole:
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise ConfigError(f"annotation file {path} is not JSON: {whole}") from None


class _Entry:
    """One entry of a file, which knows where it stands."""

    def __init__(self, content: Any, path: Path, number: int) -> None:
        self.content, self.where, self.number = content, f"{path} entry {number}", number
        if not isinstance(content, dict):
            raise self.error("must be an object")

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {problem}")

    def text(self, key: str) -> str:
        """A string, or a number as one."""
        value = self.content.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.error(f"{key} ({value!r}) must be a text")
        return str(value)

    def texts(self, key: str) -> list[str]:
        """One string or a list of them."""
        value = self.content.get(key)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{key} ({value!r}) must be a text or a list of texts")
        return value

    def label(self) -> bool | None:
        """True or false, in any case of letters; None where the file has no labels."""
        value = self.content.get("label")
        known = {"true": True, "false": False}
        if value is None:
            return None
        if str(value).lower() not in known:
            raise self.error(f"label ({value!r}) must be true or false")
        return known[str(value).lower()]


def _entries(files: Iterable[Path]) -> Iterator[_Entry]:
    for path in files:
        tree = _read_json(path)
        if not isinstance(tree, list):
            raise ConfigError(f"{path} must be a list of entries, not an object")
        yield from (_Entry(content, path, number) for number, content in enumerate(tree))


def _questions(entries: Iterable[_Entry], images: Path) -> Iterator[Example]:
    """`[{image, question, question_id, answer}]`; `answer` is a text or one per annotator, absent in a test set."""
    for entry in entries:
        answers = tuple(entry.texts("answer")) if entry.content.get("answer") is not None else ()
        yield Example(
            key=entry.text("question_id"),
            images=(images / entry.text("image"),),
            text=entry.text("question"),
            group=str(entry.content.get("question_type", "")),
            answers=answers,
        )


def _statements(entries: Iterable[_Entry], images: Path) -> Iterator[Example]:
    """`[{images: [left, right], sentence, label}]`."""
    for number, entry in enumerate(entries):
        sentence = entry.text("sentence")
        paths = tuple(images / name for name in entry.texts("images"))
        yield Example(str(number), paths, sentence, sentence, label=entry.label())


def _captions(entries: Iterable[_Entry], images: Path) -> Iterator[Example]:
    """`[{image, caption, image_id}]`, captions of one image in several entries or in a list."""
    number = 0
    for entry in entries:
        image = entry.text("image")
        captions = entry.texts("caption")
        if not captions:
            raise entry.error(f"image {image} has no caption: give one, or leave the image out")
        group = str(entry.content.get("image_id", image))
        for caption in captions:
            yield Example(str(number), (images / image,), caption, group)
            number += 1


def _nlvr2(entries: Iterable[_Entry], images: Path) -> Iterator[Example]:
    """JSON lines of NLVR2; images `SPLIT-SET-PAIR-img0.png`, where needed in the folder that `directory` names."""
    for entry in entries:
        identifier, sentence = entry.text("identifier"), entry.text("sentence")
        stem = identifier.rpartition("-")[0]
        folders = [images / str(entry.content["directory"])] if "directory" in entry.content else []
        names = [f"{stem}-img{side}.png" for side in (0, 1)]
        paths = tuple(_existing([*(folder / name for folder in folders), images / name]) for name in names)
        yield Example(identifier, paths, sentence, sentence, label=entry.label())


def _vqav2(files: Sequence[Path], images: Path) -> Iterator[Example]:
    """VQAv2's questions and, for all but a test set, annotations, in any order of the files."""
    questions: list[tuple[_Entry, str]] = []
    annotations: dict[str, _Entry] = {}
    for path in files:
        tree = _read_json(path)
        subtype = str(tree.get("data_subtype", ""))
        questions += [(_Entry(item, path, i), subtype) for i, item in enumerate(tree.get("questions", []))]
        for entry in (_Entry(item, path, i) for i, item in enumerate(tree.get("annotations", []))):
            annotations[entry.text("question_id")] = entry
    if not questions:
        raise ConfigError(f"{files[0]} holds no questions: give the file of questions beside that of annotations")
    for entry, subtype in questions:
        key = entry.text("question_id")
        annotation = annotations.get(key)
        if annotations and annotation is None:
            raise entry.error(f"question {key} has no annotation: the two files are of different sets")
        name = f"COCO_{subtype}_{int(entry.text('image_id')):012d}.jpg"
        yield Example(
            key=key,
            images=(_existing([images / name, images / subtype / name]),),
            text=entry.text("question"),
            group="" if annotation is None else str(annotation.content.get("question_type", "")),
            answers=() if annotation is None else _annotators(annotation),
        )


def _annotators(annotation: _Entry) -> tuple[str, ...]:
    answers = annotation.content.get("answers")
    if not isinstance(answers, list) or not all(isinstance(item, dict) and "answer" in item for item in answers):
        raise annotation.error("answers must be a list of objects with `answer`")
    return tuple(str(item["answer"]) for item in answers)


def _karpathy(path: Path, images: Path, split: str) -> Iterator[Example]:
    """`{"images": [{filename, filepath, split, sentences: [{raw}]}]}`; `restval` belongs to `train`."""
    tree = _read_json(path)
    wanted = KARPATHY_SPLITS.get(split, (split,))
    number, found = 0, Counter[str]()
    for entry in (_Entry(item, path, i) for i, item in enumerate(tree["images"])):
        found[entry.text("split")] += 1
        if entry.text("split") not in wanted:
            continue
        name = str(PurePosixPath(str(entry.content.get("filepath", ""))) / entry.text("filename"))
        sentences = entry.content.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            raise entry.error(f"image {name} has no sentences: give one, or leave the image out")
        for sentence in sentences:
            yield Example(str(number), (images / name,), _Entry(sentence, path, entry.number).text("raw"), name)
            number += 1
    if not number:
        have = ", ".join(f"{name} ({count})" for name, count in sorted(found.items()))
        raise ConfigError(f"{path} has no image of split {split}; it has: {have}")


def _nlvr(path: Path, split: str | None) -> Iterator[Example]:
    """NLVR 1.0 as published: every example once for each of the six pictures of it."""
    files = _folder_files(path) if path.is_dir() else archive_members(path)
    images: dict[str, ImageSource] = {}
    entries: list[tuple[str, _Entry]] = []
    try:
        for name, content in files:
            if (annotated := annotated_split(name)) is not None and split in (None, annotated):
                lines = (content() if callable(content) else content).splitlines()
                entries += [(annotated, _Entry(json.loads(line), path, i)) for i, line in enumerate(lines)]
            elif (match := IMAGE_NAME.fullmatch(name.name)) and split in (None, match["split"]):
                images[name.stem] = path / name if callable(content) else content
    except (SourceError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as NLVR: {error}") from None
    if not entries:
        raise ConfigError(f"{path} has no SPLIT.json{f' of split {split}' if split else ''}: it is not NLVR's layout")
    for stem, entry in entries:
        identifier = entry.text("identifier")
        for permutation in range(PERMUTATIONS):
            key = f"{stem}-{identifier}-{permutation}"
            image = images.get(key, Path(f"{key}.png"))  # one that is missing is found when it is read
            group = identifier.partition("-")[0]
            yield Example(key, (image,), entry.text("sentence"), group, label=entry.label())


def _folder_files(folder: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    """Annotations and images of a folder's splits, whose bytes are read when they are called for."""
    for sentences, images in folder_splits(folder):
        for path in (sentences, *sorted(images.rglob("*.png"))):
            yield PurePosixPath(path.relative_to(folder)), path.read_bytes


def _existing(candidates: Sequence[Path]) -> Path:
    """The first that exists, otherwise the last, which is found to be missing when it is read."""
    return next((path for path in candidates if path.is_file()), candidates[-1])


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
    """Refuse an image folder under which nothing is found, before an hour has gone into skipping every example."""
    chosen = examples[:: max(1, len(examples) // PROBED_IMAGES)]
    paths = [source for example in chosen for source in example.images if isinstance(source, Path)]
    if paths and len(paths) >= len(chosen) and not any(path.is_file() for path in paths):
        raise ConfigError(
            f"{where}: none of {len(paths)} probed images exists (the first: {paths[0]}): set the folder of the images "
            "with --images"
        )
