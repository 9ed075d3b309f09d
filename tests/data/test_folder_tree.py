"""Folders are found through links, each once; links can make no loop, and what cannot be read is named."""

import os
import random

import pytest

from eve_ds.data import folder_tree
from eve_ds.data.folder_tree import BROKEN, UNREADABLE, FolderTree, contents_digest


def tree_of(folder, files=(), links=()):
    """Folder `root` with files and with links {place: target below `folder`}."""
    for name in ("root/", *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            (folder / name).write_text(name)
    for place, target in dict(links).items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(folder / target)
    return FolderTree(folder / "root")


LINKS = {  # name: files, links, names of the files that are found
    "no link": (["root/b/1.tar", "root/a.tar"], {}, ["a.tar", "b/1.tar"]),
    "out": (["other/1.tar"], {"root/x": "other"}, ["x/1.tar"]),
    "out, in a folder": (["other/1.tar"], {"root/x/y": "other"}, ["x/y/1.tar"]),
    "to a link": (["other/1.tar"], {"root/x": "way", "way": "other"}, ["x/1.tar"]),
    "in a linked folder": (["o/1.tar", "p/2.tar"], {"root/x": "o", "o/y": "p"}, ["x/1.tar", "x/y/2.tar"]),
    "of a file": (["other/1.tar"], {"root/x.tar": "other/1.tar"}, ["x.tar"]),
    "of a file in a linked folder": (["p/2.tar"], {"root/x": "o", "o/y.tar": "p/2.tar"}, ["x/y.tar"]),
    "to a sibling": (["root/z/1.tar"], {"root/a": "root/z"}, ["z/1.tar"]),
    "two to one": (["other/1.tar"], {"root/b": "other", "root/a": "other"}, ["a/1.tar"]),
    "to a part of a linked folder": (["o/p/1.tar"], {"root/a": "o/p", "root/b": "o"}, ["a/1.tar"]),
    "to itself": (["root/1.tar"], {"root/x": "root/x"}, ["1.tar"]),
    "to the root": (["root/1.tar"], {"root/x": "root"}, ["1.tar"]),
    "above the root": (["root/1.tar", "beside/2.tar"], {"root/x": "."}, ["1.tar"]),
    "around": (["root/a/1.tar"], {"root/a/x": "root/b", "root/b/y": "root/a"}, ["a/1.tar"]),
    "around outside": (["o/1.tar"], {"root/x": "o", "o/y": "p", "p/z": "o"}, ["x/1.tar"]),
    "with the name of a tar": (["o/1.tar"], {"root/x.tar": "o"}, ["x.tar/1.tar"]),
    "of macOS": (["root/__MACOSX/1.tar", "root/._2.tar", "o/3.tar"], {"root/__MACOSX/x": "o"}, []),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", LINKS)
def test_every_folder_is_found_once(tmp_path, name):
    files, links, expected = LINKS[name]
    tree = tree_of(tmp_path, files, links)
    found = tree.ending(".tar")
    assert [file.name for file in found] == expected
    for file in found:
        assert os.path.samefile(file.path, tmp_path / "root" / file.name)
        assert os.path.realpath(os.path.dirname(file.path)).startswith(file.within)
    assert [name for name, _ in tree.unread] == (["x"] if name == "to itself" else [])


def test_random_links_end_and_every_reachable_file_is_found_once(tmp_path):
    """The reference follows links without a guard, up to a depth, and compares real paths."""
    rng = random.Random(0)
    folders = [
        f"{top}/{'/'.join(rng.choices('abc', k=depth))}" for top in ("root", "o") for depth in (0, 1, 1, 2, 2, 3)
    ]
    files = [os.path.join(folder, f"{number}.tar") for number, folder in enumerate(folders)]
    links = {os.path.join(rng.choice(folders), f"link{number}"): rng.choice(folders) for number in range(12)}
    found = tree_of(tmp_path, files, links).ending(".tar")

    reachable = set()
    waiting = [(tmp_path / "root", 0)]
    while waiting:
        folder, depth = waiting.pop()
        for path in folder.iterdir():
            if path.is_dir() and depth < 5:
                waiting.append((path, depth + 1))
            elif path.suffix == ".tar":
                reachable.add(path.resolve())
    assert len(found) == len(reachable) > 6
    assert {(tmp_path / "root" / file.name).resolve() for file in found} == reachable


def test_links_that_lead_nowhere_are_named_unless_their_reader_counts_them(tmp_path):
    tree = tree_of(tmp_path, (), {"root/a/00001": "gone", "root/0.jpg": "gone.jpg", "root/x": "root/x"})
    assert tree.unread == [("x", BROKEN), ("a/00001", BROKEN)]
    assert [file.name for file in tree.ending(".jpg")] == ["0.jpg"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def scandir(path):
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    scan = os.scandir
    monkeypatch.setattr(folder_tree.os, "scandir", scandir)
    tree = tree_of(tmp_path, ["root/closed/1.tar", "root/2.tar"])
    assert tree.unread == [("closed", UNREADABLE)]
    assert [file.name for file in tree.ending(".tar")] == ["2.tar"]


def test_several_roots_share_no_folder(tmp_path):
    tree_of(tmp_path, ["root/a/1.tar", "other/2.tar"], {"other/x": "root"})
    found = FolderTree(tmp_path / "root" / "a", tmp_path / "root", tmp_path / "other").ending(".tar")
    assert sorted(os.path.basename(file.path) for file in found) == ["1.tar", "2.tar"]


def test_the_digest_knows_names_order_and_sizes(tmp_path):
    for name, size in (("a", 1), ("b", 1), ("long", 2)):
        (tmp_path / name).write_bytes(bytes(size))
    lists = [
        [("x", "a")],
        [("y", "a")],
        [("x", "long")],
        [("x", "gone")],
        [("x", "a"), ("y", "b")],
        [("y", "a"), ("x", "b")],
        [("x\udcff", "a")],
        [],
    ]
    digests = [contents_digest((name, str(tmp_path / path)) for name, path in files) for files in lists]
    assert len({*digests}) == len(lists)
    assert contents_digest([("y", str(tmp_path / "b"))]) == digests[1], "neither the path nor the content counts"
