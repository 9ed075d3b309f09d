"""Generated scenes as a source, so that the default data can be inspected and mixed in as ordinary shards."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image

from eve_ds.data.importers.candidate import Candidate, InlineBytes
from eve_ds.data.synthetic.scenes import LevelName, Scenes, Split


@dataclass(frozen=True)
class SceneCandidate:
    """A scene that the worker draws; its id names level, seed, split and index."""

    level: LevelName
    seed: int
    split: Split
    index: int
    num_captions: int = 1

    @property
    def name(self) -> str:
        """Level, seed, split and index of the scene."""
        return f"scenes-{self.level}-{self.seed}-{self.split}-{self.index}"

    def resolve(self) -> Candidate:
        """Draw the scene and encode it as PNG."""
        scene = _scenes(self.level, self.seed, self.split)[self.index]
        png = io.BytesIO()
        Image.fromarray(scene.image).save(png, "PNG")
        return Candidate(self.name, InlineBytes(png.getvalue()), (scene.caption,), self.name)


class GeneratedScenes:
    """The first `num_samples` scenes of a split."""

    def __init__(self, num_samples: int, level: LevelName = "easy", seed: int = 0, split: Split = "train") -> None:
        self._parts = (level, seed, split)
        self.total: int | None = num_samples
        self.description: dict[str, Any] = {
            "format": "scenes",
            "level": level,
            "seed": seed,
            "split": split,
            "num_samples": num_samples,
        }

    def __iter__(self) -> Iterator[SceneCandidate]:
        """Scenes in the order of their index."""
        return (SceneCandidate(*self._parts, index) for index in range(self.total or 0))


@lru_cache(maxsize=4)
def _scenes(level: LevelName, seed: int, split: Split) -> Scenes:
    return Scenes(level, seed=seed, split=split)
