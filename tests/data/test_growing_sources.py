"""An unfinished folder of shards is not continued from a source whose files changed meanwhile: pairs would be lost."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from photo_sets import pack, photo, write

from eve_ds.data.importers import Addresses, Img2dataset, MetadataFolder, Nlvr
from eve_ds.data.shard_writer import OutputError, WriterOptions, write_shards

OPTIONS = WriterOptions(samples_per_shard=2)
CHANGED = (
    r"out holds the shards of another source or other options \((source\.[a-z0-9.]+: files came, went or changed since "
    r"then|source\.annotations: .*)\); choose another --out or remove it$"
)


class Killed(Exception):
    """Stands for a kill between two shards."""


def members(*numbers):
    return {
        f"{number:04d}.{suffix}": data
        for number in numbers
        for suffix, data in (
            ("png", photo(number)),
            ("txt", f"caption {number}".encode()),
            ("json", json.dumps({"url": f"http://x/{number}"}).encode()),
        )
    }


def nlvr(*numbers):
    return {f"dev/images/0/dev-{number}-0-{k}.png": photo(k) for number in numbers for k in range(6)}


def statements(numbers):
    lines = ({"sentence": "a", "label": "true", "identifier": f"{n}-0", "directory": "0"} for n in numbers)
    return "\n".join(map(json.dumps, lines))


def metadata(*numbers):
    return "file_name,text\n" + "".join(f"{number}.png,caption {number}\n" for number in numbers)


def table(path, *numbers):
    path.parent.mkdir(exist_ok=True)
    columns = {"png": [photo(n) for n in numbers], "caption": [f"caption {n}" for n in numbers]}
    pyarrow.parquet.write_table(pyarrow.table(columns | {"url": [f"http://x/{n}" for n in numbers]}), path)


def write_source(kind, folder):
    """Write a source of ten images and more."""
    if kind in ("tars", "urls of tars"):
        pack(folder / "in" / "1.tar", members(*range(10, 20)).items())
    elif kind in ("files", "urls of files"):
        write(folder / "in", {f"1/{name}": data for name, data in members(*range(10, 20)).items()})
    elif kind == "parquet":
        table(folder / "in" / "1.parquet", *range(10, 20))
    elif kind == "imagefolder":
        write(folder / "in", {f"{number}.png": photo(number) for number in range(20)})
        write(folder / "in", {"metadata.csv": metadata(*range(10, 20))})
    else:
        write(folder / "in", {"dev/dev.json": statements(range(5)), **nlvr(2, 3, 4)})
    write(folder, {"list.tsv": "".join(f"caption {number}\thttp://x/{number}\n" for number in range(20))})


def source(kind, folder):
    if kind.startswith("urls"):
        return Addresses([folder / "list.tsv"], folder / "in")
    reader = {"imagefolder": MetadataFolder, "nlvr": lambda path: Nlvr([path])}.get(kind, Img2dataset)
    return reader(folder / "in")


CHANGES = {  # kind: (what happens, function that changes the folder)
    "tars": [
        ("an earlier tar comes", lambda folder: pack(folder / "0.tar", members(1).items())),
        ("a tar grows", lambda folder: pack(folder / "1.tar", members(*range(9, 40)).items())),
        ("a tar goes", lambda folder: (folder / "1.tar").rename(folder / "2.tar")),
    ],
    "files": [
        (
            "earlier files come in the folder",
            lambda folder: write(folder, {f"1/{n}": d for n, d in members(0).items()}),
        ),
        ("files come in another folder", lambda folder: write(folder, {f"0/{n}": d for n, d in members(0).items()})),
        ("files come at the top", lambda folder: write(folder, members(0))),
        ("files come two folders down", lambda folder: write(folder, {f"1/x/{n}": d for n, d in members(0).items()})),
        ("a caption changes", lambda folder: write(folder, {"1/0010.txt": "another caption"})),
        ("an image goes", lambda folder: (folder / "1" / "0010.png").unlink()),
        ("a linked folder comes", lambda folder: link(folder, members(0))),
    ],
    "parquet": [
        ("an earlier table comes", lambda folder: table(folder / "0.parquet", 1)),
        ("a table grows", lambda folder: table(folder / "1.parquet", *range(9, 40))),
    ],
    "imagefolder": [
        ("metadata of a subfolder come", lambda folder: write(folder, {"a/metadata.csv": metadata(0)})),
        ("metadata change", lambda folder: write(folder, {"metadata.csv": metadata(*range(9, 20))})),
    ],
    "nlvr": [
        ("earlier images come", lambda folder: write(folder, nlvr(1))),
        ("an image goes", lambda folder: (folder / "dev" / "images" / "0" / "dev-2-0-0.png").unlink()),
        ("annotations change", lambda folder: write(folder, {"dev/dev.json": statements(range(4))})),
    ],
}
CHANGES |= {f"urls of {kind}": CHANGES[kind] for kind in ("tars", "files")}
CASES = [(kind, *change) for kind, changes in CHANGES.items() for change in changes]


def link(folder, files):
    write(folder.parent / "elsewhere", files)
    (folder / "0").symlink_to(folder.parent / "elsewhere")


def kill_after_two_shards(kind, folder):
    """Leave the folder of a run that ended after two shards."""

    def on_shard(progress):
        finished.append(progress)
        if len(finished) == 2:
            raise Killed

    finished = []
    with pytest.raises(Killed):
        write_shards(source(kind, folder), folder / "out", OPTIONS, 1, on_shard)
    assert len(list((folder / "out").glob("*.tar"))) == 2


@pytest.mark.parametrize(("kind", "name", "change"), CASES, ids=[f"{kind}: {name}" for kind, name, _ in CASES])
def test_a_changed_source_is_refused(tmp_path, kind, name, change):
    write_source(kind, tmp_path)
    kill_after_two_shards(kind, tmp_path)
    change(tmp_path / "in")
    with pytest.raises(OutputError, match=CHANGED):
        write_shards(source(kind, tmp_path), tmp_path / "out", OPTIONS)


@pytest.mark.parametrize("kind", CHANGES)
def test_an_unchanged_source_is_continued(tmp_path, kind):
    write_source(kind, tmp_path)
    clean = write_shards(source(kind, tmp_path), tmp_path / "clean", OPTIONS)
    kill_after_two_shards(kind, tmp_path)
    write(tmp_path / "in", {"00000_stats.html": "no part of a sample", ".DS_Store": "macOS"})
    assert write_shards(source(kind, tmp_path), tmp_path / "out", OPTIONS) == clean
    for path in (tmp_path / "clean").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
