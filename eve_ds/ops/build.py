"""Compile and load the fused ops on first use, or log once why the plain PyTorch ops run instead.

`EVE_DS_OPS` selects the mode. `auto` (default) compiles the ops where a compiler exists, and otherwise falls back to
`reference.py` with one warning. `build` makes every problem fatal. `reference` never compiles. A compiled library stays
in `EVE_DS_CACHE` (default `~/.cache/eve_ds`), a folder that nobody else may write; its name is a hash of sources, flags
and versions. When several processes start together, one compiles and the others wait for it.

On the CPU, the ops check ids before they touch memory. On CUDA they do not, because the host would have to wait for the
GPU; a wrong id then reads or writes unrelated memory. With `EVE_DS_CHECK=1`, the GPU checks the ids of every op before
the op runs. A bad id ends the program with a line such as
`eve_ds: slots[7] is 12, which must be at least -1 and below 12`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from eve_ds.log import get_logger
from eve_ds.ops.library_cache import CacheError, cache_folder, is_trusted, locked, make_private

PACKAGE = Path(__file__).resolve().parents[1]
KERNELS = (PACKAGE if (PACKAGE / "kernels").is_dir() else PACKAGE.parent) / "kernels"
"""Sources of the ops: inside the package if it was installed from a wheel, beside the package in a checkout."""
MODES = ("auto", "build", "reference")
HEADERS = Path(torch.__file__).parent / "include"
LIBRARIES = Path(torch.__file__).parent / "lib"
TORCH_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"
"""Target version of torch's stable ABI: 2.11 is the oldest torch that can load the libraries."""
CPU_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-fno-strict-aliasing", "-Wno-psabi", "-Wno-ignored-attributes"),
)
CPU_SOURCES = ("routing_cpu.cpp", "masked_loss_cpu.cpp", "activation_cpu.cpp")
CPU_BUILDS = {"base": (), "v3": ("-march=x86-64-v3",), "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512")}
CUDA_FLAGS = (
    *("-std=c++20", "-O3", "-Xcompiler", "-fPIC"),
    *("-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"),
)
CUDA_SOURCES = ("routing_cuda.cu", "masked_loss_cuda.cu", "activation_cuda.cu", "check_cuda.cu")


DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "meta": (torch.float32, torch.bfloat16, torch.float16),  # by the fake kernels, which need no library
}


class OpsBuildError(RuntimeError):
    """The fused ops could not be built although `EVE_DS_OPS=build` requires them; the message gives the reason."""


class Job(NamedTuple):
    """One compiler call without its output argument."""

    name: str
    command: tuple[str, ...]


def mode() -> str:
    """Value of `EVE_DS_OPS`.

    Raises:
        OpsBuildError: the value is not one of `MODES`.
    """
    chosen = os.environ.get("EVE_DS_OPS", "auto")
    if chosen not in MODES:
        raise OpsBuildError(f"EVE_DS_OPS ({chosen}) must be one of {', '.join(MODES)}")
    return chosen


def use_built(x: torch.Tensor) -> bool:
    """Whether the compiled ops support the device and dtype of this tensor; the first call builds and loads them.

    Raises:
        OpsBuildError: `EVE_DS_OPS=build`, and the ops cannot be built.
    """
    return x.dtype in DTYPES.get(x.device.type, ()) and (x.is_meta or _wanted_and_loaded(x.device.type))


def _wanted_and_loaded(device_type: str) -> bool:
    return _loaded(device_type, mode())


# `torch.compiler.assume_constant_result` sets this same flag, but importing it costs 1.5 s at every start.
_wanted_and_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _loaded(device_type: str, chosen: str) -> bool:
    if chosen == "reference":
        return False
    problem = _loading_problem(device_type)
    if problem is None:
        return True
    if chosen == "build":
        raise OpsBuildError(problem)
    get_logger().warning(
        "%s; using the plain PyTorch ops, which are slower (set EVE_DS_OPS=reference to silence this warning)", problem
    )
    return False


@cache
def _loading_problem(device_type: str) -> str | None:
    """Reason why the ops cannot be loaded, or None if they are loaded.

    The result is cached, because a build that fails may take a minute.
    """
    try:
        torch.ops.load_library(str(build(device_type)))
    except (OpsBuildError, OSError) as error:
        return str(error)
    return None


def build(device_type: str) -> Path:
    """Path of the ops library for `cpu` or `cuda`; compiles the library unless the cache holds it.

    Raises:
        OpsBuildError: the sources or a compiler are missing, or compilation failed; holds the compiler's first error.
    """
    if not KERNELS.is_dir():
        raise OpsBuildError(
            f"the sources of the fused ops are not at {KERNELS}: install eve_ds again, from a wheel or a checkout"
        )
    jobs, link = _cuda_jobs() if device_type == "cuda" else _cpu_jobs()
    try:
        folder = cache_folder()
        make_private(folder)
        library = folder / f"eve_ds_{device_type}_{_digest(jobs, link)}.so"
        if is_trusted(library):  # also on a read-only disk
            return library
        with locked(library.with_suffix(".lock")):
            if not is_trusted(library):
                get_logger().info("compiling the fused ops for %s, once, into %s", device_type, folder)
                _compile(jobs, link, library)
    except CacheError as error:
        raise OpsBuildError(str(error)) from None
    except OSError as error:
        raise OpsBuildError(
            f"{error.filename or folder} cannot be written ({error.strerror}): name another folder in EVE_DS_CACHE"
        ) from None
    return library


def _cpu_jobs() -> tuple[list[Job], tuple[str, ...]]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OpsBuildError("no C++ compiler found to build the fused ops: install g++ (Debian: apt install g++)")
    builds = CPU_BUILDS if platform.machine() in ("x86_64", "AMD64") else {"base": ()}
    jobs = [
        Job(f"{source}.{isa}", (compiler, *CPU_FLAGS, *flags, f"-DEVE_ISA={isa}", "-c", str(KERNELS / source)))
        for source in CPU_SOURCES
        for isa, flags in builds.items()
    ]
    jobs.append(_binding(compiler, "binding_cpu.cpp"))
    return jobs, _link(compiler, "torch_cpu")


def _cuda_jobs() -> tuple[list[Job], tuple[str, ...]]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    nvcc = shutil.which("nvcc")
    if compiler is None or nvcc is None:
        raise OpsBuildError("no nvcc and g++ found to build the fused ops for CUDA: install the CUDA toolkit")
    jobs = [Job(source, (nvcc, *CUDA_FLAGS, "-c", str(KERNELS / source))) for source in CUDA_SOURCES]
    jobs.append(_binding(compiler, "binding_cuda.cpp"))
    # nvcc knows where its own runtime is: the toolkit may keep it in `lib`, in `lib64` or elsewhere.
    return jobs, (*_link(nvcc, "torch_cpu", "torch_cuda"), "-cudart", "static")


def _binding(compiler: str, source: str) -> Job:
    includes = (f"-I{HEADERS}", f"-I{HEADERS / 'torch/csrc/api/include'}")
    return Job(source, (compiler, "-std=c++20", "-O2", "-fPIC", TORCH_VERSION, *includes, "-c", str(KERNELS / source)))


def _link(compiler: str, *libraries: str) -> tuple[str, ...]:
    names = (f"-l{library}" for library in (*libraries, "c10"))
    return (compiler, "-shared", "-Xlinker", "--no-as-needed", f"-L{LIBRARIES}", *names)


def _digest(jobs: list[Job], link: tuple[str, ...]) -> str:
    """Hash of the sources, the flags, and the versions of torch and of the compilers."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(KERNELS.glob("*.*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            digest.update(path.name.encode() + path.read_bytes())
    for command in (*(job.command for job in jobs), link):
        digest.update("\0".join(command).encode())
    for compiler in sorted({job.command[0] for job in jobs}):
        digest.update(_run([compiler, "--version"]).encode())
    return digest.hexdigest()[:16]


def _compile(jobs: list[Job], link: tuple[str, ...], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [str(Path(scratch) / f"{job.name}.o") for job in jobs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job, out: _run([*job.command, "-o", out]), jobs, objects))
        unfinished = Path(scratch) / library.name
        _run([link[0], *objects, *link[1:], "-o", str(unfinished)])
        unfinished.chmod(0o755)  # with any umask, nobody else may write it
        unfinished.replace(library)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise OpsBuildError(f"{command[0]} cannot be run to build the fused ops: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise OpsBuildError(f"{Path(command[0]).name} could not build the fused ops: {first}")
    return done.stdout
