"""Sums of bf16 gradients in fp32 at ZeRO 0, which DeepSpeed refuses there."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor


def sum_in_fp32(engine: DeepSpeedEngine) -> None:
    """Let autograd add the gradients of a ZeRO 0 engine in fp32, and send them as they are.

    Args:
        engine: new engine of a bf16 model with `communication_data_type` fp32.
    """
    engine.optimizer.__class__ = Fp32SumsOptimizer
    for parameter in engine.module.parameters():
        parameter.grad_dtype = torch.float32


class Fp32SumsOptimizer(FP16_UnfusedOptimizer):
    """DeepSpeed's optimizer of bf16 models at ZeRO 0, with gradients in fp32."""

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Return the gradients to average over all ranks, and by group those to average over ranks with one expert.

        The engine asks for them before its update. A missing gradient counts as 0, so that all ranks send the same.
        """
        dense: list[Tensor] = []
        experts: dict[str, list[Tensor]] = {}
        for parameter in (parameter for group in self.fp16_groups for parameter in group):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
            of_kind = experts.setdefault(parameter.group_name, []) if is_moe_param(parameter) else dense
            of_kind.append(parameter.grad)
        return dense, experts
