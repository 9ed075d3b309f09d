"""Shape of a run: number of GPUs, how they share experts, tensors and optimizer states, and the micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eve_ds.topology import Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`train.precision` -> data type of weights, activations and gradients."""


@dataclass(frozen=True)
class Shape:
    """One way to run a model on a number of GPUs."""

    gpus: int
    gpus_per_node: int = 8
    ep_size: int = 1
    """Number of ranks that share one full set of experts."""
    tp_size: int = 1
    """Number of ranks that share one full set of tensors."""
    split_experts: bool = False
    """Whether tensor-parallel ranks share each expert."""
    zero_stage: int = 1
    offload: bool = False
    """Whether optimizer states and their update are in host memory (ZeRO 2)."""
    micro_batch: int = 1
    """Samples of one forward pass of one data-parallel rank."""
    accumulation_steps: int = 1
    """Forward passes of one optimizer step."""
    checkpointing: bool = False
    """Whether blocks are computed again in the backward pass (`train.activation_checkpointing`)."""
    precision: str = "bf16"
    reduce_bucket: int = 500_000_000
    """`reduce_bucket_size` in elements, at most the elements that a rank holds; default of DeepSpeed."""
    overlap_comm: bool = False
    """Whether ZeRO 2 fills a second bucket while it sends the first."""
    max_live_parameters: int = 1_000_000_000
    """`stage3_max_live_parameters`: elements that ZeRO 3 keeps gathered; default of DeepSpeed."""

    def __str__(self) -> str:
        """Short name, such as `ZeRO 1, ep 8`."""
        parts = [f"ZeRO {self.zero_stage}", f"ep {self.ep_size}", *[f"tp {self.tp_size}"] * (self.tp_size > 1)]
        marks = {"split experts": self.split_experts, "offload": self.offload, "recompute": self.checkpointing}
        return ", ".join([*parts, *(mark for mark, holds in marks.items() if holds)])

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return DTYPES[self.precision].itemsize

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks, over which dense parameters are replicated or partitioned."""
        return Topology(world_size=self.gpus, ep_size=self.ep_size, tp_size=self.tp_size).data_size

    @property
    def expert_replicas(self) -> int:
        """Number of ranks over which an expert is replicated or partitioned."""
        return Topology(world_size=self.gpus, ep_size=self.ep_size, tp_size=self.tp_size).num_expert_replicas

    @property
    def samples(self) -> int:
        """Samples of one optimizer step."""
        return self.micro_batch * self.accumulation_steps * self.data_size

    @property
    def settings(self) -> list[str]:
        """Settings of the YAML, as `--set` takes them."""
        found = [f"parallel.ep_size={self.ep_size}", f"train.micro_batch_size={self.micro_batch}"]
        if self.tp_size > 1:
            found += [f"parallel.tp_size={self.tp_size}", *["parallel.split_experts=true"] * self.split_experts]
        if self.checkpointing:
            found.append("train.activation_checkpointing=true")
        return found

    def spans_nodes(self, size: int, stride: int) -> bool:
        """Whether some group of `size` ranks, `stride` apart, has ranks of several nodes.

        `size * stride` consecutive ranks make `stride` such groups; on a node that is no multiple of them, one group is
        cut by the end of the node.
        """
        return size > 1 and self.gpus > self.gpus_per_node and self.gpus_per_node % (size * stride) != 0
