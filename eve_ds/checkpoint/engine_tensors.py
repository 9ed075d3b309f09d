"""Tensors of a DeepSpeed engine (fp32 weights and Adam's moments), in pieces, under plain names.

:mod:`eve_ds.checkpoint.parts` finds what a rank holds at ZeRO 1 to 3. At ZeRO 0 every rank holds all tensors of its
computation: the parameters themselves in fp32, or the copies of FP16_UnfusedOptimizer in bf16 and fp16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from eve_ds.checkpoint.files import KINDS, CheckpointError, Piece, PieceReader, listed
from eve_ds.checkpoint.parts import (
    Part,
    part_at_stage_3,
    part_of_partition,
    places,
    update_weights_at_stage_3,
    whole_numel,
)
from eve_ds.model.moe import plain_names_of
from eve_ds.model.naming import expert_id
from eve_ds.model.shards import Runs, Shard, shard_of
from eve_ds.model.with_losses import plain_model
from eve_ds.topology import Topology


class Fragment(NamedTuple):
    """Range of one tensor, or of a shard of it, inside the engine; writing to `tensors` changes the engine."""

    name: str
    """Name in the plain model."""
    start: int
    """First element, in row-major order; of a shard, counted from the shard's first."""
    tensors: dict[str, Tensor]
    """Kind -> flat view."""


def fragments(engine: DeepSpeedEngine) -> list[Fragment]:
    """All fragments that this rank holds, in the order of the model's parameters."""
    held = _parts(engine)
    found: list[Fragment] = []
    model = plain_model(engine.module)
    for name, parameter in model.named_parameters():
        if held[parameter].numel:
            names, views = plain_names_of(model, name), _views(engine, held[parameter])
            split = _split_by_tensor(names, whole_numel(parameter), held[parameter].start, views)
            found += _without_padding(split, shard_of(parameter))
    return found


def pieces_to_write(engine: DeepSpeedEngine, topology: Topology) -> list[Piece]:
    """This rank's share of the state; the shares of all ranks together hold everything exactly once."""
    held, runs = fragments(engine), _runs_by_name(engine)
    if engine.zero_optimization_stage() == 0:  # the data ranks hold replicas, so they take turns
        held = [
            fragment
            for number, fragment in enumerate(held)
            if (
                number % topology.num_expert_replicas == topology.expert_replica
                if expert_id(fragment.name) is not None
                else number % topology.data_size == topology.data_rank
            )
        ]
    # Tensor-parallel ranks hold replicas of what is not cut.
    held = [part for part in held if part.name in runs or topology.tensor_rank == 0]
    return [
        Piece(kind, part.name, part.start, part.tensors[kind], runs.get(part.name)) for part in held for kind in KINDS
    ]


@torch.no_grad()
def load_pieces(engine: DeepSpeedEngine, reader: PieceReader, steps: float) -> None:
    """Fill the engine from a checkpoint that any number of ranks may have written; collective.

    Args:
        engine: newly initialized engine with any ZeRO stage.
        reader: reader of the checkpoint.
        steps: number of updates that the moments have seen, for Adam's bias correction.

    Raises:
        CheckpointError: the checkpoint lacks a part of this rank's tensors, or holds too much.
    """
    runs = _runs_by_name(engine)
    for name, start, tensors in fragments(engine):
        for kind, tensor in tensors.items():
            stop = start + tensor.numel()
            if name in runs:
                tensor.copy_(runs[name].view(reader.read(kind, name)).flatten()[start:stop])
            else:
                tensor.copy_(reader.read(kind, name, start, stop))
    for state in [*_inner(engine).state.values(), *_initialized_states(engine)]:
        state["step"].fill_(steps)
    if engine.zero_optimization_stage() == 3:
        update_weights_at_stage_3(engine)
    elif engine.zero_optimization_stage() > 0:
        engine.optimizer.update_lp_params()
    else:
        for parameter, master in _masters_at_stage_0(engine).items():
            parameter.copy_(master)


def check_tensors(reader: PieceReader, shapes: dict[str, torch.Size], where: str) -> None:
    """Check that a checkpoint holds every tensor of the plain model whole, with its moments, and no other tensor.

    Raises:
        CheckpointError: names the tensors that differ.
    """
    for kind in KINDS:
        names = reader.names(kind)
        wrong = (names ^ shapes.keys()) | {
            name for name in names & shapes.keys() if reader.numel(kind, name) != shapes[name].numel()
        }
        if wrong:
            raise CheckpointError(
                f"{where}: {kind} of {listed(wrong)} does not match the model: config.json does not "
                "belong to this checkpoint"
            )


def optimizer_steps(engine: DeepSpeedEngine) -> float:
    """Number of updates that Adam's moments have seen; equal for all tensors that are trained."""
    steps = {float(state["step"]) for state in _initialized_states(engine)}
    if len(steps) != 1:
        raise CheckpointError(f"the optimizer counts {sorted(steps)} updates for different tensors, which is a bug")
    return steps.pop()


def loss_scale_state(engine: DeepSpeedEngine) -> dict[str, float] | None:
    """State of a dynamic loss scale (fp16); None without one."""
    scaler = _scaler(engine)
    return None if scaler is None else {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)}


def load_loss_scale(engine: DeepSpeedEngine, numbers: dict[str, float] | None) -> None:
    """Restore the result of :func:`loss_scale_state`; does nothing if either side has no dynamic loss scale."""
    scaler = _scaler(engine)
    if scaler is not None and numbers is not None:
        for name, value in numbers.items():
            setattr(scaler, name, value)


_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler(engine: DeepSpeedEngine) -> Any:
    """Object that holds a dynamic loss scale: from ZeRO's optimizer or the unfused fp16 optimizer."""
    for name in ("loss_scaler", "loss_scale_config"):
        scaler = getattr(engine.optimizer, name, None)
        if getattr(scaler, "dynamic", False) or getattr(engine.optimizer, "dynamic_loss_scale", False):
            return scaler
    return None


def _inner(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _initialized_states(engine: DeepSpeedEngine) -> Iterator[dict[str, Tensor]]:
    """State of every tensor that the optimizer updates; a state that does not exist yet is created for zero updates.

    Frozen parameters get no gradient, so the optimizer skips them.
    """
    optimizer = _inner(engine)
    updated = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    if engine.zero_optimization_stage() == 3:  # whose groups are empty except during an update
        updated = engine.optimizer.fp32_partitioned_groups_flat
    for tensor in updated:
        if tensor.requires_grad:
            yield _initialized(optimizer.state[tensor], tensor)


def _initialized(state: dict[str, Tensor], tensor: Tensor) -> dict[str, Tensor]:
    if not state:  # the state that torch's AdamW creates at the first update
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
    return state


Masters = dict[nn.Parameter, Tensor]
"""Low-precision parameter -> its fp32 copy."""


def _parts(engine: DeepSpeedEngine) -> dict[nn.Parameter, Part]:
    """Part of every parameter that this rank holds: at stage 0, all of it."""
    parameters = list(engine.module.parameters())
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return {parameter: part_at_stage_3(engine, parameter) for parameter in parameters}
    if stage > 0:
        return {
            parameter: part_of_partition(engine, place, parameter.numel())
            for parameter, place in places(engine).items()
        }
    masters = _masters_at_stage_0(engine)
    return {parameter: Part(masters.get(parameter, parameter), 0, 0, parameter.numel()) for parameter in parameters}


def _views(engine: DeepSpeedEngine, part: Part) -> dict[str, Tensor]:
    """Kind -> flat view of a part."""
    state = _initialized(_inner(engine).state[part.masters], part.masters)
    whole = {"master": part.masters.detach(), **{kind: state[kind] for kind in KINDS[1:]}}
    return {kind: tensor.view(-1).narrow(0, part.offset, part.numel) for kind, tensor in whole.items()}


def _masters_at_stage_0(engine: DeepSpeedEngine) -> Masters:
    """Masters of all parameters; empty in fp32, and if ZeRO partitions the masters."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        return {}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {parameter: master for low, high in pairs for parameter, master in zip(low, high, strict=True)}


def _runs_by_name(engine: DeepSpeedEngine) -> dict[str, Runs]:
    """Plain name -> elements of the tensor that this rank holds, for the tensors of which it holds a shard."""
    model = plain_model(engine.module)
    cut = [(name, parameter, shard_of(parameter)) for name, parameter in model.named_parameters()]
    return {
        plain: shard.runs
        for name, parameter, shard in cut
        if shard is not None
        for plain in plain_names_of(model, name)
    }


def _without_padding(held: Iterable[Fragment], shard: Shard | None) -> Iterator[Fragment]:
    """Cut off what lies behind the last element of a shard."""
    for fragment in held:
        numel = fragment.tensors["master"].numel()
        real = numel if shard is None else min(numel, shard.runs.numel - fragment.start)
        if real > 0:
            yield fragment._replace(tensors={kind: tensor[:real] for kind, tensor in fragment.tensors.items()})


def _split_by_tensor(names: tuple[str, ...], numel: int, start: int, tensors: dict[str, Tensor]) -> Iterator[Fragment]:
    """Split a range of a parameter with `numel` elements at the borders of its tensors: of its experts, if any."""
    size = numel // len(names)
    stop = start + tensors["master"].numel()
    for number, name in enumerate(names):
        first, last = max(start, number * size), min(stop, (number + 1) * size)
        if first < last:
            views = {kind: tensor[first - start : last - start] for kind, tensor in tensors.items()}
            yield Fragment(name, first - number * size, views)
