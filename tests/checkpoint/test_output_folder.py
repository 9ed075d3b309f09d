"""Output folders of commands: never inside a checkpoint, which would then have files that its manifest lacks."""

from contextlib import ExitStack

import pytest

from eve_ds.checkpoint.output_folder import check_output_folder, enclosing_checkpoint
from eve_ds.cli import report
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
    assert sorted(checkpoint.rglob("*")) == before
