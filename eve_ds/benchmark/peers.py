"""Other implementations of the same work: stock DeepSpeed MoE and megatron-core."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eve_ds.model.feed_forward import FeedForward
from eve_ds.model.moe import MoE, MoEOutput, Peers, RouterStatistics


def find(name: str) -> ModuleType | None:
    """Import a module; None if it is not installed or cannot be loaded."""
    try:
        return importlib.import_module(name)
    except Exception:  # a package can fail in any way if its device is missing
        return None


def join_group_of_one() -> None:
    """Create a process group of one process, which DeepSpeed's layers require."""
    import deepspeed

    if not dist.is_initialized():
        store = tempfile.NamedTemporaryFile(prefix="eve_ds_store_", delete=False).name  # noqa: SIM115, must outlive this call
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # skips a minute of compilation; not used here
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


class StockRouting:
    """Gate, dispatch and combine of DeepSpeed's MOELayer (`deepspeed/moe/sharded_moe.py`) as separate steps."""

    def __init__(self, capacity_factor: float) -> None:
        from deepspeed.moe import sharded_moe

        self.sharded_moe = sharded_moe
        self.capacity_factor = capacity_factor

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Route (T, E) logits; return load-balancing loss, slots, gates and capacity."""
        balance, capacity, experts, indices, locations, gates, _ = self.sharded_moe.top2gating(
            logits, self.capacity_factor, 4, True, None, False, True
        )
        capacity = int(capacity)
        return balance, self.sharded_moe._route_slots(indices, locations, experts, capacity), gates, capacity

    def dispatch(self, x: Tensor, slots: Tensor, experts: int, capacity: int) -> Tensor:
        """Copy tokens (T, D) to the slots of experts (E, C, D)."""
        return self.sharded_moe._sparse_encode(x, slots, experts, capacity)

    def combine(self, rows: Tensor, slots: Tensor, gates: Tensor, tokens: int) -> Tensor:
        """Combine the rows of slots (E * C, D) to tokens (T, D)."""
        return self.sharded_moe._sparse_decode(rows, slots, gates, tokens)


class StockMoE(nn.Module):
    """DeepSpeed's MOELayer with the weights of one of our layers, used as in the released code of EVE.

    Input of gate and experts is the token plus its modality embedding; padding is routed; experts have fixed capacity.
    """

    is_compilable = False

    def __init__(self, moe: MoE, capacity_factor: float) -> None:
        super().__init__()
        from deepspeed.moe.experts import Experts
        from deepspeed.moe.sharded_moe import MOELayer, TopKGate

        join_group_of_one()
        num_experts, width = moe.router.weight.shape
        gate = TopKGate(width, num_experts, 2, capacity_factor, capacity_factor, top2_2nd_expert_sampling=False)
        gate.wg.weight = moe.router.weight
        experts = Experts(nn.Identity(), num_experts)
        _, intermediate, _ = moe.experts.fc1_weight.shape
        networks = nn.ModuleList(FeedForward(width, intermediate) for _ in range(num_experts))
        networks.load_state_dict(moe.experts.state_dict())
        experts.deepspeed_experts = networks.to(moe.experts.fc1_weight)
        assert moe.router.modality_embedding is not None
        self.modality_embedding = moe.router.modality_embedding
        self.layer = MOELayer(gate, experts, "ep_size_1", 1, num_experts)

    def mix(
        self,
        hidden_states: Tensor,
        modality_ids: Tensor,
        attention_mask: Tensor | None = None,
        view_sizes: Sequence[int] | None = None,
        peers: Peers | None = None,
    ) -> tuple[Tensor, ...]:
        """Counterpart of :meth:`eve_ds.model.moe.MoE.mix` for one view; :meth:`outputs` takes the results."""
        return self.layer(hidden_states + self.modality_embedding[modality_ids], None), self.layer.l_aux

    def outputs(self, mixed: Sequence[Sequence[Tensor]]) -> list[MoEOutput]:
        """Return outputs with zeros for router statistics and z-loss, which this layer lacks."""
        nothing = mixed[0][0].new_zeros((), dtype=torch.float32)
        statistics = RouterStatistics(nothing, nothing, nothing, nothing)
        return [MoEOutput(hidden_states, balance, nothing, statistics) for hidden_states, balance in mixed]

    def forward(self, hidden_states: Tensor, modality_ids: Tensor) -> MoEOutput:
        """Counterpart of :meth:`eve_ds.model.moe.MoE.forward` for a single view."""
        return self.outputs([self.mix(hidden_states, modality_ids)])[0]


def stock_engine(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """Return the engine of `deepspeed.initialize`, with DeepSpeed's own ZeRO optimizer."""
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def megatron_permutation() -> ModuleType | None:
    """Return the module with megatron-core's permute and unpermute of packed rows; None if it cannot be loaded."""
    return find("megatron.core.transformer.moe.moe_utils")
