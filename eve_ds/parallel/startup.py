"""Join the process group of the run, create its tensor-parallel groups, and hand both to DeepSpeed."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

import deepspeed
import torch.distributed as dist
from deepspeed.utils import groups

from eve_ds.launch_environment import RankInfo, read_environment
from eve_ds.process_group import DEFAULT_TIMEOUT, initialize_process_group, set_group_timeout
from eve_ds.topology import Topology

if TYPE_CHECKING:
    from eve_ds.parallel.tensor.mpu import ModelParallelUnit


def initialize_deepspeed_distributed(timeout: timedelta = DEFAULT_TIMEOUT) -> RankInfo:
    """Join the process group unless this process already has, and make DeepSpeed use it.

    On CPU, DeepSpeed would otherwise compile `shm_comm` first. That takes most of a minute and serves inference only,
    so this function marks `shm_comm` as not available. DeepSpeed's MPI discovery stays off, because
    :mod:`eve_ds.launch_environment` has already read the launcher's variables.

    Args:
        timeout: longest wait in a collective, including those of DeepSpeed's own groups.

    Raises:
        LaunchError: see :func:`eve_ds.process_group.initialize_process_group`.
    """
    # DeepSpeed's ZeRO 3 calls two collectives by their former names, which no user can change.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    if dist.is_initialized():
        set_group_timeout(timeout)
        info = read_environment(os.environ)
    else:
        info = initialize_process_group(timeout=timeout)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, timeout=timeout
    )
    return info


def tensor_parallel_unit(topology: Topology, timeout: timedelta = DEFAULT_TIMEOUT) -> ModelParallelUnit | None:
    """Groups of tensor-parallel ranks, as `deepspeed.initialize` takes them; None if `tp_size` is 1; collective.

    DeepSpeed keeps the unit of an earlier engine of this process, and expert groups that do not know another `tp_size`.
    This function makes it forget both. With tensor parallelism it also creates the expert groups: left to itself,
    DeepSpeed makes them of consecutive ranks, which then hold equal data.

    Args:
        topology: sizes of the groups.
        timeout: longest wait in a collective of the tensor-parallel groups.
    """
    before = 1 if groups.mpu is None else groups.mpu.get_model_parallel_world_size()
    groups.mpu = None
    if before != topology.tp_size:
        for known in (
            *(groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS),
            *(groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS),
        ):
            known.clear()
    if topology.tp_size == 1:
        return None
    from eve_ds.parallel.tensor.mpu import create_groups  # imports megatron-core, which takes seconds

    groups.mpu = create_groups(topology.tp_size, timeout)
    groups._create_expert_data_and_model_parallel(topology.ep_size, groups.mpu)
    return groups.mpu
