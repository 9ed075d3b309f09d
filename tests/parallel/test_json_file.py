"""Files that are no JSON are refused in one line; others are read as by Python, comments in them as by DeepSpeed."""

import json
import time
from pathlib import Path

import hjson
import pytest

from eve_ds.config import ConfigError
from eve_ds.parallel.deepspeed_json.file import read_deepspeed_json

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_files_are_read_as_by_the_standard_library(file):
    assert read_deepspeed_json(file) == json.loads(file.read_text())


def test_a_byte_order_mark_is_allowed(tmp_path):
    file = tmp_path / "bom.json"
    file.write_bytes(b'\xef\xbb\xbf{"train_batch_size": 8, "a": [5e8, null, "\xc3\xa9"]}')
    assert read_deepspeed_json(file) == {"train_batch_size": 8, "a": [5e8, None, "é"]}


COMMENTED = {
    "line": '{\n// a "comment", with {\n"a": 1 // [\n}',
    "hash": '# top\n{"a": 1, # "b": 2\n"c": 3}',
    "block": '/* a\n * "b" */{"a": /* 5, */ [1, 2] /**/ }',
    "trailing commas": '{"a": [1, 2, ], "b": {"c": 1,\n},}',
    "comma before a comment": '{"a": [1, // one\n], /* two */ }',
    "texts with marks": r'{"a": "http://b/*c*/#d", "e": "\\\\", "f": "\"// ,]", "g": ",}"}',
    "end of the file": '{"a": 1} // end',
}


@pytest.mark.parametrize("name", COMMENTED)
def test_comments_and_trailing_commas_are_read_as_by_deepspeed(tmp_path, name):
    file = tmp_path / "commented.json"
    file.write_text(COMMENTED[name])
    assert read_deepspeed_json(file) == hjson.loads(COMMENTED[name])  # deepspeed.runtime.config reads files with it


@pytest.mark.parametrize("piece", ['"', "/*", "/* ", "//", ",", '"\\', "#\n", '", '])
def test_no_file_takes_long_to_read(tmp_path, piece):
    file = tmp_path / "long.json"
    file.write_text("{" + piece * 100_000)
    started = time.process_time()
    with pytest.raises(ConfigError, match=" is not JSON: "):
        read_deepspeed_json(file)
    assert time.process_time() - started < 1


BAD = {
    "empty": (b"", "is not JSON: Expecting value: line 1 column 1"),
    "behind a comment": (
        b"{\n/* a\ncomment */ a}",
        "is not JSON: Expecting property name enclosed in double quotes: line 3",
    ),
    "two commas": (b'{"a": 1,,}', "is not JSON: "),
    "open comment": (b'{"a": 1 /* }', "is not JSON: "),
    "only a comment": (b"// {}", "is not JSON: Expecting value: line 1 column 6"),
    "single quotes": (b"{'a': 1}", "is not JSON: "),
    "no quotes": (b"{a: 1}", "is not JSON: "),
    "Python": (b'{"a": True}', "is not JSON: "),
    "two objects": (b"{}{}", "is not JSON: Extra data: line 1 column 3"),
    "deep list": (b'{"a":' + b"[" * 200_000, "is not JSON of DeepSpeed: its brackets are nested too deep"),
    "deep object": (b'{"a":' * 200_000, "is not JSON of DeepSpeed: its brackets are nested too deep"),
    "latin-1": (b'{"a": "\xe9"}', "is not JSON: byte 7 is not UTF-8: save it as UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "is not JSON: byte 0 is not UTF-8: save it as UTF-8"),
    "NaN": (b'{"a": NaN}', "is not JSON: the number NaN is not finite: write a finite one"),
    "infinity": (b'{"a": -Infinity}', "is not JSON: the number -Infinity is not finite"),
    "huge float": (b'{"a": 1e999}', "is not JSON: the number 1e999 is not finite"),
    "huge int": (
        b'{"a": ' + b"9" * 10_000 + b"}",
        "is not JSON: the number 999999999999999999999999999999... has 10000",
    ),
    "twice": (b'{"a": {"b": 1, "b": 1}}', 'is not JSON: the key "b" appears twice in one object: keep one of them'),
    "list": (b"[1]", ": the DeepSpeed JSON must be a mapping of settings, not a list"),
    "null": (b"null", ": the DeepSpeed JSON must be a mapping of settings, not a NoneType"),
    "text": (b'"stage 1"', ": the DeepSpeed JSON must be a mapping of settings, not a str"),
    "binary": (bytes(range(256)), "is not JSON: "),
}


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused_in_one_line(tmp_path, name):
    content, text = BAD[name]
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_json(file)
    line = str(caught.value)
    assert line.startswith(f"--deepspeed_config {file}")
    assert text in line
    assert "\n" not in line
    assert len(line) < 500


def test_files_that_cannot_be_read_say_why(tmp_path):
    for path, text in ((tmp_path / "none.json", "No such file or directory"), (tmp_path, "not a regular file")):
        with pytest.raises(ConfigError) as caught:
            read_deepspeed_json(path)
        assert str(caught.value) == f"--deepspeed_config {path} cannot be read: {text}"
