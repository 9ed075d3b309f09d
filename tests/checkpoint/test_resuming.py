"""Choice of the checkpoint to resume from: of this run, of a named run, or a named checkpoint."""

import re

import pytest
from tiny import tiny_config

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import record_of
from eve_ds.checkpoint.resuming import newest_good
from eve_ds.config import ConfigError


def write_checkpoint(run, step, config):
    """A checkpoint with nothing but its configuration."""
    folder = run / manifest.FOLDER / manifest.name_of(step)
    folder.mkdir(parents=True)
    (folder / manifest.CONFIG).write_text(config.model_dump_json())
    manifest.write_manifest(folder, {"step": step}, {manifest.CONFIG: record_of(folder / manifest.CONFIG)})
    (run / manifest.FOLDER / manifest.LATEST).write_text(f"{folder.name}\n")
    return folder


@pytest.fixture
def config(tmp_path):
    return tiny_config(f"train.output_dir={tmp_path / 'own'}")


def test_a_named_run_gives_its_newest_good_checkpoint(tmp_path, config):
    first, second = (write_checkpoint(tmp_path / "other", step, config) for step in (3, 5))
    own = write_checkpoint(tmp_path / "own", 9, config)
    assert newest_good(config, tmp_path / "other") == second
    assert newest_good(config, first) == first
    assert newest_good(config) == own
    (second / manifest.CONFIG).write_text("{}")
    assert newest_good(config, tmp_path / "other") == first


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: None, "the checkpoint {} to resume from does not exist"),
        (lambda folder: folder.mkdir(), "the checkpoint {} to resume from has no manifest.json"),
        (
            lambda folder: (folder / "checkpoints").mkdir(parents=True),
            "the run {} to resume from has no finished",
        ),
    ],
    ids=["nothing", "another folder", "a run that saved nothing"],
)
def test_a_folder_without_a_checkpoint_is_named(tmp_path, config, make, text):
    make(tmp_path / "named")
    with pytest.raises(ConfigError, match=f"^{re.escape(text.format(tmp_path / 'named'))}.*name a checkpoint or a run"):
        newest_good(config, tmp_path / "named")
