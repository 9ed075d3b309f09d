"""A run with one checkpoint of a model whose weights are drawn, as two ranks would have written it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import overrides as tiny_overrides
from torch import Tensor

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import Piece, record_of, write_pieces
from eve_ds.config import load_config
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.eve import EVE


def inputs() -> dict[str, Tensor]:
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


def write_run(run: Path, *, step: int = 7, seed: int = 0, overrides: Sequence[str] = ()) -> tuple[Path, EVE]:
    """A run with one checkpoint of a model drawn from `seed`; returns (checkpoint, model)."""
    config = load_config("eve_tiny", [*tiny_overrides(), f"train.output_dir={run}", *overrides])
    torch.manual_seed(seed)
    model = EVE(config.model).eval()
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    halves: list[list[Piece]] = [[], []]  # of two ranks, every tensor cut in two
    for name, weight in model.state_dict().items():
        flat, middle = weight.flatten(), weight.numel() // 2
        for kind, values in (("master", flat), ("exp_avg", 0 * flat), ("exp_avg_sq", 0 * flat)):
            halves[0].append(Piece(kind, name, 0, values[:middle]))
            halves[1].append(Piece(kind, name, middle, values[middle:]))
    for rank, pieces in enumerate(halves):
        write_pieces(checkpoint / f"tensors-{rank:05d}.safetensors", [p for p in pieces if p.tensor.numel()])
    with torch.no_grad():
        output = model(**inputs())
        recorded = {"pixel_predictions": output.pixel_predictions, "token_logits": output.token_logits()}
    named = {f"input.{k}": v for k, v in inputs().items()} | {f"output.{k}": v for k, v in recorded.items()}
    save_file(named, checkpoint / "check_batch.safetensors", {"device": "cpu"})
    topology = {"world_size": 2, "ep_size": 2, "zero_stage": 1}
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "topology": topology}))
    (checkpoint / "config.json").write_text(config.model_dump_json())
    load_tokenizer("scenes").save_pretrained(checkpoint / "tokenizer")
    sign(checkpoint)
    (run / "checkpoints" / "latest").write_text(checkpoint.name + "\n")
    return checkpoint, model


def sign(checkpoint: Path) -> None:
    """Write the manifest of the files in the folder."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    records = {str(path.relative_to(checkpoint)): record_of(path) for path in files}
    manifest.write_manifest(checkpoint, {"step": 7}, records)
