"""Layout of a shard: where each group of members stands, and how many captions it has; found by a scan, or stored.

A group is the members of one image: KEY.jpg, KEY.txt, KEY.json, or with several captions KEY.0.txt, KEY.1.txt, ... Each
caption is a sample. `index.json` stores the layout, so that opening a shard reads nothing of it.

The stored form is base64 of LEB128 varints, three for each group: the gap in blocks of 512 bytes from the end of the
previous group to the first header of this one, the blocks from there to the end of its last member, and the number of
captions (0: none, which is one sample as well).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from eve_ds import limits
from eve_ds.data.sample_names import caption_label, split_name
from eve_ds.data.shard_bytes import ShardBytes
from eve_ds.data.tar_headers import BLOCK, members, read_ahead, round_up

Varints = bytes | NDArray[np.uint8]
"""Stored form of a layout, before base64."""
_NUMBERS = 3
"""Numbers that are stored for each group."""
_MOST_BYTES = 6
"""Bytes of the longest varint: 42 bits, a terabyte in blocks and more."""


class ShardLayout:
    """Groups of one shard in their order.

    Args:
        starts: offset of the first header of each group, in bytes; int64, as the other two.
        ends: offset of the block after the last member of each group, in bytes.
        captions: number of captions of each group.
    """

    def __init__(self, starts: NDArray[np.int64], ends: NDArray[np.int64], captions: NDArray[np.int64]) -> None:
        self.starts, self.ends, self.captions = starts, ends, captions
        self._last_samples = np.maximum(captions, 1).cumsum()
        self._num_samples = int(self._last_samples[-1]) if len(captions) else 0

    def __len__(self) -> int:
        """Number of samples."""
        return self._num_samples

    def locate(self, number: int) -> tuple[int, int]:
        """Return the group of a sample, and its index among the samples of the group."""
        group = int(self._last_samples.searchsorted(number, side="right"))
        return group, number - (int(self._last_samples[group - 1]) if group else 0)

    def contains(self, other: ShardLayout) -> bool:
        """Whether each group of another layout is a part of its own group of this one, as after damage."""
        around = self.starts.searchsorted(other.starts, side="right") - 1
        if (around < 0).any() or len(np.unique(around)) < len(around):
            return False
        return bool(((other.ends <= self.ends[around]) & (other.captions <= self.captions[around])).all())


def encode(layout: ShardLayout) -> str:
    """Return the stored form of a layout, as ASCII text."""
    gaps = layout.starts - np.concatenate([[0], layout.ends[:-1]])
    numbers = np.stack([gaps // BLOCK, (layout.ends - layout.starts) // BLOCK, layout.captions], axis=1)
    return base64.b64encode(_varints(numbers.ravel().tolist())).decode("ascii")


def decode_text(text: str) -> Varints:
    """Return the varints of a stored layout; raises ValueError if the text is not base64."""
    return base64.b64decode(text, validate=True)


def decode(varints: Varints, samples: int, size: int) -> ShardLayout:
    """Return the layout that :func:`encode` stored.

    Args:
        varints: result of :func:`decode_text`.
        samples: number of samples that the layout must have.
        size: bytes of the shard, in which all groups must lie.

    Raises:
        ValueError: the varints are no layout of such a shard.
    """
    numbers = _numbers(np.frombuffer(varints, dtype=np.uint8))
    if len(numbers) % _NUMBERS or len(numbers) > _NUMBERS * limits.SHARD_SAMPLES:
        raise ValueError(f"{len(numbers)} numbers are no groups of {_NUMBERS}")
    gaps, blocks, captions = numbers.reshape(-1, _NUMBERS).T
    if (blocks < 1).any():
        raise ValueError("a group is empty")
    # Floats, since 64 bits could not hold sums of hostile numbers; those of a real shard are exact.
    found, end = np.maximum(captions, 1).sum(dtype=np.float64), (gaps + blocks).sum(dtype=np.float64) * BLOCK
    if found != samples:
        raise ValueError(f"{found:.0f} samples, not {samples}")
    if end > round_up(size):
        raise ValueError(f"groups up to byte {end:,.0f}, beyond the end at {size:,}")
    ends = (gaps + blocks).cumsum()
    return ShardLayout((ends - blocks) * BLOCK, ends * BLOCK, np.ascontiguousarray(captions))


def scan_layout(stored: ShardBytes) -> ShardLayout:
    """Find the layout of a shard by its headers; members are grouped by the rules of `webdataset`.

    Raises:
        OSError: the storage failed.
    """
    starts, ends, captions = [], [], []
    key, labels = None, set[str]()
    again = partial(stored.reread, size=BLOCK)
    for member in members(read_ahead(stored.read_at), stored.size, again=again):
        prefix, extension = split_name(member.name)
        if prefix is None or extension is None:
            continue
        if prefix != key:
            key, labels = prefix, set()
            starts.append(member.header)
            ends.append(0)
            captions.append(0)
        if (label := caption_label(extension)) is not None:
            labels.add(label)
        ends[-1], captions[-1] = round_up(member.end), len(labels)
    return ShardLayout(*(np.array(column, dtype=np.int64) for column in (starts, ends, captions)))


def _varints(numbers: Iterable[int]) -> bytes:
    return bytes(byte for number in numbers for byte in _varint(number))


def _varint(number: int) -> Iterator[int]:
    while number > 0x7F:
        yield number & 0x7F | 0x80
        number >>= 7
    yield number


def _numbers(stored: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Numbers of a sequence of varints."""
    if not len(stored):
        return np.zeros(0, dtype=np.int64)
    ends = np.flatnonzero(stored < 0x80)
    if not len(ends) or ends[-1] != len(stored) - 1:
        raise ValueError("the last number is cut")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_BYTES:
        raise ValueError(f"a number has {lengths.max()} bytes, more than {_MOST_BYTES}")
    shifts = 7 * (np.arange(len(stored)) - np.repeat(starts, lengths))
    numbers: NDArray[np.int64] = np.add.reduceat((stored & 0x7F).astype(np.int64) << shifts, starts)
    return numbers
