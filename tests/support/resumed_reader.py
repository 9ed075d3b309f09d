"""A reader of training batches that is killed at any time and goes on where its last record ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORD = "record.json"
KEYS = "keys.txt"


def read_batches(config: Any, batch: int, folder: Path, count: int) -> None:
    """Write the keys of `count` batches, one line each; batches that an earlier call recorded are not read again.

    A batch is recorded by the replacement of one file, as a checkpoint is. Lines behind the last record belong to
    batches that were read and lost by a kill.
    """
    from eve_ds.data.pipeline import build_loader
    from eve_ds.data.tokenizer import load_tokenizer
    from eve_ds.objectives.registry import objectives_of

    record = json.loads((folder / RECORD).read_text()) if (folder / RECORD).exists() else {"size": 0, "batches": 0}
    loader = build_loader(
        config,
        load_tokenizer("scenes"),
        objectives_of(config.model),
        rank=0,
        world_size=1,
        micro_batch_size=batch,
        state=record.get("state"),
        start_method="fork",
    )
    with open(folder / KEYS, "ab", buffering=0) as keys:
        keys.truncate(record["size"])
        for number in range(record["batches"], count):
            keys.write((" ".join(next(loader).keys) + "\n").encode())
            size = os.fstat(keys.fileno()).st_size
            text = json.dumps({"size": size, "batches": number + 1, "state": loader.state_dict()})
            (folder / "aside").write_text(text)
            os.replace(folder / "aside", folder / RECORD)
    loader.close()
