"""Streamed JSON equals what the standard library reads at once, wherever the file is cut into pieces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eve_ds import limits
from eve_ds.data.errors import SourceError
from eve_ds.data.formats import json_stream
from eve_ds.data.formats.json_stream import Value, read_outline, read_tree, stream_json

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(['"', "\\", "é]", "\u2028", "[{", "},", "\ud800"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=3), values, max_size=3)
spaces = st.sampled_from([None, 0, 1, "\t", "\r\n"])


def same(one, other):
    return json.dumps(one) == json.dumps(other)  # NaN differs from itself


@settings(max_examples=300)
@given(tree=values, indent=spaces, ascii_only=st.booleans(), chunk=st.integers(1, 9))
def test_a_document_in_pieces_equals_the_whole(tmp_path_factory, tree, indent, ascii_only, chunk):
    path = tmp_path_factory.getbasetemp() / "stream.json"
    text = json.dumps(tree, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass").replace(b"\xed\xa0\x80", b"\\ud800"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK_CHARACTERS", chunk)
        assert same(read_tree(path), tree)


@settings(max_examples=100)
@given(trees=st.lists(objects, min_size=2, max_size=4), chunk=st.integers(1, 9))
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_lines_in_pieces_equal_the_whole(tmp_path_factory, trees, suffix, end, chunk):
    path = tmp_path_factory.getbasetemp() / f"lines{suffix}"
    path.write_bytes((end.join(map(json.dumps, trees)) + end).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK_CHARACTERS", chunk)
        assert same(read_tree(path), trees)


def test_values_of_an_object_come_one_by_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"info": {"a": [1]}, "images": [1, [2]], "empty": [], "n": 3}')
    assert list(stream_json(path)) == [
        Value(None, {}, False),
        Value("info", {"a": [1]}, False),
        Value("images", [], False),
        Value("images", 1, True),
        Value("images", [2], True),
        Value("empty", [], False),
        Value("n", 3, False),
    ]
    outline = read_outline(path)
    assert outline.tree == {"info": {"a": [1]}, "images": [1], "empty": [], "n": 3}
    assert outline.counts == {"images": 2}


TEXT = '[{"image": "a.jpg", "n": [1, 2.5, true]}, {"image": "é\\u00e9\\n"}]'


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
@pytest.mark.parametrize("cut", range(len(TEXT)))
def test_a_cut_file_is_never_read_as_a_whole_one(tmp_path, monkeypatch, cut, chunk):
    monkeypatch.setattr(json_stream, "CHUNK_CHARACTERS", chunk)
    path = tmp_path / "a.json"
    path.write_text(TEXT[:cut])
    with pytest.raises(SourceError, match=r"a\.json is not JSON: .*: line 1, character [0-9]+$"):
        read_tree(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]\n[2]", "Extra data: line 2"),
        ('{"a": 1}]', "Extra data: line 1"),
        ("[1\n 2]", "Expecting ']': line 2"),
        ("[1,]", "Expecting value: line 1"),
        ('{"a" 1}', "Expecting ':': line 1"),
        ('{"a": 1,}', "stands where a key should be|Expecting value"),
        ("{1: 2}", "1 stands where a key should be: line 1"),
        ('[{"a": 1}\n, {"a" 2}\n]', "Expecting ':' delimiter: line 2"),
        ("[" + "9" * 400 + "]", "a number has 400 digits, more than 300: line 1"),
        ("[0,\n" + "[" * 101 + "]" * 101 + "]", "nested deeper than 100 levels: line 2"),
    ],
)
@pytest.mark.parametrize("chunk", [5, 2**20])
def test_an_error_has_its_line(tmp_path, monkeypatch, text, message, chunk):
    monkeypatch.setattr(json_stream, "CHUNK_CHARACTERS", chunk)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_tree(tmp_path / "a.json")


VALUES = '{"a": @,\n "b": [@, [@, @],\r\n\t{"c": @}],\n\n"d": "é", "e":\n@}\n'
"""A document with a place for each value."""


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
@pytest.mark.parametrize("at", [place for place, char in enumerate(VALUES) if char == "@"])
def test_an_error_has_its_line_and_character(tmp_path, monkeypatch, at, chunk):
    """Reference: the parser of the standard library on the whole document."""
    monkeypatch.setattr(json_stream, "CHUNK_CHARACTERS", chunk)
    text = f"{VALUES[:at]}?{VALUES[at + 1 :]}".replace("@", "10")
    path = tmp_path / "a.json"
    path.write_bytes(text.encode())
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(path.read_text(encoding="utf-8"))
    place = f"line {expected.value.lineno}, character {expected.value.colno}"
    with pytest.raises(SourceError, match=rf"is not JSON: Expecting value: {place}$"):
        read_tree(path)


def test_an_entry_above_the_cap_is_not_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "JSON_ENTRY_CHARACTERS", 1000)
    monkeypatch.setattr(json_stream, "CHUNK_CHARACTERS", 100)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["x" * 500] * 9))
    assert len(read_tree(path)) == 9
    path.write_text(json.dumps(["x" * 5000]))
    with pytest.raises(SourceError, match="an entry has more than 1,000 characters: line 1"):
        read_tree(path)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Most characters that are held at once; the whole file has 50 times as many."""
    monkeypatch.setattr(json_stream, "CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(limits, "METADATA_BYTES", 1500)  # of the first line, which may be that of JSON lines
    held = []
    read_more = json_stream._Window._read_more

    def watched(window):
        read_more(window)
        held.append(len(window._text))

    monkeypatch.setattr(json_stream._Window, "_read_more", watched)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(3000)]}))
    assert sum(value.is_entry for value in stream_json(path)) == 3000
    assert max(held) < 3000
