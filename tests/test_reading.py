"""Bounded reading: regular files up to a size, JSON up to a depth and a number of digits; errors of one line."""

import json
import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eve_ds import limits
from eve_ds.reading import parse_json, read_file


def test_a_regular_file_is_read_whole_or_in_part(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to(path)
    assert read_file(path, 10) == read_file(tmp_path / "link", 10) == b"0123456789"
    assert read_file(path, 3, offset=7) == b"789"
    assert read_file(str(path), 3, offset=2, size=3) == b"234"
    assert read_file(path, 5, offset=8, size=5) == b"89"
    assert read_file(path, 5, offset=20) == b""


@pytest.mark.parametrize(("offset", "size"), [(0, None), (0, 10), (2, 9), (1, None)])
def test_more_bytes_than_the_cap_are_not_read(tmp_path, offset, size):
    (tmp_path / "a").write_bytes(b"0123456789")
    with pytest.raises(OSError, match=r"\d+ bytes, more than the 8 that are read"):
        read_file(tmp_path / "a", 8, offset, size)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "name", ["pipe", "socket", "folder", "/dev/zero", "/dev/null", "link", "gone", "x\0", "\ud800"]
)
def test_what_is_no_regular_file_is_never_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("folder")
    os.symlink("/dev/zero", "link")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match=r"not a regular file|No such|no file can have this name"):
            read_file(name, 100)
        assert len(os.listdir("/proc/self/fd")) == before, "the descriptor is closed"


def nested(levels, opening="[", closing="]", inside=""):
    return opening * levels + inside + closing * levels


@pytest.mark.parametrize("form", [("[", "]", ""), ('{"a":', "}", "1"), ('[{"a":', "}]", "1")])
def test_depth_is_capped(form):
    per_level = sum(form[0].count(sign) for sign in "[{")
    deepest = limits.JSON_DEPTH // per_level
    assert parse_json(nested(deepest, *form)) == json.loads(nested(deepest, *form))
    for levels in (deepest + 1, 500, 100_000):
        with pytest.raises(ValueError, match="nested deeper than 100 levels"):
            parse_json(nested(levels, *form))
    assert len(parse_json(f"[{','.join([nested(5, *form)] * 2000)}]")) == 2000, "a wide document is not deep"


@pytest.mark.parametrize("digits", [301, 4000, 4301, 100_000])
def test_digits_are_capped(digits):
    assert parse_json("-" + "9" * 299) == -int("9" * 299)
    with pytest.raises(ValueError, match=r"^a number has [\d,]+ digits, more than 300$"):
        parse_json(f'{{"a": [{"9" * digits}]}}')


@pytest.mark.parametrize("text", [b"\xff", b"", b"{", b"[1,]", b"\xef\xbb\xbf", "[1".encode("utf-16"), b"nan", b"[\0]"])
def test_what_is_no_json_is_one_line(text):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        parse_json(text)


leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
trees = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner), max_leaves=8)


@settings(max_examples=40)
@given(trees)
def test_other_documents_are_those_of_json(tree):
    text = json.dumps(tree, ensure_ascii=False)
    assert parse_json(text) == tree
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return
    assert parse_json(data) == parse_json(b"\xef\xbb\xbf" + data) == tree
