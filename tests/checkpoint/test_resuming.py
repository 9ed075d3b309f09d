"""Choice of the checkpoint to resume from: of this run, of a named run, or a named checkpoint."""

import re

import pytest
from tiny import tiny_config
from tokenizers import normalizers

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import record_of
from eve_ds.checkpoint.resuming import changed_settings, check_tokenizer, newest_good
from eve_ds.config import ConfigError
from eve_ds.data.tokenizer import load_tokenizer, train_tokenizer


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
        (lambda folder: folder.touch(), "the checkpoint {} to resume from is a file"),
        (lambda folder: folder.mkdir(), "the checkpoint {} to resume from has no manifest.json"),
        (
            lambda folder: (folder / "checkpoints").mkdir(parents=True),
            "the run {} to resume from has no finished",
        ),
    ],
    ids=["nothing", "a file", "another folder", "a run that saved nothing"],
)
def test_a_folder_without_a_checkpoint_is_named(tmp_path, config, make, text):
    make(tmp_path / "named")
    with pytest.raises(ConfigError, match=f"^{re.escape(text.format(tmp_path / 'named'))}.*name a checkpoint or a run"):
        newest_good(config, tmp_path / "named")


def test_changed_settings_are_named_with_both_values(tmp_path, config):
    folder = write_checkpoint(tmp_path / "own", 3, config)
    assert changed_settings(folder, config) == []
    moved = f"train.output_dir={tmp_path / 'moved'}"
    now = tiny_config(moved, "optimizer.lr=3e-5", "optimizer.betas=[0.9, 0.99]", "data.num_workers=2")
    before = config.optimizer
    assert sorted(changed_settings(folder, now)) == [
        "data.num_workers: 0 -> 2",
        f"optimizer.betas: {list(before.betas)} -> [0.9, 0.99]",
        f"optimizer.lr: {before.lr} -> 3e-05",
        f'train.output_dir: "{tmp_path}/own" -> "{tmp_path}/moved"',
    ]


CAPTIONS = ["a red circle", "a blue square left of a cross"]


def other_vocabulary():
    return train_tokenizer([*CAPTIONS, "zebra"], 120)


def other_splitting():
    tokenizer = train_tokenizer(CAPTIONS, 80)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # keeps capitals
    return tokenizer


def test_the_same_tokenizer_from_another_place_is_accepted(tmp_path, config):
    folder = write_checkpoint(tmp_path / "own", 3, config)
    check_tokenizer(folder, load_tokenizer("scenes"))  # a checkpoint without a tokenizer
    train_tokenizer(CAPTIONS, 80).save_pretrained(folder / manifest.TOKENIZER)
    check_tokenizer(folder, train_tokenizer(CAPTIONS, 80))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (other_vocabulary, r"the token '\S+' has the id (\d+|none) there and (\d+|none) here"),
        (other_splitting, "the vocabularies are equal, but texts are split otherwise"),
    ],
)
def test_another_tokenizer_under_any_name_is_refused(tmp_path, config, make, text):
    folder = write_checkpoint(tmp_path / "own", 3, config)
    train_tokenizer(CAPTIONS, 80).save_pretrained(folder / manifest.TOKENIZER)
    with pytest.raises(ConfigError, match=rf"step-00000003 was written with another tokenizer than .* \({text}\): "):
        check_tokenizer(folder, make())
