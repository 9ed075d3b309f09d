"""CUDA sources compile for their target GPUs, and no kernel exceeds its registers; no kernel runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from eve_ds.ops import build

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
ARCHITECTURES = ("sm_80", "sm_90")
MAX_REGISTERS = 64
"""A multiprocessor has 65,536 registers: enough for one block of 1,024 threads, the largest possible."""
TORCH_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"


class Resources(NamedTuple):
    """Assembler report for one kernel."""

    kernel: str
    architecture: str
    stack: int
    spills: int
    registers: int


ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<architecture>sm_\d+)'\n"
    r".*\n\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)


def parse(report: str) -> list[Resources]:
    return [
        Resources(
            entry["kernel"],
            entry["architecture"],
            int(entry["stack"]),
            int(entry["stores"]) + int(entry["loads"]),
            int(entry["registers"]),
        )
        for entry in ENTRY.finditer(report)
    ]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("source", build.CUDA_SOURCES)
def test_kernels_use_few_registers_and_do_not_spill(source: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to compile the CUDA sources")
    targets = [f"-gencode=arch={each.replace('sm', 'compute')},code={each}" for each in ARCHITECTURES]
    output = ["-Xcompiler", "-fPIC", "-c", str(KERNELS / source), "-o", str(tmp_path / "object.o")]
    report = run([nvcc, "-std=c++20", "-O3", "-Xptxas", "-v", *targets, *output])
    kernels = parse(report)
    assert len(kernels) == report.count("Compiling entry function")
    assert {each.architecture for each in kernels} == set(ARCHITECTURES)
    assert [each for each in kernels if each.spills] == []
    assert [each for each in kernels if each.stack and "check_" not in each.kernel] == []  # checks print with a stack
    assert [each for each in kernels if each.registers > MAX_REGISTERS] == []


def test_binding_compiles_without_the_cuda_toolkit(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the binding")
    headers = Path(torch.__file__).parent / "include"
    output = ["-c", str(KERNELS / "binding_cuda.cpp"), "-o", str(tmp_path / "binding.o")]
    run(["g++", "-std=c++20", "-fPIC", TORCH_VERSION, f"-I{headers}", *output])


def test_library_links_against_torch_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links with an empty library in place of torch's CUDA library, which a CPU build of torch lacks."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc to link with")
    stub = tmp_path / "stub.cpp"
    stub.touch()
    run(["g++", "-shared", str(stub), "-o", str(tmp_path / "libtorch_cuda.so")])
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("EVE_DS_CACHE", str(tmp_path / "cache"))
    library = build.build("cuda")
    assert "NEEDED               libtorch_cuda.so" in run(["objdump", "-p", str(library)])
