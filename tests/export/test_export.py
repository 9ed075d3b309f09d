"""Exports of real runs: four gloo ranks train for three steps with DeepSpeed and return outputs of their models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config

from eve_ds import export
from eve_ds.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE = 4
SHORT = ["train.train_batch_size=8", "train.max_steps=3", "optimizer.warmup_steps=0"]
RUNS = {  # name -> (overrides, ZeRO stage)
    "fp32": (["parallel.ep_size=2"], 1),
    "bf16": (["parallel.ep_size=2", "train.precision=bf16"], 1),
    "bf16_zero2": (["parallel.ep_size=4", "train.precision=bf16", "train.gradient_accumulation_steps=2"], 2),
    "bf16_zero0": (["parallel.ep_size=2", "train.precision=bf16", "optimizer.clip_grad_norm=0"], 0),
}
TOLERANCE = 1e-6
"""Absolute tolerance; outputs are of order 1."""


def config_of(name, folder):
    return tiny_config(*SHORT, *RUNS[name][0], f"train.output_dir={folder / name}")


def fixed_inputs():
    """Three samples, the last without an image, with captions of 9, 6 and 3 tokens."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.stack([torch.randperm(64, generator=generator) for _ in range(3)])
    lengths = torch.tensor([[9], [6], [3]])
    has_image = torch.tensor([True, True, False])
    return {
        "pixel_values": torch.randn(3, 3, 64, 64, generator=generator) * has_image.view(3, 1, 1, 1),
        "image_mask": has_image,
        "visible_patch_ids": patches[:, :16].sort().values,
        "masked_patch_ids": patches[:, 16:].sort().values,
        "input_ids": torch.randint(5, 60, (3, 9), generator=generator),
        "attention_mask": torch.arange(9) < lengths,
        "masked_token_ids": torch.tensor([1, 4, 11, 19]),
    }


def train(rank, world_size, folder):
    """Train every run; return this rank's weights and fp32 masters with plain names, and outputs, for each run."""
    from deepspeed.utils import safe_get_full_fp32_param

    from eve_ds.model.moe import plain_named_tensors
    from eve_ds.training import pretrain as pretraining
    from eve_ds.training import start
    from eve_ds.training.trainer import Trainer

    found = []

    class Watched(Trainer):
        def __exit__(self, *error):
            found.append(self.look())
            super().__exit__(*error)

        def look(self):
            module = self.model.eval()
            with torch.no_grad():
                output = module(**fixed_inputs())
            outputs = {"pixel_predictions": output.pixel_predictions, "token_logits": output.token_logits().detach()}
            weights = dict(plain_named_tensors(module, lambda parameter: parameter.detach().clone()))
            stage = self.engine.zero_optimization_stage()
            masters = dict(plain_named_tensors(module, lambda p: safe_get_full_fp32_param(p).clone())) if stage else {}
            return {"outputs": outputs, "weights": weights, "masters": masters}

    start.Trainer = Watched
    pretraining.evaluate_scenes = lambda *_, **__: {}
    results = {}
    for name, (_, stage) in RUNS.items():
        pretraining.pretrain(config_of(name, folder), {"zero_optimization": {"stage": stage}})
        results[name] = found.pop()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of the runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def runs(folder, run_ranks):
    """(folder of the runs, name -> merged results of the ranks); the first test that uses the fixture trains them."""
    stored = folder / "live.pt"
    if not stored.exists():
        per_rank = run_ranks(train, WORLD_SIZE, folder, timeout=240.0)
        live = {
            name: {
                "outputs": per_rank[0][name]["outputs"],
                "weights": {k: v for rank in per_rank for k, v in rank[name]["weights"].items()},
                "masters": {k: v for rank in per_rank for k, v in rank[name]["masters"].items()},
            }
            for name in RUNS
        }
        torch.save(live, stored)
    return folder, torch.load(stored, weights_only=True)


def without_deepspeed(*command, blocker):
    """Run Python in an environment where `import deepspeed` raises ModuleNotFoundError."""
    blocker.mkdir(exist_ok=True)
    (blocker / "sitecustomize.py").write_text("import sys\nsys.modules['deepspeed'] = None\n")
    env = os.environ | {"PYTHONPATH": str(blocker)}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


LOAD_AND_RUN = """
import sys, torch
from safetensors.torch import load_file, save_file
try:
    import deepspeed
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("deepspeed can be imported, so this test is void")
from eve_ds.export import load
model, config, tokenizer = load(sys.argv[1])
assert not model.training and not torch.distributed.is_initialized()
with torch.no_grad():
    output = model(**load_file(sys.argv[2]))
    outputs = {"pixel_predictions": output.pixel_predictions, "token_logits": output.token_logits()}
save_file(outputs, sys.argv[3])
print(config.model_dump_json())
print(tokenizer("a red circle")["input_ids"])
"""


def test_plain_model_without_deepspeed_computes_the_outputs_of_the_trained_model(runs, tmp_path):
    folder, live = runs
    out, blocker = tmp_path / "export", tmp_path / "blocker"
    converted = without_deepspeed(ROOT / "launcher" / "convert.py", folder / "fp32", "--out", out, blocker=blocker)
    assert converted.returncode == 0, converted.stderr
    report = json.loads((out / "export.json").read_text())
    assert report["step"] == 3
    assert report["experts"] == {"1": 4, "2": 4}
    assert report["check"]["outputs"].keys() == {"pixel_predictions", "token_logits"}
    assert report["check"]["max_abs_diff"] <= TOLERANCE
    assert f"sha256      {report['sha256']}" in converted.stdout

    save_file(fixed_inputs(), tmp_path / "inputs.safetensors")
    arguments = (out, tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors")
    loaded = without_deepspeed("-c", LOAD_AND_RUN, *arguments, blocker=blocker)
    assert loaded.returncode == 0, loaded.stderr
    outputs = load_file(tmp_path / "outputs.safetensors")
    for name, expected in live["fp32"]["outputs"].items():
        assert (outputs[name] - expected).abs().max() <= TOLERANCE, name
    config, ids = loaded.stdout.splitlines()
    assert json.loads(config)["model"] == config_of("fp32", folder).model.model_dump(mode="json")
    assert json.loads(ids) == load_tokenizer("scenes")("a red circle")["input_ids"]


@pytest.mark.parametrize("name", RUNS)
def test_every_weight_is_exported_once_and_equals_the_trained_weight(runs, tmp_path, name):
    folder, live = runs
    report = export.export(folder / name, tmp_path / "export")
    weights = live[name]["weights"]
    expected = live[name]["masters"] or weights
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == expected.keys()
    for key, weight in expected.items():
        assert exported[key].dtype == torch.float32
        assert torch.equal(exported[key].to(weight.dtype), weight), key
    vocabulary = [key for key, weight in exported.items() if weight.shape == (256, 32)]
    assert vocabulary == ["backbone.text_embedding.word.weight"]
    if name != "fp32":
        assert any(not torch.equal(exported[key], weight.float()) for key, weight in weights.items()), "masters"
    assert report.check.precision == name[:4]
    assert report.check.relative <= report.check.tolerance
