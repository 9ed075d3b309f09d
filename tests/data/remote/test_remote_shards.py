"""Shards at addresses, from the address in a configuration to the samples, and through kills."""

import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
from faulty_server import FaultyServer
from PIL import Image
from resumed_reader import KEYS, RECORD, read_batches

from eve_ds.cli.command import ending
from eve_ds.config import Config, ConfigError, DataConfig, load_config, parse_config
from eve_ds.data.errors import UnusableData
from eve_ds.data.held_out import held_out_pairs
from eve_ds.data.index_file import Indices
from eve_ds.data.index_writer import write_index
from eve_ds.data.pipeline import build_loader
from eve_ds.data.remote import retries, storage
from eve_ds.data.remote.errors import RemoteError
from eve_ds.data.remote.storage import RemoteStorage
from eve_ds.data.shard_paths import expand
from eve_ds.data.shards import find_shards, open_shard
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.objectives.registry import objectives_of
from eve_ds.printable import printable

SOAK = "EVE_DS_SOAK" in os.environ


def jpeg(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEGS = [jpeg(seed) for seed in range(8)]


def tar(first, count, order=("jpg", "txt")):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for number in range(first, first + count):
            for extension in order:
                data = JPEGS[number % 8] if extension == "jpg" else b"a small red circle"
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("set")
    for number, count in enumerate((20, 30, 10)):
        (path / f"shard-{number}.tar").write_bytes(tar(100 * number, count))
    write_index(path, lambda done, total: None)
    return path


@pytest.fixture
def server(folder):
    files = {f"set/{file.name}": file.read_bytes() for file in folder.iterdir()}
    with FaultyServer(files) as running:
        yield running


def samples(spec):
    remote = RemoteStorage(DataConfig())
    for shard in find_shards(spec, remote):
        file = open_shard(shard, remote)
        yield from ((stored.key, stored.fields) for stored in map(file.read, range(len(file))))
        file.close()


SPECS = {
    "set": "set",
    "set/": "set",
    "set/shard-{0..2}.tar": "set",
    "set/shard-{2,0}.tar": "set/shard-{2,0}.tar",
    "set/shard-1.tar": "set/shard-1.tar",
    "set/shard-1.tar?X-Amz-Signature=abc&part=2": "set/shard-1.tar",
    "set?signature=abc": "set",
    "set/index.json": "set",
    "set/index.json?signature=abc": "set",
}


@pytest.mark.parametrize("indexed", ["index", "index of version 1", "no index"])
@pytest.mark.parametrize("spec", SPECS)
def test_samples_at_an_address_are_those_of_the_files(server, folder, spec, indexed):
    if indexed == "no index":
        del server.files["set/index.json"]
        if ".tar" not in spec:
            rule = rf"'{server.address}/set/?' has no index\.json that lists shards, and HTTP has no lists of files"
            with pytest.raises(ConfigError, match=rule):
                find_shards(f"{server.address}/{spec}")
            return
    if indexed == "index of version 1":
        index = json.loads(server.files["set/index.json"])
        shards = [{key: entry[key] for key in ("name", "samples", "bytes")} for entry in index["shards"]]
        server.files["set/index.json"] = json.dumps({"version": 1, "shards": shards}).encode()
    expected = list(samples(str(folder.parent / SPECS[spec]).replace("/set", f"/{folder.name}")))
    assert list(samples(f"{server.address}/{spec}")) == expected
    assert len(expected) in (60, 30)
    if "?" in spec:
        assert all("?" in request.path for request in server.requests)


def test_the_scheme_of_an_address_may_be_in_capitals_and_its_query_may_have_a_star(server):
    address = f"{server.address.replace('http', 'HTTP')}/set/shard-1.tar?policy=*"
    assert [shard.num_samples for shard in find_shards(address)] == [30]


@pytest.mark.parametrize("host", ["[::1]", "[fe80::1]", "user:secret@[::1]:8000"])
def test_colons_of_a_host_separate_no_names(host, monkeypatch):
    monkeypatch.setattr(RemoteStorage, "read_small", lambda self, address, most: None)
    found = expand(f"http://{host}/{{0..1}}.tar::http://{host}/2.tar", Indices(RemoteStorage(DataConfig())))
    assert found == [f"http://{host}/{number}.tar" for number in range(3)]


def test_an_index_is_read_once_and_its_shards_not_before_they_are_opened(server):
    assert len(find_shards(f"{server.address}/set/shard-{{0..2}}.tar")) == 3
    assert [request.path for request in server.requests] == ["/set/index.json"]


def test_the_layout_of_an_address_without_an_index_is_found_once(server, caplog, monkeypatch):
    monkeypatch.setattr(storage, "READ_AHEAD", storage.SMALL)
    del server.files["set/index.json"]
    shards = find_shards(f"{server.address}/set/shard-{{0..2}}.tar?signature=secret")
    assert [shard.num_samples for shard in shards] == [20, 30, 10]
    assert "3 of 3 shards have no entry in an index.json" in caplog.text
    assert "secret" not in caplog.text
    before = len(server.requests)
    file = open_shard(shards[1], RemoteStorage(DataConfig()))
    assert file.read(29).key == "000129"
    assert len(server.requests) == before + 2, "one to open, one to read"


def test_a_shard_with_another_size_than_its_index_says_is_refused(server):
    server.files["set/shard-1.tar"] = tar(100, 20)
    shards = find_shards(f"{server.address}/set")
    rule = r"shard-1\.tar has [\d,]+ bytes, not [\d,]+ as its index\.json says or as when the run started: upload"
    with pytest.raises(RemoteError, match=rule):
        open_shard(shards[1], RemoteStorage(DataConfig()))


NO_SHARDS = {
    "page.tar": (b"<!doctype html>\n" * 200, r"page\.tar is a web page: download the file again"),
    "gzip.tar": (b"\x1f\x8b" + bytes(2000), r"gzip\.tar is compressed by gzip: samples are read at their offsets"),
    "zeros.tar": (bytes(10240), r"zeros\.tar is empty \(10240 bytes, 0 samples\)"),
    "empty.tar": (b"", r"empty\.tar is empty \(0 bytes, 0 samples\)"),
}


@pytest.mark.parametrize("name", NO_SHARDS)
def test_what_is_no_shard_is_named(server, name):
    content, rule = NO_SHARDS[name]
    server.files[name] = content
    with pytest.raises(ConfigError, match=rule):
        find_shards(f"{server.address}/{name}?signature=secret")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 3, "shards": []}', "[" * 100_000])
def test_a_malformed_index_is_one_line(server, text):
    server.files["set/index.json"] = text.encode()
    with pytest.raises(ConfigError, match=rf"^{server.address}/set/index\.json (is not a shard index|has version 3)"):
        find_shards(f"{server.address}/set?signature=secret")


def test_a_server_that_is_away_at_the_start_is_one_line_with_exit_code_2(free_port):
    config = DataConfig(remote={"deadline_seconds": 0.1})
    with pytest.raises(RemoteError, match=r"set/index\.json cannot be read: no connection \(\d+ attempts") as caught:
        find_shards(f"http://127.0.0.1:{free_port}/set", RemoteStorage(config))
    assert ending(caught.value).code == 2


INDEX_FAULTS = {
    "status 400": r"set/index\.json cannot be read: HTTP 400 Bad Request$",
    "status 401": r"set/index\.json cannot be read: HTTP 401 Unauthorized$",
    "status 403": r"set/index\.json cannot be read: HTTP 403 Forbidden$",
    "status 404": r"set' has no index\.json that lists shards",
    "status 410": r"set' has no index\.json that lists shards",
    "page": r"set/index\.json is a web page, not a shard index: check the address, and whether the server wants a lo",
    "long page": r"set/index\.json is a web page, not a shard index: check the address",
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_that_a_server_refuses_is_needed_for_a_folder_only(server, fault, caplog):
    server.faults = lambda path, index: fault if "index.json" in path else ""
    with pytest.raises((ConfigError, RemoteError), match=INDEX_FAULTS[fault]) as caught:
        find_shards(f"{server.address}/set?sig=secret")
    shards = find_shards([f"{server.address}/set/shard-{number}.tar?sig=secret{number}" for number in range(3)])
    assert [shard.num_samples for shard in shards] == [20, 30, 10]
    assert ending(caught.value).code == 2
    assert caplog.text.count("; going on without an index") == (fault not in ("status 404", "status 410"))
    assert "secret" not in caplog.text + str(caught.value)


@pytest.mark.parametrize("fault", ["short", "gzip cut"])
@pytest.mark.parametrize("times", [1, storage.PARSE_ATTEMPTS - 1, storage.PARSE_ATTEMPTS])
def test_an_index_that_was_cut_is_read_again(server, fault, times, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.01)
    server.faults = lambda path, index: fault if index < times else ""
    if times < storage.PARSE_ATTEMPTS:
        assert [shard.num_samples for shard in find_shards(f"{server.address}/set")] == [20, 30, 10]
    else:
        with pytest.raises(ConfigError, match=r"index\.json is not a shard index \(JSONDecodeError: .*write it again"):
            find_shards(f"{server.address}/set")
    assert len(server.requests) == min(times + 1, storage.PARSE_ATTEMPTS)


def test_a_page_of_a_login_in_place_of_a_shard_is_named(server):
    shards = find_shards(f"{server.address}/set")
    server.faults = lambda path, index: "page"
    with pytest.raises(RemoteError, match=r"shard-0\.tar is a web page, not a tar: check the address, and whether"):
        open_shard(shards[0], RemoteStorage(DataConfig()))


REPEATED = {
    "set/shard-1.tar": "set/./x/../shard-1.tar",
    "set/shard-0.tar?sig=1": "set/shard-{0..2}.tar?sig=2",
    "set": "set/shard-%31.tar",
    "set?X-Amz-Signature=1": "set?X-Amz-Signature=2",
}


@pytest.mark.parametrize("spec", REPEATED)
def test_a_shard_with_two_spellings_is_named_twice(server, spec):
    with pytest.raises(ConfigError, match=r"shard-(\d|%31)\.tar is named twice in one source.*; raise the `weight`"):
        find_shards([f"{server.address}/{spec}", f"{server.address}/{REPEATED[spec]}"])


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_query_that_names_another_shard_is_no_shard_of_training(server, is_shared):
    server.files = {f"get.tar?id={number}": server.files[f"set/shard-{number}.tar"] for number in range(2)}
    held_out = [{"kind": "shards", "shards": f"{server.address}/get.tar?id={0 if is_shared else 1}&sig=2"}]
    config = run_config(f"{server.address}/get.tar?sig=1&id=0", validation={"sources": held_out})
    server.files |= {f"get.tar?id={number}&sig=2": server.files[f"get.tar?id={number}"] for number in range(2)}
    server.files["get.tar?sig=1&id=0"] = server.files["get.tar?id=0"]
    if is_shared:
        with pytest.raises(ConfigError, match=r"names shard \S+/get\.tar, which data\.sources trains on"):
            held_out_pairs(config, 0, 1)
    else:
        assert len(held_out_pairs(config, 0, 1)) == 30


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("fault", ["zeros", "zeros behind the caption"])
def test_one_wrong_answer_costs_no_sample(tmp_path, monkeypatch, fault, cached):
    monkeypatch.setattr(storage, "block_bytes", lambda most: 2560)
    (tmp_path / "a.tar").write_bytes(tar(0, 40, ("txt", "jpg")))
    write_index(tmp_path, lambda done, total: None)
    files = {file.name: file.read_bytes() for file in tmp_path.glob("*.*")}
    right = batch_keys(run_config(str(tmp_path), num_workers=0))
    for wrong in (3, 4):  # some samples lie in the start that was read to learn the size
        with FaultyServer(files, lambda path, index, wrong=wrong: fault if index == wrong else "") as server:
            config = run_config(f"{server.address}/", tmp_path / f"cache-{wrong}" if cached else None, num_workers=0)
            for _ in range(2):
                assert batch_keys(config) == right


def batch_keys(config):
    """Keys and pixels of an epoch."""
    loader = build_loader(
        config, load_tokenizer("scenes"), objectives_of(config.model), rank=0, world_size=1, micro_batch_size=20
    )
    batches = [next(loader) for _ in range(2)]
    assert dict(loader.skipped) == {}
    loader.close()
    return [(batch.keys, batch.pixel_values.tolist()) for batch in batches]


@pytest.mark.parametrize("marked", [True, False], ids=["ETag", "no ETag"])
def test_samples_of_a_set_that_was_replaced_are_the_new_ones(tmp_path, marked):
    runs = []
    with FaultyServer({}, lambda path, index: "" if marked else "no ETag") as server:
        for first in (100, 200):
            (tmp_path / "a.tar").write_bytes(tar(first, 40))
            write_index(tmp_path, lambda done, total: None)
            server.files = {file.name: file.read_bytes() for file in tmp_path.glob("*.*")}
            runs += [
                batch_keys(run_config(place, tmp_path / "cache", 0)) for place in (f"{server.address}/", str(tmp_path))
            ]
    assert runs[0] == runs[1] != runs[2] == runs[3]


SECRET_SPECS = [
    "http://host/my set/a.tar?sig=SECRET",
    "http://host/it's/a.tar?sig=SECRET",
    "http://host/a.tar?sig=a'SECRET",
    'http://host/a.tar?sig="SECRET"',
    "http://host/a.tar?sig=a SECRET",
    "http://host/a.tar?sig=a::SECRET",
    "http://user:SEC'SECRET@host/a.tar",
    "http://user:p SECRET@host/a.tar",
    "http://user:p/SECRET@host/a.tar",
    "http://host/{0..1}.tar?sig=x y::http://user:p'SECRET@host/2.tar?sig=a'SECRET",
    "http://host/{0..3.tar?sig=SECRET",
]


@pytest.mark.parametrize("spec", SECRET_SPECS)
def test_no_spelling_of_an_address_leaks(spec, free_port, caplog):
    spec = spec.replace("host/", f"127.0.0.1:{free_port}/")
    config = run_config(spec)
    remote = RemoteStorage(DataConfig(remote={"deadline_seconds": 0.05}))
    with pytest.raises((ConfigError, RemoteError)) as caught:
        find_shards(spec, remote)
    assert "SECRET" not in config.model_dump_json() + str(caught.value) + caplog.text


@pytest.mark.parametrize("spec", [spec for spec in SECRET_SPECS if "{" not in spec])
@pytest.mark.parametrize(
    "override",
    [
        "data.sources=[{{kind: scenes, shards: {{a: {}}}}}]",
        "data.sources=[{{kind: shards, shards: [[{}]]}}]",
        "data.sources={}",
        "data.sources=[{{kind: shards, shards: {}",
        "data.sources.shards={}",
        "data.cache_dir={}/$NO_SUCH_VARIABLE",
    ],
)
def test_no_message_about_a_setting_leaks(spec, override):
    with pytest.raises(ConfigError) as caught:
        load_config("eve_tiny", [override.format(json.dumps(spec))])
    assert "SECRET" not in printable(str(caught.value))


def test_written_configurations_have_no_credentials():
    shards = ["https://user:secret@host/a.tar?sig=secret", "s3://secret@bucket/b.tar", "/data/c?.tar"]
    config = load_config("eve_tiny", [f"data.sources=[{{kind: shards, shards: {json.dumps(shards)}}}]"])
    written = config.model_dump_json()
    assert "secret" not in written
    assert Config.model_validate_json(written).data.sources[0].shards == [
        "https://host/a.tar",
        "s3://bucket/b.tar",
        "/data/c?.tar",
    ]
    assert config.data.sources[0].shards == config.model_dump()["data"]["sources"][0]["shards"] == shards


# ------------------------------------------------------------------------------------------------ loader and kills


def run_config(address, cache=None, num_workers=2, **data):
    return parse_config(
        {
            "model": {"image_size": 32, "patch_size": 8, "vocab_size": 256},
            "data": {
                "sources": [{"kind": "shards", "shards": address}],
                "num_workers": num_workers,
                "shuffle_buffer": 50,
                "cache_dir": cache,
                "remote": {"timeout_seconds": 0.5, "deadline_seconds": 60, "max_failed_share": 0.9},
                **data,
            },
            "train": {"train_batch_size": 20},
        }
    )


FAULTS = ["status 503", "status 429", "status 500", "cut", "too long", "short range", "other range", "no Content-Range"]


def some_faults(share):
    """Faults of a share of the requests, the same ones at each run; some of them hang."""
    draws = random.Random(0)

    def fault(path, index):
        if path.endswith("index.json") or draws.random() > share:
            return ""
        return "hang" if draws.random() < 0.02 else draws.choice(FAULTS)

    return fault


def kill_when(process, keys, lines):
    while process.is_alive() and (not keys.exists() or keys.read_bytes().count(b"\n") < lines):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.timeout(1800 if SOAK else 300)
@pytest.mark.parametrize("cached", [True, False] if SOAK else [True], ids=str)
def test_a_run_that_is_killed_serves_each_sample_once_per_epoch(tmp_path, monkeypatch, cached):
    shards, per_shard, kills = (20, 1000, 10) if SOAK else (4, 40, 2)
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(storage, "block_bytes", lambda most: 20_000)
    for number in range(shards):
        (tmp_path / f"shard-{number:03d}.tar").write_bytes(tar(number * per_shard, per_shard))
    write_index(tmp_path, lambda done, total: None)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    batches = 3 * shards * per_shard // 20
    context = multiprocessing.get_context("fork")
    with FaultyServer(files, some_faults(0.15)) as server:
        config = run_config(f"{server.address}/", tmp_path / "cache" if cached else None)
        for kill in range(kills + 1):
            process = context.Process(target=read_batches, args=(config, 20, tmp_path, batches))
            process.start()
            if kill < kills:
                kill_when(process, tmp_path / KEYS, batches * (kill + 1) // (kills + 1))
                assert process.exitcode == -signal.SIGKILL
            else:
                process.join()
        assert process.exitcode == 0
    assert json.loads((tmp_path / RECORD).read_text())["state"]["skipped"] == {}
    keys = (tmp_path / KEYS).read_text().split()
    expected = {f"{number:06d}" for number in range(shards * per_shard)}
    for epoch in range(3):
        served = keys[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert Counter(served) == Counter(expected), f"epoch {epoch}"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_server_that_fails_for_good_ends_the_run_by_name(server, tmp_path, num_workers, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.01)
    server.faults = lambda path, index: "status 404" if "shard-1" in path else ""
    with pytest.raises(UnusableData, match=r"set/shard-1\.tar cannot be read: HTTP 404 Not Found$"):
        read_batches(run_config(f"{server.address}/set", num_workers=num_workers), 20, tmp_path, 9)


def test_an_object_that_is_replaced_between_workers_ends_the_run(server, tmp_path):
    config = run_config(f"{server.address}/set", num_workers=0)
    read_batches(config, 20, tmp_path, 2)
    server.files["set/shard-0.tar"] = server.files["set/shard-1.tar"] = server.files["set/shard-2.tar"] + bytes(512)
    with pytest.raises(UnusableData, match=r"shard-\d\.tar has [\d,]+ bytes, not [\d,]+ as its index\.json says"):
        read_batches(config, 20, tmp_path, 9)
