"""Recognizes the format of annotations by their content."""

from __future__ import annotations

import tarfile
from pathlib import Path

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.entries import read_json

KEYS = {"questions": "vqav2", "images": "karpathy", "annotations": "vqav2"}
"""Key of a list in a JSON object -> format. COCO has the last two: the reader of Karpathy's files names it."""


def sniff(path: Path) -> str:
    """Name of the format of an annotation file, folder or archive: json, karpathy, nlvr, nlvr2 or vqav2.

    Raises:
        SourceError: the file cannot be read or has no known form.
    """
    if path.is_dir() or (path.is_file() and tarfile.is_tarfile(path)):
        return "nlvr"
    tree = read_json(path)
    if isinstance(tree, dict):
        for key, name in KEYS.items():
            if isinstance(tree.get(key), list):
                return name
    elif tree and isinstance(tree, list) and isinstance(tree[0], dict):
        return "nlvr2" if "identifier" in tree[0] else "json"
    raise SourceError(
        f"{path} is in no known form: a list of entries, VQAv2's questions or annotations, JSON lines of NLVR2, "
        "Karpathy's images, or NLVR's folder or archive"
    )
