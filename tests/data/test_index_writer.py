"""`prepare index`: indices of the shards of any tool, and one line for a folder that cannot be indexed."""

import hashlib
import json
import os

import pytest
from tars import samples, write_tar

from eve_ds.cli.prepare import main
from eve_ds.data import shard_file
from eve_ds.data.importers import GeneratedScenes
from eve_ds.data.shard_writer import WriterOptions, write_shards
from eve_ds.data.shards import find_shards, open_shard


def write_folder(folder, counts=(3, 5)):
    folder.mkdir()
    for number, count in enumerate(counts):
        write_tar(folder / f"{number}.tar", samples(count, f"{number}-"))
    return folder


def read_all(folder):
    found = []
    for shard in find_shards(str(folder)):
        file = open_shard(shard)
        found += [file.read(number)[:2] for number in range(shard.num_samples)]
        file.close()
    return found


def test_shards_of_any_tool_get_an_index_with_their_layouts(tmp_path, capsys, caplog, monkeypatch):
    folder = write_folder(tmp_path / "set")
    (folder / "readme.txt").write_text("no shard")
    whole = read_all(folder)
    assert main(["index", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: 8 samples in 2 shards, 0.1 MB, index.json written\n"
    index = json.loads((folder / "index.json").read_text())
    assert index["version"] == 2
    for entry in index["shards"]:
        data = (folder / entry["name"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    caplog.clear()
    monkeypatch.setattr(shard_file, "scan_layout", None)
    assert read_all(folder) == whole
    assert not caplog.records


def test_a_folder_of_prepare_keeps_its_order_and_its_report(tmp_path):
    """A run with the old index resumes with the new one, and the command of the folder finds it complete."""
    folder = tmp_path / "set"
    report = write_shards(GeneratedScenes(25), folder, WriterOptions(samples_per_shard=10))
    before = json.loads((folder / "index.json").read_text())["shards"]
    assert main(["index", str(folder)]) == 0
    after = json.loads((folder / "index.json").read_text())["shards"]
    for old, new in zip(before, after, strict=True):
        assert {name: new[name] for name in ("name", "samples", "bytes", "sha256")} == {
            name: old[name] for name in ("name", "samples", "bytes", "sha256")
        }
    assert write_shards(GeneratedScenes(25), folder, WriterOptions(samples_per_shard=10)) == report


def test_shards_that_changed_since_the_last_index_are_logged(tmp_path, caplog):
    folder = write_folder(tmp_path / "set")
    assert main(["index", str(folder)]) == 0
    assert not caplog.records
    write_tar(folder / "1.tar", samples(2, "new-"))
    assert main(["index", str(folder)]) == 0
    (record,) = caplog.records
    assert f"1 shards of {folder} have other bytes than those with the hashes of the index.json" in record.message
    assert "for example 1.tar: were they changed, or damaged?" in record.message
    assert [shard.num_samples for shard in find_shards(str(folder))] == [3, 2]


def test_a_malformed_index_is_replaced(tmp_path):
    folder = write_folder(tmp_path / "set")
    (folder / "index.json").write_text('{"version": 9}')
    assert main(["index", str(folder)]) == 0
    assert len(find_shards(str(folder))) == 2


def packed(folder):
    (folder / "a.tar.gz").write_bytes(b"\x1f\x8b")


def unfinished(folder):
    write_tar(folder / "shard-000000.tar", samples(2))
    (folder / ".prepare").mkdir()


def one_empty(folder):
    write_tar(folder / "0.tar", samples(2))
    write_tar(folder / "1.tar", [])


def one_page(folder):
    (folder / "0.tar").write_text("<!doctype html>\n" * 200)


def one_pipe(folder):
    (folder / "0.tar").mkdir()


FOLDERS = {
    "missing": (None, "FOLDER is no folder: name a folder of shards (*.tar)"),
    "empty": (lambda folder: None, "FOLDER holds no shards (*.tar)"),
    "compressed": (packed, "FOLDER holds no shards (*.tar); unpack a.tar.gz and others to .tar"),
    "unfinished": (
        unfinished,
        "FOLDER is not finished: rerun the command of launcher/prepare.py that writes its",
    ),
    "a tar without samples": (one_empty, "shard FOLDER/1.tar is empty (10240 bytes, 0 samples); remove it from data"),
    "a web page": (one_page, "shard FOLDER/0.tar is a web page: download the file again"),
    "a folder with the name of a tar": (one_pipe, "FOLDER/0.tar cannot be used: Is a directory"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_indexed_is_named(tmp_path, capsys, name):
    write, problem = FOLDERS[name]
    folder = tmp_path / "set"
    if write is not None:
        folder.mkdir()
        write(folder)
    assert main(["index", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"prepare: {problem.replace('FOLDER', str(folder))}")
    assert error.count("\n") == 1
    assert not folder.is_dir() or "index.json" not in os.listdir(folder)


def test_an_address_and_no_folder_are_refused(capsys):
    for arguments, problem in (([], "FOLDER"), (["s3://bucket/set"], "s3://bucket/set is an address")):
        with pytest.raises(SystemExit) as caught:
            main(["index", *arguments])
        assert caught.value.code == 2
        assert problem in capsys.readouterr().err


PARTED = {
    "captions behind images": [(f"{n}.{kind}", b"x") for kind in ("jpg", "txt") for n in range(10)],
    "dots in keys": [(f"im.{n}.{kind}", b"x") for n in range(10) for kind in ("jpg", "txt")],
}


@pytest.mark.parametrize("members", PARTED.values(), ids=PARTED)
def test_images_without_their_captions_are_told(members, tmp_path, caplog):
    write_tar(tmp_path / "0.tar", members)
    assert main(["index", str(tmp_path)]) == 0
    (message,) = caplog.messages
    assert message.startswith(f"no sample read of {tmp_path / '0.tar'} has both an image and a caption: members of")


@pytest.mark.parametrize("kind", ["jpg", "txt"])
def test_shards_of_one_modality_are_indexed_without_a_word(kind, tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [(f"{n}.{kind}", b"x") for n in range(10)])
    assert main(["index", str(tmp_path)]) == 0
    assert not caplog.messages
