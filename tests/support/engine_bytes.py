"""Bytes of the tensors that a DeepSpeed engine holds, by walking its objects, and the same by term."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

WALKED = {"deepspeed", "eve_ds", "torch"}
"""Packages whose objects are walked."""


def engine_bytes(engine: Any) -> dict[str, int]:
    """Return the bytes of storages by term: `weights`, `masters`, `moments`, and `gradients`, which are all others.

    Integers are left out, such as those of a batch, and tensors on the meta device.
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    weights = _storages(_weights(engine.module))
    moments = _storages(
        state[kind] for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq") if kind in state
    )
    masters = _storages(optimizer.state)
    everything = _storages(_tensors(engine))
    terms = {"weights": weights, "moments": moments, "masters": masters, "gradients": everything}
    found, counted = {}, set()
    for name, sizes in terms.items():
        found[name] = sum(size for address, size in sizes.items() if address not in counted)
        counted |= sizes.keys()
    return found


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, or the partitions that ZeRO 3 leaves of them."""
    for parameter in module.parameters():
        partition = getattr(parameter, "ds_tensor", None)
        yield parameter.data if partition is None else partition.data


def _storages(tensors: Any) -> dict[int, int]:
    """Address -> bytes of the storages of tensors."""
    return {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.is_floating_point() and not tensor.is_meta
    }


def _tensors(root: Any) -> Iterator[Tensor]:
    """Tensors that can be reached from an object, gradients included."""
    waiting, seen = [root], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
            waiting += [getattr(item, name, None) for name in ("ds_tensor", "_hp_mapping")]
            waiting.append(item.grad if item.is_leaf else None)
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        elif hasattr(item, "__dict__") and not isinstance(item, type) and type(item).__module__.split(".")[0] in WALKED:
            waiting += vars(item).values()
