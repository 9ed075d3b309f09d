"""Reading single samples of a tar: compared with webdataset, and with damaged and hostile files."""

import io
import os
import tarfile

import pytest
from tars import samples, write_tar
from webdataset.tariterators import tarfile_samples

from eve_ds import limits
from eve_ds.data.errors import BadSample
from eve_ds.data.shard_bytes import FileBytes
from eve_ds.data.shard_file import ShardFile


def opened(path):
    return ShardFile(str(path), FileBytes(path))


def ours(path):
    shard = opened(path)
    try:
        return [shard.read(number)[:2] for number in range(len(shard))]
    finally:
        shard.close()


def theirs(path):
    read = []
    for sample in tarfile_samples([{"url": str(path)}]):
        read.append((sample.pop("__key__"), {name: data for name, data in sample.items() if name[:2] != "__"}))
    return read


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["s", "a/b.c/s", "long/" * 18 + "s", "very long name " * 12, "día "])
def test_samples_equal_those_of_webdataset(tmp_path, format, prefix):
    if format == tarfile.USTAR_FORMAT and prefix.startswith("very"):
        pytest.skip("ustar cannot hold the name")
    path = write_tar(tmp_path / "a.tar", samples(5, prefix), format)
    assert ours(path) == theirs(path)
    assert len(ours(path)) == 5


def test_unusual_members_are_grouped_as_in_webdataset(tmp_path):
    members = [
        ("./", None),
        ("no_extension", b"x"),
        ("__meta__.json", b"x"),
        ("__reserved__", b"x"),
        ("dir/__meta__/a.txt", b"x"),
        ("a.JPG", b"1"),
        ("a.seg.png", b"2"),
        ("folder", None),
        ("a.txt", b""),
        ("b.txt", b"3"),
        ("a.txt", b"again"),
        (".hidden", b"4"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    assert ours(path) == theirs(path)
    assert [key for key, _ in ours(path)] == ["__meta__", "dir/__meta__/a", "a", "b", "a"]


def test_sizes_in_pax_headers_are_read(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size, info.pax_headers = 5, {"comment": "é" * 300, "size": "5"}
            tar.addfile(info, io.BytesIO(b"hello"))
    assert ours(path) == theirs(path) == [(str(number), {"txt": b"hello"}) for number in range(3)]


def test_only_the_requested_sample_is_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", os.urandom(100_000)) for n in range(20)])
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: read.append(size) or pread(fd, size, offset))
    shard = opened(path)
    assert sum(read) < 25 * 4096, "opening a shard must read headers only"
    read.clear()
    shard.read(13)
    assert sum(read) < 101_000
    shard.close()


def headers(path):
    with tarfile.open(path) as tar:
        return {member.name: member.offset for member in tar}


def damage(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("data", [b"\xff" * 512, bytes(512), b"renamed"])
def test_broken_entry_loses_only_its_sample(tmp_path, data):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", os.urandom(600)) for n in range(6)])
    whole = ours(path)
    damage(path, headers(path)["2.txt"], data)
    assert ours(path) == whole[:2] + whole[3:]
    shard = opened(path)
    with pytest.raises(BadSample, match="only 5 samples can be found") as caught:
        shard.read(5)
    assert caught.value.reason == "broken tar entry"
    shard.close()


def test_broken_first_member_keeps_the_other_members_of_the_sample(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(3))
    whole = ours(path)
    damage(path, headers(path)["s0001.jpg"], b"\xff" * 512)
    key, fields = ours(path)[1]
    assert ours(path)[0::2] == whole[0::2]
    assert (key, sorted(fields)) == ("s0001", ["json", "txt"])


def test_damage_within_a_sample_loses_one_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(3))
    whole = ours(path)
    damage(path, headers(path)["s0001.json"], b"\xff" * 512)
    key, fields = ours(path)[1]
    assert ours(path)[0::2] == whole[0::2]
    assert (key, fields["jpg"], fields["txt"]) == ("s0001", whole[1][1]["jpg"], whole[1][1]["txt"])
    assert "json" not in fields


@pytest.mark.parametrize("lost", [1, 700, 1500, 5000])
def test_truncated_shard_keeps_its_complete_members(tmp_path, lost):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", os.urandom(600)) for n in range(6)])
    whole, end = ours(path), headers(path)["5.txt"] + 512 + 600
    with open(path, "r+b") as file:
        file.truncate(end - lost)
    kept = ours(path)
    assert kept == whole[: len(kept)]
    assert len(kept) == {1: 5, 700: 5, 1500: 5, 5000: 2}[lost]


def test_two_members_with_one_extension_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"1"), ("a.TXT", b"2"), ("b.txt", b"3")])
    shard = opened(path)
    with pytest.raises(BadSample, match=r"a\.TXT occurs twice"):
        shard.read(0)
    assert shard.read(1)[:2] == ("b", {"txt": b"3"})
    shard.close()


# -------------------------------------------------------------------------------------------------- hostile headers


def header(name, size=b"00000000000\0", kind=b"0"):
    """One header block with a valid checksum and any bytes as its size."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records, size=None):
    stored = b"%011o\0" % (len(records) if size is None else size)
    return header("PaxHeader", stored, b"x") + records + bytes(-len(records) % 512)


def base_256(size):
    return b"\x80" + size.to_bytes(11, "big")


HOSTILE = {
    "negative octal": header("bad.txt", b"-0000001000\0"),
    "negative base 256": header("bad.txt", b"\xff" * 12),
    "size in letters": header("bad.txt", b"00000zz0000\0"),
    "size with an underscore": header("bad.txt", b"0000000_100\0"),
    "a terabyte": header("bad.txt", base_256(2**40)),
    "more than a file can hold": header("bad.txt", base_256(2**87)),
    "long name of a terabyte": header("bad.txt", base_256(2**40), b"L"),
    "long link of a terabyte": header("bad.txt", base_256(2**40), b"K"),
    "pax records of a terabyte": header("bad.txt", base_256(2**40), b"x"),
    "global records of a terabyte": header("bad.txt", base_256(2**40), b"g"),
    "pax length of 5,000 digits": pax(b"9" * 5000 + b" size=1\n"),
    "pax size of 5,000 digits": pax(b"5013 size=" + b"9" * 5000 + b"\n") + header("bad.txt"),
    "pax size of a terabyte": pax(b"22 size=1099511627776\n") + header("bad.txt"),
    "pax size below zero": pax(b"12 size=-5\n") + header("bad.txt"),
    "pax length of zero": pax(b"0 size=5\n"),
    "pax length below its own": pax(b"1 size=5\n"),
    "sparse member of a terabyte": header("bad.txt", b"00000000000\0", b"S"),
    "link with a size": header("bad.txt", b"00000001000\0", b"1"),
    "folder with a size": header("bad.txt", b"00000001000\0", b"5"),
    "device": header("bad.txt", kind=b"3"),
    "unknown kind": header("bad.txt", kind=b"Z"),
    "no number": header("bad.txt", b" " * 12),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_header_costs_no_other_sample(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", os.urandom(600)) for n in range(6)])
    whole, data, place = ours(path), path.read_bytes(), headers(path)["3.txt"]
    path.write_bytes(data[:place] + HOSTILE[name] + data[place:])
    assert [sample for sample in ours(path) if sample[0] != "bad"] == whole
    alone = tmp_path / "alone.tar"
    alone.write_bytes(HOSTILE[name])
    assert {key for key, _ in ours(alone)} <= {"bad"}


def test_an_extension_header_above_the_cap_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "TAR_RECORD_BYTES", 1000)
    path = write_tar(tmp_path / "a.tar", [("x" * 1100 + ".txt", b"1"), ("b.txt", b"2")], tarfile.GNU_FORMAT)
    assert ours(path) == [("b", {"txt": b"2"})]


@pytest.mark.timeout(20)
def test_many_small_pax_records_are_read_in_linear_time(tmp_path):
    records = b"6 a=b\n" * 150_000
    path = tmp_path / "a.tar"
    path.write_bytes(pax(records) + header("a.txt"))
    assert ours(path) == [("a", {"txt": b""})]


@pytest.mark.timeout(20)
def test_a_sparse_file_of_a_terabyte_is_searched_up_to_the_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "TAR_DAMAGE_BYTES", 2**20)
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"1")])
    os.truncate(path, 2**40)
    assert ours(path) == [("a", {"txt": b"1"})]


@pytest.mark.timeout(20)
def test_samples_above_the_caps_are_counted(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(header("big.jpg", base_256(2**40)))
    os.truncate(path, 512 + 2**40)  # a hole: the file holds what its header says
    with path.open("ab") as file:
        file.write(header("b.txt", b"00000000001\0") + b"1" + bytes(511))
    shard = opened(path)
    with pytest.raises(BadSample, match=r"too large a sample \(1,099,511,628,288 bytes, more than 1,073,741,824\)"):
        shard.read(0)
    assert shard.read(1)[:2] == ("b", {"txt": b"1"})
    shard.close()
    monkeypatch.setattr(limits, "SAMPLE_MEMBERS", 3)
    shard = opened(write_tar(tmp_path / "b.tar", [(f"a.{n}", b"") for n in range(4)]))
    with pytest.raises(BadSample, match=r"too large a sample .*more than 3 members"):
        shard.read(0)
    shard.close()


def test_a_shard_cut_while_it_is_open_is_counted(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", bytes(600)), ("b.txt", bytes(600))])
    shard = opened(path)
    os.truncate(path, 1200)
    with pytest.raises(BadSample, match=r"broken tar entry \(the shard is shorter than when it was opened\)"):
        shard.read(1)
    shard.close()


def test_files_of_macos_are_no_members(tmp_path):
    plain = samples(3)
    mixed = [(f"{folder}._{name}", b"mac") for folder in ("", "__MACOSX/") for name, _ in plain]
    mixed += [(".DS_Store", b"mac"), ("__MACOSX/s0000.jpg", b"mac")]
    between = [member for pair in zip(mixed, plain, strict=False) for member in pair]
    path = write_tar(tmp_path / "a.tar", between + mixed)
    assert ours(path) == ours(write_tar(tmp_path / "b.tar", plain))
