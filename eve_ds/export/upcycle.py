"""Initialize an EVE from a dense image Transformer (sparse upcycling, arXiv 2212.05055).

The source is a folder of Hugging Face's ViT or BEiT, or BEiTv2, the initialization of the paper, as published by its
authors (a .pth file) or by timm (a folder or its file); :mod:`eve_ds.export.dense` has their names. EVE takes these
parts of layer N:

attention             fused q, k, v. Keys of BEiT have no bias, like ours. The bias b of ViT's keys is dropped without
                      error: it adds q . b to the scores of a query for all keys, which does not change the softmax.
LayerNorms            before attention and before the feed-forward network
gamma_1, gamma_2      lambda_1, lambda_2 of BEiT; gamma_1, gamma_2 of BEiTv2; 1 if the checkpoint has no LayerScale
feed-forward          for the image network of a shallow layer, on request for its text network; for every expert of an
                      MoE layer, each with its own noise, so that experts differ

EVE also takes the patch projection, class token, position table (resized to the images of the model) and the final
LayerNorm, if the checkpoint has one. Most BEiTs have relative position biases instead of a position table; EVE has no
counterpart, so the position table then has its random initialization. Everything else is initialized as in a new model:
words, routers, modality embeddings, decoders.

For BEiTv2, notes list tensors without a counterpart in EVE: relative position biases, the token of masked patches,
heads (including fc_norm, which normalizes averages of patches), and the second decoder of the class token. Other
tensors are refused, because a file with them may compute something else. Sizes are read from the tensors. The number of
heads is read from the bias tables; without bias tables it is that of the config, and a note says so.

The blocks do not compute exactly the same as their sources: EVE's activation is quick_gelu, but these checkpoints were
trained with gelu (the difference is at most 0.02); LayerNorms have eps 1e-6 instead of 1e-12 in Hugging Face's models;
relative position biases are dropped. With quick_gelu in the source, equal eps, biases of 0, no noise and top_k of at
least 2 (gates that sum to 1), a block equals its source. The complete model differs even then: its pre_norm normalizes
the embedded tokens, which no weight can undo.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eve_ds.checkpoint.files import listed
from eve_ds.checkpoint.output_folder import check_output_folder
from eve_ds.config import Config, ModelConfig
from eve_ds.export.dense import SIZES, Dense, Names, read_dense
from eve_ds.export.plain import ExportError, check_weights
from eve_ds.export.start import DRAWN, StartReport, changed, draw_weights, fitting_tokenizer, write_start
from eve_ds.export.weight_files import WeightFileError
from eve_ds.model.embeddings import resize_positions


class Upcycled(NamedTuple):
    """Initial state dict."""

    weights: dict[str, Tensor]
    """fp32 state dict of :class:`eve_ds.model.eve.EVE`."""
    origins: dict[str, str]
    """Tensor -> names of its sources in the checkpoint, or DRAWN."""
    notes: list[str]
    """Unused tensors of the checkpoint and differences in computation, as sentences."""


class _Rule(NamedTuple):
    """Rule that computes one tensor of EVE."""

    sources: tuple[str, ...]
    """Names of the sources in the checkpoint, without the prefix of a model with a head."""
    make: Callable[..., Tensor]
    """Function from the sources in fp32 to the tensor."""
    remark: str = ""
    """Text to append to the origin."""


def upcycle(source: Path, config: Config, *, noise: float = 0.01, text_from_image: bool = False) -> Upcycled:
    """Return the initial state dict of an EVE from a ViT, BEiT or BEiTv2 of the same width.

    Nothing is downloaded. Pickles are read only by torch.load(weights_only=True), which calls nothing except functions
    that rebuild tensors and plain containers, and refuses a file that refers to anything else.

    Args:
        source: folder with config.json and model.safetensors or pytorch_model.bin, from save_pretrained or timm; or a
            file of BEiTv2.
        config: configuration of the model. Width, heads, feed-forward width and patch size must be those of the
            checkpoint, which must have at least as many layers. `train.seed` determines random weights.
        noise: standard deviation of the noise on each tensor of an expert, relative to that of the tensor.
        text_from_image: initialize text networks of shallow layers from the image networks instead of at random.

    Raises:
        WeightFileError: the source cannot be read, is of another kind or size, lacks tensors, or is a BEiTv2 with
            unknown tensors.
        CheckpointError: the shape of a weight differs from the config, or a weight is not finite.
        ValueError: `noise` is negative.
    """
    if noise < 0:
        raise ValueError(f"noise ({noise}) must not be negative")
    dense = read_dense(source)
    _check_sizes(dense, config.model)
    rules = _rules(dense, config.model, noise, text_from_image, config.train.seed)
    needed = {name for rule in rules.values() for name in rule.sources}
    if missing := needed - dense.tensors.keys():
        raise WeightFileError(f"{source} lacks {listed(missing)}, which {dense.kind} has: take a complete one")
    notes = _left_out(dense, dense.tensors.keys() - needed, config.model.num_hidden_layers)
    weights = draw_weights(config) | {name: _make(name, rule, dense) for name, rule in rules.items()}
    check_weights(weights, config.model, str(source))
    origins = {name: " + ".join(rule.sources) + rule.remark for name, rule in rules.items()}
    return Upcycled(weights, dict.fromkeys(weights, DRAWN) | origins, notes + _differences(dense, config.model))


def write_upcycled(
    source: Path,
    out: Path,
    *,
    config: Config,
    tokenizer: str | None = None,
    noise: float = 0.01,
    text_from_image: bool = False,
) -> StartReport:
    """Write the result of :func:`upcycle` to a folder that :func:`eve_ds.export.load` reads.

    Args:
        source: see :func:`upcycle`.
        out: new or empty folder.
        config: see :func:`upcycle`.
        tokenizer: argument of :func:`eve_ds.data.tokenizer.load_tokenizer`; None: `config.data.tokenizer`.
        noise: see :func:`upcycle`.
        text_from_image: see :func:`upcycle`.

    Raises:
        WeightFileError: see :func:`upcycle`.
        CheckpointError: see :func:`upcycle`.
        ValueError: see :func:`upcycle`.
        ConfigError: the tokenizer cannot be used.
        ExportError: `out` is not empty.
        OSError: writing failed.
    """
    check_output_folder(out, ExportError)
    config = changed(config, tokenizer)
    loaded = fitting_tokenizer(config)
    made = upcycle(source, config, noise=noise, text_from_image=text_from_image)
    return write_start(out, config, loaded, made.weights, source=str(source), origins=made.origins, notes=made.notes)


def _rules(dense: Dense, config: ModelConfig, noise: float, text_from_image: bool, seed: int) -> dict[str, _Rule]:
    """Return our name -> its rule, for all tensors that are taken from the checkpoint."""
    names = dense.names
    image = "backbone.image_embedding."
    rules = _copied(f"{image}projection", names.projection)
    rules[f"{image}class_token"] = _Rule((names.class_token,), torch.flatten)
    if dense.has_position:
        resized = partial(_resized, side=config.image_size // config.patch_size)
        rules[f"{image}position"] = _Rule((names.position,), resized)
    if dense.has_norm:
        rules |= _copied("backbone.norm", names.norm)
    generator = torch.Generator().manual_seed(seed)
    expert = partial(_noisy, noise=noise, generator=generator)
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"backbone.blocks.{layer}.", names.layer.format(layer)
        rules |= _attention_rules(ours, theirs, dense, config.hidden_size)
        if layer in config.expert_layers:
            rules |= _copied(f"{ours}norm2", theirs + names.norm2)
            for index in range(config.moe.num_experts):
                experts = f"{ours}moe.experts.{index}."
                rules |= _feed_forward_rules(experts, theirs, names, expert, f", noise {noise:g}")
            continue
        if layer in config.moe_layers and config.deep_ffn == "shared":
            rules |= _copied(f"{ours}ffn.norm", theirs + names.norm2)
            rules |= _feed_forward_rules(f"{ours}ffn.network.", theirs, names, torch.clone)
            continue
        for modality in ("image", "text") if text_from_image else ("image",):
            rules |= _copied(f"{ours}ffn.norm_{modality}", theirs + names.norm2)
            rules |= _feed_forward_rules(f"{ours}ffn.{modality}.", theirs, names, torch.clone)
    return rules


def _attention_rules(ours: str, theirs: str, dense: Dense, width: int) -> dict[str, _Rule]:
    """Return the rules of attention, the LayerNorm before it, and both LayerScales."""
    names = dense.names
    rules = _copied(f"{ours}norm1", theirs + names.norm1)
    rules |= _copied(f"{ours}attention.proj", theirs + names.proj)
    rules[f"{ours}attention.qkv.weight"] = _Rule(tuple(theirs + name for name in names.qkv), _stacked)
    for part, name in (("q", names.q_bias), ("v", names.v_bias)):
        rules[f"{ours}attention.{part}_bias"] = (
            _Rule((theirs + name,), torch.clone)
            if dense.has_bias
            else _Rule((), partial(torch.zeros, width), "0, the checkpoint has no bias there")
        )
    for index, name in enumerate(names.gamma, 1):
        rules[f"{ours}gamma_{index}"] = (
            _Rule((theirs + name,), torch.clone)
            if dense.has_scale
            else _Rule((), partial(torch.ones, width), "1, the checkpoint has no LayerScale")
        )
    return rules


def _feed_forward_rules(
    ours: str, theirs: str, names: Names, make: Callable[..., Tensor], remark: str = ""
) -> dict[str, _Rule]:
    return {
        f"{ours}{layer}.{kind}": _Rule((f"{theirs}{name}.{kind}",), make, remark)
        for layer, name in (("fc1", names.fc1), ("fc2", names.fc2))
        for kind in ("weight", "bias")
    }


def _copied(ours: str, theirs: str) -> dict[str, _Rule]:
    return {f"{ours}.{kind}": _Rule((f"{theirs}.{kind}",), torch.clone) for kind in ("weight", "bias")}


def _make(name: str, rule: _Rule, dense: Dense) -> Tensor:
    try:
        return rule.make(*(dense.tensors[source].float() for source in rule.sources))
    except (RuntimeError, ValueError) as error:  # shapes that do not match
        raise WeightFileError(f"{dense.source}: {name} cannot be made of {listed(rule.sources)}: {error}") from None


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _resized(position: Tensor, side: int) -> Tensor:
    """Resize a position table (1, 1 + N, D) to (1 + side * side, D)."""
    return resize_positions(position[0], side)


def _noisy(tensor: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    drawn = torch.empty_like(tensor).normal_(generator=generator)
    return tensor + noise * tensor.std(correction=0) * drawn


def _check_sizes(dense: Dense, config: ModelConfig) -> None:
    """Check that the sizes of the checkpoint match the config."""
    sizes = dense.sizes
    problems = [
        f"{key} {sizes[key]} where the model has {getattr(config, key)}"
        for key in SIZES
        if key in sizes and sizes[key] != getattr(config, key)
    ]
    layers = sizes["num_hidden_layers"]
    if layers < config.num_hidden_layers:
        problems.append(f"num_hidden_layers {layers} where the model has {config.num_hidden_layers}")
    if problems:
        raise WeightFileError(
            f"{dense.source} has {', '.join(problems)}: take a checkpoint or a config of the same size"
        )


def _left_out(dense: Dense, unused: set[str], depth: int) -> list[str]:
    """Return notes on tensors that a model of `depth` layers does not use."""
    deeper = "|".join(
        re.escape(dense.names.layer.format(layer)) for layer in range(depth, dense.sizes["num_hidden_layers"])
    )
    patterns = dense.left_out | ({"not taken, layers beyond the model's": f"({deeper}).+"} if deeper else {})
    notes = []
    for note, pattern in patterns.items():
        matching = {name for name in unused if re.fullmatch(pattern, name)}
        unused = unused - matching
        if note and matching:
            notes.append(f"{note}: {listed(matching)}")
    if unused:
        raise WeightFileError(
            f"{dense.source} holds {listed(unused)}, no part of {dense.kind}: take it as its authors or timm publish it"
        )
    return notes


def _differences(dense: Dense, config: ModelConfig) -> list[str]:
    """Return notes on missing tensors of the checkpoint, and on differences in computation."""
    notes = []
    if not dense.has_position:
        notes.append("the checkpoint has no position table: that of images is newly initialized")
    if not dense.has_norm:
        notes.append(
            "the checkpoint has no LayerNorm of every token after its last layer: the final one is newly initialized"
        )
    if "num_attention_heads" not in dense.sizes:
        notes.append(
            f"the checkpoint does not determine num_attention_heads: the config's {config.num_attention_heads} is used"
        )
    if dense.activation != "quick_gelu":
        notes.append(f"the checkpoint was trained with {dense.activation}, the model uses quick_gelu")
    if dense.eps != config.layer_norm_eps:
        notes.append(f"the checkpoint has layer_norm_eps {dense.eps:g}, the model {config.layer_norm_eps:g}")
    return [*notes, *dense.notes]
