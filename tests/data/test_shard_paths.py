"""Finding shards by paths, braces, folders and indices; everything else that users name is one line."""

import json
import logging
import os

import pytest
from braceexpand import braceexpand
from hypothesis import given
from hypothesis import strategies as st
from tars import samples, write_tar

from eve_ds import limits
from eve_ds.config import ConfigError, DataConfig
from eve_ds.data.index_file import Indices
from eve_ds.data.remote.errors import RemoteError
from eve_ds.data.remote.storage import RemoteStorage
from eve_ds.data.shard_paths import expand, name_of, num_expanded
from eve_ds.data.shards import find_shards


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
    return [(name_of(shard.address), shard.num_samples) for shard in find_shards(spec)]


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
    if index:
        assert sizes(f"{folder}/index.json") == everything
    assert ("3 of 3 shards have no entry in an index.json" in caplog.text) == (not index)


PATTERNS = {
    "set/*.tar": [0, 1, 2],
    "set/shard-00000[02].tar": [0, 2],
    "set/shard-{000002,00000?}.tar": None,
    "s?t": [0, 1, 2],
    "**/shard-*1.tar": [1],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_expanded_in_the_order_of_names(tmp_path, pattern):
    folder = write_set(tmp_path / "set", [2, 3, 1])
    (folder / "._shard-000000.tar").write_bytes(b"mac")
    if PATTERNS[pattern] is None:
        with pytest.raises(ConfigError, match=r"shard-000002\.tar is named twice"):
            find_shards(f"{tmp_path}/{pattern}")
        return
    everything = sizes(str(folder))
    assert sizes(f"{tmp_path}/{pattern}") == [everything[number] for number in PATTERNS[pattern]]
    assert sizes(f"file://{tmp_path}/{pattern}") == sizes(f"{tmp_path}/{pattern}")


def test_a_name_with_the_characters_of_a_pattern_is_that_file(tmp_path):
    folder = write_set(tmp_path / "set[1]", [2])
    assert sizes(str(folder)) == sizes(f"{folder}/shard-000000.tar") == [("shard-000000.tar", 2)]


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
    (tmp_path / "index.json").write_text('{"version": 3, "shards": []}')
    with pytest.raises(ConfigError, match=r"index\.json has version 3, only 1 and 2 can be read"):
        find_shards(str(tmp_path))


def test_shard_whose_size_differs_from_the_index_is_logged(tmp_path, caplog):
    folder = write_set(tmp_path / "set", [2])
    with open(folder / "shard-000000.tar", "r+b") as file:
        file.truncate(3000)
    with caplog.at_level(logging.WARNING):
        find_shards(str(folder))
    assert "shard-000000.tar (3000 bytes, not 10240; incomplete copy?): scanning their headers instead" in caplog.text


BAD_INDICES = {
    "samples in words": '{"version": 1, "shards": [{"name": "a.tar", "samples": "many"}]}',
    "samples of a fraction": '{"version": 1, "shards": [{"name": "a.tar", "samples": 1.5}]}',
    "samples below zero": '{"version": 1, "shards": [{"name": "a.tar", "samples": -1}]}',
    "samples null": '{"version": 1, "shards": [{"name": "a.tar", "samples": null}]}',
    "samples true": '{"version": 1, "shards": [{"name": "a.tar", "samples": true}]}',
    "samples of a galaxy": '{"version": 1, "shards": [{"name": "a.tar", "samples": 100000000000}]}',
    "samples of 5,000 digits": '{"version": 1, "shards": [{"name": "a.tar", "samples": %s}]}' % ("9" * 5000),
    "samples infinite": '{"version": 1, "shards": [{"name": "a.tar", "samples": Infinity}]}',
    "bytes in words": '{"version": 1, "shards": [{"name": "a.tar", "samples": 1, "bytes": "x"}]}',
    "name of another folder": '{"version": 1, "shards": [{"name": "../a.tar", "samples": 1}]}',
    "name of an absolute path": '{"version": 1, "shards": [{"name": "/a.tar", "samples": 1}]}',
    "name null": '{"version": 1, "shards": [{"name": null, "samples": 1}]}',
    "entry of text": '{"version": 1, "shards": ["a.tar"]}',
    "shards null": '{"version": 1, "shards": null}',
    "shards of numbers": '{"version": 1, "shards": [1]}',
    "text": '"index"',
    "null": "null",
    "empty": "",
    "nested": "[" * 100_000,
    "nested a little": '{"version": 1, "shards": ' + "[" * 200 + "]" * 200 + "}",
    "UTF-16": '{"version": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", BAD_INDICES)
def test_every_malformed_index_is_one_line(tmp_path, name):
    text = BAD_INDICES[name]
    (tmp_path / "index.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"index\.json is not a shard index \(.*\); write it again") as caught:
        find_shards(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


NO_SHARDS = {
    "hf://datasets/a/b.tar": r"'hf://datasets/a/b\.tar' is an address of a scheme that is not read; these are: http://,",
    "ftp://user:secret@host/a.tar": r"'ftp://host/a\.tar' is an address of a scheme",
    "https://x.invalid/set/*.tar": r"is a glob pattern, but HTTP has no lists of files: name numbers in braces as \{",
    "https://x.invalid/a.tar.gz?signature=x": r"shard https://x\.invalid/a\.tar\.gz is compressed: samples are read at",
    "s3://bucket/a.tgz": r"shard s3://bucket/a\.tgz is compressed",
    "s3://": r"'s3://' has no bucket \(a variable that is not set\?\)",
    "s3:///a.tar": r"'s3:///a\.tar' has no bucket \(a variable that is not set\?\): name one",
    "gs:///set/*.tar": r"'gs:///set/\*\.tar' has no bucket",
    "https://": r"'https://' has no host \(a variable that is not set, or IPv6 without brackets\?\): name one",
    "https:///a.tar?sig=secret": r"'https:///a\.tar' has no host",
    "https://user:secret@:80/a.tar": r"'https://:80/a\.tar' has no host",
    "http://[::1/a.tar": r"'http://\[::1/a\.tar' has a host or port that is not valid: labels of a host have 1 to 63",
    "http://a..b/a.tar": r"'http://a\.\.b/a\.tar' has a host or port that is not valid",
    f"http://{'a' * 64}.org/a.tar": r"a\.org/a\.tar' has a host or port that is not valid",
    "http://x.invalid:99999/a.tar": r"'http://x\.invalid:99999/a\.tar' has a host or port that is not valid",
    "http://x.invalid:port/a.tar": r"'http://x\.invalid:port/a\.tar' has a host or port that is not valid",
    "pipe:curl -s https://x.invalid/a.tar": r"is a command of a pipe, which is not run: name files",
    "FOLDER/none-*.tar": r"none-\*\.tar' is a glob pattern that matches no file: check it",
    "FOLDER/shard-?.tar": r"is a glob pattern that matches no file",
    "FOLDER/shard-[0-9].tar": r"is a glob pattern that matches no file",
    "FOLDER/*.tar.gz": r"set\.tar\.gz is compressed: samples are read at their offsets",
    "FOLDER/g*.tar": r"gzip\.tar is compressed by gzip",
    "file://FOLDER/set.tgz": r"set\.tgz is compressed",
    "FOLDER/set.tar.gz": r"set\.tar\.gz is compressed: samples are read at their offsets in a plain tar; unpack it",
    "FOLDER/set.tgz": r"set\.tgz is compressed",
    "FOLDER/gzip.tar": r"gzip\.tar is compressed by gzip: samples are read at their offsets",
    "FOLDER/zip.tar": r"zip\.tar is a zip archive",
    "FOLDER/parquet.tar": r"parquet\.tar is Parquet",
    "FOLDER/pointer.tar": r"pointer\.tar is a pointer of Git LFS: run `git lfs pull`",
    "FOLDER/page.tar": r"page\.tar is a web page: download the file again",
    "FOLDER/text.tar": r"text\.tar holds no sample \(3000 bytes, 0 samples\)",
    "": r"has an empty name \(a variable that is not set\?\): name a folder or files",
    " ": r"has an empty name",
    "FOLDER/packed": r"packed holds neither shards .*; it holds a\.tar\.xz, which is compressed",
    "FOLDER/pipe.tar": r"pipe\.tar is not a regular file",
    "/dev/zero": r"/dev/zero is not a regular file",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("item", NO_SHARDS)
def test_what_is_no_shard_is_named(tmp_path, item):
    (tmp_path / "packed").mkdir()
    for name, data in {
        "set.tar.gz": b"\x1f\x8b", "set.tgz": b"x", "gzip.tar": b"\x1f\x8b" + bytes(2000), "packed/a.tar.xz": b"x",
        "zip.tar": b"PK\x03\x04" + bytes(2000), "parquet.tar": b"PAR1" + bytes(2000),
        "pointer.tar": b"version https://git-lfs.github.com/spec/v1\n", "page.tar": b"<!doctype html>\n" * 200,
        "text.tar": b"abc" * 1000,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises((ConfigError, RemoteError), match=NO_SHARDS[item]) as caught:
        find_shards([item.replace("FOLDER", str(tmp_path))])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["more.tar", "more.tar.gz", "more.tgz"])
def test_a_tar_of_the_folder_that_is_not_read_is_logged(tmp_path, caplog, name):
    folder = write_set(tmp_path / "set", [2])
    (folder / name).write_bytes((folder / "shard-000000.tar").read_bytes())
    (folder / "shard-000000.tar.gz").write_bytes(b"unpacked beside it")
    with caplog.at_level(logging.WARNING):
        assert sizes(str(folder)) == [("shard-000000.tar", 2)]
    assert f"1 tars of {folder} are not read" in caplog.text
    assert f"for example {name}" in caplog.text


def test_a_complete_folder_logs_nothing(tmp_path, caplog):
    folder = write_set(tmp_path / "set", [2, 3])
    with caplog.at_level(logging.WARNING):
        assert len(sizes(str(folder))) == 2
    assert not caplog.records


def test_tars_of_macos_beside_shards_are_no_shards(tmp_path):
    folder = write_set(tmp_path / "set", [2, 3], index=False)
    (folder / "._shard-000000.tar").write_bytes(b"mac")
    assert sizes(str(folder)) == [("shard-000000.tar", 2), ("shard-000001.tar", 3)]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "pattern",
    [
        "{00000000..99999999}.tar",
        "{0..9999}{0..9999}.tar",
        "{0..1" + "0" * 5000 + "}",
        "{0..99999999..2}",
        "{a,{0..99999999}}",
        "{0..9}" * 9,
        "{a,b}" * 40,
        "a::{0..99999999}",
        "{99999999..0}",
    ],
    ids=lambda text: text[:30],
)
def test_too_many_names_in_braces_are_refused_without_expanding_them(pattern):
    with pytest.raises(ConfigError, match=r"names more than 1,000,000 shards: check the numbers in braces"):
        expand(pattern, Indices(RemoteStorage(DataConfig())))


def test_the_cap_of_names_holds_for_a_whole_list(monkeypatch):
    monkeypatch.setattr(limits, "SHARDS", 10)
    with pytest.raises(ConfigError, match="names more than 10 shards"):
        expand(["{0..4}", "{0..5}"], Indices(RemoteStorage(DataConfig())))


pieces = st.recursive(
    st.sampled_from(["a", "-", "{0..12}", "{007..3}", "{a..e}", "{0..20..3}", "{-2..2}", "{x}", "{0..}"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}"),
    ),
    max_leaves=5,
)


@given(pieces)
def test_names_are_counted_as_braceexpand_expands_them(pattern):
    names = sum(1 for _, name in zip(range(20_000), braceexpand(pattern), strict=False))
    assert names <= num_expanded(pattern) or names == 20_000
    if names < 20_000 and "{x}" not in pattern and "{0..}" not in pattern:
        assert num_expanded(pattern) == names
