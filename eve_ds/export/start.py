"""A folder of weights that training starts from: the form of an export, with a report of where each tensor is from."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eve_ds.config import Config, parse_config
from eve_ds.data.captions import check_vocabulary
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.export.plain import (
    CONFIG,
    REPORT,
    TOKENIZER,
    WEIGHTS,
    experts_per_layer,
    replacing,
    sha256,
)
from eve_ds.model.decoders import PixelDecoder, TextHead
from eve_ds.model.eve import EVE, initialize_weights
from eve_ds.objectives.contrastive import MatchingHeads

DRAWN = "drawn"
"""Where a tensor is from that a new model of the same seed has too."""


@dataclass(frozen=True)
class StartReport:
    """What was written and where it is from; export.json holds the same."""

    source: str
    origins: dict[str, str]
    """Tensor -> what it was made of, or DRAWN."""
    notes: list[str]
    """What a reader should know, one sentence each."""
    tensors: int
    parameters: int
    experts: dict[str, int]
    """Layer -> experts in it."""
    bytes: int
    """Of model.safetensors."""
    sha256: str


def changed(config: Config, tokenizer: str | None, image_size: int | None = None) -> Config:
    """The config with another `data.tokenizer` and `model.image_size`, where they are given.

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
    """The tokenizer of `config.data.tokenizer`.

    Raises:
        ConfigError: it cannot be loaded, or has ids that the word embedding has no row for.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(tokenizer, config)
    return tokenizer


def draw_weights(config: Config) -> dict[str, Tensor]:
    """fp32 state dict of a new :class:`EVE`, a function of the model's config and `train.seed`.

    The default generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return EVE(config.model).state_dict()


def draw_decoders(config: Config) -> dict[str, Tensor]:
    """The part of :func:`draw_weights` that no released file has, without drawing the backbone, which takes a minute.

    A parameter's values depend on its name and the seed that :class:`EVE` draws first.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        seed = int(torch.randint(2**62, (), device="cpu"))
        with torch.device("meta"):
            model = EVE(config.model)
        for name, part in (("pixel_decoder", PixelDecoder), ("text_head", TextHead), ("matching", MatchingHeads)):
            if getattr(model, name) is not None:
                setattr(model, name, part(config.model))
        initialize_weights(model, config.model, seed)  # leaves what is on the meta device
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
    """Write what :func:`eve_ds.export.load` reads; a killed call leaves no half-written `out`.

    Raises:
        OSError: writing failed.
    """
    with replacing(out) as folder:
        save_file({name: weights[name].contiguous() for name in sorted(weights)}, folder / WEIGHTS, {"format": "pt"})
        (folder / CONFIG).write_text(config.model_dump_json(indent=2), encoding="utf-8")
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody else read it
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
