"""`launcher/convert.py` as people start it, on checkpoints written here in DeepSpeed's layout, whole and damaged."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eve_ds.config import load_config
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.export import ExportError, load
from eve_ds.export.official import from_official
from eve_ds.model.eve import EVE
from eve_ds.model.naming import expert_id, to_deepspeed_name

SCRIPT = Path(__file__).resolve().parents[2] / "launcher" / "convert.py"
MOE_LAYERS = [1, 2]
MODEL = [
    "model.hidden_size=32",
    "model.num_hidden_layers=3",
    "model.intermediate_size=48",
    f"model.moe_layers={MOE_LAYERS}",
    "model.moe.num_experts=4",
    "model.pixel_decoder.hidden_size=24",
]
DENSE = "mp_rank_00_model_states.pt"


def inputs():
    """One pair with 16 of 64 patches visible and 5 tokens, one of them masked."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.randperm(64, generator=generator).view(1, 64)
    return {
        "pixel_values": torch.randn(1, 3, 64, 64, generator=generator),
        "visible_patch_ids": patches[:, :16].sort().values,
        "masked_patch_ids": patches[:, 16:].sort().values,
        "input_ids": torch.tensor([[2, 9, 4, 11, 3]]),
        "masked_token_ids": torch.tensor([2]),
    }


def write_run(run, *, step=7, seed=0, overrides=()):
    """A run with one checkpoint of a model drawn from `seed`; returns (checkpoint, model)."""
    config = load_config("eve_tiny", [*MODEL, f"train.output_dir={run}", *overrides])
    torch.manual_seed(seed)
    model = EVE(config.model).eval()
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    files = defaultdict(dict)
    for name, weight in model.state_dict().items():
        expert = expert_id(name)
        layer = MOE_LAYERS.index(int(name.split(".")[2])) if expert is not None else None
        file = DENSE if expert is None else f"layer_{layer}_expert_{expert}_{DENSE}"
        files[file][to_deepspeed_name(name)] = weight
    for file, weights in files.items():
        torch.save({"module": weights} if file == DENSE else weights, checkpoint / file)
    with torch.no_grad():
        output = model(**inputs())
        recorded = {"pixel_predictions": output.pixel_predictions, "token_logits": output.token_logits()}
    named = {f"input.{k}": v for k, v in inputs().items()} | {f"output.{k}": v for k, v in recorded.items()}
    save_file(named, checkpoint / "check_batch.safetensors", {"device": "cpu"})
    topology = {"world_size": 2, "ep_size": 2, "zero_stage": 1}
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "topology": topology}))
    (checkpoint / "config.json").write_text(config.model_dump_json())
    load_tokenizer("scenes").save_pretrained(checkpoint / "tokenizer")
    (run / "checkpoints" / "latest").write_text(checkpoint.name + "\n")
    return checkpoint, model


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def checkpoint(run):
    return run / "checkpoints" / "step-00000007"


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the script in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    main = runpy.run_path(str(SCRIPT))["main"]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        code = main()
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


def change(file, edit):
    """Apply `edit` to what a torch file holds."""
    state = torch.load(file, weights_only=True)
    edit(state)
    torch.save(state, file)


def test_a_run_becomes_a_folder_that_loads(run, tmp_path):
    out = tmp_path / "exports" / "first"
    env = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, str(SCRIPT), str(run), "--out", str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    lines = dict(re.split(r"\s{2,}|: ", line, maxsplit=1) for line in done.stdout.splitlines())
    weights = load_file(out / "model.safetensors")
    assert lines[str(out)] == "plain weights of step 7 (step-00000007), from fp32 model states"
    assert lines["tensors"] == str(len(weights))
    assert lines["parameters"] == f"{sum(weight.numel() for weight in weights.values()):,}"
    assert lines["experts"] == "4 in layer 1, 4 in layer 2"
    assert lines["bytes"] == f"{(out / 'model.safetensors').stat().st_size:,}"
    assert re.fullmatch(
        r"max abs diff \d\.\d\de[+-]\d\d, relative \S+ \(at most 1e-06 in fp32\) from the engine's "
        r"pixel_predictions \(1, 48, 192\), token_logits \(1, 256\)",
        lines["check"],
    )
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json", "tokenizer", "export.json"}
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


def test_the_official_profile_is_what_the_released_code_computes(convert, tmp_path):
    write_run(tmp_path / "official", overrides=["model.profile=official", "model.moe.routing=capacity"])
    _, stdout, _ = convert(tmp_path / "official", "--out", tmp_path / "out", "--format", "official")
    assert stdout.endswith("eve_official.pth, fp32, without the decoders\n")


def test_a_dtype_without_the_official_format(convert, capsys, run, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        convert(run, "--out", tmp_path / "out", "--dtype", "bf16")
    assert "--dtype goes with --format official" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    assert f"cannot write {tmp_path / 'file'}" in refused(run, tmp_path / "file" / "out")


def test_not_a_run(refused, run, tmp_path):
    assert "nowhere does not exist: name a run or a checkpoint" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty is neither a run (no folder checkpoints) nor a checkpoint (no state.json)" in refused(
        tmp_path / "empty"
    )
    (run / "checkpoints" / "latest").unlink()
    assert "run holds no finished checkpoint" in refused(run)


@pytest.mark.parametrize(
    "file", [DENSE, f"layer_1_expert_3_{DENSE}", "state.json", "config.json", "tokenizer/tokenizer.json"]
)
def test_a_missing_file_is_named(refused, run, checkpoint, file):
    (checkpoint / file).unlink()
    line = refused(run)
    assert "torn" in line
    assert file.split("/")[-1] in line


def test_many_missing_files_are_counted(refused, run, checkpoint):
    for file in checkpoint.glob("layer_0_expert_*"):
        file.unlink()
    names = ", ".join(f"layer_0_expert_{expert}_{DENSE}" for expert in range(3))
    assert f"it lacks {names} and 1 more: take another" in refused(run)


@pytest.mark.parametrize("size", [0, 1000])
def test_a_truncated_file_is_named(refused, run, checkpoint, size):
    file = checkpoint / DENSE
    file.write_bytes(file.read_bytes()[:size])
    assert re.search(rf"{DENSE} (cannot be read|is not a file that torch\.save wrote)", refused(run))


def test_a_truncated_check_batch_is_named(refused, run, checkpoint):
    file = checkpoint / "check_batch.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "check_batch.safetensors cannot be read" in refused(run)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_pickles_are_not_run(refused, run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"module": Harmful()}, checkpoint / DENSE)
    assert re.search(rf"{DENSE} refers to \w+\.system, which is not loaded", refused(run))
    assert not (tmp_path / "harmed").exists()


def test_a_missing_and_a_surplus_weight_are_named(refused, run, checkpoint):
    def rename(state):
        state["module"]["backbone.surplus"] = state["module"].pop("backbone.norm.bias")

    change(checkpoint / DENSE, rename)
    line = refused(run)
    assert "lacks backbone.norm.bias; holds backbone.surplus, unknown to the model" in line


def test_an_expert_in_two_files_is_named(refused, run, checkpoint):
    (checkpoint / f"layer_0_expert_1_{DENSE}").write_bytes((checkpoint / f"layer_0_expert_0_{DENSE}").read_bytes())
    line = refused(run)
    assert f"layer_0_expert_1_{DENSE} holds backbone.blocks.1.moe.experts.0." in line
    assert "which another file holds too" in line


def test_weights_that_are_not_finite_are_named(refused, run, checkpoint):
    def spoil(state):
        state["module"]["backbone.norm.bias"][3] = float("nan")

    change(checkpoint / DENSE, spoil)
    assert "backbone.norm.bias not finite" in refused(run)


def test_weights_that_compute_something_else_are_refused(refused, run, checkpoint):
    def nudge(state):
        state["module"]["backbone.blocks.0.gamma_2"] += 0.01

    change(checkpoint / DENSE, nudge)
    assert re.search(
        r"outputs of the weights of \S+ differ by \S+ \(relative\) from those that were recorded", refused(run)
    )


def test_a_config_of_other_shapes(refused, run, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["model"]["intermediate_size"] = 64
    (checkpoint / "config.json").write_text(json.dumps(config))
    line = refused(run)
    assert "backbone.blocks.0.ffn.image.fc1.bias (48,) where the config asks for (64,)" in line
    assert "more: config.json is not the one of these weights" in line


def test_a_config_with_fewer_experts(refused, run, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["model"]["moe"]["num_experts"] = 2
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert f"holds layer_0_expert_2_{DENSE}" in refused(run)


def test_a_config_that_is_not_valid(refused, run, checkpoint):
    (checkpoint / "config.json").write_text("{")
    assert "config.json is not JSON" in refused(run)
    (checkpoint / "config.json").write_text('{"models": {}}')
    assert "unknown key 'models'; did you mean 'model'?" in refused(run)


def test_without_a_check_batch_it_says_so(convert, run, checkpoint, tmp_path):
    (checkpoint / "check_batch.safetensors").unlink()
    code, stdout, _ = convert(run, "--out", tmp_path / "out")
    assert code == 0
    assert "check       none: the checkpoint holds no recorded outputs" in stdout
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"] is None


def test_load_refuses_what_is_not_an_export(run, checkpoint, tmp_path):
    with pytest.raises(
        ExportError, match=r"run is not an export, it lacks config\.json, model\.safetensors, tokenizer"
    ):
        load(run)
