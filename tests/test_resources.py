"""Errors of lacking memory, files and processes are one line that says what to do; most of them are provoked here."""

import errno
import os
import resource
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from eve_ds.cli.command import BAD_INPUT, ending
from eve_ds.resources import lack


class EndingWorker(IterableDataset):
    """Data whose worker process is killed, as by a system that is short of memory."""

    def __iter__(self):
        os.kill(os.getpid(), signal.SIGKILL)
        yield 0


def open_many():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        for _ in range(256):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in opened:
            os.close(number)


def raised(error):
    raise error


CASES = {
    "tensor": (lambda: torch.empty(10**14), "out of memory (", "train.micro_batch_size"),
    "array": (lambda: np.empty(10**15), "out of memory (Unable to allocate", "train.activation_checkpointing"),
    "bytes": (lambda: bytearray(10**16), "out of memory: ", "smaller model"),
    "fork": (lambda: raised(OSError(errno.ENOMEM, "Cannot allocate memory")), "out of memory (", "more devices"),
    "GPU": (
        lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has 1 GiB")),
        "out of memory (CUDA out of memory. Tried to allocate 2 GiB.): ",
        "train.micro_batch_size",
    ),
    "cuBLAS": (
        lambda: raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        "out of memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
        "smaller batches",
    ),
    "worker": (lambda: list(DataLoader(EndingWorker(), num_workers=1)), "a worker process of the data", "--shm-size"),
    "files": (open_many, "too many open files (", "ulimit -n"),
    "shared tensors": (
        lambda: raised(RuntimeError("received 0 items of ancdata")), "too many open files (received", "ulimit -n",
    ),
    "threads": (lambda: raised(RuntimeError("can't start new thread")), "too many processes (can't", "ulimit -u"),
    "processes": (lambda: raised(BlockingIOError(errno.EAGAIN, "Resource")), "too many processes (", "ulimit -u"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_lacking(name):
    provoke, start, advice = CASES[name]
    with pytest.raises((RuntimeError, MemoryError, OSError)) as caught:
        provoke()
    end = ending(caught.value)
    assert end is not None, caught.value
    assert end.code == BAD_INPUT
    assert end.line.startswith(start)
    assert advice in end.line
    assert "\n" not in end.line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        KeyError("DataLoader worker (pid 3)"),
        BlockingIOError(errno.EAGAIN, "write could not complete without blocking", 0),
    ],
)
def test_other_errors_are_none_of_these(error):
    assert lack(error) is None
