"""Folder of initial weights for training: an export with a report on the origin of each tensor."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eve_ds.checkpoint.output_folder import replacing
from eve_ds.config import Config, parse_config
from eve_ds.data.captions import check_vocabulary
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.export.plain import (
    CONFIG,
    REPORT,
    TOKENIZER,
    WEIGHTS,
    experts_per_layer,
    sha256,
)
from eve_ds.model.decoders import PixelDecoder, TextHead
from eve_ds.model.eve import EVE, initialize_weights
from eve_ds.objectives.contrastive import MatchingHeads

DRAWN = "drawn"
"""Origin of a tensor that has the initial value of a new model with the same seed."""


@dataclass(frozen=True)
class StartReport:
    """Report of initial weights and their origins; export.json contains the same."""

    source: str
    """Path of the source checkpoint."""
    origins: dict[str, str]
    """Tensor -> its source, or DRAWN."""
    notes: list[str]
    """Remarks for the user, one sentence each."""
    tensors: int
    parameters: int
    experts: dict[str, int]
    """Layer -> number of its experts."""
    bytes: int
    """Size of model.safetensors."""
    sha256: str
    """Checksum of model.safetensors."""


def changed(config: Config, tokenizer: str | None, image_size: int | None = None) -> Config:
    """Return the config with another `data.tokenizer` and `model.image_size`, if these are not None.

    Raises:
        ConfigError: the image size is not a multiple of the patch size.
    """
    tree = config.model_dump(mode="json")
    if tokenizer is not None:
        tree["data"]["tokenizer"] = tokenizer
    if image_size is not None:
        tree["model"]["image_size"] = image_size
    return parse_config(tree)


def fitting_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """Load the tokenizer of `config.data.tokenizer`.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or has IDs without a row in the word embedding.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(tokenizer, config)
    return tokenizer


def draw_weights(config: Config) -> dict[str, Tensor]:
    """Return the fp32 state dict of a new :class:`EVE`, as a function of `config.model` and `train.seed`.

    The state of the default random generator does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return EVE(config.model).state_dict()


def draw_decoders(config: Config) -> dict[str, Tensor]:
    """Return the part of :func:`draw_weights` outside the backbone, whose initialization would take a minute.

    The values of a parameter depend on its name and on the seed that :class:`EVE` draws first.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        seed = int(torch.randint(2**62, (), device="cpu"))
        with torch.device("meta"):
            model = EVE(config.model)
        for name, part in (("pixel_decoder", PixelDecoder), ("text_head", TextHead), ("matching", MatchingHeads)):
            if getattr(model, name) is not None:
                setattr(model, name, part(config.model))
        initialize_weights(model, config.model, seed)  # skips parameters on the meta device
    return {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}


def write_start(
    out: Path,
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    weights: dict[str, Tensor],
    *,
    source: str,
    origins: dict[str, str],
    notes: list[str],
) -> StartReport:
    """Write a folder that :func:`eve_ds.export.load` reads; a killed call leaves no incomplete `out`.

    Raises:
        OSError: writing failed.
    """
    with replacing(out) as folder:
        save_file({name: weights[name].contiguous() for name in sorted(weights)}, folder / WEIGHTS, {"format": "pt"})
        (folder / CONFIG).write_text(config.model_dump_json(indent=2), encoding="utf-8")
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes files readable by their owner only
        tokenizer.save_pretrained(folder / TOKENIZER)
        report = StartReport(
            source=source,
            origins={name: origins[name] for name in sorted(weights)},
            notes=notes,
            tensors=len(weights),
            parameters=sum(weight.numel() for weight in weights.values()),
            experts=experts_per_layer(weights),
            bytes=(folder / WEIGHTS).stat().st_size,
            sha256=sha256(folder / WEIGHTS),
        )
        (folder / REPORT).write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
    return report
