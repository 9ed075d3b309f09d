"""Import released weights: convert a file with released names to a folder that :func:`eve_ds.export.load` reads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from eve_ds.checkpoint.files import listed, shape_problem
from eve_ds.checkpoint.output_folder import check_output_folder
from eve_ds.config import Config, ModelConfig
from eve_ds.export.official import POSITION_BUFFERS, PREFIX, from_official, to_official
from eve_ds.export.plain import ExportError, check_weights
from eve_ds.export.start import DRAWN, StartReport, changed, draw_decoders, fitting_tokenizer, write_start
from eve_ds.export.weight_files import WeightFileError, read_tensors
from eve_ds.model.embeddings import cut_positions, resize_positions
from eve_ds.model.eve import EVE

IMAGE_POSITIONS, TEXT_POSITIONS = "backbone.image_embedding.position", "backbone.text_embedding.position"
HEADS = ("output.", "mitc_", "mitm_", "itc_vl_")
"""Starts of the names of the released code's task heads: VQA and NLVR2 (`output`), retrieval (the others)."""
_TABLES = {"backbone.pos_embed_vision", "backbone.pos_embed_text"}


def import_weights(
    file: Path,
    out: Path,
    *,
    config: Config,
    tokenizer: str | None = None,
    image_size: int | None = None,
) -> StartReport:
    """Write the backbone from a file with released names to the folder `out`, in fp32.

    Position tables are fitted to the model: the image table by bicubic interpolation of all rows except the class row,
    the text table by omitting its last rows. A released file lacks pixel decoder and text head; these get the initial
    weights of a new model with `config.train.seed`. Heads of a fine-tuned model are left out; a note names them.

    Args:
        file: .pth, .pt, .th, .bin or .safetensors file; see :func:`eve_ds.export.weight_files.read_tensors`. Names may
            have the prefix `backbone.` or not.
        out: new or empty folder.
        config: configuration of the model; the shapes of all tensors except the position tables must match the file.
        tokenizer: argument of :func:`eve_ds.data.tokenizer.load_tokenizer`; None: `config.data.tokenizer`.
        image_size: replaces `config.model.image_size`; None: no change.

    Raises:
        WeightFileError: `file` cannot be read, lacks tensors of the backbone, or contains unknown ones.
        ConfigError: the tokenizer cannot be used, or `image_size` is not a multiple of the patch size.
        ExportError: `out` is not empty.
        CheckpointError: a weight is not finite.
        OSError: writing failed.
    """
    check_output_folder(out, ExportError)
    config = changed(config, tokenizer, image_size)
    loaded = fitting_tokenizer(config)
    taken, fitted = read_backbone(file, config.model)
    notes = _profile_notes(config.model) + fitted
    weights = taken | draw_decoders(config)
    check_weights(weights, config.model, str(file))
    origins = dict.fromkeys(weights, DRAWN) | dict.fromkeys(taken, file.name)
    return write_start(out, config, loaded, weights, source=str(file), origins=origins, notes=notes)


def read_backbone(file: Path, config: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Read the backbone of a released file with our names, in fp32 and with fitted position tables.

    Returns:
        The tensors; and notes, one sentence each, on fitted tables and on tensors that were left out.

    Raises:
        WeightFileError: see :func:`import_weights`.
    """
    state, heads = _without_heads(read_tensors(file))
    taken = {name: tensor.float() for name, tensor in from_official(_checked(state, config, file)).items()}
    notes = [f"left out, no part of the backbone: {listed(heads)}"] if heads else []
    return taken, notes + fit_positions(taken, config, str(file))


def _without_heads(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Split the tensors of a released file into those of the backbone, and the names of all others.

    If backbone tensors have their prefix, everything without it belongs to heads; otherwise :data:`HEADS` tells.
    """
    has_prefix = any(name.startswith(PREFIX) for name in state)
    heads = [name for name in state if (not name.startswith(PREFIX) if has_prefix else name.startswith(HEADS))]
    return {name: tensor for name, tensor in state.items() if name not in set(heads)}, heads


def _checked(state: dict[str, Tensor], config: ModelConfig, file: Path) -> dict[str, Tensor]:
    """Return the tensors with released names and prefix; check that names and shapes are those of the model.

    Rows of position tables may differ.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in state) else ""
    with torch.device("meta"):
        model = to_official(EVE(config).state_dict())
    expected = {prefix + name.removeprefix(PREFIX): tensor for name, tensor in model.items()}
    missing = expected.keys() - state - {prefix + name.removeprefix(PREFIX) for name in POSITION_BUFFERS}
    surplus = state.keys() - expected
    shapes = {problem for name in expected.keys() & state if (problem := _misfit(name, state[name], expected[name]))}
    problems = [f"lacks {listed(missing)}"] if missing else []
    problems += [f"holds {listed(surplus)}, no part of the backbone"] if surplus else []
    problems += [f"has {listed(shapes)}"] if shapes else []
    if problems:
        raise WeightFileError(f"{file} {'; '.join(problems)}: it is not the backbone that the config describes")
    return {PREFIX + name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def _misfit(name: str, found: Tensor, expected: Tensor) -> str | None:
    """Describe the problem of a tensor of the file; None if it has none."""
    stem = name.removeprefix(PREFIX)
    if PREFIX + stem in POSITION_BUFFERS:
        return None
    if not found.is_floating_point():
        return f"{name} in {str(found.dtype).removeprefix('torch.')}"
    free = 1 if PREFIX + stem in _TABLES else 0
    if found.ndim == expected.ndim and found.shape[free:] == expected.shape[free:]:
        return None
    return shape_problem(name, found.shape, expected.shape)


def fit_positions(weights: dict[str, Tensor], config: ModelConfig, where: str) -> list[str]:
    """Fit both position tables to the model in place.

    Returns:
        One sentence for each changed table.

    Raises:
        WeightFileError: a table cannot be fitted.
    """
    before = {name: weights[name].shape[0] for name in (IMAGE_POSITIONS, TEXT_POSITIONS)}
    try:
        side = config.image_size // config.patch_size
        weights[IMAGE_POSITIONS] = resize_positions(weights[IMAGE_POSITIONS], side)
        weights[TEXT_POSITIONS] = cut_positions(weights[TEXT_POSITIONS], config.text_positions)
    except ValueError as error:
        raise WeightFileError(f"{where}: {error}") from None
    return [
        f"{name}: {rows} rows of the file became {weights[name].shape[0]}"
        for name, rows in before.items()
        if rows != weights[name].shape[0]
    ]


def _profile_notes(config: ModelConfig) -> list[str]:
    if config.profile == "official" and config.moe.routing == "capacity":
        return []
    return ["the released numbers need model.profile=official and model.moe.routing=capacity"]
