"""Dtypes of the ops under `torch.autocast`: two rules, which the compiled ops and the reference share.

Autocast knows torch's own functions only, and would act on some steps inside an op and not on others. An op therefore
runs with autocast off, on inputs that its rule has prepared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def keeps_dtypes(op: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate an op that autocast leaves alone: it widens what needs fp32 itself, and copies keep their dtype."""

    @functools.wraps(op)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        device_type = _autocast_device(args)
        if device_type is None:
            return op(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return op(*args, **kwargs)

    return run


def like_linear(op: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate an op made of matrix products: autocast casts its floating tensors, as it does for `F.linear`.

    Tensors in fp64 stay as they are. Only positional tensors are cast.
    """

    @functools.wraps(op)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        device_type = _autocast_device(args)
        if device_type is None:
            return op(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return op(*[_cast(value, dtype) for value in args], **kwargs)  # type: ignore[arg-type]

    return run


def _autocast_device(args: tuple[object, ...]) -> str | None:
    """Type of the device of the first tensor if autocast is on there, otherwise None."""
    for value in args:
        if isinstance(value, Tensor):
            device_type = value.device.type
            available = torch.amp.is_autocast_available(device_type)
            return device_type if available and torch.is_autocast_enabled(device_type) else None
    return None


def _cast(value: object, dtype: torch.dtype) -> object:
    is_cast = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_cast else value  # type: ignore[attr-defined]
