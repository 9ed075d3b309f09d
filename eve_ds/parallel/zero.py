"""DeepSpeed's optimizers of ZeRO 1 and 2 with the same results and far fewer host calls per step.

DeepSpeed handles gradients one tensor at a time: bucketing, averaging, checking, norm, flattening, and views of the new
weights take about 35 calls per tensor and step. With hundreds of tensors, these calls keep the host busy for longer
than the model keeps the accelerator busy. The overrides below follow `deepspeed/runtime/zero/stage_1_and_2.py` of
version `FOLLOWED`, with these differences:

- ZeRO 1 copies all gradients into flat buffers with the layout of the flat weights. The partition that this rank
  updates is a slice of these buffers. Sums over ranks add the same numbers, so a result can differ only for more than
  two ranks, and only in the last bit.
- ZeRO 1 sums gradients over micro-steps in fp32 in these buffers if `data_types.grad_accum_dtype` says so. DeepSpeed
  would take another optimizer for that, whose tensors our checkpoints do not know.
- The norm alone detects gradients that are not finite, because sums over ranks spread such values to all ranks.
- Weights that already are views of the flat weights are not set again.
"""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor, nn

from eve_ds.log import get_logger
from eve_ds.parallel.deepspeed_json.keys import FOLLOWED


def lower_host_calls(engine: DeepSpeedEngine, sum_dtype: torch.dtype | None = None) -> bool:
    """Replace methods of the engine's ZeRO optimizer; return whether they were replaced.

    Nothing is replaced at ZeRO 0 and 3, with offload to the CPU, with a model-parallel group, with an optimizer other
    than AdamW, or with a DeepSpeed version other than `FOLLOWED`. The last case is logged.

    Args:
        engine: new engine.
        sum_dtype: data type in which ZeRO 1 sums gradients over micro-steps and ranks; None: that of the weights.
    """
    optimizer = engine.optimizer
    if type(optimizer) is not DeepSpeedZeroOptimizer or not _is_supported(optimizer):
        return False
    if deepspeed.__version__.partition("+")[0] != FOLLOWED:
        get_logger().warning(
            "DeepSpeed %s is not %s, the version that our faster optimizer methods follow: using DeepSpeed's methods",
            deepspeed.__version__,
            FOLLOWED,
        )
        return False
    optimizer.__class__ = FewerCallsOptimizer
    reduces_after = _reduces_after_backward(optimizer)
    optimizer.flat_gradients = FlatGradients(optimizer, sum_dtype or optimizer.dtype) if reduces_after else None
    if optimizer.flat_gradients is not None:
        for hook in optimizer._grad_acc_hooks:  # these hooks would fill DeepSpeed's own buckets
            hook.remove()
    return True


def _is_supported(optimizer: DeepSpeedZeroOptimizer) -> bool:
    """Whether norms cover all gradients of a rank's partition, and the update uses exactly these gradients."""
    return (
        isinstance(optimizer.optimizer, torch.optim.AdamW)
        and optimizer.compute_grad_norm
        and optimizer.model_parallel_world_size == 1
        and not (optimizer.cpu_offload or optimizer.zenflow or optimizer.torch_autocast_gradscaler)
    )


def _reduces_after_backward(optimizer: DeepSpeedZeroOptimizer) -> bool:
    """Whether gradients are averaged once, after the last backward, in their own precision; this is ZeRO 1."""
    dtypes = {optimizer.gradient_accumulation_dtype, optimizer.communication_data_type, *optimizer.ipg_buckets}
    return (
        not (optimizer.partition_gradients or optimizer.overlap_comm)
        and optimizer.contiguous_gradients
        and optimizer.reduce_scatter
        and optimizer.use_multi_rank_bucket_allreduce
        and dtypes == {optimizer.dtype}
        and optimizer.sequence_parallel_size == 1
        and optimizer.autoep_folding_tp_group is None
    )


class FlatGradients:
    """Gradients of all parameters that a rank computes, in one buffer per process group that averages them.

    Each buffer has the size of the weights it serves and lives across steps. It replaces DeepSpeed's bucket of
    `reduce_bucket_size` elements and its copy of this rank's gradients.

    Args:
        optimizer: ZeRO 1 optimizer.
        dtype: data type of the buffers. If it is not that of the weights, micro-steps are summed in the buffers.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, dtype: torch.dtype) -> None:
        self.sums_micro_steps = dtype != optimizer.dtype
        self.is_empty = True
        """Whether the buffers hold nothing of the step that is being computed."""
        self.parameters: list[nn.Parameter] = []
        self.views: list[Tensor] = []
        """Destination of each parameter's gradient, in the shape of the parameter."""
        self.buffers: list[tuple[Tensor, Any]] = []
        """Each buffer with its process group."""
        self.partitions: dict[int, GradPartitionBufferGroup] = {}
        """Index of a parameter group -> the slice that this rank updates, in DeepSpeed's type for such slices."""
        groups = optimizer.real_dp_process_group
        for process_group in dict.fromkeys(groups):
            members = [number for number, group in enumerate(groups) if group is process_group]
            sizes = [optimizer.bit16_groups_flat[number].numel() for number in members]
            buffer = optimizer.bit16_groups_flat[members[0]].new_zeros(sum(sizes), dtype=dtype)
            self.buffers.append((buffer, process_group))
            for number, flat in zip(members, buffer.split(sizes), strict=True):
                self._add(optimizer, number, flat)

    def _add(self, optimizer: DeepSpeedZeroOptimizer, number: int, flat: Tensor) -> None:
        """Register a parameter group; its gradients lie in `flat` as its weights lie in DeepSpeed's flat weights."""
        parameters = optimizer.round_robin_bit16_groups[number]
        for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[number], strict=True):
            self.parameters.append(parameter)
            self.views.append(flat.narrow(0, offset, parameter.numel()).view(parameter.shape))
        partition = optimizer._build_compact_grad_partition_buffer(number)
        size = partition.flat_partition.numel()
        partition.flat_partition = flat.narrow(0, dist.get_rank(optimizer.real_dp_process_group[number]) * size, size)
        partition.move_flat_partition(flat.device)  # recreates its views
        self.partitions[number] = partition

    def add(self) -> None:
        """Add the gradients of all parameters to the step's sums; a missing gradient counts as 0."""
        pairs = zip(self.views, (parameter.grad for parameter in self.parameters), strict=True)
        found = [(view, gradient) for view, gradient in pairs if gradient is not None]
        if self.is_empty and len(found) < len(self.views):
            for buffer, _ in self.buffers:
                buffer.zero_()
        if found:
            combine = torch._foreach_copy_ if self.is_empty else torch._foreach_add_
            combine([view for view, _ in found], [gradient for _, gradient in found])
        self.is_empty = False

    def average(self, num_ranks: int) -> None:
        """Sum over the ranks of each process group, divided by the number of all data-parallel ranks."""
        self.is_empty = True  # the next step starts anew
        for buffer, process_group in self.buffers:
            if num_ranks > 1:
                buffer.div_(num_ranks)
            if dist.get_world_size(process_group) > 1:
                dist.all_reduce(buffer, group=process_group)


class FewerCallsOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's ZeRO 1 or 2 optimizer, with a number of host calls that does not grow with the parameters.

    :func:`lower_host_calls` converts an optimizer of DeepSpeed to this class. At ZeRO 2, DeepSpeed still reduces the
    gradients during the backward; norm, check and update are ours.
    """

    flat_gradients: FlatGradients | None
    """None if DeepSpeed reduces the gradients."""
    _scale: tuple[Tensor | None, Tensor | float] = (None, 1.0)
    """A norm, and the factor by which that norm scales the gradients."""

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Average gradients over ranks after the last backward of a step, and keep the part that this rank updates."""
        if self.flat_gradients is None:
            super().reduce_gradients(pipeline_parallel)
            return
        self.flat_gradients.add()
        self.flat_gradients.average(dist.get_world_size(self.dp_process_group) if self.gradient_average else 1)
        self.averaged_gradients.update(self.flat_gradients.partitions)
        self._clear_param_grad_only()
        self._epilogue_ran_this_backward = True

    @torch.no_grad()
    def backward_epilogue(self, *arguments: Any, **options: Any) -> None:
        """After each backward: move the gradients of a micro-step into the sums, if these are of their own type."""
        super().backward_epilogue(*arguments, **options)
        flat = self.flat_gradients
        if flat is not None and flat.sums_micro_steps and not self.is_gradient_accumulation_boundary():
            flat.add()
            self._clear_param_grad_only()

    def should_refresh_expected_hook_count(self) -> bool:
        """Whether to count the parameters in the graph: no if autograd signals the end of the backward."""
        return not self.queue_post_backward_callback() and super().should_refresh_expected_hook_count()

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Report no overflow; the norm detects it, and :meth:`step` then sets `overflow`."""
        self.overflow = False

    @torch.no_grad()
    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """() fp32 norm of all gradients of all ranks, times the loss scale; inf if any gradient is not finite."""
        groups = [self._pieces(number) for number in range(len(self.bit16_groups))]
        pieces = [piece for group in groups for piece in group]
        squares = torch.stack(torch._foreach_norm(pieces, 2, dtype=get_norm_dtype())).square()
        sums = torch.stack([own.sum() for own in squares.split([len(group) for group in groups])]).float()
        if dist.get_world_size(self.dp_process_group) > 1:
            dist.all_reduce(sums, group=self.dp_process_group)
        return torch.linalg.vector_norm(sums.sqrt()).nan_to_num(nan=math.inf, posinf=math.inf)

    def _pieces(self, number: int) -> list[Tensor]:
        """Averaged gradients of a parameter group: one tensor if they lie in one tensor."""
        flat = self._get_preflattened_grad_partition(number)
        return self.averaged_gradients[number] if flat is None else [flat]

    def unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: Tensor) -> None:
        """Multiply gradients in place by the factor that removes the loss scale and clips them.

        Args:
            grad_groups_flat: gradients of this rank's partition of a parameter group.
            total_norm: () finite norm over all groups. :meth:`step` passes the same tensor for every group, so the
                factor is computed once and the host does not wait for it.
        """
        if self.clip_grad == 0.0 and self.loss_scale == 1.0:
            return
        if self._scale[0] is not total_norm:
            scale = self.loss_scale
            if self.clip_grad > 0:
                scale = ((total_norm / self.loss_scale + 1e-6) / self.clip_grad).clamp(min=1.0) * self.loss_scale
            self._scale = total_norm, 1.0 / scale
        for gradient in grad_groups_flat:
            gradient.mul_(self._scale[1])

    def _update_model_bit16_weights(self, group_index: int) -> None:
        """Make the weights of a group views of its flat weights, unless they already are."""
        flat = self.bit16_groups_flat[group_index]
        start, size = flat.data_ptr(), flat.element_size()
        places = zip(
            self.round_robin_bit16_groups[group_index], self.round_robin_bit16_offsets[group_index], strict=True
        )
        if any(parameter.data_ptr() != start + offset * size for parameter, offset in places):
            super()._update_model_bit16_weights(group_index)
