"""Files and folders of checkpoints: tensor pieces, manifests, and which checkpoints are good, newest or old."""

import itertools
import json
import os
import random
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import CheckpointError, Piece, PieceReader, record_of, write_pieces
from eve_ds.checkpoint.resuming import newest_good, restore_random_states
from eve_ds.checkpoint.saving import random_states
from eve_ds.checkpoint.universal import write_universal
from eve_ds.config import ConfigError
from eve_ds.model.shards import Cut, Shard

FIRST = "tensors-00000.safetensors"


def pieces(values, *cuts, kind="master", name="a.b"):
    """Pieces of a tensor that is cut at the given elements."""
    borders = [0, *cuts, len(values)]
    return [Piece(kind, name, start, values[start:stop]) for start, stop in itertools.pairwise(borders)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_are_safetensors_with_the_recorded_hash(tmp_path, dtype):
    values = torch.randn(7).to(dtype)
    record = write_pieces(tmp_path / FIRST, [*pieces(values, 3), Piece("exp_avg", "c", 2, torch.randn(2, 4)[:, 1])])
    assert record == record_of(tmp_path / FIRST)
    stored = load_file(tmp_path / FIRST)
    assert torch.equal(stored["master/a.b/0"], values[:3])
    assert torch.equal(stored["master/a.b/3"], values[3:])
    assert stored["exp_avg/c/2"].shape == (2,)


def test_any_range_can_be_read_across_files(tmp_path):
    values = torch.arange(20.0)
    cut = pieces(values, 5, 6, 13)
    write_pieces(tmp_path / FIRST, [cut[2], cut[0]])
    write_pieces(tmp_path / "tensors-00001.safetensors", [cut[3], cut[1]])
    reader = PieceReader(tmp_path)
    assert reader.names("master") == {"a.b"}
    assert reader.names("exp_avg") == set()
    assert reader.numel("master", "a.b") == 20
    for start in range(20):
        for stop in range(start + 1, 21):
            assert torch.equal(reader.read("master", "a.b", start, stop), values[start:stop])
    assert torch.equal(reader.read("master", "a.b"), values)


@pytest.mark.parametrize("present", [(0, 2), (1, 2), (0, 1)])
def test_gap_between_pieces_is_reported(tmp_path, present):
    cut = pieces(torch.arange(9.0), 3, 6)
    write_pieces(tmp_path / FIRST, [cut[number] for number in present])
    with pytest.raises(CheckpointError, match=r"lacks elements \d to 9 of master a\.b: take another checkpoint"):
        PieceReader(tmp_path).read("master", "a.b", 0, 9)


def test_overlapping_pieces_are_refused(tmp_path):
    values = torch.arange(9.0)
    write_pieces(tmp_path / FIRST, [Piece("master", "a", 0, values[:5]), Piece("master", "a", 4, values[4:])])
    with pytest.raises(CheckpointError, match="lacks elements 5 to 9 of master a"):
        PieceReader(tmp_path).read("master", "a")


def shards(whole, dim, blocks, size, name="a.b"):
    """Pieces of the shards of `size` ranks, each in two parts; the shards are made by `chunk`."""
    made = []
    for rank in range(size):
        runs = Shard(whole.shape, Cut(dim, blocks), rank, size).runs
        parts = [block.chunk(size, dim)[rank] for block in whole.chunk(blocks, dim)]
        flat = torch.cat(parts, dim).flatten()
        made += [Piece("master", name, 0, flat[:5], runs), Piece("master", name, 5, flat[5:], runs)]
    return made


@pytest.mark.parametrize(("dim", "blocks"), [(0, 1), (0, 3), (1, 1)])
def test_shards_make_up_the_tensor(tmp_path, dim, blocks):
    whole = torch.randn(12, 4)
    first, *others = shards(whole, dim, blocks, 2)
    write_pieces(tmp_path / FIRST, others)
    write_pieces(tmp_path / "tensors-00001.safetensors", [first])
    reader = PieceReader(tmp_path)
    assert reader.numel("master", "a.b") == 48
    assert torch.equal(reader.read("master", "a.b"), whole.flatten())
    assert torch.equal(reader.read("master", "a.b", 7, 31), whole.flatten()[7:31])


def test_a_missing_or_doubled_part_of_a_shard_is_reported(tmp_path):
    made = shards(torch.randn(12, 4), 1, 1, 2)
    for kept in (made[:3], made[1:], [made[0], made[0], *made[2:], made[3]._replace(start=0, tensor=torch.zeros(14))]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for number, piece in enumerate(kept):
            write_pieces(folder / f"tensors-{number:05d}.safetensors", [piece])
        with pytest.raises(CheckpointError, match=r"holds shards of master a\.b that do not make up its 48 elements"):
            PieceReader(folder).read("master", "a.b")


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 16,
        struct.pack("<Q", 4) + b"nope",
        header([1]),
        header({"a": 1}),
        header({"master/a/0": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
        header({"master/a/0": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}),
        header({"master/a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
    ],
)
def test_invalid_tensor_file_is_reported(tmp_path, content):
    (tmp_path / FIRST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tensors-00000\.safetensors is not a tensor file of a checkpoint \("):
        PieceReader(tmp_path)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_resuming_never_unpickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (FIRST, "state.json", "rank-00000.json"):
        torch.save({"module": Harmful()}, tmp_path / name)
    with pytest.raises(CheckpointError, match="is not a tensor file of a checkpoint"):
        PieceReader(tmp_path)
    for name in ("state.json", "rank-00000.json"):
        with pytest.raises(CheckpointError, match=f"{name} is not JSON"):
            manifest.read_json(tmp_path / name)
    assert not (tmp_path / "harmed").exists()


def test_truncated_file_is_reported(tmp_path):
    write_pieces(tmp_path / FIRST, pieces(torch.arange(9.0)))
    content = (tmp_path / FIRST).read_bytes()
    (tmp_path / FIRST).write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match="ends too early"):
        PieceReader(tmp_path).read("master", "a.b")


def test_folder_without_tensors_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no tensors-\*\.safetensors"):
        PieceReader(tmp_path)


# --- folders ----------------------------------------------------------------------------------------------------------


def commit(run, step, *, latest=True, value=0.0):
    """Write a small good checkpoint."""
    root = run / manifest.FOLDER
    hidden = root / f".saving-{step}"
    (hidden / "tokenizer").mkdir(parents=True)
    records = {FIRST: write_pieces(hidden / FIRST, pieces(torch.arange(9.0) + value))}
    for name in (manifest.STATE, "tokenizer/tokenizer.json"):
        (hidden / name).write_text(json.dumps({"step": step}))
        records[name] = record_of(hidden / name)
    manifest.write_manifest(hidden, {"step": step}, records)
    if latest:
        manifest.publish(root, hidden.name, manifest.name_of(step))
    else:
        hidden.rename(root / manifest.name_of(step))
    return root / manifest.name_of(step)


def test_checkpoint_of_another_model_is_refused_with_the_key_that_differs(tmp_path):
    folder = tmp_path / manifest.FOLDER / manifest.name_of(3)
    folder.mkdir(parents=True)
    (folder / manifest.CONFIG).write_text(tiny_config("model.text_length=20").model_dump_json())
    manifest.write_manifest(folder, {"step": 3}, {manifest.CONFIG: record_of(folder / manifest.CONFIG)})
    assert newest_good(tiny_config("model.text_length=20"), folder) == folder
    with pytest.raises(ConfigError) as caught:
        newest_good(tiny_config(), folder)
    text = "holds another model than this run's: its model.text_length is 20, this run's is 24; name a checkpoint of "
    assert str(caught.value) == f"{folder} {text}this run"


def names(run):
    return [path.name for path in manifest.committed(run)]


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_good_checkpoint_has_no_problems_and_any_changed_byte_is_detected(tmp_path):
    folder = commit(tmp_path, 3)
    assert manifest.problems(folder) == []
    size = (folder / FIRST).stat().st_size
    for place in (0, 20, size // 2, size - 1):
        flip(folder / FIRST, place)
        assert manifest.problems(folder) == [f"{FIRST} has other content than was written (sha256 differs)"]
        assert manifest.problems(folder, hashes=False) == []
        flip(folder / FIRST, place)
    assert manifest.problems(folder) == []


def damage(folder, how):
    file = folder / FIRST
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "a folder":
        file.unlink()
        file.mkdir()
    elif how == "surplus":
        (folder / "tensors-00001.safetensors").write_bytes(file.read_bytes())
    elif how == "no manifest":
        (folder / manifest.MANIFEST).unlink()
    elif how == "empty manifest":
        (folder / manifest.MANIFEST).write_bytes(b"")
    elif how == "list":
        (folder / manifest.MANIFEST).write_text('{"format": 1, "files": [1]}')
    elif how == "format":
        (folder / manifest.MANIFEST).write_text('{"format": 2, "files": {}}')


DAMAGES = {
    "missing": f"{FIRST} is missing",
    "truncated": f"{FIRST} has 123 bytes, 124 were written",
    "empty": f"{FIRST} has 0 bytes, 124 were written",
    "a folder": f"{FIRST} is no regular file",
    "surplus": "tensors-00001.safetensors not in manifest.json",
    "no manifest": "is incomplete, it lacks manifest.json",
    "empty manifest": "manifest.json is not JSON",
    "list": "manifest.json is not a list of files with their sizes and hashes",
    "format": "manifest.json has format 2, only 1 can be read",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_reported(tmp_path, how):
    folder = commit(tmp_path, 3)
    assert (folder / FIRST).stat().st_size == 124
    damage(folder, how)
    (problem,) = manifest.problems(folder)
    assert DAMAGES[how] in problem


def test_manifest_of_another_checkpoint_is_refused(tmp_path):
    folder, other = commit(tmp_path / "one", 3), commit(tmp_path / "other", 3, value=1.0)
    (folder / manifest.MANIFEST).write_bytes((other / manifest.MANIFEST).read_bytes())
    assert manifest.problems(folder) == [f"{FIRST} has other content than was written (sha256 differs)"]


def test_readers_divide_the_files(tmp_path):
    folder = commit(tmp_path, 3)
    damage(folder, "truncated")
    flip(folder / manifest.STATE, 3)
    found = [manifest.problems(folder, (number, 2)) for number in range(2)]
    assert sorted(map(len, found)) == [1, 1] or sorted(map(len, found)) == [0, 2]
    assert sorted(itertools.chain(*found)) == sorted(manifest.problems(folder))


def test_latest_names_the_newest_checkpoint(tmp_path):
    for step in (1, 2, 10, 3):
        commit(tmp_path, step)
    assert names(tmp_path) == ["step-00000003", "step-00000002", "step-00000001", "step-00000010"]
    pointer = tmp_path / manifest.FOLDER / manifest.LATEST
    for text in (b"", b"\xff\xfe", b"step-7\n", b"../../elsewhere"):
        pointer.write_bytes(text)
        assert names(tmp_path) == ["step-00000010", "step-00000003", "step-00000002", "step-00000001"]
    pointer.unlink()
    assert names(tmp_path)[0] == "step-00000010"
    pointer.write_text("step-00000005\n")  # this folder does not exist
    assert names(tmp_path) == ["step-00000003", "step-00000002", "step-00000001", "step-00000010"]


def test_file_times_are_ignored(tmp_path):
    for step in (1, 2):
        os.utime(commit(tmp_path, step), (2e9 - step * 1e8,) * 2)
    assert names(tmp_path) == ["step-00000002", "step-00000001"]


def test_hidden_and_foreign_folders_are_not_checkpoints(tmp_path):
    commit(tmp_path, 1)
    root = tmp_path / manifest.FOLDER
    for name in (".saving-step-00000002-ab", ".deleting-step-00000003", "step-4", "notes"):
        (root / name).mkdir()
    (root / "step-00000005").write_text("a file")
    assert names(tmp_path) == ["step-00000001"]
    manifest.remove_leftovers(root)
    left = sorted(path.name for path in root.iterdir())
    assert left == ["latest", "notes", "step-00000001", "step-00000005", "step-4"]


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path):
    commit(tmp_path, 3)
    folder = commit(tmp_path, 3, value=5.0)
    assert manifest.problems(folder) == []
    assert PieceReader(folder).read("master", "a.b")[0] == 5.0


@pytest.mark.parametrize(
    ("last", "every", "left"),
    [
        (None, None, [1, 2, 3, 4, 5, 6]),
        (2, None, [5, 6]),
        (1, 2, [2, 4, 6]),
        (2, 3, [3, 5, 6]),
        (9, None, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_old_checkpoints_are_retired(tmp_path, last, every, left):
    for step in range(1, 7):
        commit(tmp_path, step)
    gone = manifest.retire(tmp_path, last, every)
    assert sorted(names(tmp_path)) == [manifest.name_of(step) for step in left]
    assert sorted(gone) == [manifest.name_of(step) for step in range(1, 7) if step not in left]
    assert not list((tmp_path / manifest.FOLDER).glob(".*"))


def test_nothing_is_retired_if_the_newest_checkpoint_is_incomplete(tmp_path):
    for step in (1, 2):
        commit(tmp_path, step)
    damage(tmp_path / manifest.FOLDER / "step-00000002", "truncated")
    assert manifest.retire(tmp_path, 1, None) == []
    assert names(tmp_path) == ["step-00000002", "step-00000001"]


def test_random_states_are_restored():
    states = json.loads(json.dumps(random_states()))
    drawn = random.random(), np.random.rand(), torch.rand(3)
    restore_random_states(states)
    again = random.random(), np.random.rand(), torch.rand(3)
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])


# --- whole tensors ------------------------------------------------------------------------------------------------


def test_universal_checkpoint_joins_pieces(tmp_path, monkeypatch):
    folder, expected = tmp_path / "cut", {}
    folder.mkdir()
    files = [[], []]
    for number, kind in enumerate(("master", "exp_avg", "exp_avg_sq")):
        for name in ("a", "b", "c"):
            values = expected[kind, name] = torch.randn(10 + number)
            for rank, piece in enumerate(pieces(values, 4, kind=kind, name=name)):
                files[(rank + number) % 2].append(piece)
    records = {}
    for rank, held in enumerate(files):
        file = f"tensors-{rank:05d}.safetensors"
        records[file] = write_pieces(folder / file, held)
    (folder / "state.json").write_text("{}")
    records["state.json"] = record_of(folder / "state.json")
    manifest.write_manifest(folder, {"step": 4}, records)
    monkeypatch.setattr("eve_ds.checkpoint.universal.FILE_BYTES", 100)
    report = write_universal(folder, tmp_path / "deep" / "whole")
    assert (report.step, report.tensors, report.files) == (4, 9, 3)
    assert manifest.problems(tmp_path / "deep" / "whole") == []
    stored = {}
    for file in sorted((tmp_path / "deep" / "whole").glob("tensors-*")):
        stored |= load_file(file)
    assert stored.keys() == {f"{kind}/{name}/0" for kind, name in expected}
    assert all(torch.equal(stored[f"{kind}/{name}/0"], values) for (kind, name), values in expected.items())
    with pytest.raises(CheckpointError, match=r"whole is not empty, it holds .*: name a new or empty folder"):
        write_universal(folder, tmp_path / "deep" / "whole")


def test_universal_conversion_of_an_incomplete_checkpoint_leaves_no_folder(tmp_path):
    folder = commit(tmp_path, 3)
    save_file({"master/x/4": torch.zeros(3)}, folder / "tensors-00001.safetensors")
    with pytest.raises(CheckpointError, match="lacks elements 0 to 7 of master x"):
        write_universal(folder, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == [manifest.FOLDER]
