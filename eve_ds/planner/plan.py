"""Shapes of a run that fit into the memory of the GPUs, best first.

The order depends on counts alone, on no times. It prefers, in this order: no offload, no tensor parallelism,
micro-batches of some samples, no recomputation, a low ZeRO stage, expert rows that stay inside a node, few micro-steps,
and few bytes between nodes. Settings of a shape that the configuration names (`parallel.tp_size`) are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

from eve_ds.config import Config, ConfigError
from eve_ds.objectives.registry import objectives_of
from eve_ds.parallel.refused import check_clipping, check_compile, check_tensor_parallel, check_topology
from eve_ds.planner.files import FILES, with_buffers
from eve_ds.planner.forward import Forward, forward_of
from eve_ds.planner.memory import memory
from eve_ds.planner.option import Option
from eve_ds.planner.parameters import Cutting, Held, count_parameters, model_on_meta
from eve_ds.planner.shape import Shape
from eve_ds.planner.traffic import Passes, collectives

GIB = 2**30
RESERVED = 0.1
"""Share of a GPU's memory for the CUDA context, NCCL, cuBLAS and fragmentation: assumed, not measured on a GPU."""
TENSOR_PARALLEL = (1, 2, 4, 8)
"""Numbers of ranks that share tensors, unless the configuration names another one."""
SETTINGS = {
    "ep_size": ("parallel", "ep_size"),
    "tp_size": ("parallel", "tp_size"),
    "split_experts": ("parallel", "split_experts"),
    "micro_batch": ("train", "micro_batch_size"),
    "accumulation_steps": ("train", "gradient_accumulation_steps"),
    "checkpointing": ("train", "activation_checkpointing"),
}
"""Fields of a shape -> sections and fields of the configuration."""


class Machine(NamedTuple):
    """GPUs to use."""

    gpus: int
    gpus_per_node: int
    gpu_memory: float
    """GiB of one GPU."""

    @property
    def usable(self) -> float:
        """Bytes of one GPU for tensors."""
        return self.gpu_memory * (1 - RESERVED) * GIB

    def __str__(self) -> str:
        """Number of GPUs."""
        return "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs"


class Planner:
    """Counts the bytes of shapes of one configuration; the model is measured once per tensor-parallel size.

    What a micro-batch keeps and exchanges grows by the same number of bytes with every sample, so two sizes are
    measured and the others follow.

    Args:
        config: model, masks, batch size, precision, clipping, and the settings of shapes that are not to be chosen.

    Raises:
        ConfigError: the configuration is that of a task.
    """

    MEASURED = (8, 16)
    """Numbers of samples that are measured."""

    def __init__(self, config: Config) -> None:
        if config.task is not None:
            raise ConfigError(
                f"the configuration has a section task ({config.task.name}), and only pre-training can be planned, "
                "whose batches and heads differ: take a configuration without the section"
            )
        self.config = config
        self.kept = kept_settings(config)
        self._model = model_on_meta(config.model)
        self._measured: dict[Cutting, tuple[Forward, Forward]] = {}
        self._counted: dict[tuple[int, Cutting], Held] = {}

    def option(self, shape: Shape) -> Option:
        """Bytes of a shape."""
        cutting = Cutting(shape.tp_size, shape.split_experts)
        held = self._held(shape.ep_size, cutting)
        forward = self.forward(shape.micro_batch, cutting)
        kept = forward.checkpointed if shape.checkpointing else forward.kept
        found = collectives(held, forward.passes, self.config.model, shape)
        return Option(shape, memory(held, shape, kept), found)

    def _held(self, ep_size: int, cutting: Cutting) -> Held:
        if (ep_size, cutting) not in self._counted:
            self._counted[ep_size, cutting] = count_parameters(self._model, ep_size, cutting)
        return self._counted[ep_size, cutting]

    def forward(self, micro_batch: int, cutting: Cutting) -> Forward:
        """What a micro-batch keeps and exchanges."""
        if cutting not in self._measured:
            precision = self.config.train.precision
            few, many = (forward_of(self.config, size, precision, cutting) for size in self.MEASURED)
            self._measured[cutting] = few, many
        few, many = self._measured[cutting]
        share = (micro_batch - self.MEASURED[0]) / (self.MEASURED[1] - self.MEASURED[0])
        passes = Passes(*(round(a + (b - a) * share) for a, b in zip(few.passes, many.passes, strict=True)))
        outside, blocks, inputs, largest, logits = (
            round(a + (b - a) * share) for a, b in zip(few[:-1], many[:-1], strict=True)
        )
        return Forward(outside, blocks, inputs, largest, logits, passes)

    def plan(self, machine: Machine) -> list[Option]:
        """Shapes that fit, best first: of each ZeRO stage, offload and tensor-parallel size the best one.

        Args:
            machine: GPUs.

        Raises:
            ConfigError: no shape is valid, or none fits.
        """
        options = [self.option(shape) for shape in self.shapes(machine)]
        self._check_not_empty(options, machine)
        fitting = [option for option in options if option.memory.gpu <= machine.usable]
        if not fitting:
            least = min(options, key=lambda option: option.memory.gpu)
            raise ConfigError(
                f"{self.config.name} does not fit on {machine} of {machine.gpu_memory:g} GiB, of which "
                f"{1 - RESERVED:.0%} are for tensors: the smallest shape ({least.shape}) needs "
                f"{least.memory.gpu / GIB:.1f} GiB on each: use more GPUs, or larger ones"
            )
        best: dict[tuple[int, bool, int], Option] = {}
        for option in sorted(fitting, key=attrgetter("order")):
            shape = option.shape
            best.setdefault((shape.zero_stage, shape.offload, shape.tp_size), option)
        return list(best.values())

    def _check_not_empty(self, options: list[Option], machine: Machine) -> None:
        train = self.config.train
        if train.precision not in FILES:
            raise ConfigError(
                f"train.precision ({train.precision}) has no file in ds_configs/: plan with one of {', '.join(FILES)}"
            )
        if options:
            return
        named = [f"{'.'.join(SETTINGS[name])}={value}" for name, value in self.kept.items()]
        wanted = f" with {', '.join(named)}" if named else ""
        sizes = {name: self.kept[name] for name in ("ep_size", "tp_size") if name in self.kept}
        if not any(sizes.items() <= vars(shape).items() for shape in self._unsized(machine)):
            raise ConfigError(
                f"no run starts on {machine}{wanted}: parallel.ep_size * parallel.tp_size must divide the GPUs, and "
                "parallel.tp_size the GPUs of a node, the heads and the hidden channels: take other sizes"
            )
        raise ConfigError(
            f"train.train_batch_size ({train.train_batch_size}) cannot be split into micro-batches on {machine}"
            f"{wanted}: take a multiple, another number of GPUs{', or other settings' if named else ''}"
        )

    def shapes(self, machine: Machine) -> Iterator[Shape]:
        """Shapes of runs that would start, whether they fit or not."""
        for shape in self._unsized(machine):
            yield from self._sizes(shape)

    def _unsized(self, machine: Machine) -> Iterator[Shape]:
        """Valid shapes with a micro-batch of 1."""
        precision = self.config.train.precision
        sizes = sorted({*TENSOR_PARALLEL, self.kept.get("tp_size", 1)})
        for tp_size, split in [(size, split) for size in sizes for split in (False, True) if size > 1 or not split]:
            for ep_size in self._ep_sizes(machine, tp_size):
                for zero_stage, offload in FILES.get(precision, {}):
                    ranks = machine.gpus, machine.gpus_per_node, ep_size, tp_size
                    shape = Shape(*ranks, split, zero_stage, offload, precision=precision)
                    if self._is_valid(shape):
                        yield with_buffers(shape)

    def _ep_sizes(self, machine: Machine, tp_size: int) -> list[int]:
        """Sizes that divide both the experts and the data-parallel ranks; none if no node holds whole groups."""
        if machine.gpus_per_node % tp_size:
            return []
        model = self.config.model
        return divisors(math.gcd(model.moe.num_experts, machine.gpus // tp_size)) if model.expert_layers else [1]

    def _is_valid(self, shape: Shape) -> bool:
        """Whether a run of this shape would start."""
        config, stage = self.config, shape.zero_stage
        sizes = {"ep_size": shape.ep_size, "tp_size": shape.tp_size, "split_experts": shape.split_experts}
        clip, parallel = config.optimizer.clip_grad_norm, config.parallel.model_copy(update=sizes)
        try:
            check_topology(
                world_size=shape.gpus,
                num_experts=config.model.moe.num_experts,
                ep_size=shape.ep_size,
                zero_stage=stage,
                clip_grad_norm=clip,
                tp_size=shape.tp_size,
                overlap=parallel.overlap,
            )
            check_tensor_parallel(config.model_copy(update={"parallel": parallel}), stage, accumulates_in_fp32=False)
            check_clipping(shape.precision, stage, clip)
            check_compile(config.train.compile, stage)
        except ConfigError:
            return False
        return True

    def _sizes(self, shape: Shape) -> Iterator[Shape]:
        """The shape with every micro-batch that divides the share of a rank, kept or recomputed."""
        share, rest = divmod(self.config.train.train_batch_size, shape.data_size)
        if rest or not share:
            return
        least = max(objective.min_pairs for objective in objectives_of(self.config.model))
        for size in divisors(share):
            for checkpointing in (False, True):
                sized = replace(shape, micro_batch=size, accumulation_steps=share // size, checkpointing=checkpointing)
                if size >= least and self._has_kept(sized):
                    yield sized

    def _has_kept(self, shape: Shape) -> bool:
        """Whether a shape has the settings that the configuration names; without shards, experts are never split."""
        return all(
            getattr(shape, name) == value
            for name, value in self.kept.items()
            if name != "split_experts" or shape.tp_size > 1
        )


def kept_settings(config: Config) -> dict[str, Any]:
    """Fields of a shape that a configuration names, with their values; an `ep_size` of 0 leaves the choice."""
    found = {}
    for name, (section, field) in SETTINGS.items():
        values = getattr(config, section)
        if field in values.model_fields_set and (name, getattr(values, field)) != ("ep_size", 0):
            found[name] = getattr(values, field)
    return {name: value for name, value in found.items() if value is not None}


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
