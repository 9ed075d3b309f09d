"""Shards of a source: indices of every version, tars that are not those of their index, and one look for all ranks."""

import logging
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
from tars import samples, write_index, write_tar

from eve_ds import together
from eve_ds.config import Config, ConfigError, SourceConfig, parse_config
from eve_ds.data import shard_file, sources
from eve_ds.data.shard_table import ShardTable
from eve_ds.data.shards import find_shards, open_shard
from eve_ds.data.sources import open_sources


def write_set(folder, counts=(2, 3), **changes):
    folder.mkdir()
    for number, count in enumerate(counts):
        write_tar(folder / f"{number}.tar", samples(count, f"{number}-"))
    write_index(folder, **changes)
    return folder


def keys(shards):
    found = []
    for shard in shards:
        file = open_shard(shard)
        found += [file.read(number).key for number in range(min(shard.num_samples, len(file)))]
        file.close()
    return found


EVERY_KEY = ["0-0000", "0-0001", "1-0000", "1-0001", "1-0002"]


def test_with_layouts_no_shard_is_scanned(tmp_path, monkeypatch, caplog):
    folder = write_set(tmp_path / "set")
    monkeypatch.setattr(shard_file, "scan_layout", None)
    shards = find_shards(str(folder))
    assert [shard.num_samples for shard in shards] == [2, 3]
    assert keys(shards) == EVERY_KEY
    assert not caplog.records


def test_shards_without_an_index_are_scanned_once(tmp_path, monkeypatch):
    """By the process that finds them; ranks and workers that open them know their layouts."""
    folder = write_set(tmp_path / "set")
    (folder / "index.json").unlink()
    shards = find_shards(str(folder))
    monkeypatch.setattr(shard_file, "scan_layout", None)
    assert keys(shards) == EVERY_KEY


SCANNED = {
    "version 1": {"groups": None},
    "a size that is not given": {"bytes": None},
    "layout of another shard": {"groups": "AAQB"},
    "layout beyond the end": {"groups": "AP//PwI="},
    "layout that is cut": {"groups": "gA=="},
    "empty layout": {"groups": ""},
}


@pytest.mark.parametrize("name", SCANNED)
def test_a_layout_that_is_missing_or_wrong_is_replaced_by_a_scan(tmp_path, name, caplog):
    folder = write_set(tmp_path / "set", **SCANNED[name])
    with caplog.at_level(logging.WARNING):
        assert keys(find_shards(str(folder))) == EVERY_KEY
    wrong = name.startswith("layout")
    assert len(caplog.records) == (2 if wrong else 0)
    assert all("has another layout than its index says" in record.message for record in caplog.records)


@pytest.mark.parametrize("change", ["longer", "cut", "more samples"])
def test_shards_of_another_size_are_scanned_with_one_warning_for_all(tmp_path, change, caplog):
    folder = write_set(tmp_path / "set")
    for number in range(2):
        path = folder / f"{number}.tar"
        if change == "longer":
            path.write_bytes(path.read_bytes() + bytes(10240))
        elif change == "cut":
            path.write_bytes(path.read_bytes()[:3000])
        else:
            write_tar(path, samples(9, f"{number}-"))
    with caplog.at_level(logging.WARNING):
        shards = find_shards(str(folder))
        found = keys(shards)
    assert len(caplog.records) == 1
    assert "2 of 2 shards do not have the size in their index.json, for example" in caplog.text
    assert [shard.num_samples for shard in shards] == ([9, 9] if change == "more samples" else [2, 3])
    assert len(found) == {"longer": 5, "cut": 2, "more samples": 18}[change]
    assert {shard.sha256 for shard in shards} == {None}


@pytest.mark.parametrize("groups", ["5", 5, True, [], {}, "AA", "A A=", "é"])
def test_a_layout_that_is_no_text_of_base64_is_one_line(tmp_path, groups):
    folder = write_set(tmp_path / "set", groups=groups)
    with pytest.raises(ConfigError, match=r"index\.json is not a shard index \(.*\); write it again") as caught:
        find_shards(str(folder))
    assert "\n" not in str(caught.value)


def config_of(folder):
    return parse_config({"data": {"sources": [{"kind": "shards", "shards": str(folder)}]}})


def as_other_rank(monkeypatch, answer):
    """Make this process a rank that is not rank 0, which answers with `answer`."""
    monkeypatch.setattr(together, "rank_zero", lambda: False)
    monkeypatch.setattr(together.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(together, "broadcast_object", lambda own, group: pickle.loads(pickle.dumps(answer)))
    monkeypatch.setattr(sources, "find_shards", None)


def test_other_ranks_do_not_look_for_the_shards(tmp_path, monkeypatch):
    config = config_of(write_set(tmp_path / "set"))
    (here,) = open_sources(config)
    found = [find_shards(str(tmp_path / "set"))]
    as_other_rank(monkeypatch, (None, [found]))
    (there,) = open_sources(config)
    assert (there.fingerprint(), there.contents()) == (here.fingerprint(), here.contents())
    assert list(there.images(1))[2] == list(here.images(1))[2] == "1-0002"


def test_a_failure_of_rank_zero_is_raised_on_other_ranks(tmp_path, monkeypatch):
    config = config_of(tmp_path / "missing.tar")
    with pytest.raises(ConfigError, match="does not exist") as caught:
        open_sources(config)
    as_other_rank(monkeypatch, (together._Problem.of(caught.value), []))
    with pytest.raises(ConfigError, match="does not exist") as other:
        open_sources(config)
    assert str(other.value) == str(caught.value)


def test_a_table_gives_the_shards_back(tmp_path):
    folder = tmp_path / "s\udce9t ü"
    folder.mkdir()
    shards = find_shards(str(write_set(folder / "set")))
    shards[1] = shards[1]._replace(groups=None)
    table = ShardTable(shards)
    assert len(table) == 2
    for shard, found in zip(shards, (table[0], table[1]), strict=True):
        stored = None if found.groups is None else bytes(found.groups)
        assert found._replace(groups=stored) == shard


def test_workers_share_the_shards(tmp_path):
    """What a worker gets does not grow with the number of samples: 48 bytes for each in this index."""
    (shard,) = find_shards(str(write_set(tmp_path / "set", [1])))
    many = [shard._replace(address=f"/data/{number:06d}.tar", groups=bytes(30_000)) for number in range(100)]
    section, transform = SourceConfig(kind="shards", shards="/data"), None
    sizes = [len(ForkingPickler.dumps(sources.ShardsSource(section, transform, found))) for found in (many[:10], many)]
    assert sizes[1] - sizes[0] < 90 * 20
    assert sizes[0] < 4000


def test_generated_samples_need_no_shards(monkeypatch):
    monkeypatch.setattr(sources, "find_shards", None)
    assert len(open_sources(Config())) == 1
