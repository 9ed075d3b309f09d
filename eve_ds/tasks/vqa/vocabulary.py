"""Vocabulary of answers: collected from training examples, saved with the model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eve_ds.config import ConfigError
from eve_ds.reading import read_json
from eve_ds.storage import cause
from eve_ds.tasks.examples import Example
from eve_ds.tasks.vqa.answer_accuracy import normalize_answer
from eve_ds.tasks.vqa.examples import SceneQuestions

ANSWERS = "answers.json"
"""Name of the file in a saved model."""


def build_vocabulary(examples: Sequence[Example], min_count: int) -> list[str]:
    """Normalized answers that at least `min_count` annotators gave, most frequent first; for scenes all answers.

    Raises:
        ConfigError: no answer is frequent enough.
    """
    if isinstance(examples, SceneQuestions):
        return sorted({normalize_answer(answer) for answer in examples.all_answers()})
    counts = Counter(normalize_answer(answer) for example in examples for answer in example.answers)
    frequent = sorted((answer for answer, count in counts.items() if count >= min_count), key=lambda a: (-counts[a], a))
    if not frequent:
        raise ConfigError(
            f"none of the {len(counts)} answers was given task.min_answer_count ({min_count}) times: lower it"
        )
    return frequent


def write_vocabulary(answers: Sequence[str], folder: Path) -> None:
    """Write the vocabulary beside the weights of a model."""
    (folder / ANSWERS).write_text(json.dumps(answers, indent=0, ensure_ascii=False), encoding="utf-8")


def read_vocabulary(folder: Path) -> list[str]:
    """Vocabulary of a saved model; raises ConfigError unless it is a JSON list of different strings."""
    file = folder / ANSWERS
    try:
        answers = read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"answer vocabulary {file} cannot be read: {cause(error)}") from None
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ConfigError(f"answer vocabulary {file} must be a JSON list of strings")
    twice = [answer for answer, count in Counter(answers).items() if count > 1]
    if twice:
        raise ConfigError(f"answer vocabulary {file} holds '{twice[0]}' twice: remove one")
    return answers
