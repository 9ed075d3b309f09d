"""`convert` on checkpoints written here, whole and damaged."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn_run import inputs, sign, write_run
from safetensors.torch import load_file, save_file
from tiny import MODEL as TINY
from tiny import overrides

from eve_ds.cli.convert import main
from eve_ds.export import ExportError, load
from eve_ds.export.official import from_official

SCRIPT = Path(__file__).resolve().parents[2] / "launcher" / "convert.py"
MODEL = overrides()
MOE_LAYERS = TINY["moe_layers"]
TENSORS = "tensors-00001.safetensors"


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def checkpoint(run):
    return run / "checkpoints" / "step-00000007"


@pytest.fixture
def convert(capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(convert, tmp_path):
    """Expects exit code 2, one line on stderr, and nothing written; returns the line."""

    def call(source, out=tmp_path / "out"):
        before = sorted(out.rglob("*")) if out.is_dir() else None
        code, stdout, stderr = convert(source, "--out", out)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert (sorted(out.rglob("*")) if out.is_dir() else None) == before
        assert not [path.name for path in out.parent.glob(f".{out.name}.*")]
        return stderr

    return call


def change(checkpoint, edit):
    """Apply `edit` to the tensors of the first rank, as name -> flat tensor, and sign the result."""
    file = checkpoint / "tensors-00000.safetensors"
    state = load_file(file)
    edit(state)
    save_file(state, file)
    sign(checkpoint)


def test_a_run_becomes_a_folder_that_loads(run, tmp_path):
    out = tmp_path / "exports" / "first"
    env = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, str(SCRIPT), str(run), "--out", str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    lines = dict(re.split(r"\s{2,}|: ", line, maxsplit=1) for line in done.stdout.splitlines())
    weights = load_file(out / "model.safetensors")
    assert lines[str(out)] == "plain weights of step 7 (step-00000007), float32 of fp32 masters"
    assert lines["tensors"] == str(len(weights))
    assert lines["parameters"] == f"{sum(weight.numel() for weight in weights.values()):,}"
    assert lines["experts"] == "4 in layer 1, 4 in layer 2"
    assert lines["bytes"] == f"{(out / 'model.safetensors').stat().st_size:,}"
    assert re.fullmatch(
        r"max abs diff \d\.\d\de[+-]\d\d, relative \S+ \(at most 1e-06 in fp32\) from the engine's "
        r"pixel_predictions \(1, 48, 192\), token_logits \(1, 256\)",
        lines["check"],
    )
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "config.json", "tokenizer", "export.json", "README.md")
    }
    model, config, tokenizer = load(out)
    assert not model.training
    assert config.train.output_dir == run
    assert tokenizer.mask_token_id == 4
    model(**inputs()).token_logits().sum().backward()  # it can be trained further


@pytest.mark.parametrize(("arguments", "dtype"), [((), torch.float32), (("--dtype", "bf16"), torch.bfloat16)])
def test_weights_under_the_released_names_too(convert, run, tmp_path, arguments, dtype):
    out = tmp_path / "out"
    _, model = write_run(run, step=9, seed=1)
    code, stdout, _ = convert(run, "--out", out, "--format", "official", *arguments)
    assert code == 0
    assert stdout.splitlines()[-1] == (
        f"official    {out / 'eve_official.pth'}, {'bf16' if arguments else 'fp32'}, without the decoders; routed as "
        "model.profile=default, which the released code does otherwise"
    )
    released = torch.load(out / "eve_official.pth", weights_only=True)
    assert released["backbone.position_ids_text"].dtype == torch.int64
    ours = from_official(released)
    assert ours.keys() == {name for name in model.state_dict() if name.startswith("backbone.")}
    assert all(torch.equal(tensor, model.state_dict()[name].to(dtype)) for name, tensor in ours.items())
    load(out)
    assert convert(run, "--out", out)[0] == 0
    assert not (out / "eve_official.pth").exists()  # it would be that of an earlier step


def test_official_profile_needs_no_note_about_routing(convert, tmp_path):
    write_run(tmp_path / "official", overrides=["model.profile=official", "model.moe.routing=capacity"])
    _, stdout, _ = convert(tmp_path / "official", "--out", tmp_path / "out", "--format", "official")
    assert stdout.endswith("eve_official.pth, fp32, without the decoders\n")


def test_a_model_without_a_released_form_leaves_the_earlier_export(convert, tmp_path):
    run, out = tmp_path / "shared", tmp_path / "out"
    write_run(run, overrides=["model.deep_ffn=shared"])
    assert convert(run, "--out", out)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    code, stdout, stderr = convert(run, "--out", out, "--format", "official")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "the released code has no place for model.deep_ffn 'shared': leave --format out" in stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_export_with_released_names_appears_whole_or_not_at_all(convert, run, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def full(state, opened):
        opened.write(b"half")
        raise OSError(28, "No space left on device")

    assert convert(run, "--out", out)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(torch, "save", full)
    for folder, files in ((out, before), (tmp_path / "new", {})):
        code, stdout, stderr = convert(run, "--out", folder, "--format", "official")
        assert (code, stdout) == (5, "")
        assert stderr == "convert: No space left on device; make room, and rerun the same command\n"
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_hf_export_in_several_files_is_replaced_by_one_file(convert, run, tmp_path):
    from transformers import AutoModel

    out, loaded = tmp_path / "out", {}
    for size, count in (("100KB", 4), ("5GB", 1)):
        assert convert(run, "--out", out, "--format", "hf", "--max_shard_size", size)[0] == 0
        files = list(out.glob("*.safetensors"))
        assert len(files) == count
        assert {file.stat().st_mode for file in files} == {(out / "config.json").stat().st_mode}
        loaded[count] = AutoModel.from_pretrained(out).state_dict()
    assert all(torch.equal(weight, loaded[1][name]) for name, weight in loaded[4].items())


def test_hf_export_refuses_a_folder_before_it_exports(convert, run, tmp_path, monkeypatch):
    monkeypatch.setattr("eve_ds.export.export", lambda *_, **__: pytest.fail("exported"))
    (tmp_path / "notes.txt").touch()
    for out, message in ((tmp_path, "is not empty"), ("/", "is a mounted disk")):
        code, _, stderr = convert(run, "--out", out, "--format", "hf")
        assert (code, stderr.count("\n")) == (2, 1)
        assert message in stderr


def test_bf16_in_several_files(convert, run, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = convert(run, "--out", out, "--dtype", "bf16", "--max_shard_size", "100KB")
    assert code == 0
    parts = sorted(path.name for path in out.glob("model-*"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(parts) > 1
    assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(parts)
    assert not (out / "model.safetensors").exists()
    hashed = hashlib.sha256(b"".join((out / part).read_bytes() for part in parts)).hexdigest()
    assert f"sha256      {hashed}" in stdout
    assert "bfloat16 of fp32 masters" in stdout
    loaded, _, _ = load(out)
    _, model = write_run(tmp_path / "again")
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float()), name
    assert convert(run, "--out", out)[0] == 0, "an earlier export gives way, in whatever files it was"
    (out / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"out is not an export, it lacks model\.safetensors"):
        load(out)


def test_a_missing_part_is_named(convert, run, tmp_path):
    out = tmp_path / "out"
    assert convert(run, "--out", out, "--max_shard_size", "200KB")[0] == 0
    (out / json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]["text_head.bias"]).unlink()
    with pytest.raises(ExportError, match=r"lacks model-0000\d-of-0000\d\.safetensors"):
        load(out)


@pytest.mark.parametrize("text", ["0", "5XB", "-1MB", "MB"])
def test_invalid_sizes_are_refused(convert, capsys, run, tmp_path, text):
    with pytest.raises(SystemExit, match="2"):
        convert(run, "--out", tmp_path / "out", f"--max_shard_size={text}")
    assert f"{text} is not a size such as 500MB" in capsys.readouterr().err


def test_hf_export_loads_with_automodel(convert, run, tmp_path):
    from transformers import AutoModel

    import eve_ds.export.hf  # noqa: F401 - registers its classes

    out = tmp_path / "out"
    code, stdout, _ = convert(run, "--out", out, "--format", "hf")
    assert code == 0
    assert "AutoModel.from_pretrained" in stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    _, model = write_run(tmp_path / "again")
    state = AutoModel.from_pretrained(out).state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in model.named_parameters())


def test_card_names_the_origin_of_the_weights(convert, run, checkpoint, tmp_path):
    records = [
        {"kind": "eval", "step": 5, "color": {"right": 0.1}},
        {"kind": "eval", "step": 7, "seconds": 1.5, "samples": 9, "color": {"right": 0.8, "wrong": 0.125}, "n": 3},
        {"kind": "eval", "step": 9, "color": {"right": 0.9}},
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records) + '{"kind": "ev')
    assert convert(run, "--out", tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "| checkpoint | step-00000007: step 7, 0 samples |",
        "| architecture | 3 layers, width 32, 4 experts in layer 1, 4 experts in layer 2 |",
        "| compared with the training engine | relative difference of outputs ",
        "Evaluation at step 7:",
        "| color | right 0.800, wrong 0.125 |",
        "| n | 3 |",
        json.loads((tmp_path / "out" / "export.json").read_text())["sha256"],
    ):
        assert part in card, card
    assert "seconds" not in card


def test_check_asks_for_recorded_outputs(convert, run, checkpoint, tmp_path):
    assert convert(run, "--out", tmp_path / "out", "--check")[0] == 0
    (checkpoint / "check_batch.safetensors").unlink()
    sign(checkpoint)
    code, _, stderr = convert(run, "--out", tmp_path / "other", "--check")
    assert code == 2
    assert "has no recorded outputs (check_batch.safetensors) to compare with" in stderr
    assert not (tmp_path / "other").exists()


def test_verify_reports_good_and_damaged_checkpoints(convert, run, checkpoint, tmp_path):
    newer, _ = write_run(run, step=9, seed=1)
    code, stdout, _ = convert("verify", run)
    assert code == 0
    assert [line.split(": ")[:2] for line in stdout.splitlines()] == [
        [str(newer), stdout.splitlines()[0].split(": ")[1]],
        [str(checkpoint), stdout.splitlines()[1].split(": ")[1]],
    ]
    assert all(re.search(r": good, 7 files, [\d,]+ bytes$", line) for line in stdout.splitlines())
    (newer / TENSORS).write_bytes(b"")
    code, stdout, _ = convert("verify", run)
    assert code == 1
    assert stdout.startswith(f"{newer}: DAMAGED: {TENSORS} has 0 bytes, ")
    assert convert("verify", checkpoint)[0] == 0
    code, stdout, _ = convert("verify", tmp_path)
    assert (code, "it lacks manifest.json" in stdout) == (1, True)
    code, _, stderr = convert("verify", tmp_path / "nowhere")
    assert (code, "nowhere does not exist: name a run or a checkpoint" in stderr) == (2, True)


def test_universal_checkpoint_exports_the_same_weights(convert, run, tmp_path):
    out = tmp_path / "whole"
    code, stdout, _ = convert("universal", run, "--out", out)
    assert code == 0
    assert stdout.startswith(f"{out}: checkpoint of step 7, whole tensors\n")
    assert convert("verify", out)[0] == 0
    assert convert(out, "--out", tmp_path / "one")[0] == convert(run, "--out", tmp_path / "other")[0] == 0
    assert load_file(tmp_path / "one" / "model.safetensors").keys() == load(tmp_path / "other")[0].state_dict().keys()
    assert json.loads((tmp_path / "one" / "export.json").read_text())["check"]["max_abs_diff"] == 0
    code, _, stderr = convert("universal", run, "--out", out)
    assert (code, "whole is not empty, it holds " in stderr) == (2, True)


def test_a_checkpoint_folder_may_be_named(convert, run, checkpoint, tmp_path):
    write_run(run, step=9, seed=1)
    assert convert(checkpoint, "--out", tmp_path / "out")[1].startswith(f"{tmp_path / 'out'}: plain weights of step 7")
    assert convert(run, "--out", tmp_path / "out")[1].startswith(f"{tmp_path / 'out'}: plain weights of step 9")


def test_an_earlier_export_of_the_run_is_replaced(convert, run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert convert(run, "--out", out)[0] == 0
    _, model = write_run(run, step=9, seed=1)
    assert convert(run, "--out", out)[0] == 0
    weights = load_file(out / "model.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_the_export_of_another_run_is_kept(convert, refused, run, tmp_path):
    out = tmp_path / "out"
    assert convert(run, "--out", out)[0] == 0
    write_run(tmp_path / "other")
    before = (out / "model.safetensors").read_bytes()
    assert refused(tmp_path / "other", out) == (
        f"convert: --out {out} holds the export of another run: name a new or empty folder\n"
    )
    assert (out / "model.safetensors").read_bytes() == before


def test_a_folder_with_other_files_is_kept(convert, refused, run, tmp_path):
    out = tmp_path / "out"
    assert convert(run, "--out", out)[0] == 0
    (out / "notes.txt").write_text("mine")
    assert f"--out {out} is not empty, it holds notes.txt: name a new" in refused(run, out)


def test_out_may_not_be_a_file(refused, run, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file is a file: name a new or empty folder" in refused(run, tmp_path / "file")


def test_out_below_a_file_cannot_be_written(refused, run, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}/.out.writing cannot be used: Not a directory" in refused(
        run, tmp_path / "file" / "out"
    )


def test_folder_without_a_run_is_refused(refused, run, tmp_path):
    assert "nowhere does not exist: name a run or a checkpoint" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty is neither a run (no folder checkpoints) nor a checkpoint (no manifest.json)" in refused(
        tmp_path / "empty"
    )


def test_without_the_pointer_the_last_step_is_taken(convert, run, tmp_path):
    write_run(run, step=9, seed=1)
    (run / "checkpoints" / "latest").unlink()
    assert "step 9" in convert(run, "--out", tmp_path / "out")[1]


def test_a_run_that_saved_nothing(refused, run, checkpoint):
    shutil.rmtree(checkpoint)
    assert "run holds no finished checkpoint: train until one is saved" in refused(run)


def test_an_older_checkpoint_is_used_if_the_newest_is_damaged(convert, run, tmp_path, caplog):
    newer, _ = write_run(run, step=9, seed=1)
    (newer / TENSORS).unlink()
    code, stdout, _ = convert(run, "--out", tmp_path / "out")
    assert code == 0
    assert "plain weights of step 7" in stdout
    assert f"{newer} is damaged: {TENSORS} is missing; going back to step-00000007" in caplog.text


@pytest.mark.parametrize("file", [TENSORS, "state.json", "config.json", "tokenizer/tokenizer.json"])
def test_a_missing_file_is_named(refused, run, checkpoint, file):
    (checkpoint / file).unlink()
    assert f"is damaged: {file} is missing" in refused(run)


@pytest.mark.parametrize("size", [0, 1000])
def test_a_truncated_file_is_named(refused, run, checkpoint, size):
    file = checkpoint / TENSORS
    file.write_bytes(file.read_bytes()[:size])
    assert re.search(rf"is damaged: {TENSORS} has {size:,} bytes, [\d,]+ were written", refused(run))


def test_a_flipped_bit_is_noticed(refused, run, checkpoint):
    content = bytearray((checkpoint / TENSORS).read_bytes())
    content[len(content) // 2] ^= 4
    (checkpoint / TENSORS).write_bytes(content)
    assert f"is damaged: {TENSORS} has other content than was written (sha256 differs)" in refused(run)


def test_signed_file_that_is_no_tensor_file_is_named(refused, run, checkpoint):
    (checkpoint / TENSORS).write_bytes(b"")
    sign(checkpoint)
    assert "tensors-00001.safetensors is not a tensor file of a checkpoint" in refused(run)


def test_weights_under_other_names_are_named(refused, run, checkpoint):
    def rename(state):
        for name in [name for name in state if "backbone.norm.bias" in name]:
            state[name.replace("norm.bias", "surplus")] = state.pop(name)

    change(checkpoint, rename)
    (checkpoint / TENSORS).rename(checkpoint / "other")
    sign(checkpoint)
    line = refused(run)
    assert "lacks backbone.norm.bias; holds backbone.surplus, unknown to the model" in line


def test_half_a_tensor_is_refused(refused, run, checkpoint):
    change(checkpoint, lambda state: state.pop("master/backbone.norm.bias/0"))
    assert "lacks elements 0 to 32 of master backbone.norm.bias" in refused(run)


def test_equal_experts_are_named(refused, run, checkpoint):
    def copy(state):
        for kind in ("fc1", "fc2"):
            for what in ("weight", "bias"):
                name = f"master/backbone.blocks.1.moe.experts.{{}}.{kind}.{what}/0"
                state[name.format(3)] = state[name.format(1)].clone()

    change(checkpoint, copy)
    other = load_file(checkpoint / TENSORS)
    for name in [name for name in other if ".blocks.1.moe.experts.3." in name]:
        other[name] = other[name.replace("experts.3.", "experts.1.")].clone()
    save_file(other, checkpoint / TENSORS)
    sign(checkpoint)
    assert "experts 1 and 3 of layer 1 are equal" in refused(run)


def test_weights_that_are_not_finite_are_named(refused, run, checkpoint):
    def spoil(state):
        state["master/backbone.norm.bias/0"][3] = float("nan")

    change(checkpoint, spoil)
    assert "backbone.norm.bias not finite" in refused(run)


def test_weights_with_other_outputs_are_refused(refused, run, checkpoint):
    def nudge(state):
        state["master/backbone.blocks.0.gamma_2/0"] += 0.01

    change(checkpoint, nudge)
    assert re.search(
        r"outputs of the weights of \S+ differ by \S+ \(relative\) from the outputs recorded", refused(run)
    )


def test_a_config_of_other_shapes_is_refused(refused, run, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["model"]["intermediate_size"] = 64
    (checkpoint / "config.json").write_text(json.dumps(config))
    sign(checkpoint)
    line = refused(run)
    assert "backbone.blocks.0.ffn.image.fc1.bias (48,) where the model has (64,)" in line
    assert "more: these are the weights of another model than the config's" in line


def test_a_config_with_fewer_experts_is_refused(refused, run, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["model"]["moe"]["num_experts"] = 2
    (checkpoint / "config.json").write_text(json.dumps(config))
    sign(checkpoint)
    assert "holds backbone.blocks.1.moe.experts.2.fc1.bias, backbone.blocks.1.moe.experts.2.fc1.weight" in refused(run)


def test_a_config_that_is_not_valid_is_refused(refused, run, checkpoint):
    (checkpoint / "config.json").write_text("{")
    sign(checkpoint)
    assert "config.json is not JSON" in refused(run)
    (checkpoint / "config.json").write_text('{"models": {}}')
    sign(checkpoint)
    assert "unknown key 'models'; did you mean 'model'?" in refused(run)


def test_missing_check_batch_is_reported(convert, run, checkpoint, tmp_path):
    (checkpoint / "check_batch.safetensors").unlink()
    sign(checkpoint)
    code, stdout, _ = convert(run, "--out", tmp_path / "out")
    assert code == 0
    assert "check       none: the checkpoint holds no recorded outputs" in stdout
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"] is None


def test_load_refuses_a_folder_that_is_not_an_export(run, checkpoint, tmp_path):
    with pytest.raises(
        ExportError, match=r"run is not an export, it lacks config\.json, model\.safetensors, tokenizer"
    ):
        load(run)


def test_a_truncated_check_batch_is_named(refused, run, checkpoint):
    file = checkpoint / "check_batch.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    sign(checkpoint)
    assert "check_batch.safetensors cannot be read" in refused(run)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("command", [(), ("verify",), ("universal",)])
@pytest.mark.parametrize("file", [TENSORS, "state.json", "config.json", "check_batch.safetensors"])
def test_pickles_are_not_run(convert, run, checkpoint, tmp_path, monkeypatch, command, file):
    """Nothing of a checkpoint is read as a pickle: a planted one, signed too, is at most a file that does not fit."""
    monkeypatch.chdir(tmp_path)
    torch.save({"module": Harmful()}, checkpoint / file)
    sign(checkpoint)
    out = [] if command == ("verify",) else ["--out", tmp_path / "out"]
    code, _, stderr = convert(*command, run, *out)
    assert code == (2 if command == () or (command, file) == (("universal",), TENSORS) else 0), stderr
    assert not (tmp_path / "harmed").exists()
