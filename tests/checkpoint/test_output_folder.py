"""Output folders: never in a checkpoint; whole or not at all, and an earlier result survives a failure."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from eve_ds.checkpoint.output_folder import check_output_folder, enclosing_checkpoint, replacing
from eve_ds.cli import evaluate, report
from eve_ds.config import ConfigError
from eve_ds.evaluation.predictions import _lock


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    for name in ("manifest.json", "state.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("below", ["", "export", "export/hf", "../step-00000001/x"])
def test_a_folder_in_a_checkpoint_is_refused(checkpoint, below):
    out = checkpoint / below
    with pytest.raises(ValueError, match=r"^--out \S+ lies in the checkpoint \S+, which it would damage: name another"):
        check_output_folder(out, ValueError, lambda name: True)


def test_a_link_into_a_checkpoint_is_followed(checkpoint, tmp_path):
    (tmp_path / "link").symlink_to(checkpoint)
    assert enclosing_checkpoint(tmp_path / "link" / "export") == checkpoint


def test_folders_beside_checkpoints_are_accepted(checkpoint, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")  # of another program
    for out in (tmp_path / "run" / "export", checkpoint.parent / "export", tmp_path / "new"):
        assert check_output_folder(out, ValueError) == set()


def test_predictions_and_reports_follow_the_same_rule(checkpoint, capsys):
    before = sorted(checkpoint.rglob("*"))
    with pytest.raises(ConfigError, match=" lies in the checkpoint "), ExitStack() as held:
        _lock(checkpoint / "predictions", held)
    assert report.main([str(checkpoint.parents[1]), "--out", str(checkpoint / "report")]) == 2
    assert f"report: --out {checkpoint}/report lies in the checkpoint {checkpoint}, which" in capsys.readouterr().err
    for command, option in (("scenes", "--json"), ("task", "--csv")):
        file = checkpoint / "results"
        options = [] if command == "scenes" else ["--out", str(checkpoint.parents[1] / "predictions")]
        assert evaluate.main([command, "--model", "x", option, str(file), *options]) == 2
        assert f"evaluate: {option} {file} lies in the checkpoint {checkpoint}, which" in capsys.readouterr().err
    assert sorted(checkpoint.rglob("*")) == before


def write(out, text="new"):
    with replacing(out) as folder:
        (folder / "file").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("target", ["empty", "earlier result", "missing", "missing below missing folders"])
def test_folder_that_a_link_names_is_replaced_and_the_link_stays(tmp_path, target):
    disk, links = tmp_path / "disk", tmp_path / "links"
    real = disk / "deep" / "real" if target.startswith("missing below") else disk / "real"
    disk.mkdir()
    links.mkdir()
    if target in ("empty", "earlier result"):
        real.mkdir()
    if target == "earlier result":
        (real / "file").write_text("old")
    link = links / "link"
    link.symlink_to(real)
    for text in ("new", "newer"):
        write(link, text)
        assert (real / "file").read_text() == text
        assert link.is_symlink()
        assert (names(links), names(real.parent)) == (["link"], ["real"])


@pytest.mark.parametrize("moment", ["after the first rename", "before the first rename"])
def test_earlier_result_comes_back_after_a_killed_call(tmp_path, moment):
    out, hidden = tmp_path / "out", tmp_path / ".out.writing"
    write(out, "old")
    hidden.mkdir()
    (hidden / "half").write_text("")
    if moment == "after the first rename":
        out.rename(tmp_path / ".out.earlier")
    with pytest.raises(OSError, match="full"), replacing(out):
        raise OSError("full")
    assert names(tmp_path) == ["out"]
    assert (out / "file").read_text() == "old"


def test_error_between_the_renames_brings_the_earlier_result_back(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename
    write(out, "old")
    left = [None, OSError("broken")]

    def rename_once(*paths):
        if left and (error := left.pop(0)):
            raise error
        rename(*paths)

    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(OSError, match="broken"):
        write(out)
    assert names(tmp_path) == ["out"]
    assert (out / "file").read_text() == "old"


def test_mounted_disk_is_refused_as_it_cannot_be_renamed(tmp_path):
    (tmp_path / "link").symlink_to("/proc")
    for out in (Path("/proc"), Path("/"), tmp_path / "link"):
        with pytest.raises(ValueError, match=f"--out {out} is a mounted disk, .*: name a folder in it"):
            check_output_folder(out, ValueError)


@pytest.mark.parametrize("spelling", [".", "link", "absolute"])
def test_working_directory_is_refused(tmp_path, monkeypatch, spelling):
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    out = {".": Path(), "link": tmp_path / "link", "absolute": here}[spelling]
    with pytest.raises(ValueError, match=r"is the working directory, .*: name a folder in it"):
        check_output_folder(out, ValueError)
    assert check_output_folder(Path("inside"), ValueError) == set()
