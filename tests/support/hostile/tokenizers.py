"""Hostile tokenizers: folders and files of strangers, and names that are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from eve_ds.config import load_config
from eve_ds.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from eve_ds.export.start import fitting_tokenizer
from hostile.case import BIGINT, DEEP, Case, endless, pipe, sparse, write


def _json(change: Callable[[Any], Any], folder: Path, honest: Path) -> None:
    """Load an honest tokenizer.json that `change` has damaged in place, or replaced."""
    tree = json.loads((honest / "export/tokenizer/tokenizer.json").read_bytes())
    changed = change(tree)
    tokenizer = load_tokenizer(write(folder / "t.json", tree if changed is None else changed))
    print(f"loaded: {tokenizer('a red circle').input_ids}")


def _folder(files: dict[str, Any], folder: Path, honest: Path) -> None:
    """Load an honest folder with other content of some files; None removes one."""
    shutil.copytree(honest / "export/tokenizer", folder / "t")
    for name, content in files.items():
        (folder / "t" / name).unlink(missing_ok=True)
        if content is not None:
            content(folder / "t" / name) if callable(content) else write(folder / "t" / name, content)
    tokenizer = load_tokenizer(folder / "t")
    print(f"loaded {type(tokenizer).__name__}: {tokenizer('a red circle').input_ids}")


def _name(name: str, folder: Path, _: Path) -> None:
    load_tokenizer(name.format(folder=folder))


def _beyond_the_table(folder: Path, honest: Path) -> None:
    tree = json.loads((honest / "export/tokenizer/tokenizer.json").read_bytes())
    tree["model"]["vocab"]["circle"] = 10**6
    tree["model"]["merges"] = []
    write(folder / "t.json", tree)
    fitting_tokenizer(load_config("eve_tiny", [f"data.tokenizer={folder}/t.json"]))


def _nested(levels: int) -> Any:
    normalizer: Any = {"type": "Lowercase"}
    for _ in range(levels):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    return normalizer


def _replacements(count: int, content: str) -> Any:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [step] * count}


CODE = "import os\nos.system('true')\n"
AUTO_MAP = {"tokenizer_class": "Canary", "auto_map": {"AutoTokenizer": [None, "canary.Canary"]}}
CASES = {
    "an empty object": Case(partial(_json, lambda tree: {}), "tokenizer file .*t.json cannot be read: Model missing"),
    "a list": Case(partial(_json, lambda tree: []), "cannot be read: it holds no JSON object"),
    "no model": Case(partial(_json, lambda tree: {**tree, "model": None}), "cannot be read: "),
    "deep JSON": Case(partial(_json, lambda tree: DEEP), "nested deeper than 100 levels"),
    "a bigint": Case(partial(_json, lambda tree: BIGINT), "a number has 100,000 digits"),
    "normalizers in normalizers": Case(
        partial(_json, lambda tree: {**tree, "normalizer": _nested(45)}), "nested deeper than 30 levels"
    ),
    "normalizers that multiply a text": Case(
        partial(_json, lambda tree: {**tree, "normalizer": _replacements(40, "aa")}),
        "could make a text 1,099,511,627,776 times as long, more than 1,000",
    ),
    "a normalizer of a damaged map": Case(
        partial(_json, lambda tree: {**tree, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),
        "cannot be read: |cannot encode a text: ",
    ),
    "a pattern that is none": Case(
        partial(
            _json,
            lambda t: {
                **t,
                "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": False},
            },
        ),
        "cannot be read: ",
    ),
    "a negative id": Case(partial(_json, lambda tree: tree["model"]["vocab"].update(red=-1)), "cannot be read: "),
    "a merge of no token": Case(
        partial(_json, lambda tree: tree["model"]["merges"].append(["q", "q"])), "cannot be read: "
    ),
    "an id beyond the table": Case(_beyond_the_table, "has a vocabulary of 1000001 tokens, larger than"),
    "a terabyte": Case(lambda folder, _: load_tokenizer(sparse(folder / "t.json", 2**40)), "bytes, more than the 268,"),
    "a pipe": Case(lambda folder, _: load_tokenizer(pipe(folder / "t.json")), "cannot be read: .*not a regular file"),
    "code in a folder": Case(
        partial(_folder, {"tokenizer_config.json": AUTO_MAP, "canary.py": CODE, "tokenizer.json": None}),
        r"names code of its own \(auto_map\), which is never run: name its tokenizer.json: ",
    ),
    "code beside a whole tokenizer": Case(
        partial(_folder, {"tokenizer_config.json": AUTO_MAP, "canary.py": CODE}),
        r"names code of its own \(auto_map\), which is never run: name its tokenizer.json: ",
    ),
    "code beside a tokenizer of a known class": Case(
        partial(
            _folder,
            {
                "tokenizer_config.json": {**AUTO_MAP, "tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL_TOKENS},
                "canary.py": CODE,
            },
        ),
        "loaded .*: .2, ",
        code=0,
    ),
    "a class of another library": Case(
        partial(_folder, {"tokenizer_config.json": {"tokenizer_class": "os.system"}, "special_tokens_map.json": None}),
        "tokenizer .* has no pad_token",
    ),
    "pickles in a folder": Case(
        partial(_folder, {"tokenizer.json": None, "canary.pkl": b"\x80", "canary.pickle": b"", "vocab.txt": None}),
        "is not 'scenes', a tokenizer.json, or a folder or name with one: ",
    ),
    "a deep file in a folder": Case(
        partial(_folder, {"tokenizer_config.json": DEEP}), "tokenizer_config.json cannot be read: .*nested deeper than"
    ),
    "a pipe in a folder": Case(partial(_folder, {"added_tokens.json": pipe}), "added_tokens.json: not a regular file"),
    "a device in a folder": Case(partial(_folder, {"vocab.txt": endless}), "vocab.txt: not a regular file"),
    "padding to a gigabyte": Case(
        partial(
            _json,
            lambda tree: tree.update(
                padding={"strategy": {"Fixed": 2**30}, "direction": "Right", "pad_to_multiple_of": None}
                | {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
            ),
        ),
        r"loaded: \[2, \d+, \d+, \d+, 3\]",
        code=0,
    ),
    "a name with dots": Case(partial(_name, "../canary"), "tokenizer folder ../canary does not exist"),
    "a name below a folder": Case(partial(_name, "{folder}/tokenizer"), "tokenizer folder .*/tokenizer does not exist"),
    "a name with a control": Case(partial(_name, "a\x1b[31m"), "does not exist"),
    "a name of the Hub, offline": Case(
        partial(_name, "nobody/nothing"),
        "no tokenizer of this name could be loaded from the Hub or from its cache .*name a folder",
    ),
}
