"""Finding shards, and reading single samples of a tar: compared with webdataset, and with damaged files."""

import io
import json
import logging
import os
import tarfile

import pytest
from webdataset.tariterators import tarfile_samples

from eve_ds.config import ConfigError
from eve_ds.data.errors import BadSample
from eve_ds.data.shards import ShardFile, find_shards


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def samples(count, prefix="s"):
    return [
        member
        for number in range(count)
        for member in (
            (f"{prefix}{number:04d}.jpg", os.urandom(700 + 400 * number)),
            (f"{prefix}{number:04d}.json", b"{}"),
            (f"{prefix}{number:04d}.txt", f"caption {number}".encode()),
        )
    ]


def ours(path):
    shard = ShardFile(path)
    try:
        return [shard.read(number) for number in range(len(shard))]
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
    shard = ShardFile(path)
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
    shard = ShardFile(path)
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
    shard = ShardFile(path)
    with pytest.raises(BadSample, match=r"a\.TXT occurs twice"):
        shard.read(0)
    assert shard.read(1) == ("b", {"txt": b"3"})
    shard.close()


def write_set(folder, counts, index=True, **changes):
    folder.mkdir(exist_ok=True)
    entries = []
    for number, count in enumerate(counts):
        path = write_tar(folder / f"shard-{number:06d}.tar", samples(count, f"{number}-"))
        entries.append({"name": path.name, "samples": count, "bytes": path.stat().st_size, "sha256": ""} | changes)
    if index:
        (folder / "index.json").write_text(json.dumps({"version": 1, "shards": entries}))
    return folder


def sizes(spec):
    return [(shard.path.name, shard.num_samples) for shard in find_shards(spec)]


@pytest.mark.parametrize("index", [True, False])
def test_shards_can_be_given_by_folder_path_braces_or_list(tmp_path, index, caplog):
    folder = write_set(tmp_path / "set", [2, 3, 1], index)
    everything = [("shard-000000.tar", 2), ("shard-000001.tar", 3), ("shard-000002.tar", 1)]
    assert sizes(str(folder)) == everything
    assert sizes(f"{folder}/shard-{{000000..000002}}.tar") == everything
    assert sizes(f"{folder}/shard-00000{{2,0}}.tar") == [everything[2], everything[0]]
    assert sizes([f"{folder}/shard-000001.tar", f"{folder}/shard-{{000000,000002}}.tar"]) == [
        everything[1],
        everything[0],
        everything[2],
    ]
    assert sizes(f"{folder}/shard-000001.tar::{folder}/shard-000000.tar") == [everything[1], everything[0]]
    assert ("3 of 3 shards have no entry in an index.json" in caplog.text) == (not index)


def test_sizes_come_from_the_index_without_opening_shards(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", [2, 3])
    monkeypatch.setattr("eve_ds.data.shards.ShardFile", None)
    assert sizes(str(folder)) == [("shard-000000.tar", 2), ("shard-000001.tar", 3)]


def test_missing_shards_are_refused(tmp_path):
    folder = write_set(tmp_path / "set", [2, 3])
    with pytest.raises(ConfigError, match=r"shard .*shard-000002.tar does not exist \(2 of 4 shards are missing\)"):
        find_shards(f"{folder}/shard-{{000000..000003}}.tar")
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(ConfigError, match=r"shard-000001.tar does not exist \(1 of 2 shards are missing\)"):
        find_shards(str(folder))


def test_empty_shards_are_refused(tmp_path):
    folder = write_set(tmp_path / "set", [2, 0])
    with pytest.raises(ConfigError, match=r"shard-000001.tar is empty \(10240 bytes, 0 samples\)"):
        find_shards(str(folder))
    (tmp_path / "zero.tar").touch()
    with pytest.raises(ConfigError, match=r"zero.tar is empty \(0 bytes, 0 samples\); remove it"):
        find_shards(str(tmp_path / "zero.tar"))


def test_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds neither shards \(\*\.tar\) nor an index\.json"):
        find_shards(str(tmp_path))


def test_shard_named_twice_is_refused(tmp_path):
    folder = write_set(tmp_path / "set", [2])
    with pytest.raises(ConfigError, match=r"shard-000000\.tar is named twice in one source"):
        find_shards([f"{folder}/shard-000000.tar", str(folder)])


def test_unbalanced_braces_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'.*\{0\.\.3\.tar' cannot be expanded"):
        find_shards(f"{tmp_path}/shard-{{0..3.tar")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1, "shards": [{"name": "a.tar"}]}', '{"shards": []}'])
def test_unreadable_index_is_refused(tmp_path, text):
    folder = write_set(tmp_path / "set", [2])
    (folder / "index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"index\.json is not a shard index .* launcher/prepare\.py"):
        find_shards(str(folder))


def test_index_of_another_version_is_refused(tmp_path):
    (tmp_path / "index.json").write_text('{"version": 2, "shards": []}')
    with pytest.raises(ConfigError, match=r"index\.json has version 2, only 1 can be read"):
        find_shards(str(tmp_path))


def test_shard_whose_size_differs_from_the_index_is_logged(tmp_path, caplog):
    folder = write_set(tmp_path / "set", [2])
    with open(folder / "shard-000000.tar", "r+b") as file:
        file.truncate(3000)
    with caplog.at_level(logging.WARNING):
        find_shards(str(folder))
    assert "shard-000000.tar has 3000 bytes, its index.json says 10240: incomplete copy?" in caplog.text
