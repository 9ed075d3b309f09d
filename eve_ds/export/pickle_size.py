"""Size of the tuples in a pickle, counted without loading it: a few bytes can describe one that takes years to hash."""

from __future__ import annotations

import pickletools
from typing import IO

from eve_ds import limits

_MARK = pickletools.markobject
_TUPLES = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}


def check_pickle(file: IO[bytes]) -> None:
    """Follow one pickle from the position of the file to its end, and measure every tuple in it.

    A key of a dictionary is hashed, and the hash of a tuple visits each part of it, however often they are shared. A
    tuple of two references to such a tuple, and so on, doubles the work with every level.

    Raises:
        ValueError: a tuple has more than `limits.TUPLE_ITEMS` parts, or the pickle is damaged.
    """
    stack: list[int | None] = []  # number of parts of each object; None for a mark
    memo: dict[int, int | None] = {}
    try:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name in _PUTS:
                memo[len(memo) if argument is None else int(argument)] = stack[-1]
                continue
            if operation.name in _GETS:
                stack.append(memo[int(argument or 0)])
                continue
            parts = _pop(stack, operation.stack_before)
            size = 1 + sum(parts) if operation.name in _TUPLES else 1
            if size > limits.TUPLE_ITEMS:
                raise ValueError(f"a tuple of more than {limits.TUPLE_ITEMS:,} items")
            stack += [None if kind is _MARK else size for kind in operation.stack_after]
    except (LookupError, TypeError) as error:
        raise ValueError(f"a damaged pickle, {type(error).__name__}") from None


def _pop(stack: list[int | None], kinds: list[pickletools.StackObject]) -> list[int]:
    """Remove the operands of an operation; return the sizes of those above the mark, or of all without one."""
    above: list[int] = []
    if _MARK in kinds:
        while (size := stack.pop()) is not None:
            above.append(size)
        kinds = kinds[: kinds.index(_MARK)]
    below = [stack.pop() or 0 for _ in kinds]
    return above + below
