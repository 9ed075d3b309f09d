"""Shard writer: written samples, skipped samples with reasons, reproducible bytes, and folders of other data."""

import errno
import gzip
import hashlib
import io
import json
import os
import signal
import struct
import tarfile
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from eve_ds.data import shard_writer
from eve_ds.data.image_check import encode_for_shard
from eve_ds.data.importers import BadSample, Candidate, FileSlice, GeneratedScenes, InlineBytes, Skip, SourceError
from eve_ds.data.shard_bytes import FileBytes
from eve_ds.data.shard_captions import read_captions
from eve_ds.data.shard_index import decode, scan_layout
from eve_ds.data.shard_writer import WriterOptions, write_shards
from eve_ds.data.shards import find_shards
from eve_ds.data.writing import one_shard
from eve_ds.data.writing.excluded_ids import read_ids
from eve_ds.data.writing.one_shard import split_into_tasks
from eve_ds.data.writing.progress_files import OutputError
from eve_ds.signals import Stopped, StopSignals


def encoded(image_format="PNG", size=(16, 12), mode="RGB", **options):
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(file, image_format, **options)
    return file.getvalue()


class ListSource:
    """Source that yields the given items."""

    def __init__(self, *items, name="list"):
        self.items, self.total = items, len(items)
        self.description = {"format": name}

    def __iter__(self):
        return iter(self.items)


def candidate(name, captions=("a cat",), data=None, **fields):
    return Candidate(name, InlineBytes(encoded() if data is None else data), captions, fields.pop("id", name), **fields)


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def read_samples(folder):
    index = json.loads((folder / "index.json").read_text())
    urls = [str(folder / shard["name"]) for shard in index["shards"]]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


# ------------------------------------------------------------------------------------------------- written samples


def test_webdataset_reads_a_written_sample(tmp_path):
    data = encoded("JPEG")
    report = write_shards(ListSource(candidate("x/1.jpg", (" two cats\n",), data, id="7")), tmp_path, WriterOptions())
    (sample,) = read_samples(tmp_path)
    assert sample["__key__"] == "000000000"
    assert sample["jpg"] == data
    assert sample["txt"] == b"two cats"
    assert json.loads(sample["json"]) == {"image_id": "7", "name": "x/1.jpg"}
    assert (report["samples"], report["images"], report["shards"], report["skipped"]) == (1, 1, 1, {})
    assert (tmp_path / "ids.txt").read_text() == "7\n"


def test_every_caption_of_an_image_becomes_a_sample(tmp_path):
    items = [candidate("a", ("one", "", b"three", b"\xff")), candidate("b", ("four",))]
    report = write_shards(ListSource(*items), tmp_path, WriterOptions())
    first, second = read_samples(tmp_path)
    assert (first["__key__"], first["0.txt"], first["2.txt"]) == ("000000000", b"one", b"three")
    assert "1.txt" not in first
    assert (second["__key__"], second["txt"]) == ("000000001", b"four")
    (shard,) = find_shards(str(tmp_path))
    assert shard.num_samples == 3
    scanned = scan_layout(FileBytes(shard.address))
    stored = decode(shard.groups, 3, shard.bytes)
    assert [stored.starts.tolist(), stored.ends.tolist()] == [scanned.starts.tolist(), scanned.ends.tolist()]
    assert stored.captions.tolist() == scanned.captions.tolist() == [2, 1]
    assert (report["samples"], report["images"]) == (3, 2)
    assert {reason: entry["count"] for reason, entry in report["skipped"].items()} == {
        "empty caption": 1,
        "caption is not UTF-8": 1,
    }


def test_index_lists_names_sizes_and_digests(tmp_path):
    write_shards(GeneratedScenes(25), tmp_path, WriterOptions(samples_per_shard=10))
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["version"] == 2
    assert [shard["name"] for shard in index["shards"]] == [f"shard-{n:06d}.tar" for n in range(3)]
    for shard in index["shards"]:
        data = (tmp_path / shard["name"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        with tarfile.open(tmp_path / shard["name"]) as tar:
            members = tar.getmembers()
        assert len(members) == 3 * shard["samples"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert sum(shard["samples"] for shard in index["shards"]) == 25
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ids.txt", "index.json", "report.json", *(f"shard-{n:06d}.tar" for n in range(3)),
    ]  # fmt: skip


def test_shard_size_counts_captions_but_no_skips():
    source = ListSource(
        candidate("a", ("1", "2")), Skip("s", "why"), candidate("b"), candidate("c", ("1", "2", "3")), Skip("t", "why")
    )
    tasks = list(split_into_tasks(source, WriterOptions(samples_per_shard=3)))
    assert [[c.name for c in task.candidates] for task in tasks] == [["a", "b"], ["c"], []]
    assert [task.first_index for task in tasks] == [0, 2, 3]
    skipped = [{"why": {"count": 1, "examples": [name]}} for name in "st"]
    assert [task.skipped.reasons for task in tasks] == [skipped[0], {}, skipped[1]]


def test_limit_counts_images():
    source = ListSource(*(candidate(str(n)) for n in range(10)))
    tasks = list(split_into_tasks(source, WriterOptions(samples_per_shard=4, limit=6)))
    assert [[c.name for c in task.candidates] for task in tasks] == [["0", "1", "2", "3"], ["4", "5"]]


# ------------------------------------------------------------------------------------------------- skipped samples


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def flipped_byte(data, position):
    return data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero-size image"),
        (b"<html>not found</html>", "no image but a web page"),
        (encoded("JPEG", (200, 200))[:-300], "truncated image"),
        (encoded("PNG", (200, 200))[:-100], "truncated image"),
        (flipped_byte(encoded("PNG", (200, 200)), 60), "unreadable image"),
        (png_header(0, 5), "zero-size image"),
        (png_header(10_000, 10_000), "decompression bomb"),
        (png_header(50_000, 50_000), "decompression bomb"),
    ],
    ids=["empty", "html", "cut-jpeg", "cut-png", "flipped-byte", "zero", "bomb", "large-bomb"],
)
def test_unusable_images_give_their_reason(data, reason):
    with pytest.raises(BadSample) as caught:
        encode_for_shard(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("image_format", "mode", "suffix"),
    [
        ("JPEG", "RGB", "jpg"),
        ("JPEG", "CMYK", "jpg"),
        ("PNG", "RGBA", "png"),
        ("PNG", "P", "png"),
        ("WEBP", "RGB", "webp"),
    ],
)
def test_common_formats_keep_their_bytes(image_format, mode, suffix):
    data = encoded(image_format, mode=mode)
    assert encode_for_shard(data) == (data, suffix)


def test_other_formats_become_png():
    stored, suffix = encode_for_shard(encoded("BMP"))
    with Image.open(io.BytesIO(stored)) as image:
        assert (suffix, image.format, image.mode, image.size) == ("png", "PNG", "RGB", (16, 12))
        assert image.tobytes() == Image.linear_gradient("L").resize((16, 12)).convert("RGB").tobytes()


def test_max_size_shrinks_only_images_with_longer_shorter_sides():
    stored, suffix = encode_for_shard(encoded("PNG", (90, 60), "RGBA"), max_size=20)
    with Image.open(io.BytesIO(stored)) as image:
        assert (suffix, image.format, image.size) == ("jpg", "JPEG", (30, 20))
    small = encoded("PNG", (90, 20))
    assert encode_for_shard(small, max_size=20) == (small, "png")


def test_max_size_applies_the_exif_orientation_and_keeps_the_content():
    upright = Image.linear_gradient("L").resize((300, 600)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise for display
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", exif=exif, quality=95)
    with Image.open(io.BytesIO(encode_for_shard(file.getvalue(), max_size=50)[0])) as image:
        assert image.size == (50, 100)
        expected = upright.resize((50, 100), Image.Resampling.BICUBIC)
        differences = [abs(a - b) for a, b in zip(image.tobytes(), expected.tobytes(), strict=True)]
    assert max(differences) < 12, "differences must be JPEG noise"


def test_report_counts_and_names_skipped_samples(tmp_path):
    (tmp_path / "folder").mkdir()
    items = [candidate("good")]
    items += [candidate(f"empty{n}", data=b"") for n in range(7)]
    items += [Candidate("gone", FileSlice(str(tmp_path / "gone.jpg")), ("a",), "gone")]
    items += [Candidate("folder", FileSlice(str(tmp_path / "folder")), ("a",), "folder")]
    items += [candidate("mute", ("  ",)), Skip("s1", "malformed entry")]
    for samples_per_shard in (2, 100):
        out = tmp_path / f"out{samples_per_shard}"
        report = write_shards(ListSource(*items), out, WriterOptions(samples_per_shard))
        assert report["skipped"] == {
            "zero-size image": {"count": 7, "examples": [f"empty{n}" for n in range(5)]},
            "missing file": {"count": 1, "examples": ["gone"]},
            "not a regular file": {"count": 1, "examples": ["folder"]},
            "empty caption": {"count": 1, "examples": ["mute"]},
            "malformed entry": {"count": 1, "examples": ["s1"]},
        }
        assert report == json.loads((out / "report.json").read_text())
        shards = json.loads((out / "index.json").read_text())["shards"]
        assert [shard["name"] for shard in shards] == ["shard-000000.tar"], "empty shards must not be written"
        assert [path.name for path in out.glob("*.tar")] == ["shard-000000.tar"]


def test_source_without_usable_samples_is_refused_and_leaves_an_empty_folder(tmp_path):
    bad = ListSource(candidate("x", data=b""), candidate("y", data=b"gif?"))
    reasons = r"zero-size image: 1 \(as x\); unreadable image: 1 \(as y\)"
    with pytest.raises(SourceError, match=f"no sample could be used: {reasons}"):
        write_shards(bad, tmp_path, WriterOptions())
    assert list(tmp_path.iterdir()) == []
    write_shards(ListSource(candidate("z")), tmp_path, WriterOptions(limit=1))


def test_excluded_images_are_skipped(tmp_path):
    test_set = ListSource(candidate("t1.jpg", id="17"), candidate("t2.jpg", id="föö"), candidate("bad", data=b""))
    write_shards(test_set, tmp_path / "test", WriterOptions())
    ids = tmp_path / "test" / "ids.txt"
    assert ids.read_text(encoding="utf-8") == "17\nföö\n"
    train = ListSource(
        candidate("a", id="17"),
        candidate("b", id="170"),
        candidate("c", id="b/föö.jpg", aliases=("föö.jpg", "föö")),
        candidate("bad"),
    )
    report = write_shards(train, tmp_path / "train", WriterOptions(exclude_ids=(str(ids),)))
    assert (tmp_path / "train" / "ids.txt").read_text() == "170\nbad\n"
    assert report["skipped"] == {"excluded id": {"count": 2, "examples": ["a", "c"]}}
    assert report["excluded_ids"] == {"listed": 2, "matched": 2}


def test_an_id_with_any_whitespace_is_excluded_by_the_list_that_names_it(tmp_path):
    names = ["a  b.png", "Screenshot 9.00\u202fAM.png", "next\x85line.png", "tab\there.png", " edge.png "]
    write_shards(ListSource(*map(candidate, names)), tmp_path / "test", WriterOptions())
    ids = tmp_path / "test" / "ids.txt"
    assert len(ids.read_text(encoding="utf-8").split("\n")) == len(names) + 1, "one line per id, and the last end"
    train = ListSource(candidate("good"), *map(candidate, names))
    report = write_shards(train, tmp_path / "train", WriterOptions(exclude_ids=(str(ids),)))
    assert report["images"] == 1
    assert report["excluded_ids"] == {"listed": 5, "matched": 5}


def test_ids_of_another_program_are_split_at_line_feeds_alone(tmp_path):
    (tmp_path / "ids").write_bytes("a\u2028b\r\n\r\n c \n".encode())
    assert read_ids((str(tmp_path / "ids"),)).lines == {"a b", "c"}


NAMES = "a.png\né.png\n17\n"


@pytest.mark.parametrize(
    "data",
    [
        NAMES.encode(),
        b"\xef\xbb\xbf" + NAMES.encode(),
        NAMES.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + NAMES.replace("\n", "\r\n").encode(),
        NAMES.rstrip().encode(),
        f"\n\n{NAMES}\n".encode(),
        unicodedata.normalize("NFD", NAMES).encode(),
        b"[not a list].png\n" + NAMES.encode(),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_ids_of_any_editor_exclude_their_images(tmp_path, data, form):
    (tmp_path / "ids.txt").write_bytes(data)
    names = [unicodedata.normalize(form, name) for name in NAMES.split()]
    source = ListSource(candidate("good"), *map(candidate, names))
    report = write_shards(source, tmp_path / "out", WriterOptions(exclude_ids=(str(tmp_path / "ids.txt"),)))
    assert (report["images"], report["excluded_ids"]["matched"]) == (1, 3)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (NAMES.encode("utf-16"), "is UTF-16; this is not read: save it as UTF-8"),
        (NAMES.encode("utf-16-le"), "without a byte order mark"),
        (NAMES.encode("utf-32"), "UTF-16"),
        (gzip.compress(NAMES.encode()), "compressed by gzip; this is not read: unpack it"),
        (json.dumps(NAMES.split()).encode(), "are JSON: write one id a line, as in ids.txt"),
        (json.dumps({"ids": NAMES.split()}, indent=1).encode(), "are JSON: write one id a line"),
    ],
    ids=["utf-16", "utf-16 without mark", "utf-32", "gzip", "list", "object"],
)
def test_a_file_in_which_no_id_would_be_found_is_refused(tmp_path, data, found):
    (tmp_path / "ids.txt").write_bytes(data)
    with pytest.raises(SourceError, match=found):
        read_ids((str(tmp_path / "ids.txt"),))


def test_missing_file_of_excluded_ids_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"cannot read the ids to exclude from .*nothing: No such file"):
        read_ids((str(tmp_path / "nothing"),))


# ------------------------------------------------------------------------------------------------- reproducible bytes


def test_number_of_workers_does_not_change_the_bytes(tmp_path):
    options = WriterOptions(samples_per_shard=7)
    calls = []
    write_shards(GeneratedScenes(40), tmp_path / "1", options, 1)
    write_shards(GeneratedScenes(40), tmp_path / "3", options, 3, calls.append)
    assert digests(tmp_path / "1") == digests(tmp_path / "3")
    assert len(calls) == 6
    assert sum(call.record.samples for call in calls) == 40
    assert {(call.kept, call.total) for call in calls} == {(False, 40)}


def interrupted_after(shards):
    def stop(progress):
        nonlocal shards
        shards -= 1
        if not shards:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("damage", ["none", "leftovers", "lost shard", "short shard"])
def test_interrupted_run_continues_and_gives_the_same_bytes(tmp_path, damage):
    options = WriterOptions(samples_per_shard=5)
    write_shards(GeneratedScenes(30), tmp_path / "clean", options)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_shards(GeneratedScenes(30), out, options, 1, interrupted_after(4))
    assert not (out / "index.json").exists()
    if damage == "leftovers":
        (out / ".prepare" / "shard-000005.tar.999.tmp").write_bytes(b"half")
        (out / "report.json.999.tmp").write_bytes(b"half")
    elif damage == "lost shard":
        (out / "shard-000001.tar").unlink()
    elif damage == "short shard":
        (out / "shard-000001.tar").write_bytes(b"half")
    calls = []
    write_shards(GeneratedScenes(30), out, options, 1, calls.append)
    assert sum(call.kept for call in calls) == (3 if damage.endswith("shard") else 4)
    assert digests(out) == digests(tmp_path / "clean")


@pytest.mark.parametrize("name", ["submit", "wait", "shutdown"])
def test_signal_interrupts_no_call_that_takes_locks_of_the_workers(tmp_path, monkeypatch, name):
    """An exception in such a call may leave a lock taken, which a thread of the workers then waits for for ever."""
    ended = []

    def signaled(call):
        def send_and_call(*arguments, **settings):
            os.kill(os.getpid(), signal.SIGTERM)
            result = call(*arguments, **settings)
            ended.append(name)
            return result

        return send_and_call

    pool = type("Threads", (ThreadPoolExecutor,), {})
    if name == "wait":
        monkeypatch.setattr(shard_writer, "wait", signaled(shard_writer.wait))
    else:
        monkeypatch.setattr(pool, name, signaled(getattr(pool, name)))
    monkeypatch.setattr(shard_writer, "ProcessPoolExecutor", lambda workers, *_, **__: pool(workers))
    with StopSignals(), pytest.raises(Stopped):
        write_shards(GeneratedScenes(30), tmp_path / "out", WriterOptions(samples_per_shard=5), workers=2)
    assert ended


def test_complete_folder_does_not_change(tmp_path):
    first = write_shards(GeneratedScenes(10), tmp_path, WriterOptions())
    before = digests(tmp_path)
    calls = []
    assert write_shards(GeneratedScenes(10), tmp_path, WriterOptions(), 1, calls.append) == first
    assert (digests(tmp_path), calls) == (before, [])


def test_groups_are_the_same_bytes_after_a_kill_and_with_any_number_of_workers(tmp_path):
    items = [candidate(str(n), tuple(f"{n}-{k}" for k in range(n % 4))) for n in range(30)]
    options = WriterOptions(samples_per_shard=7)
    write_shards(ListSource(*items), tmp_path / "clean", options)
    write_shards(ListSource(*items), tmp_path / "two", options, 2)
    with pytest.raises(KeyboardInterrupt):
        write_shards(ListSource(*items), tmp_path / "killed", options, 1, interrupted_after(3))
    write_shards(ListSource(*items), tmp_path / "killed", options)
    assert digests(tmp_path / "clean") == digests(tmp_path / "two") == digests(tmp_path / "killed")


def test_an_id_of_several_groups_is_listed_once_and_first_where_it_came_first(tmp_path):
    items = [candidate(f"{n}", id=name) for n, name in enumerate(["b", "a", "b", "\ud800", "c", "a", "\ud800"])]
    report = write_shards(ListSource(*items), tmp_path, WriterOptions(samples_per_shard=2))
    assert (tmp_path / "ids.txt").read_text(encoding="utf-8").split("\n") == ["b", "a", "\ufffd", "c", ""]
    assert (report["samples"], report["images"]) == (7, 7), "images that are stored"


# ---------------------------------------------------------------------------------------- folders of other data


def as_version(version, folder, name):
    """Change a file of this version to one of an earlier version; the index of version 1 has no groups."""
    tree = json.loads((folder / name).read_text())
    tree["version"] = version
    for shard in tree.get("shards", []) if name == "index.json" else []:
        del shard["groups"]
    (folder / name).write_text(json.dumps(tree))


def test_a_complete_folder_of_version_1_needs_nothing(tmp_path):
    write_shards(GeneratedScenes(10), tmp_path, WriterOptions())
    for name in ("index.json", "report.json"):
        as_version(1, tmp_path, name)
    before = digests(tmp_path)
    assert write_shards(GeneratedScenes(10), tmp_path, WriterOptions())["version"] == 1
    assert digests(tmp_path) == before


@pytest.mark.parametrize("version", [1, 2])
def test_an_unfinished_folder_of_an_earlier_version_is_refused_in_one_line(tmp_path, version):
    with pytest.raises(KeyboardInterrupt):
        write_shards(GeneratedScenes(10), tmp_path, WriterOptions(2), 1, interrupted_after(1))
    as_version(version, tmp_path / ".prepare", "plan.json")
    before = digests(tmp_path)
    message = (
        rf"unfinished folder of another version .*\(version {version} there, 3 here\), .*remove it, or choose anoth"
    )
    with pytest.raises(OutputError, match=message):
        write_shards(GeneratedScenes(10), tmp_path, WriterOptions(2))
    assert digests(tmp_path) == before


def test_folder_of_other_options_or_another_source_is_refused(tmp_path):
    write_shards(GeneratedScenes(10), tmp_path / "whole", WriterOptions())
    with pytest.raises(KeyboardInterrupt):
        write_shards(
            GeneratedScenes(10), tmp_path / "part", WriterOptions(samples_per_shard=2), 1, interrupted_after(1)
        )
    for folder, options in ((tmp_path / "whole", WriterOptions()), (tmp_path / "part", WriterOptions(2))):
        before = digests(folder)
        with pytest.raises(
            OutputError, match=r"another source or other options \(source\.seed: 0 there, 1 here\); cho"
        ):
            write_shards(GeneratedScenes(10, seed=1), folder, options)
        with pytest.raises(OutputError, match=r"\(options\.max_size: null there, 32 here\)"):
            write_shards(GeneratedScenes(10), folder, WriterOptions(options.samples_per_shard, max_size=32))
        assert digests(folder) == before


def test_changed_file_of_excluded_ids_counts_as_another_option(tmp_path):
    ids = tmp_path / "ids"
    for text in ("1\n", "2\n"):
        ids.write_text(text)
        read_ids.cache_clear()
        if text == "1\n":
            write_shards(GeneratedScenes(3), tmp_path / "out", WriterOptions(exclude_ids=(str(ids),)))
    with pytest.raises(OutputError, match=r"other options \(options\.exclude_ids"):
        write_shards(GeneratedScenes(3), tmp_path / "out", WriterOptions(exclude_ids=(str(ids),)))


def test_folders_written_by_other_programs_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "00000.tar").write_bytes(b"")
    with pytest.raises(OutputError, match=r"a holds \.tar files that this command did not write; choose another --out"):
        write_shards(GeneratedScenes(3), tmp_path / "a", WriterOptions())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.json").write_text("[]")
    with pytest.raises(OutputError, match=r"b holds an index\.json that this command did not write"):
        write_shards(GeneratedScenes(3), tmp_path / "b", WriterOptions())


def test_damaged_complete_folder_is_refused(tmp_path):
    write_shards(GeneratedScenes(3), tmp_path, WriterOptions())
    (tmp_path / "shard-000000.tar").write_bytes(b"cut")
    with pytest.raises(
        OutputError, match=r"shard-000000\.tar is missing or does not have the \d+ bytes in index\.json; remove"
    ):
        write_shards(GeneratedScenes(3), tmp_path, WriterOptions())


def test_a_folder_without_permission_gives_one_line(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # permissions do not apply if the tests run as root
    with pytest.raises(OutputError, match=r"^cannot write to .*x: Permission denied; choose another --out$"):
        write_shards(GeneratedScenes(3), tmp_path / "x", WriterOptions())


def test_second_writer_of_a_folder_is_refused(tmp_path):
    def second(_progress):
        with pytest.raises(OutputError, match="another process is writing to"):
            write_shards(GeneratedScenes(10), tmp_path, WriterOptions(samples_per_shard=4))

    report = write_shards(GeneratedScenes(10), tmp_path, WriterOptions(samples_per_shard=4), 1, second)
    assert report["samples"] == 10


def test_run_continues_after_a_full_disk(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(one_shard, "_add_member", full)
        with pytest.raises(OSError, match="No space left"):
            write_shards(GeneratedScenes(10), tmp_path, WriterOptions())
    assert write_shards(GeneratedScenes(10), tmp_path, WriterOptions())["samples"] == 10


# ------------------------------------------------------------------------------------------------- reading captions


def test_read_captions_keeps_the_order(tmp_path):
    items = [candidate(str(n), (f"caption {n}", "ünï")) for n in range(3)]
    write_shards(ListSource(*items), tmp_path, WriterOptions(samples_per_shard=2))
    assert list(read_captions(tmp_path)) == [text for n in range(3) for text in (f"caption {n}", "ünï")]
    assert list(read_captions(tmp_path / "shard-000002.tar")) == ["caption 2", "ünï"]


def test_read_captions_refuses_missing_and_damaged_shards(tmp_path):
    with pytest.raises(SourceError, match=r"holds no \.tar shards"):
        list(read_captions(tmp_path))
    with pytest.raises(SourceError, match=r"^s3://bucket/a is an address: download some of its shards"):
        list(read_captions("s3://bucket/a"))
    (tmp_path / "a.tar").write_bytes(b"x" * 600)
    with pytest.raises(SourceError, match=r"a\.tar cannot be read"):
        list(read_captions(tmp_path))
