"""A plain export of random weights, and inputs for its model: what the tests of the transformers classes share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_config
from torch import Tensor

from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.eve import EVE

CONFIG = tiny_config()


def write_plain(folder: Path, config: Any = CONFIG) -> Path:
    """Write an export whose biases and norms are not 0 or 1 as initially."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(7)
    weights = EVE(config.model).state_dict()
    drawn = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(drawn, folder / "model.safetensors")
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "export.json").write_text(json.dumps({"step": 300, "sha256": "c0ffee"}))
    load_tokenizer("scenes").save_pretrained(folder / "tokenizer")
    return folder


def inputs(kind: str = "masked") -> dict[str, Tensor]:
    """Three samples, with captions of 9, 6 and 3 tokens; in `masked` the last has no image."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.stack([torch.randperm(64, generator=generator) for _ in range(3)])
    image = {"pixel_values": torch.randn(3, 3, 64, 64, generator=generator)}
    text = {
        "input_ids": torch.randint(5, 60, (3, 9), generator=generator),
        "attention_mask": torch.arange(9) < torch.tensor([[9], [6], [3]]),
    }
    masks = {
        "image_mask": torch.tensor([True, True, False]),
        "visible_patch_ids": patches[:, :16].sort().values,
        "visible_patch_mask": torch.arange(16) < torch.tensor([[16], [5], [16]]),
        "masked_patch_ids": patches[:, 16:].sort().values,
        "masked_token_ids": torch.tensor([1, 4, 11, 19]),
    }
    return {"image": image, "text": text, "pair": image | text, "masked": image | text | masks}[kind]
