"""Dense to mixture of experts: an EVE that starts from an image Transformer (sparse upcycling, arXiv 2212.05055).

Reads the folders of Hugging Face's ViT and BEiT, and BEiTv2, which the paper starts from, as its authors (a .pth file)
and timm (a folder, or its file) publish it; :mod:`eve_ds.export.dense` knows their names. What is taken from layer N:

attention             fused q, k, v. BEiT's keys have no bias, as ours. ViT's bias b of keys is dropped, which is exact:
                      it adds q . b to the scores of a query with every key alike, and softmax does not see that.
LayerNorms            those before attention and before the feed-forward network
gamma_1, gamma_2      BEiT's lambda_1, lambda_2, BEiTv2's gamma_1, gamma_2; 1 where the checkpoint has no LayerScale
feed-forward          of images in a shallow layer, and on demand of texts; every expert of an MoE layer, each with
                      noise of its own so that experts differ

and besides: patch projection, class token, position table (resized to the model's images; most BEiTs have relative
position biases instead, for which we have no place, and ours is drawn), final LayerNorm where there is one. All else is
drawn as in a new model: words, routers, modality embeddings, decoders.

Of a BEiTv2, notes name what has no place here: relative position biases, the token of masked patches, heads (with them
fc_norm, which normalizes averages of patches), the second decoder of the class token. Tensors that are none of these
are refused, as a file that holds them may compute something else. Sizes are read from the tensors; the number of heads
from the bias tables, and where there are none, that of the config is taken and a note says so.

What the blocks compute is not exactly what they did: EVE's activation is quick_gelu where these checkpoints were
trained with gelu (at most 0.02 apart), LayerNorms have eps 1e-6 for the 1e-12 of Hugging Face's, and relative position
biases are gone. With quick_gelu there too, equal eps, biases of 0, no noise and top_k of 2 or more (gates that sum to
1) a block equals its source. The whole model does not even then: its pre_norm normalizes the embedded stream, which no
weight undoes.
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


def upcycle(source: Path, config: Config, *, noise: float = 0.01, text_from_image: bool = False) -> Upcycled:
    """State dict of an EVE from a ViT, BEiT or BEiTv2 of its width.

    Nothing is fetched. Pickles are read by torch.load(weights_only=True) alone, which calls nothing but what rebuilds
    tensors and plain containers, and refuses a file that names anything else.

    Args:
        source: folder with config.json and model.safetensors or pytorch_model.bin, as save_pretrained or timm writes
            them; or a file of BEiTv2.
        config: of the model; width, heads, feed-forward width and patch size must be those of the checkpoint, which
            must have as many layers at least. `train.seed` decides what is drawn.
        noise: standard deviation of what is added to each tensor of an expert, relative to that of the tensor.
        text_from_image: start the text networks of shallow layers from the image networks, instead of drawing them.

    Raises:
        WeightFileError: the source cannot be read, is of another kind or size, lacks tensors, or is a BEiTv2 that
            holds unknown ones.
        CheckpointError: a weight has another shape than the config says, or is not finite.
        ValueError: negative noise.
    """
    if noise < 0:
        raise ValueError(f"noise ({noise}) must not be negative")
    dense = read_dense(source)
    _check_sizes(dense, config.model)
    rules = _rules(dense, config.model, noise, text_from_image, config.train.seed)
    needed = {name for rule in rules.values() for name in rule.sources}
    if missing := needed - dense.tensors.keys():
        raise WeightFileError(f"{source} lacks {listed(missing)}, which {dense.kind} has: take one that is whole")
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
    """Write what :func:`upcycle` makes of `source` into the new or empty folder `out`, for `eve_ds.export.load`.

    `tokenizer` is what :func:`eve_ds.data.tokenizer.load_tokenizer` takes; None: `config.data.tokenizer`.

    Raises:
        WeightFileError, ValueError: as :func:`upcycle`.
        ConfigError: the tokenizer cannot be used.
        ExportError: `out` holds something.
        CheckpointError: a weight has another shape than the config says, or is not finite.
        OSError: writing failed.
    """
    check_output_folder(out, ExportError)
    config = changed(config, tokenizer)
    loaded = fitting_tokenizer(config)
    made = upcycle(source, config, noise=noise, text_from_image=text_from_image)
    return write_start(out, config, loaded, made.weights, source=str(source), origins=made.origins, notes=made.notes)


def _rules(dense: Dense, config: ModelConfig, noise: float, text_from_image: bool, seed: int) -> dict[str, _Rule]:
    """Our name -> how it is made."""
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
    """Attention, the LayerNorm before it, and both LayerScales."""
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
    except (RuntimeError, ValueError) as error:  # shapes that do not go together
        raise WeightFileError(f"{dense.source}: {name} cannot be made of {listed(rule.sources)}: {error}") from None


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _resized(position: Tensor, side: int) -> Tensor:
    """(1, 1 + N, D) -> (1 + side * side, D)."""
    return resize_positions(position[0], side)


def _noisy(tensor: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    drawn = torch.empty_like(tensor).normal_(generator=generator)
    return tensor + noise * tensor.std(correction=0) * drawn


def _check_sizes(dense: Dense, config: ModelConfig) -> None:
    """Compare what the checkpoint tells with the config."""
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
    """Notes on the tensors that are not taken into a model of `depth` layers."""
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
    """Notes on what the checkpoint lacks, and on what the model computes differently."""
    notes = []
    if not dense.has_position:
        notes.append("the checkpoint has no position table: that of images is drawn")
    if not dense.has_norm:
        notes.append("the checkpoint has no LayerNorm of every token after its last layer: the final one is drawn")
    if "num_attention_heads" not in dense.sizes:
        notes.append(
            f"the checkpoint does not tell its heads: num_attention_heads {config.num_attention_heads} is ours"
        )
    if dense.activation != "quick_gelu":
        notes.append(f"the checkpoint was trained with {dense.activation}, the model computes quick_gelu")
    if dense.eps != config.layer_norm_eps:
        notes.append(f"the checkpoint has layer_norm_eps {dense.eps:g}, the model {config.layer_norm_eps:g}")
    return [*notes, *dense.notes]
