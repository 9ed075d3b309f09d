"""Process groups of megatron-core, under the names that DeepSpeed asks a model-parallel unit for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from megatron.core import parallel_state


class ModelParallelUnit:
    """Megatron's `parallel_state`, whose tensor-parallel group is the model-parallel group: there is no pipeline."""

    def __getattr__(self, name: str) -> Any:
        """Return the function of `parallel_state`; DeepSpeed leaves the word "tensor" out of three names."""
        return getattr(parallel_state, name.replace("get_model_parallel", "get_tensor_model_parallel"))


def create_groups(tp_size: int, timeout: timedelta) -> ModelParallelUnit:
    """Create the groups of ranks as :class:`eve_ds.topology.Topology` numbers them; collective.

    Args:
        tp_size: number of ranks of a group.
        timeout: longest wait in a collective.
    """
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tp_size,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        create_gloo_process_groups=False,
    )
    return ModelParallelUnit()
