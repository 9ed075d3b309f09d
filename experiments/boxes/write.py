"""Write generated boxes as data of the ordinary tools: shards for pre-training, folders of NLVR for fine-tuning.

    python experiments/boxes/write.py --out datasets/boxes

OUT/shards holds images with captions (`kind: shards`), OUT/train and OUT/val hold statements in NLVR's published layout
(`launcher/finetune.py --task nlvr --data OUT/train --val_data OUT/val`).
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from boxes import Boxes, BoxStatements, render
from numpy.typing import NDArray
from PIL import Image

from eve_ds.data.importers import Candidate
from eve_ds.data.importers.candidate import InlineBytes
from eve_ds.data.shard_writer import WriterOptions, write_shards
from eve_ds.data.synthetic.scenes import Split

IMAGES_PER_FOLDER = 600


@dataclass(frozen=True)
class BoxCandidate:
    """An image with a caption, drawn by the worker that writes it."""

    seed: int
    index: int
    num_captions: int = 1

    @property
    def name(self) -> str:
        return f"boxes-{self.seed}-{self.index}"

    def resolve(self) -> Candidate:
        scene = Boxes(self.seed, "train")[self.index]
        return Candidate(self.name, InlineBytes(png(scene.image)), (scene.caption,), self.name)


class BoxSource:
    """The first `num_samples` images of the training split, a source for `write_shards`."""

    def __init__(self, seed: int, num_samples: int) -> None:
        self.seed = seed
        self.total: int | None = num_samples
        self.description: dict[str, Any] = {"format": "boxes", "seed": seed, "num_samples": num_samples}

    def __iter__(self) -> Iterator[BoxCandidate]:
        return (BoxCandidate(self.seed, index) for index in range(self.total or 0))


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode (H, W, 3) uint8 pixels."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_statements(folder: Path, seed: int, split: Split, count: int) -> None:
    """Write statements of a split as NLVR publishes them, each with its three boxes in all six orders.

    Statements 2k and 2k + 1 share their text and have the identifiers k-0 and k-1, so that NLVR's consistency counts
    the pairs of which both are judged correctly.
    """
    statements, lines = BoxStatements(seed, split), []
    for index in range(count):
        statement, identifier = statements[index], f"{index // 2}-{index % 2}"
        directory = str(index * 6 // IMAGES_PER_FOLDER)
        images = folder / "images" / directory
        images.mkdir(parents=True, exist_ok=True)
        for number, (first, second, third) in enumerate(permutations(statement.boxes)):
            (images / f"{split}-{identifier}-{number}.png").write_bytes(png(render((first, second, third))))
        label = "true" if statement.label else "false"
        entry = {"sentence": statement.text, "label": label, "identifier": identifier, "directory": directory}
        lines.append(json.dumps(entry) + "\n")
    (folder / f"{split}.json").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Parse the command line and write the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated world (default: %(default)s)")
    parser.add_argument("--num_samples", type=int, default=100_000, help="images with captions (default: %(default)s)")
    parser.add_argument("--num_train", type=int, default=10_000, help="training statements (default: %(default)s)")
    parser.add_argument("--num_val", type=int, default=1_000, help="validation statements (default: %(default)s)")
    arguments = parser.parse_args()
    source = BoxSource(arguments.seed, arguments.num_samples)
    write_shards(source, arguments.out / "shards", WriterOptions(), len(os.sched_getaffinity(0)))
    write_statements(arguments.out / "train", arguments.seed, "train", arguments.num_train)
    write_statements(arguments.out / "val", arguments.seed, "val", arguments.num_val)


if __name__ == "__main__":
    main()
