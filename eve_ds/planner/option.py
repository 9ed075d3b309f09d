"""One shape of a run with its bytes, its place in the order of shapes, and the settings that make it."""

from __future__ import annotations

from typing import NamedTuple

from eve_ds.planner.files import file_of
from eve_ds.planner.memory import Memory
from eve_ds.planner.shape import Shape
from eve_ds.planner.traffic import Collective

FEW_SAMPLES = 8
"""Micro-batches below this size come last, since products of few rows are slow: assumed, not measured on a GPU."""


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
        return f"ds_configs/{file_of(self.shape).name}"

    @property
    def order(self) -> tuple[float, ...]:
        """Sort key, lowest first; see :mod:`eve_ds.planner.plan`."""
        shape = self.shape
        exchange = shape.spans_nodes(shape.ep_size, shape.tp_size)
        few = min(shape.micro_batch, FEW_SAMPLES)
        return (
            *(shape.offload, shape.tp_size, -few, shape.checkpointing, shape.zero_stage, exchange),
            *(shape.accumulation_steps, self.sent_between_nodes, self.sent_inside_node, self.memory.gpu),
        )

    @property
    def reason(self) -> str:
        """One line about what the first shape of a plan does without, and why it has its ep_size."""
        shape = self.shape
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
        return f"fits {without} at the lowest ZeRO stage; {experts}, and no such shape sends fewer bytes between nodes"
