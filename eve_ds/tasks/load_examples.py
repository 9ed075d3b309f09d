"""Examples of a section of the configuration: generated, or read from published files by the readers of the task.

An entry against the rules is an error that names file, entry and rule. An image that is missing or damaged is found
when it is read, and counted there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eve_ds.config import Config, ConfigError, ExamplesConfig
from eve_ds.data.formats.images import require_some_image, spread
from eve_ds.data.formats.sniff import sniff
from eve_ds.printable import excerpt
from eve_ds.tasks.examples import Example, Section
from eve_ds.tasks.registry import task_class
from eve_ds.tasks.task import Published, Task, task_section


def load_examples(config: Config, section: Section) -> Sequence[Example]:
    """Examples of `config.task.train` or `config.task.val`.

    Raises:
        ConfigError: files that cannot be read or are of another form, an entry against the rules, a key or question id
            twice, or an image folder in which nothing is found.
    """
    task, source = task_class(config), getattr(task_section(config), section)
    if source.format == "scenes":
        return task.scene_examples(config, source, section)
    examples = _read(task, source, section)
    _check(examples, task.num_images(config), source.annotations[0])
    return _unseen(examples, load_examples(config, "train")) if source.unseen_texts and section == "val" else examples


def _read(task: type[Task], source: ExamplesConfig, section: Section) -> list[Example]:
    """Examples of published files; raises ConfigError without files, or for files that the task cannot read."""
    if not source.annotations:
        raise ConfigError(f"task.{section} has no annotations: name files, or take format scenes")
    first = source.annotations[0]
    name = sniff(first) if source.format == "auto" else source.format
    if name not in task.readers:
        raise ConfigError(
            f"{first} is of format {name}, which has no examples of task '{task.name}': give data of format "
            f"{' or '.join(task.readers)}"
        )
    images = source.images or (first.parent if first.is_file() else first)
    examples = list(task.readers[name](Published(source.annotations, images, section, source.split)))
    if not examples:
        raise ConfigError(f"{first} holds no example")
    return examples[: source.num_examples]


def _unseen(examples: Sequence[Example], known: Sequence[Example]) -> list[Example]:
    """Return examples whose text no known example has; raises ConfigError if none is left."""
    texts = {example.text for example in known}
    kept = [example for example in examples if example.text not in texts]
    if not kept:
        raise ConfigError("task.val.unseen_texts leaves no example: the texts of all are in task.train too")
    return kept


def _require_text(example: Example, where: Path) -> None:
    """Raise ConfigError for a text with half a character, as JSON can write it, which no tokenizer takes."""
    for text in (example.key, example.text, example.group, *example.answers):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{where}: example {example.key} has a text that is no Unicode ({excerpt(ascii(text))}): repair it, or "
                "leave the example out"
            ) from None


def _check(examples: Sequence[Example], num_images: int, where: Path) -> None:
    """Raise ConfigError for a key that occurs twice, a wrong number of images, half a character, or no image at all."""
    twice = [key for key, count in Counter(example.key for example in examples).items() if count > 1]
    if twice:
        raise ConfigError(f"{where}: question id or identifier {twice[0]} occurs more than once: remove all but one")
    for example in examples:
        _require_text(example, where)
        if len(example.images) != num_images:
            raise ConfigError(
                f"{where}: example {example.key} has {len(example.images)} images where task.num_images is "
                f"{num_images}: set task.num_images to {len(example.images)}, or give other data"
            )
    paths = [source for example in examples for source in example.images if isinstance(source, Path)]
    if len(paths) >= len(examples):
        require_some_image(spread(paths), where)
