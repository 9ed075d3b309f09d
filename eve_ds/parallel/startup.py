"""Join the process group of the run and hand it to DeepSpeed."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import deepspeed
import torch.distributed as dist

from eve_ds.launch_environment import RankInfo, read_environment
from eve_ds.process_group import DEFAULT_TIMEOUT, initialize_process_group, set_group_timeout


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
