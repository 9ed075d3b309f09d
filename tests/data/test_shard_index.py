"""Stored layouts of shards: the format, and what is no layout of a shard."""

import base64
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tars import samples, write_tar

from eve_ds import limits
from eve_ds.data.shard_bytes import FileBytes
from eve_ds.data.shard_index import ShardLayout, decode, decode_text, encode, scan_layout

BLOCK = 512


def layout_of(groups):
    """Layout of (gap in blocks, size in blocks, captions)."""
    starts, ends, end = [], [], 0
    for gap, blocks, _ in groups:
        starts.append(end + gap * BLOCK)
        end = starts[-1] + blocks * BLOCK
        ends.append(end)
    columns = (starts, ends, [captions for *_, captions in groups])
    return ShardLayout(*(np.array(column, dtype=np.int64) for column in columns))


def leb128(number):
    """Definition of the encoding, one byte at a time (DWARF 5, section 7.6)."""
    done = bytearray()
    while True:
        number, low = number >> 7, number & 127
        if not number:
            return bytes([*done, low])
        done.append(low | 128)


def stored(*numbers):
    return b"".join(map(leb128, numbers))


groups = st.lists(st.tuples(st.integers(0, 2**30), st.integers(1, 2**30), st.integers(0, 300)), max_size=30)


@given(groups)
def test_a_layout_is_stored_as_documented_and_read_back(groups):
    layout = layout_of(groups)
    text = encode(layout)
    assert base64.b64decode(text) == stored(*(number for group in groups for number in group))
    size = int(layout.ends[-1]) if groups else 0
    found = decode(decode_text(text), len(layout), size)
    for name in ("starts", "ends", "captions"):
        assert getattr(found, name).tolist() == getattr(layout, name).tolist()
    every = [(index, sample) for index, (*_, captions) in enumerate(groups) for sample in range(max(captions, 1))]
    assert len(found) == len(every)
    assert [found.locate(number) for number in range(0, len(every), 7)] == every[::7]


def test_the_example_of_the_format():
    """Two pairs, the second one with 300 blocks and two captions behind a gap of one block."""
    assert (
        encode(layout_of([(0, 5, 1), (1, 300, 2)])) == base64.b64encode(b"\0\5\1\1\xac\2\2").decode() == "AAUBAawCAg=="
    )


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_scan_finds_the_groups_that_tarfile_finds(tmp_path, form):
    members = [("notes", b"x" * 700), *samples(4), ("._s0.jpg", b"mac"), *samples(3, "día " * 40)]
    if form == tarfile.USTAR_FORMAT:
        members = [(name, data) for name, data in members if len(name) < 90]
    path = write_tar(tmp_path / "a.tar", members, form)
    with tarfile.open(path) as tar:
        found = {}
        for member in tar:
            if "." in member.name and not member.name.startswith("._"):
                start = found.setdefault(member.name.partition(".")[0], (member.offset, 0))[0]
                end = -(-(member.offset_data + member.size) // BLOCK) * BLOCK
                found[member.name.partition(".")[0]] = (start, end)
    layout = scan_layout(FileBytes(path))
    assert list(zip(layout.starts.tolist(), layout.ends.tolist(), strict=True)) == list(found.values())
    assert layout.captions.tolist() == [1] * len(found)


NO_LAYOUTS = {
    "cut within a number": (stored(0, 4) + b"\x80", "cut"),
    "cut within a group": (stored(0, 4), "groups"),
    "empty group": (stored(0, 0, 1), "empty"),
    "number of eight bytes": (stored(0, 2**50, 1), "8 bytes"),
    "padded number": (b"\0" + b"\x80" * 9 + b"\0\1", "10 bytes"),
    "beyond the end": (stored(0, 21, 1), "beyond the end"),
    "first group beyond the end": (stored(2**41, 1, 1), "beyond the end"),
    "more samples": (stored(0, 4, 2), "2 samples, not 1"),
    "fewer samples": (b"", "0 samples, not 1"),
    "many captions": (stored(0, 4, 2**41), "samples, not 1"),
}


@pytest.mark.parametrize("name", NO_LAYOUTS)
def test_what_is_no_layout_of_the_shard_is_named(name):
    varints, problem = NO_LAYOUTS[name]
    assert decode(stored(0, 20, 1), 1, 10240).ends.tolist() == [10240]
    with pytest.raises(ValueError, match=problem):
        decode(varints, 1, 10240)


def test_a_layout_of_more_groups_than_the_cap_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "SHARD_SAMPLES", 2)
    with pytest.raises(ValueError, match="9 numbers"):
        decode(stored(0, 1, 1, 0, 1, 1, 0, 1, 1), 3, 10240)


@given(st.binary(max_size=60), st.integers(0, 20), st.integers(0, 10**5))
def test_any_bytes_are_a_layout_within_the_shard_or_refused(varints, samples, size):
    try:
        layout = decode(varints, samples, size)
    except ValueError:
        return
    assert len(layout) == samples
    assert (layout.starts < layout.ends).all()
    assert (layout.starts[1:] >= layout.ends[:-1]).all()
    assert not len(layout) or layout.ends[-1] < size + BLOCK


@pytest.mark.parametrize("text", ["AAUB AawCAg==", "AAUB\n", "AAU", "é", "-_-_"])
def test_text_that_is_no_base64_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        decode_text(text)
