"""Section `parallel`: sharing of the experts among ranks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eve_ds.config.section import Section


class ParallelConfig(Section):
    """Expert parallelism."""

    ep_size: Annotated[int, Field(ge=0)] = 1
    """Number of ranks that share one full set of experts; must divide `model.moe.num_experts`. 0: the largest number
    that divides both the ranks and the experts."""
