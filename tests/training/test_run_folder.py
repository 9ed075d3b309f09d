"""Output folder of a run: created, accepted, or refused because it belongs to another run."""

import errno
import fcntl
import json
import os
import tempfile
from pathlib import Path

import pytest

from eve_ds.config import ConfigError, parse_config
from eve_ds.training.run_folder import FolderLock, check_output_dir
from eve_ds.training.run_folder import write_config as write_own_config


def of_run(folder, **train):
    return parse_config({"train": {"output_dir": str(folder), **train}})


def write_config(run):
    Path(run.train.output_dir, "config.json").write_text(run.model_dump_json())


def refused_folder(run, resume="auto"):
    with pytest.raises(ConfigError) as caught:
        check_output_dir(run, resume)
    return str(caught.value)


def test_a_missing_field_in_an_old_run_counts_as_its_default(tmp_path):
    run = of_run(tmp_path)
    tree = run.model_dump(mode="json")
    del tree["loss"]["itc_weight"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    check_output_dir(run, "auto")


def test_an_old_run_without_pixel_target_resumes_with_normalized_pixels(tmp_path):
    run = of_run(tmp_path)
    tree = run.model_dump(mode="json")
    del tree["model"]["pixel_target"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert "pixel_target" in refused_folder(run)
    model = run.model.model_copy(update={"pixel_target": "normalized"})
    check_output_dir(run.model_copy(update={"model": model}), "auto")


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ({}, ["joint"]),
        ({"objective": "msm"}, ["joint"]),
        ({"objective": "itc_itm"}, ["itc", "itm"]),
        ({"objective": "itc_itm_mlm"}, ["mlm", "itc", "itm"]),
    ],
)
def test_an_old_run_without_objectives_resumes_with_the_equivalent_set(tmp_path, former, now):
    run = of_run(tmp_path)
    run = run.model_copy(update={"model": run.model.model_copy(update={"objectives": now})})
    tree = run.model_dump(mode="json")
    del tree["model"]["objectives"]
    tree["model"] |= former
    tree["loss"] |= {"pixel_weight": tree["loss"].pop("mim_weight"), "text_weight": tree["loss"].pop("mlm_weight")}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    check_output_dir(run, "auto")
    other = run.model_copy(update={"model": run.model.model_copy(update={"objectives": ["mim", "mlm"]})})
    assert f"its model.objectives is {now!r}, this run's is ['mim', 'mlm']" in refused_folder(other)


def test_a_new_folder_is_created_empty(tmp_path):
    check_output_dir(of_run(tmp_path / "a" / "b"), "none")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": {"intermediate_size": 8}}, "its model.intermediate_size is 3072, this run's is 8"),
        ({"masking": {"patch_mask_ratio": 0.5}}, "its masking.patch_mask_ratio is 0.75, this run's is 0.5"),
        ({"data": {"shuffle_buffer": 7}}, "its data.shuffle_buffer is 1000, this run's is 7"),
        ({"loss": {"mlm_weight": 3}}, "its loss.mlm_weight is 1.0, this run's is 3.0"),
        ({"train": {"seed": 4}}, "its train.seed is 0, this run's is 4"),
    ],
)
def test_the_folder_of_another_run_is_refused(tmp_path, changes, text):
    write_config(of_run(tmp_path))
    train = {"output_dir": str(tmp_path), **changes.pop("train", {})}
    message = refused_folder(parse_config({"train": train} | changes))
    assert message == f"train.output_dir ({tmp_path}) is the folder of another run: {text}; name another folder"


def test_the_folder_of_the_same_run_is_accepted(tmp_path):
    run = of_run(tmp_path)
    write_config(run)
    check_output_dir(run, "auto")
    longer = parse_config(
        {
            "train": {"output_dir": str(tmp_path), "max_steps": 7, "log_every": 3},
            "optimizer": {"lr": 1e-5},
            "data": {"num_workers": 3, "max_bad_share": 0.5, "cache_dir": "/cache", "cache_bytes": 2**30}
            | {"image_decoder": "pillow", "remote": {"deadline_seconds": 5}},
        }
    )
    check_output_dir(longer, "auto")
    assert refused_folder(run, "none") == (
        f"train.output_dir ({tmp_path}) holds a run: use --resume auto, or name another folder"
    )


MOVED = {
    "tokenizer": {"data": {"tokenizer": "/other/place"}},
    "shards": {"data": {"sources": [{"kind": "shards", "shards": "/other/{000..001}.tar"}]}},
    "validation": {"data": {"validation": {"sources": [{"kind": "shards", "shards": "/other/v"}]}}},
    "examples": {"task": {"name": "vqa", "train": {"format": "json", "annotations": ["/other/a"], "images": "/b"}}},
}


def at_home(moved):
    """The same settings with the data in another place."""
    if isinstance(moved, dict):
        return {key: at_home(value) for key, value in moved.items()}
    if isinstance(moved, list):
        return [at_home(item) for item in moved]
    return moved.replace("/other", "/home") if isinstance(moved, str) else moved


@pytest.mark.parametrize("what", MOVED)
def test_data_may_move_once_a_checkpoint_can_tell_whether_it_is_the_same(tmp_path, what):
    train = {"train": {"output_dir": str(tmp_path)}}
    before, now = (parse_config(train | tree) for tree in (at_home(MOVED[what]), MOVED[what]))
    write_config(before)
    assert "is the folder of another run: its " in refused_folder(now)
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    check_output_dir(now, "auto")
    changed = now.model_copy(update={"loss": now.loss.model_copy(update={"mlm_weight": 3.0})})
    assert "its loss.mlm_weight is 1.0, this run's is 3.0" in refused_folder(changed)


@pytest.mark.parametrize("damage", ["", "{", "[]", "\ud800", "\0" * 100])
def test_a_damaged_configuration_is_read_from_a_checkpoint(tmp_path, caplog, damage):
    run = of_run(tmp_path)
    (tmp_path / "config.json").write_text(damage, errors="surrogatepass")
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(run.model_dump_json())
    check_output_dir(run, "auto")
    assert f"going on with {checkpoint}/config.json" in caplog.text
    assert "its train.seed is 0, this run's is 1" in refused_folder(of_run(tmp_path, seed=1))
    (checkpoint / "config.json").write_text("{")
    assert "config.json is not JSON (" in refused_folder(run) or damage == "[]"
    assert refused_folder(run).endswith("and no checkpoint has a copy: name another folder, or remove this one")


def test_an_empty_configuration_without_checkpoints_claims_nothing(tmp_path, caplog):
    run = of_run(tmp_path)
    (tmp_path / "config.json").touch()
    check_output_dir(run, "auto")
    assert "config.json is empty and the folder holds no checkpoint: starting a new run in it" in caplog.text
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON (" in refused_folder(run)


def test_the_configuration_is_replaced_only_if_it_changed(tmp_path):
    run = of_run(tmp_path)
    write_own_config(run)
    before = (tmp_path / "config.json").stat()
    write_own_config(run)
    assert (tmp_path / "config.json").stat().st_ino == before.st_ino
    write_own_config(of_run(tmp_path, max_steps=3))
    assert (tmp_path / "config.json").stat().st_ino != before.st_ino
    assert json.loads((tmp_path / "config.json").read_text())["train"]["max_steps"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    text = refused_folder(of_run(tmp_path / "file" / "run"))
    assert text == (
        f"train.output_dir ({tmp_path}/file/run) cannot be written: Not a directory; "
        "name another folder or change its permissions"
    )


def test_a_read_only_folder_is_refused():
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent, "run")
        folder.mkdir(mode=0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write anywhere; the user nobody may not
        try:
            text = refused_folder(of_run(folder))
        finally:
            os.seteuid(user)
    assert text == (
        f"train.output_dir ({folder}) cannot be written: Permission denied; "
        "name another folder or change its permissions"
    )


def finished_run(folder):
    """A run with one checkpoint, as far as its names go."""
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    for name in ("manifest.json", "state.json", "config.json"):
        (checkpoint / name).write_text("{}")
    return checkpoint


@pytest.mark.parametrize("below", ["", "new", "new/run", "tokenizer/.."])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_run_cannot_write_into_a_checkpoint(tmp_path, below, is_link):
    checkpoint = finished_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(checkpoint)
    folder = (tmp_path / "link" if is_link else checkpoint) / below
    before = sorted(tmp_path.rglob("*"))
    assert refused_folder(of_run(folder)) == (
        f"train.output_dir ({folder}) lies in the checkpoint {checkpoint}: name the run ({tmp_path}/run) to resume it, "
        "or another folder"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_of_checkpoints_is_no_run(tmp_path):
    folder = finished_run(tmp_path / "run").parent
    text = refused_folder(of_run(folder))
    assert text == (
        f"train.output_dir ({folder}) is the folder of the checkpoints of a run: name the run ({tmp_path}/run) to "
        "resume it, or another folder"
    )
    check_output_dir(of_run(tmp_path / "run" / "other"), "auto")
    check_output_dir(of_run(tmp_path / "checkpoints"), "auto")


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_run_cannot_replace_the_configuration_of_an_exported_model(tmp_path, weights):
    run = of_run(tmp_path)
    write_config(run)
    (tmp_path / weights).touch()
    text = refused_folder(run)
    assert text == (
        f"train.output_dir ({tmp_path}) holds an exported model ({weights}): name another folder, and the model as "
        "--init to start from its weights"
    )


@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_a_folder_of_checkpoints_that_cannot_be_written_is_refused_before_training(tmp_path, kind):
    checkpoints = tmp_path / "checkpoints"
    if kind == "file":
        checkpoints.touch()
    else:
        checkpoints.symlink_to(tmp_path / "gone")
    assert refused_folder(of_run(tmp_path)).startswith(f"train.output_dir ({checkpoints}) cannot be written: No")
    assert os.listdir(tmp_path) == ["checkpoints"]


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_the_run_that_holds_the_lock_is_named(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    (tmp_path / ".lock").write_text("process 7 on a")
    with pytest.raises(ConfigError) as caught:
        FolderLock(tmp_path).acquire()
    assert str(caught.value) == (
        f"train.output_dir ({tmp_path}) is being written by another run (process 7 on a): wait until it ends, or name "
        "another folder"
    )


def test_a_folder_without_locks_can_be_written(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert f"{tmp_path}/.lock cannot be locked (No locks available)" in caplog.text
    with lock:
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
