"""Shapes of a run that fit into the memory of the GPUs, best first.

The order depends on counts alone, on no times. It prefers, in this order: no offload, no tensor parallelism,
micro-batches of some samples, no recomputation, a low ZeRO stage, expert rows that stay inside a node, few micro-steps,
and few bytes between nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from eve_ds.config import Config, ConfigError
from eve_ds.parallel.refused import check_clipping, check_cuts, check_topology
from eve_ds.planner.forward import Forward, forward_of
from eve_ds.planner.memory import Memory, memory
from eve_ds.planner.parameters import Cutting, Held, count_parameters, model_on_meta
from eve_ds.planner.shape import Shape
from eve_ds.planner.traffic import Collective, Passes, collectives
from eve_ds.reading import read_json

GIB = 2**30
RESERVED = 0.1
"""Share of a GPU's memory for the CUDA context, NCCL, cuBLAS and fragmentation: assumed, not measured on a GPU."""
FEW_SAMPLES = 8
"""Micro-batches below this size come last, since products of few rows are slow: assumed, not measured on a GPU."""
FILES = {
    "fp32": {(0, False): "zero0", (1, False): "zero1_ep2_cpu", (3, False): "zero3_cpu"},
    "bf16": {
        **{(0, False): "zero0", (1, False): "zero1_bf16", (2, False): "zero2_bf16"},
        **{(2, True): "zero2_offload", (3, False): "zero3_bf16"},
    },
}
"""Precision -> (ZeRO stage, offload) -> name of the file in `ds_configs/`."""
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)


PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = (PACKAGE if (PACKAGE / "ds_configs").is_dir() else PACKAGE.parent) / "ds_configs"
"""Files of DeepSpeed: inside the package if it was installed from a wheel, beside the package in a checkout."""


def file_of(shape: Shape) -> Path:
    """File of the DeepSpeed JSON for a shape."""
    return FOLDER / f"{FILES[shape.precision][shape.zero_stage, shape.offload]}.json"


def with_buffers(shape: Shape) -> Shape:
    """The shape with the sizes of buffers that its file sets."""
    zero = read_json(file_of(shape))["zero_optimization"]
    return replace(
        shape,
        reduce_bucket=int(zero.get("reduce_bucket_size", shape.reduce_bucket)),
        max_live_parameters=int(zero.get("stage3_max_live_parameters", shape.max_live_parameters)),
    )


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


class Option(NamedTuple):
    """A shape with its bytes per rank and step."""

    shape: Shape
    memory: Memory
    collectives: list[Collective]

    @property
    def sent_between_nodes(self) -> int:
        """Bytes that a rank sends in groups with ranks of several nodes."""
        return sum(one.sent for one in self.collectives if one.spans_nodes)

    @property
    def sent_inside_node(self) -> int:
        """Bytes that a rank sends in groups inside its node."""
        return sum(one.sent for one in self.collectives if not one.spans_nodes)

    @property
    def file(self) -> str:
        """File of the DeepSpeed JSON."""
        shape = self.shape
        return f"ds_configs/{file_of(shape).name}"

    @property
    def settings(self) -> list[str]:
        """Settings of the YAML, as `--set` takes them."""
        shape = self.shape
        found = [f"parallel.ep_size={shape.ep_size}", f"train.micro_batch_size={shape.micro_batch}"]
        if shape.tp_size > 1:
            found += [f"parallel.tp_size={shape.tp_size}", *["parallel.split_experts=true"] * shape.split_experts]
        if shape.checkpointing:
            found.append("train.activation_checkpointing=true")
        return found

    @property
    def rank(self) -> tuple[float, ...]:
        """Sort key, lowest first; see the description of this module."""
        shape = self.shape
        exchange = shape.spans_nodes(shape.ep_size, shape.tp_size)
        few = min(shape.micro_batch, FEW_SAMPLES)
        return (
            *(shape.offload, shape.tp_size, -few, shape.checkpointing, shape.zero_stage, exchange),
            *(shape.accumulation_steps, self.sent_between_nodes, self.sent_inside_node, self.memory.gpu),
        )


class Planner:
    """Counts the bytes of shapes of one configuration; the model is measured once per tensor-parallel size.

    What a micro-batch keeps and exchanges grows by the same number of bytes with every sample, so two sizes are
    measured and the others follow.

    Args:
        config: model, masks, batch size, precision and clipping.
    """

    MEASURED = (8, 16)
    """Numbers of samples that are measured."""

    def __init__(self, config: Config) -> None:
        self.config = config
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

    def plan(self, machine: Machine, micro_batch: int | None = None) -> list[Option]:
        """Shapes that fit, best first: of each ZeRO stage, offload and tensor-parallel size the best one.

        Args:
            machine: GPUs.
            micro_batch: samples of a micro-batch; None: as many as fit.

        Raises:
            ConfigError: no shape is valid, or none fits.
        """
        precision = self.config.train.precision
        if precision not in FILES:
            raise ConfigError(
                f"train.precision ({precision}) has no file in ds_configs/: plan with one of {', '.join(FILES)}"
            )
        tried = [list(self._sizes(shape, micro_batch)) for shape in self._shapes(machine)]
        options = [option for sizes in tried for option in sizes]
        if not options:
            batch, wanted = self.config.train.train_batch_size, "" if micro_batch is None else f" of {micro_batch}"
            raise ConfigError(
                f"train.train_batch_size ({batch}) cannot be split into micro-batches{wanted} on {machine.gpus} GPUs: "
                "take a multiple, or another number of GPUs"
            )
        best: dict[tuple[int, bool, int], Option] = {}
        for option in sorted((option for option in options if option.memory.gpu <= machine.usable), key=_rank):
            shape = option.shape
            best.setdefault((shape.zero_stage, shape.offload, shape.tp_size), option)
        if not best:
            least = min(options, key=lambda option: option.memory.gpu)
            gpus = "1 GPU" if machine.gpus == 1 else f"{machine.gpus} GPUs"
            raise ConfigError(
                f"{self.config.name} does not fit on {gpus} of {machine.gpu_memory:g} GiB, of which "
                f"{1 - RESERVED:.0%} are for tensors: the smallest shape ({describe(least.shape)}) needs "
                f"{least.memory.gpu / GIB:.1f} GiB on each: use more GPUs, or larger ones"
            )
        return list(best.values())

    def _shapes(self, machine: Machine) -> Iterator[Shape]:
        """Valid shapes with a micro-batch of 1."""
        model, precision = self.config.model, self.config.train.precision
        for tp_size in TENSOR_PARALLEL_SIZES:
            if machine.gpus_per_node % tp_size:
                continue
            replicas = machine.gpus // tp_size
            common = math.gcd(model.moe.num_experts, replicas) if model.expert_layers else 1
            for ep_size in divisors(common):
                for zero_stage, offload in FILES.get(precision, {}):
                    shape = Shape(
                        machine.gpus,
                        machine.gpus_per_node,
                        ep_size,
                        tp_size,
                        self.config.parallel.split_experts,
                        zero_stage,
                        offload,
                        precision=precision,
                    )
                    if self._is_valid(shape):
                        yield with_buffers(shape)

    def _is_valid(self, shape: Shape) -> bool:
        clip = self.config.optimizer.clip_grad_norm
        try:
            check_topology(
                world_size=shape.gpus,
                num_experts=self.config.model.moe.num_experts,
                ep_size=shape.ep_size,
                zero_stage=shape.zero_stage,
                clip_grad_norm=clip,
                tp_size=shape.tp_size,
            )
            check_cuts(self.config, shape.tp_size)
            check_clipping(shape.precision, shape.zero_stage, clip)
        except ConfigError:
            return False
        return True

    def _sizes(self, shape: Shape, micro_batch: int | None) -> Iterator[Option]:
        """The shape with every micro-batch that divides the share of a rank, kept or recomputed."""
        share, rest = divmod(self.config.train.train_batch_size, shape.data_size)
        if rest or not share:
            return
        for size in divisors(share):
            if micro_batch in (None, size):
                for checkpointing in (False, True):
                    yield self.option(
                        replace(shape, micro_batch=size, accumulation_steps=share // size, checkpointing=checkpointing)
                    )


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _rank(option: Option) -> tuple[float, ...]:
    return option.rank


def describe(shape: Shape) -> str:
    """Name of a shape, such as `ZeRO 1, ep 8`."""
    parts = [f"ZeRO {shape.zero_stage}", f"ep {shape.ep_size}"]
    parts += [f"tp {shape.tp_size}"] * (shape.tp_size > 1) + ["offload"] * shape.offload
    return ", ".join([*parts, *["recompute"] * shape.checkpointing])


def why(option: Option) -> str:
    """One line about what the first shape of a plan does without, and why it has its ep_size."""
    shape = option.shape
    avoided = [
        *["offload"] * (not shape.offload),
        *["tensor parallelism"] * (shape.tp_size == 1),
        *["recomputation"] * (not shape.checkpointing),
    ]
    without = f"without {', '.join(avoided)}" if avoided else "only so"
    if shape.ep_size == 1:
        experts = "every GPU holds all experts"
    else:
        place = "cross nodes" if shape.spans_nodes(shape.ep_size, shape.tp_size) else "stay inside a node"
        experts = f"expert rows of {shape.ep_size} GPUs {place}"
    return f"fits {without} at the lowest ZeRO stage; {experts}, with the fewest bytes between nodes"
