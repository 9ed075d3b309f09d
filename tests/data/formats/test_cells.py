"""What one cell of a table means: one caption or a list of them, the file of an image, the start of JSON."""

import json
import random

import numpy as np
import pytest

from eve_ds.data.formats.cells import captions_of, image_name, is_numbered_image, is_web_address, starts_json

PARTS = [
    "a dog",
    "it's",
    'a 5" pipe',
    'he said "hi"',
    "x, y",
    "line\nend",
    "tab\there",
    "Ünï",
    "🐕",
    "\\",
    "[x]",
    "None",
]


def lists():
    rng = random.Random(0)
    return [[" ".join(rng.choices(PARTS, k=3)) for _ in range(rng.randint(1, 5))] for _ in range(300)]


@pytest.mark.parametrize(
    "write",
    [json.dumps, lambda texts: json.dumps(texts, ensure_ascii=False, indent=1), repr],
    ids=["JSON", "indented JSON", "Python"],
)
def test_a_list_of_texts_is_as_many_captions(write):
    for texts in lists():
        assert captions_of(write(texts)) == tuple(texts)


def test_a_list_that_numpy_wrote_is_as_many_captions():
    """pandas writes the lists of a Parquet table so; numpy puts no commas."""
    for texts in lists():
        assert captions_of(str(np.array(texts, dtype=object))) == tuple(texts)


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ('["a", null, NaN, ""]', ("a", "", "", "")),
        ("['a', None, nan]", ("a", "", "")),
        (" ['a'] ", ("a",)),
        ("[]", ()),
        ('["a\\ud83d\\udc15"]', ("a🐕",)),
        ("['not UTF-8: \udcff']", ("not UTF-8: \udcff",)),
    ],
)
def test_a_null_of_a_list_is_an_empty_caption(cell, captions):
    assert captions_of(cell) == captions


def test_every_character_of_a_list_of_python_is_read():
    for start in [*range(0, 0x3000, 64), 0xD800, 0xDC80, 0xFFC0, 0x1F600, 0xE0000, 0x10FFC0]:
        text = "".join(map(chr, range(start, start + 64)))
        assert captions_of(repr([f"a{text}z"])) == (f"a{text}z",)


@pytest.mark.parametrize("cell", ["[0, 1]", "[null, 1]", '[{"raw": "a"}]', "[{'raw': 'a'}]", '[["a"]]', "[true]"])
def test_a_list_of_other_values_is_no_caption(cell):
    assert captions_of(cell) is None


@pytest.mark.parametrize(
    "cell",
    [
        "a dog",
        "[MASK]",
        "[a dog] on a mat",
        "[a dog], [a cat]",
        "['a'] and ['b']",
        "[it's",
        "[[File:a.jpg]]",
        "('a', 'b')",
        '["a"',
        "['a\\q']",
        "['\\N{no}']",
        "[" * 5000 + "]" * 5000,
    ],
)
def test_a_text_with_brackets_is_one_caption(cell):
    assert captions_of(cell) == (cell,)


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (" d/1.jpg ", "d/1.jpg"),
        ("1.jpg#0", "1.jpg"),
        ("1.JPEG#12", "1.JPEG"),
        ("1.jpg#zh#3", "1.jpg"),
        ("my #1 photo.png", "my #1 photo.png"),
        ("#2.png#4", "#2.png"),
        ("1.jpg.1#0", "1.jpg.1#0"),
        ("photo#0", "photo#0"),
        ("http://h/1.jpg#0", "http://h/1.jpg#0"),
    ],
)
def test_the_number_of_a_caption_is_no_part_of_the_name(cell, name):
    assert image_name(cell) == name
    assert is_numbered_image(cell) == (cell.strip() != name)


def test_schemes_of_addresses_have_any_case():
    assert all(map(is_web_address, ["http://h/a", "HTTPS://h/a", " Http://h/a"]))
    assert not any(map(is_web_address, ["ftp://h/a", "see http://h/a", "http:/h"]))


@pytest.mark.parametrize("start", ["{", '{"url"', ' { "a": 1', "[", "[{", '["a"', "[]", "{}", "[["])
def test_a_start_of_json_is_seen(start):
    assert starts_json(start)


@pytest.mark.parametrize("start", ["[PERSON] sits", "{name}", "a dog", "", "[3] dogs"])
def test_a_caption_with_a_bracket_is_no_json(start):
    assert not starts_json(start)
