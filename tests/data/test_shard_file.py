"""Reading single samples of a tar, by a scan or an index: compared with webdataset, with damaged and hostile files."""

import contextlib
import io
import logging
import os
import tarfile

import pytest
from tars import samples, write_tar
from webdataset.tariterators import tarfile_samples

from eve_ds import limits
from eve_ds.data.errors import BadSample
from eve_ds.data.sample_names import caption_label
from eve_ds.data.shard_bytes import FileBytes
from eve_ds.data.shard_file import ShardFile
from eve_ds.data.shard_index import decode, decode_text, encode, scan_layout
from eve_ds.data.tar_headers import HEADER_BYTES


def opened(path, layout=None):
    return ShardFile(str(path), FileBytes(path), layout)


def stored_layout(path):
    """Layout of a tar as an index stores it."""
    with contextlib.closing(FileBytes(path)) as stored:
        layout = scan_layout(stored)
        return decode(decode_text(encode(layout)), len(layout), stored.size)


def all_samples(path, layout=None):
    with contextlib.closing(opened(path, layout)) as shard:
        return [shard.read(number)[:2] for number in range(len(shard))]


def ours(path):
    """All samples, which are the same by a scan and by an index."""
    found = all_samples(path)
    assert all_samples(path, stored_layout(path)) == found
    return found


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


# ---------------------------------------------------------------------------------------------- layouts of an index


def test_an_index_saves_the_scan(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", samples(50))
    layout, read = stored_layout(path), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: read.append(offset) or pread(fd, size, offset))
    with contextlib.closing(opened(path, layout)) as shard:
        assert len(shard) == 50
        assert not read
        for number in (31, 3):
            assert shard.read(number).key == f"s{number:04d}"
        assert len(read) == 2


@pytest.mark.parametrize("name", ["s0002.jpg", "s0002.txt", "s0000.jpg", "s0004.txt"])
@pytest.mark.parametrize("data", [b"\xff" * 512, bytes(512), b"renamed"])
def test_damage_leaves_the_numbers_of_an_index(tmp_path, caplog, name, data):
    """Workers that have not met the damage number the samples by the index, so that each is still read once."""
    path = write_tar(tmp_path / "a.tar", [member for member in samples(5) if not member[0].endswith(".json")])
    layout, whole = stored_layout(path), all_samples(path)
    damage(path, headers(path)[name], data)
    left = [number for number in range(5) if f"s{number:04d}" != name[:5]]
    with contextlib.closing(opened(path, layout)) as shard:
        key, fields, _ = shard.read(int(name[1:5]))
        assert (key, len(fields)) == (name[:5], 1)
        assert [shard.read(number)[:2] for number in left] == [whole[number] for number in left]
        assert len(shard) == 5
    assert not caplog.records


def test_a_sample_of_which_nothing_is_left_is_counted(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", os.urandom(600)) for n in range(6)])
    layout, whole = stored_layout(path), all_samples(path)
    damage(path, headers(path)["2.txt"], b"\xff" * 512)
    with contextlib.closing(opened(path, layout)) as shard:
        for ask in (shard.read, shard.image):
            with pytest.raises(BadSample, match=r"broken tar entry \(no member stands where the index says\)"):
                ask(2)
        assert shard.read(5)[:2] == whole[5]


@pytest.mark.parametrize("lost", [1, 700, 5000])
def test_an_incomplete_shard_with_an_index_lacks_its_last_samples(tmp_path, lost):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", os.urandom(600)) for n in range(6)])
    layout, whole = stored_layout(path), all_samples(path)
    os.truncate(path, headers(path)["5.txt"] + 512 + 600 - lost)
    with contextlib.closing(opened(path, layout)) as shard:
        complete = {1: 5, 700: 5, 5000: 2}[lost]
        assert [shard.read(number)[:2] for number in range(complete)] == whole[:complete]
        for number in range(complete, 6):
            with pytest.raises(BadSample, match="broken tar entry"):
                shard.read(number)


def pairs(*sizes, captions=1):
    """Pairs with images of these sizes; images and captions are told apart by their bytes."""
    texts = [""] if captions == 1 else [f"{number}." for number in range(captions)]
    return [
        member
        for number, size in enumerate(sizes)
        for member in (
            (f"s{number}.jpg", bytes([number]) * size),
            *((f"s{number}.{text}txt", f"{number} {text}".encode()) for text in texts),
        )
    ]


OTHER_LAYOUTS = {
    "images of other sizes": pairs(100, 3000, 100, 1400),
    "another order": pairs(1400, 3000, 100, 100)[::-1],
    "a caption for blocks of an image": [
        ("s0.jpg", b"x"),
        ("s0.0.txt", b"z"),
        ("s0.1.txt", b"y"),
        *pairs(0, 3000, 100, 100)[2:],
    ],
    "names of other keys": [(f"{n}.{e}", b"x" * 600) for n in range(4) for e in ("a", "b")],
    "members of their own keys": [(f"{n}{e}.txt", d) for n, (e, d) in enumerate(pairs(1400, 3000, 100, 100))],
    "fewer samples": pairs(2000, 2000),
    "more samples": pairs(*[100] * 7),
    "more captions": pairs(900, 100, captions=3),
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
@pytest.mark.parametrize("first", range(4))
def test_a_tar_of_another_layout_is_scanned_with_one_warning(tmp_path, caplog, name, first):
    """Both tars have the same size, which alone does not tell them apart; `first` is the sample that is read first."""
    indexed = write_tar(tmp_path / "indexed.tar", pairs(1400, 3000, 100, 100))
    path = write_tar(tmp_path / "a.tar", OTHER_LAYOUTS[name])
    for tar in (indexed, path):
        os.truncate(tar, 20480)
    layout, expected = stored_layout(indexed), all_samples(path)
    with contextlib.closing(opened(path, layout)) as shard, caplog.at_level(logging.WARNING):
        for number in (first, *range(4)):
            with contextlib.suppress(BadSample):
                assert shard.read(number)[:2] in expected
        assert [shard.read(number)[:2] for number in range(len(shard))] == expected
    (record,) = caplog.records
    assert f"shard {path} has another layout than its index says ({len(expected)} samples found)" in record.message


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_names_of_images_are_right_or_missing_in_a_tar_of_another_layout(tmp_path, name):
    indexed = write_tar(tmp_path / "indexed.tar", pairs(1400, 3000, 100, 100))
    path = write_tar(tmp_path / "a.tar", OTHER_LAYOUTS[name])
    with contextlib.closing(opened(path, stored_layout(indexed))) as shard:
        for number in range(4):
            with contextlib.suppress(BadSample):
                assert shard.image(number) in {key.partition("-")[0] for key, _ in all_samples(path)}
    assert_same_images(path, stored_layout(indexed))


SPANS = (HEADER_BYTES, 2 * HEADER_BYTES, 2**18)


def assert_same_images(path, layout):
    """Names of images in their order are those that are read one at a time, whatever bytes a read has."""
    for span in SPANS:
        with contextlib.closing(opened(path, layout)) as shard, contextlib.closing(opened(path, layout)) as single:
            for number, found in enumerate(shard.images(span, 3)):
                try:
                    assert found == single.image(number)
                except BadSample:
                    assert found is None
            assert number == max(len(single), len(shard)) - 1


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_images_are_read_in_spans_of_any_length(tmp_path, format):
    sizes = [0, 100, 511, 512, 3000, 4096, 5000, 20_000, 300_000, 100, 0, 8192, 100]
    members = [(f"{'long' * (40 * (n % 3))}-{n}.jpg", bytes(size)) for n, size in enumerate(sizes)]
    path = write_tar(tmp_path / "a.tar", members, format)
    assert_same_images(path, stored_layout(path))
    assert_same_images(path, None)


@pytest.mark.parametrize("broken", [0, 3, 6])
def test_names_of_images_stay_in_place_behind_damage(tmp_path, broken):
    path = write_tar(tmp_path / "a.tar", samples(7))
    layout = stored_layout(path)
    damage(path, headers(path)[f"s{broken:04d}.jpg"], b"\xff" * 512)
    assert_same_images(path, layout)
    with contextlib.closing(opened(path, layout)) as shard:
        found = list(shard.images(2**18, 0))
    del found[broken]
    assert found == [f"s{number:04d}" for number in range(7) if number != broken]


# -------------------------------------------------------------------------------------- several captions of an image

CAPTIONS = {
    "one": ({"txt": b"a"}, [("k", b"a")]),
    "one with a number": ({"3.txt": b"a"}, [("k-3", b"a")]),
    "several": ({"0.txt": b"a", "1.txt": b"b", "2.txt": b"c"}, [("k-0", b"a"), ("k-1", b"b"), ("k-2", b"c")]),
    "some left out": ({"1.txt": b"b", "4.txt": b"e"}, [("k-1", b"b"), ("k-4", b"e")]),
    "numbers of two digits": ({"9.txt": b"j", "10.txt": b"k"}, [("k-9", b"j"), ("k-10", b"k")]),
    "capitals": ({"0.TXT": b"a", "1.Txt": b"b"}, [("k-0", b"a"), ("k-1", b"b")]),
    "with a plain one": ({"txt": b"a", "0.txt": b"b"}, [("k", b"a"), ("k-0", b"b")]),
    "none": ({}, [("k", None)]),
    "no numbers": ({"txt": b"a", "alt.txt": b"x", "0x1.txt": b"x", "-1.txt": b"x", "1.0.txt": b"x"}, [("k", b"a")]),
    "digits that are no decimals": ({"txt": b"a", "².txt": b"x", "٣.txt": b"x"}, [("k", b"a")]),
}


@pytest.mark.parametrize("place", ["before", "after", "between"])
@pytest.mark.parametrize("name", CAPTIONS)
def test_every_caption_of_an_image_is_a_sample(tmp_path, name, place):
    texts, expected = CAPTIONS[name]
    texts = [(f"k.{extension}", text) for extension, text in texts.items()]
    image, about = ("k.jpg", b"image"), ("k.json", b"{}")
    order = {"before": [image, about, *texts], "after": [*texts, image, about], "between": [image, *texts, about]}
    members = [("a.jpg", b"1"), ("a.txt", b"2"), *order[place], ("z.txt", b"3")]
    path = write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)
    found = ours(path)
    assert [key for key, _ in found] == ["a", *(key for key, _ in expected), "z"]
    for (_, fields), (_, caption) in zip(found[1:-1], expected, strict=True):
        assert (fields["jpg"], fields["json"], fields.get("txt")) == (b"image", b"{}", caption)
        assert not [name for name in fields if caption_label(name)]
    with contextlib.closing(opened(path, stored_layout(path))) as shard:
        assert [shard.image(number) for number in range(len(shard))] == ["a", *["k"] * len(expected), "z"]
        assert list(shard.images(2**18, 0)) == ["a", *["k"] * len(expected), "z"]
        assert [shard.read(number).image for number in range(len(shard))] == ["a", *["k"] * len(expected), "z"]


def test_a_broken_caption_costs_one_sample(tmp_path):
    members = [("k.jpg", b"image"), *((f"k.{number}.txt", f"{number}".encode()) for number in range(4)), ("z.txt", b"")]
    path = write_tar(tmp_path / "a.tar", members)
    layout = stored_layout(path)
    damage(path, headers(path)["k.1.txt"], b"\xff" * 512)
    with contextlib.closing(opened(path, layout)) as shard:
        assert [shard.read(number).key for number in (0, 1, 2, 4)] == ["k-0", "k-2", "k-3", "z"]
        with pytest.raises(BadSample, match=r"broken tar entry \(only 3 captions can be found in the group\)"):
            shard.read(3)
    assert [key for key, _ in all_samples(path)] == ["k-0", "k-2", "k-3", "z"]


def test_two_captions_of_one_number_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("k.0.txt", b"a"), ("k.0.TXT", b"b"), ("z.txt", b"c")])
    with contextlib.closing(opened(path)) as shard:
        assert len(shard) == 2
        with pytest.raises(BadSample, match=r"k\.0\.TXT occurs twice"):
            shard.read(0)


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


class OnceWrong(FileBytes):
    """Shard of a server whose first answer for some bytes is wrong."""

    def __init__(self, path, wrong):
        super().__init__(path)
        self.wrong, self.fresh = wrong, []

    def read_at(self, offset, size):
        data = super().read_at(offset, size)
        inside = range(max(self.wrong.start - offset, 0), max(min(self.wrong.stop - offset, size), 0))
        return data[: inside.start] + bytes(len(inside)) + data[inside.stop :] if inside else data

    def reread(self, offset, size):
        self.fresh.append(offset)
        self.wrong = range(0)
        return super().read_at(offset, size)


WRONG = {"a header": range(3584, 4096), "many samples": range(1024, 20_000), "the start": range(6000)}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("method", ["read", "image", "scan_layout"])
def test_a_server_is_asked_again_before_a_sample_is_left_out(tmp_path, wrong, method, caplog):
    path = write_tar(tmp_path / "a.tar", samples(40))
    layout = stored_layout(path)
    right = [opened(path, layout).read(number) for number in range(40)]
    stored = OnceWrong(path, wrong)
    shard = ShardFile("a.tar", stored, None if method == "scan_layout" else layout)
    if method == "image":
        assert [shard.image(number) for number in range(40)] == [sample.image for sample in right]
    else:
        assert [shard.read(number) for number in range(40)] == right
    assert 1 <= len(stored.fresh) <= (4 if method == "scan_layout" else 1)
    assert not caplog.text
