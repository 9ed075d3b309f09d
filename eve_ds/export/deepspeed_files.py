"""Weights out of the files of a DeepSpeed checkpoint, read without DeepSpeed and without running their pickles.

mp_rank_00_model_states.pt                                 dense weights, in the precision of training
layer_{MoE layer}_expert_{e}_mp_rank_00_model_states.pt    one expert each, counted over all ranks
[bf16_]zero_pp_rank_{r}_mp_rank_00_optim_states.pt         ZeRO 1 and 2: rank r's part of the fp32 masters
"""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eve_ds.config import Config
from eve_ds.model.naming import plain_names, to_plain_name

DENSE_FILE = "mp_rank_00_model_states.pt"
SHOWN = 3
"""Names that an error spells out before it counts the rest."""


class CheckpointError(ValueError):
    """A folder that is not a checkpoint, or a torn or contradictory one; the message names what is wrong."""


class Topology(NamedTuple):
    """What the files of a checkpoint are cut by, as `state.json` has it."""

    world_size: int
    ep_size: int
    zero_stage: int


def read_weights(folder: Path, config: Config, topology: Topology) -> tuple[dict[str, Tensor], str]:
    """All weights of a checkpoint in fp32 under their plain names, and where they are from.

    A run in bf16 or fp16 at ZeRO 1 or 2 gives its fp32 masters, each compared with the weight that it was rounded to.
    At ZeRO 0 the files do not name their masters, so that such a run gives the rounded weights.

    Raises:
        CheckpointError: a file is missing, surplus or unreadable, or files contradict each other.
    """
    precision = config.train.precision
    masters = precision != "fp32" and topology.zero_stage > 0
    _check_files(folder, config, topology, masters)
    weights = _module_weights(folder, config)
    if not masters:
        return {name: weight.float() for name, weight in weights.items()}, f"{precision} model states"
    return _master_weights(folder, config, topology, weights), "fp32 masters"


def listed(names: Iterable[str]) -> str:
    """The first few of some names, and how many there are beyond."""
    ordered = sorted(names)
    more = len(ordered) - SHOWN
    return ", ".join(ordered[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _expert_files(config: Config) -> set[str]:
    layers = range(len(set(config.model.moe_layers)))
    experts = range(config.model.moe.num_experts)
    return {f"layer_{layer}_expert_{expert}_{DENSE_FILE}" for layer in layers for expert in experts}


def _optimizer_file(rank: int, precision: str) -> str:
    return f"{'bf16_' if precision == 'bf16' else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _check_files(folder: Path, config: Config, topology: Topology, masters: bool) -> None:
    experts = _expert_files(config)
    needed = {DENSE_FILE} | experts
    if masters:
        needed |= {_optimizer_file(rank, config.train.precision) for rank in range(topology.world_size)}
    missing = {name for name in needed if not (folder / name).is_file()}
    if missing:
        raise CheckpointError(f"{folder} is torn, it lacks {listed(missing)}: take another checkpoint of the run")
    surplus = {path.name for path in folder.glob("layer_*_expert_*.pt")} - experts
    if surplus:
        raise CheckpointError(
            f"{folder} holds {listed(surplus)}, but its config.json has {config.model.moe.num_experts} experts in "
            f"each of the layers {config.model.moe_layers}: config.json is not the one of this checkpoint"
        )


def _module_weights(folder: Path, config: Config) -> dict[str, Tensor]:
    """Weights as the model computes with them, under plain names, each exactly once."""
    weights = dict(_load(folder / DENSE_FILE)["module"])
    if nested := [name for name in weights if to_plain_name(name) != name]:
        raise CheckpointError(f"{folder / DENSE_FILE} holds expert weights ({listed(nested)}), which have own files")
    for file in sorted(_expert_files(config)):
        for name, weight in _load(folder / file).items():
            plain = to_plain_name(name)
            if plain in weights:
                raise CheckpointError(f"{folder / file} holds {plain}, which another file holds too")
            weights[plain] = weight
    return weights


def _master_weights(folder: Path, config: Config, topology: Topology, rounded: dict[str, Tensor]) -> dict[str, Tensor]:
    pieces: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    num_local = config.model.moe.num_experts // topology.ep_size
    for rank in range(topology.world_size):  # a tensor that is cut continues on the next rank that holds it
        for name, piece in _rank_pieces(folder / _optimizer_file(rank, config.train.precision)):
            pieces[plain_names(name, rank % topology.ep_size * num_local, num_local)].append(piece)
    flat: dict[str, Tensor] = {}
    for names in list(pieces):
        flat |= zip(names, torch.cat(pieces.pop(names)).tensor_split(len(names)), strict=True)
    if unmatched := rounded.keys() ^ flat.keys():
        raise CheckpointError(f"{folder}: {listed(unmatched)} in either model or optimizer states, but not in both")
    masters = {}
    for name, weight in rounded.items():
        master = flat.pop(name)
        if master.numel() != weight.numel() or not torch.equal(master.view(weight.shape).to(weight.dtype), weight):
            raise CheckpointError(
                f"{folder}: the fp32 master of {name} ({master.numel():,} elements), put together from "
                f"{topology.world_size} optimizer files, does not round to the weight {tuple(weight.shape)} of the "
                "model states: the files are not of one step, or state.json is not theirs"
            )
        masters[name] = master.view(weight.shape)
    return masters


def _rank_pieces(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(DeepSpeed name, flat fp32 piece) of every parameter that a rank's partitions hold a part of."""
    state = _load(file)["optimizer_state_dict"]
    groups = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
    for partition, slices in groups:
        for name, where in slices.items():
            yield name, partition.detach()[where.start : where.start + where.numel]


class _Slice:
    """Stands in for `fragment_address`: where a piece lies in its partition."""

    start: int
    numel: int


class _Unused:
    """Stands in for an object of the optimizer state that nothing here looks at."""

    def __new__(cls, *_: Any) -> _Unused:
        return super().__new__(cls)


_STAND_INS: list[Any] = [
    (_Slice, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Unused, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Unused, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Unused, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]
"""Class of ours -> name of DeepSpeed's in the files."""


def _load(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"refers to {name[1]}, which is not loaded" if name else "is not a file that torch.save wrote"
        raise CheckpointError(f"{file} {what}: take a checkpoint written by launcher/pretrain.py") from None
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file} cannot be read ({reason}): take another checkpoint of the run") from None
