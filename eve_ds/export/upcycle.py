"""Dense to mixture of experts: an EVE that starts from an image Transformer (sparse upcycling, arXiv 2212.05055).

Reads the folders of Hugging Face's ViT and BEiT. What is taken from layer N:

attention             fused q, k, v. BEiT's keys have no bias, as ours. ViT's bias b of keys is dropped, which is exact:
                      it adds q . b to the scores of a query with every key alike, and softmax does not see that.
LayerNorms            those before attention and before the feed-forward network
gamma_1, gamma_2      BEiT's lambda_1, lambda_2; 1 where the checkpoint has no LayerScale
feed-forward          of images in a shallow layer, and on demand of texts; every expert of an MoE layer, each with
                      noise of its own so that experts differ

and besides: patch projection, class token, position table (resized to the model's images; most BEiTs have relative
position biases instead, for which we have no place, and ours is drawn), final LayerNorm where there is one. All else is
drawn as in a new model: words, routers, modality embeddings, decoders.

What the blocks compute is not exactly what they did: EVE's activation is quick_gelu where these checkpoints were
trained with gelu (at most 0.02 apart), LayerNorms have eps 1e-6 for 1e-12, and relative position biases are gone. With
hidden_act "quick_gelu", equal eps, no noise and top_k of 2 or more (gates that sum to 1) a block equals its source.
The whole model does not even then: its pre_norm normalises the embedded stream, which no weight undoes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eve_ds.checkpoint.files import listed
from eve_ds.config import Config, ModelConfig
from eve_ds.export.plain import check_weights
from eve_ds.export.start import DRAWN, StartReport, changed, check_new, draw_weights, fitting_tokenizer, write_start
from eve_ds.export.weight_files import WeightFileError, read_tensors
from eve_ds.model.embeddings import resize_positions

FILES = ("model.safetensors", "pytorch_model.bin")
KINDS = {"vit": "vit.", "beit": "beit."}
"""model_type -> prefix of its names in models with a head."""
_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "patch_size")


class Upcycled(NamedTuple):
    """A state dict to start from."""

    weights: dict[str, Tensor]
    """fp32, of :class:`eve_ds.model.eve.EVE`."""
    origins: dict[str, str]
    """Tensor -> names in the checkpoint that it was made of, or DRAWN."""
    notes: list[str]
    """What was not taken, and what is computed differently, in sentences."""


class _Rule(NamedTuple):
    """How one of our tensors is made."""

    sources: tuple[str, ...]
    """Names in the checkpoint, without the prefix."""
    make: Callable[..., Tensor]
    """fp32 sources -> the tensor."""
    remark: str = ""


def upcycle(folder: Path, config: Config, *, noise: float = 0.01, text_from_image: bool = False) -> Upcycled:
    """State dict of an EVE from a ViT or BEiT of its width; nothing is fetched and no pickle is run.

    Args:
        folder: config.json with model.safetensors or pytorch_model.bin, as save_pretrained writes them.
        config: of the model; width, heads, feed-forward width and patch size must be those of the checkpoint, which
            must have as many layers at least. `train.seed` decides what is drawn.
        noise: standard deviation of what is added to each tensor of an expert, relative to that of the tensor.
        text_from_image: start the text networks of shallow layers from the image networks, instead of drawing them.

    Raises:
        WeightFileError: the folder cannot be read, is of another kind or size, or lacks tensors.
        CheckpointError: a weight has another shape than the config says, or is not finite.
        ValueError: negative noise.
    """
    if noise < 0:
        raise ValueError(f"noise ({noise}) must not be negative")
    about = _read_config(folder)
    _check_sizes(about, config.model, folder)
    tensors = _read_weights(folder, KINDS[about["model_type"]])
    rules = _rules(about, config.model, tensors, noise, text_from_image, config.train.seed)
    needed = {source for rule in rules.values() for source in rule.sources}
    if missing := needed - tensors.keys():
        raise WeightFileError(f"{folder} lacks {listed(missing)}, which a {about['model_type']} of its config.json has")
    weights = draw_weights(config) | {name: _make(name, rule, tensors, folder) for name, rule in rules.items()}
    check_weights(weights, config.model, str(folder))
    origins = {name: " + ".join(rule.sources) + rule.remark for name, rule in rules.items()}
    return Upcycled(
        weights, dict.fromkeys(weights, DRAWN) | origins, _notes(about, config.model, tensors.keys() - needed)
    )


def write_upcycled(
    folder: Path,
    out: Path,
    *,
    config: Config,
    tokenizer: str | None = None,
    noise: float = 0.01,
    text_from_image: bool = False,
) -> StartReport:
    """Write what :func:`upcycle` makes of `folder` into the new or empty folder `out`, for `eve_ds.export.load`.

    `tokenizer` is what :func:`eve_ds.data.tokenizer.load_tokenizer` takes; None: `config.data.tokenizer`.

    Raises:
        WeightFileError, ValueError: as :func:`upcycle`.
        ConfigError: the tokenizer cannot be used.
        ExportError: `out` holds something.
        CheckpointError: a weight has another shape than the config says, or is not finite.
        OSError: writing failed.
    """
    check_new(out)
    config = changed(config, tokenizer)
    loaded = fitting_tokenizer(config)
    made = upcycle(folder, config, noise=noise, text_from_image=text_from_image)
    return write_start(out, config, loaded, made.weights, source=str(folder), origins=made.origins, notes=made.notes)


def _rules(
    about: dict[str, Any],
    config: ModelConfig,
    tensors: dict[str, Tensor],
    noise: float,
    text_from_image: bool,
    seed: int,
) -> dict[str, _Rule]:
    """Our name -> how it is made."""
    side = config.image_size // config.patch_size
    image = "backbone.image_embedding."
    rules = _copied(f"{image}projection", "embeddings.patch_embeddings.projection")
    rules[f"{image}class_token"] = _Rule(("embeddings.cls_token",), torch.flatten)
    if about["model_type"] == "vit" or about.get("use_absolute_position_embeddings"):
        resized = partial(_resized, side=side)
        rules[f"{image}position"] = _Rule(("embeddings.position_embeddings",), resized)
    if about["model_type"] == "vit" or "layernorm.weight" in tensors:
        rules |= _copied("backbone.norm", "layernorm")
    generator = torch.Generator().manual_seed(seed)
    expert = partial(_noisy, noise=noise, generator=generator)
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"backbone.blocks.{layer}.", f"encoder.layer.{layer}."
        rules |= _attention_rules(ours, theirs, about, config.hidden_size)
        if layer in config.expert_layers:
            rules |= _copied(f"{ours}norm2", f"{theirs}layernorm_after")
            for index in range(config.moe.num_experts):
                rules |= _feed_forward_rules(f"{ours}moe.experts.{index}.", theirs, expert, f", noise {noise:g}")
            continue
        for modality in ("image", "text") if text_from_image else ("image",):
            rules |= _copied(f"{ours}ffn.norm_{modality}", f"{theirs}layernorm_after")
            rules |= _feed_forward_rules(f"{ours}ffn.{modality}.", theirs, torch.clone)
    return rules


def _attention_rules(ours: str, theirs: str, about: dict[str, Any], width: int) -> dict[str, _Rule]:
    """Attention, the LayerNorm before it, and both LayerScales."""
    attention = f"{theirs}attention.attention."
    parts = ("query", "key", "value")
    rules = _copied(f"{ours}norm1", f"{theirs}layernorm_before")
    rules |= _copied(f"{ours}attention.proj", f"{theirs}attention.output.dense")
    rules[f"{ours}attention.qkv.weight"] = _Rule(tuple(f"{attention}{part}.weight" for part in parts), _stacked)
    has_bias = about["model_type"] == "beit" or about.get("qkv_bias", True)
    for ours_part, part in (("q", "query"), ("v", "value")):
        rules[f"{ours}attention.{ours_part}_bias"] = (
            _Rule((f"{attention}{part}.bias",), torch.clone)
            if has_bias
            else _Rule((), partial(torch.zeros, width), "0, the checkpoint has no bias there")
        )
    has_scale = about["model_type"] == "beit" and about.get("layer_scale_init_value", 0.1) > 0
    for index in (1, 2):
        rules[f"{ours}gamma_{index}"] = (
            _Rule((f"{theirs}lambda_{index}",), torch.clone)
            if has_scale
            else _Rule((), partial(torch.ones, width), "1, the checkpoint has no LayerScale")
        )
    return rules


def _feed_forward_rules(ours: str, theirs: str, make: Callable[..., Tensor], remark: str = "") -> dict[str, _Rule]:
    names = {"fc1": "intermediate.dense", "fc2": "output.dense"}
    return {
        f"{ours}{layer}.{kind}": _Rule((f"{theirs}{names[layer]}.{kind}",), make, remark)
        for layer in names
        for kind in ("weight", "bias")
    }


def _copied(ours: str, theirs: str) -> dict[str, _Rule]:
    return {f"{ours}.{kind}": _Rule((f"{theirs}.{kind}",), torch.clone) for kind in ("weight", "bias")}


def _make(name: str, rule: _Rule, tensors: dict[str, Tensor], folder: Path) -> Tensor:
    try:
        return rule.make(*(tensors[source].float() for source in rule.sources))
    except (RuntimeError, ValueError) as error:  # shapes that do not go together
        raise WeightFileError(f"{folder}: {name} cannot be made of {listed(rule.sources)}: {error}") from None


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _resized(position: Tensor, side: int) -> Tensor:
    """(1, 1 + N, D) -> (1 + side * side, D)."""
    return resize_positions(position[0], side)


def _noisy(tensor: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    drawn = torch.empty_like(tensor).normal_(generator=generator)
    return tensor + noise * tensor.std(correction=0) * drawn


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightFileError(f"{file} cannot be read ({error.strerror}): name a folder of save_pretrained") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightFileError(f"{file} is not JSON ({error})") from None
    kind = about.get("model_type") if isinstance(about, dict) else None
    if kind not in KINDS:
        raise WeightFileError(f"{file} has model_type {kind!r}: only {' and '.join(KINDS)} are read")
    return about


def _check_sizes(about: dict[str, Any], config: ModelConfig, folder: Path) -> None:
    """Compare what both configurations say."""
    problems = [
        f"{key} {about.get(key)} where the model has {getattr(config, key)}"
        for key in _SIZES
        if about.get(key) != getattr(config, key)
    ]
    layers = about.get("num_hidden_layers", 0)
    if layers < config.num_hidden_layers:
        problems.append(f"num_hidden_layers {layers} where the model has {config.num_hidden_layers}")
    if problems:
        raise WeightFileError(f"{folder} has {', '.join(problems)}: take a checkpoint or a config of the same size")


def _read_weights(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors of the folder without the prefix of a model with a head."""
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise WeightFileError(f"{folder} holds neither {' nor '.join(FILES)}: only checkpoints of one file are read")
    return {name.removeprefix(prefix): tensor for name, tensor in read_tensors(found[0]).items()}


def _notes(about: dict[str, Any], config: ModelConfig, unused: set[str]) -> list[str]:
    unused = {name for name in unused if not name.endswith("attention.key.bias")}  # nothing is lost with those
    notes = [f"not taken from the checkpoint: {listed(unused)}"] if unused else []
    if (activation := about.get("hidden_act", "gelu")) != "quick_gelu":
        notes.append(f"the checkpoint was trained with {activation}, the model computes quick_gelu")
    if (eps := about.get("layer_norm_eps", 1e-12)) != config.layer_norm_eps:
        notes.append(f"the checkpoint has layer_norm_eps {eps:g}, the model {config.layer_norm_eps:g}")
    return notes
