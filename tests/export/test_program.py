"""Exported programs of the encoders against the model, and on their own in a process that cannot import eve_ds."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from eve_ds.config import load_config
from eve_ds.export import ExportError
from eve_ds.export.program import export_encoder
from eve_ds.model.eve import EVE

OVERRIDES = ["hidden_size=32", "num_hidden_layers=3", "intermediate_size=48", "moe_layers=[1, 2]"]
CONFIG = load_config("eve_tiny", [f"model.{override}" for override in OVERRIDES]).model
TOLERANCE = 1e-5
"""Padding is computed along, so experts see more rows at once and sums may round otherwise; outputs are about 1."""


@pytest.fixture(autouse=True)
def reference_ops(monkeypatch):
    monkeypatch.setenv("EVE_DS_OPS", "reference")


@pytest.fixture(scope="module")
def eve():
    torch.manual_seed(0)
    return EVE(CONFIG).eval()


def inputs(modality, batch, length):
    if modality == "image":
        return {"pixel_values": torch.randn(batch, 3, CONFIG.image_size, CONFIG.image_size)}
    lengths = torch.randint(2, length + 1, (batch, 1))
    return {
        "input_ids": torch.randint(5, 60, (batch, length)),
        "attention_mask": torch.arange(length) < lengths,
    }


RUN = """
import sys
sys.modules["eve_ds"] = sys.modules["transformers"] = None
import torch
from safetensors.torch import load_file, save_file
encoder = torch.export.load(sys.argv[1]).module()
save_file({"embedding": encoder(**load_file(sys.argv[2])).detach().contiguous()}, sys.argv[3])
"""


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_program_computes_what_the_model_does_for_any_batch_and_length(eve, modality, tmp_path):
    program = export_encoder(eve.backbone, CONFIG, modality)
    assert not eve.backbone.keep_padding
    encoder = program.module()
    for batch, length in ((1, 2), (2, 9), (5, CONFIG.text_positions)):
        given = inputs(modality, batch, length)
        with torch.no_grad():
            expected = eve.backbone(**given).stream.padded()[:, 0]
            assert (encoder(**given) - expected).abs().max() <= TOLERANCE
    files = [tmp_path / name for name in ("encoder.pt2", "inputs", "outputs")]
    torch.export.save(program, files[0])
    save_file(given, files[1])
    command = [sys.executable, "-c", RUN, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (load_file(files[2])["embedding"] - expected).abs().max() <= TOLERANCE


def test_fused_ops_are_refused(eve, monkeypatch):
    monkeypatch.delenv("EVE_DS_OPS")
    with pytest.raises(ExportError, match="set EVE_DS_OPS=reference"):
        export_encoder(eve.backbone, CONFIG, "image")


def test_the_official_profile_is_refused(eve):
    with pytest.raises(ExportError, match="profile 'official'"):
        export_encoder(eve.backbone, CONFIG.model_copy(update={"profile": "official"}), "image")
