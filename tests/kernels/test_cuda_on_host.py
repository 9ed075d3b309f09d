"""CUDA kernels without a GPU: the .cu files compiled for the host (kernels/host_shim.h) against ops/reference.py.

Every kernel runs with three orders of a block's threads (forward, reverse, shuffled) and must give the same bits. These
tests cannot see races inside one step, speed, or driver behavior; those need a GPU. If a kernel does something that
would hang or be undefined on a GPU, host_shim.h ends the program; `pytest -s` shows the reason.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from eve_ds.ops import reference
from eve_ds.ops.build import CUDA_SOURCES

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FLAGS = (
    *("-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-DEVE_HOST_SHIM"),
    # A misaligned wide load or an index past a shared array ends the program, as it would on a GPU.
    *("-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"),
)
ORDERS = ("forward", "reverse", "shuffled")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # numbered as in arguments.h
CHUNK_TOKENS, CHUNK_ROWS, EMBEDDING_TOKENS = 256, 128, 32
GUARD = 64
"""Number of guard values after each output, which no kernel may change."""

STATISTICS = {"rtol": 1e-5, "atol": 1e-7}
"""Tolerance for fp32 probabilities, gates and their sums over hundreds of tokens against fp64: sums of hundreds of
rounding errors of 6e-8 that mostly cancel."""
GRADIENTS = {"rtol": 1e-4, "atol": 2e-6}
"""Tolerance for dlogits against fp64: differences of terms of size 1, each rounded at 6e-8, so a few 1e-7 in absolute
terms, however small the difference is."""
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative difference of rows from fp64 values rounded to the row dtype: one unit in the last place, if fp32 arithmetic
rounds a near tie to the other side; in fp32 itself up to sixteen units, for a sum of as many products."""
SMALLEST = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 6e-8}
"""Absolute tolerance for sums that nearly cancel, and for fp16 numbers too small to have full precision."""

ENTRY_POINTS = """
#include "cuda_launch.h"
using namespace eve_ds;
extern "C" {
void set_order(int order) {
  host_shim::order = static_cast<host_shim::Order>(order);
  host_shim::generator.seed(7);
}
const char* route(const Route& args, Dtype) { return launch_route(args, nullptr); }
const char* route_backward(const RouteBackward& args, Dtype) { return launch_route_backward(args, nullptr); }
const char* dispatch(const Dispatch& args, Dtype dtype) { return launch_dispatch(args, dtype, nullptr); }
const char* dispatch_backward(const DispatchBackward& args, Dtype dtype) {
  return launch_dispatch_backward(args, dtype, nullptr);
}
const char* combine(const Combine& args, Dtype dtype) { return launch_combine(args, dtype, nullptr); }
const char* combine_backward(const CombineBackward& args, Dtype dtype) {
  return launch_combine_backward(args, dtype, nullptr);
}
const char* cross_entropy(const CrossEntropy& args, Dtype dtype) { return launch_cross_entropy(args, dtype, nullptr); }
const char* pixel_loss(const PixelLoss& args, Dtype dtype) { return launch_pixel_loss(args, dtype, nullptr); }
const char* pixel_loss_backward(const PixelLossBackward& args, Dtype dtype) {
  return launch_pixel_loss_backward(args, dtype, nullptr);
}
const char* quick_gelu(const QuickGelu& args, Dtype dtype) { return launch_quick_gelu(args, dtype, nullptr); }
const char* grouped_bias(const GroupedBias& args, Dtype dtype) { return launch_grouped_bias(args, dtype, nullptr); }
const char* grouped_bias_backward(const GroupedBiasBackward& args, Dtype dtype) {
  return launch_grouped_bias_backward(args, dtype, nullptr);
}
const char* check_ids(const int64_t* ids, int64_t count, int64_t lowest, int64_t end) {
  return launch_check_ids("source", ids, count, lowest, end, nullptr);
}
const char* check_ends(const int32_t* ends, int64_t experts, int64_t rows) {
  return launch_check_ends(ends, experts, rows, nullptr);
}
}
"""


def build_for_host(sources: Path, folder: Path) -> Path:
    """Compile the .cu files of a folder with g++ into a library with the functions of `ENTRY_POINTS`."""
    entry_points, library = folder / "entry_points.cpp", folder / "kernels.so"
    entry_points.write_text(ENTRY_POINTS)
    inputs = ["-x", "c++", str(entry_points), *(str(sources / name) for name in CUDA_SOURCES)]
    command = ["g++", *FLAGS, f"-I{sources}", *inputs, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


def argument_structs() -> dict[str, type[ctypes.Structure]]:
    """ctypes versions of the structs in arguments.h."""
    types: dict[str, type] = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "bool": ctypes.c_bool}
    structs = {}
    header = re.sub(r"//.*", "", (KERNELS / "arguments.h").read_text())
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", header, re.DOTALL):
        fields = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, names = re.fullmatch(r"(.*?[\s*])\s*(\w+(?:, \w+)*)", declaration).groups()
            field = ctypes.c_void_p if kind.endswith("*") else types[kind.strip()]
            fields += [(each, field) for each in names.split(", ")]
        types[name] = structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


class Kernels:
    """Launch functions of a host library, callable with CPU tensors."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.structs = argument_structs()
        self.guarded: list[tuple[torch.Tensor, torch.Tensor]] = []

    def in_every_order(self, run: Callable[[], SimpleNamespace]) -> SimpleNamespace:
        """Result of `run`, after checking that every order of threads gives the same bits."""
        results = []
        for order in range(len(ORDERS)):
            self.library.set_order(order)
            results.append(run())
        for order, result in zip(ORDERS[1:], results[1:], strict=True):
            for name, value in vars(result).items():
                torch.testing.assert_close(
                    value, vars(results[0])[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} differs {order}"
                )
        return results[0]

    def call(self, function: str, struct: str, dtype: torch.dtype = torch.float32, **arguments: object) -> None:
        """Call a launch function, then check that no value past the end of an output has changed."""
        entry = getattr(self.library, function)
        entry.restype = ctypes.c_char_p
        assert entry(ctypes.byref(self.pack(struct, **arguments)), DTYPES.index(dtype)) is None
        for guard, before in self.guarded:
            torch.testing.assert_close(guard, before, rtol=0, atol=0, equal_nan=True, msg="written past the end")
        self.guarded.clear()

    def pack(self, struct: str, **arguments: object) -> ctypes.Structure:
        """Fill a struct; a tensor is passed as its address."""
        fields = [name for name, _ in self.structs[struct]._fields_]
        assert sorted(fields) == sorted(arguments)
        addresses = {name: each.data_ptr() for name, each in arguments.items() if isinstance(each, torch.Tensor)}
        return self.structs[struct](**{**arguments, **addresses})

    def blank(self, *sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Output tensor filled with a value that no kernel writes, with guard values after its end."""
        count = torch.Size(sizes).numel()
        values = torch.full((count + GUARD,), float("nan") if dtype.is_floating_point else -99, dtype=dtype)
        self.guarded.append((values[count:], values[count:].clone()))
        return values[:count].view(sizes)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the host")
    return Kernels(build_for_host(KERNELS, tmp_path_factory.mktemp("kernels")))


def num_chunks(tokens: int) -> int:
    return -(-tokens // CHUNK_TOKENS)


# ---- Routing ----


def route(kernels: Kernels, case: SimpleNamespace) -> SimpleNamespace:
    tokens, experts = case.logits.shape
    top_k, chunks = case.top_k, num_chunks(tokens)
    rows = tokens * top_k if case.capacity < 0 else experts * case.capacity
    outputs = {
        "expert_ids": kernels.blank(tokens, top_k, dtype=torch.int64),
        "slots": kernels.blank(tokens, top_k, dtype=torch.int64),
        "gates": kernels.blank(tokens, top_k),
        "source": kernels.blank(rows, dtype=torch.int64),
        "counts": kernels.blank(experts, dtype=torch.int64),
        "probabilities": kernels.blank(tokens, experts),
        "log_sum_exp": kernels.blank(tokens),
        "first_choices": kernels.blank(experts),
        "probability_sum": kernels.blank(experts),
        "z_sum": kernels.blank(),
    }
    kernels.call(
        "route",
        "Route",
        logits=case.logits,
        modality_bias=case.bias,
        modality_ids=case.modality_ids,
        valid=case.valid,
        noise=case.noise,
        tokens=tokens,
        experts=experts,
        top_k=top_k,
        capacity=case.capacity,
        rows=rows,
        chunk_sums=kernels.blank(chunks, experts + 1),
        chunk_counts=kernels.blank(top_k, chunks, experts, dtype=torch.int32),
        **outputs,
    )
    return SimpleNamespace(**outputs)


def route_backward(
    kernels: Kernels, case: SimpleNamespace, routed: SimpleNamespace, upstream: SimpleNamespace
) -> SimpleNamespace:
    tokens, experts = case.logits.shape
    modalities = 0 if case.bias is None else len(case.bias)
    d_logits, d_bias = kernels.blank(tokens, experts), kernels.blank(modalities, experts)
    chunk_d_bias = kernels.blank(num_chunks(tokens), modalities, experts)
    kernels.call(
        "route_backward",
        "RouteBackward",
        probabilities=routed.probabilities,
        log_sum_exp=routed.log_sum_exp,
        expert_ids=routed.expert_ids,
        slots=routed.slots,
        gates=routed.gates,
        valid=case.valid,
        modality_ids=case.modality_ids,
        d_gates=upstream.gates,
        d_probability_sum=upstream.probability_sum,
        d_z_sum=upstream.z_sum,
        tokens=tokens,
        experts=experts,
        top_k=case.top_k,
        modalities=modalities,
        d_logits=d_logits,
        d_bias=d_bias if modalities else None,
        chunk_d_bias=chunk_d_bias if modalities else None,
    )
    return SimpleNamespace(d_logits=d_logits, d_bias=d_bias)


def routing_case(
    tokens: int,
    experts: int,
    top_k: int,
    capacity: int,
    *,
    modalities: int = 0,
    invalid: float = 0.0,
    noise: bool = False,
    change: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> SimpleNamespace:
    """Random logits and a bias per modality, modified in place by `change`; no token has the last modality."""
    generator = torch.Generator().manual_seed(tokens * 31 + experts)
    logits = torch.randn(tokens, experts, generator=generator) * 2
    bias = torch.randn(modalities, experts, generator=generator)
    if change is not None:
        change(logits, bias)
    ids = torch.randint(max(modalities - 1, 1), (tokens,), generator=generator)
    return SimpleNamespace(
        logits=logits,
        top_k=top_k,
        capacity=capacity,
        bias=bias if modalities else None,
        modality_ids=ids if modalities else None,
        valid=torch.rand(tokens, generator=generator) >= invalid if invalid else None,
        noise=torch.randn(tokens, experts, generator=generator) if noise else None,
    )


def all_to_one(logits: torch.Tensor, _: torch.Tensor) -> None:
    logits[:, 5] = logits.amax(dim=1) + 1


def one_empty(logits: torch.Tensor, _: torch.Tensor) -> None:
    logits[:, 3] -= 50


def tied(logits: torch.Tensor, bias: torch.Tensor) -> None:
    for scores in (logits, bias):
        scores.clamp_(-1, 0).round_()  # to -1, -0 and +0


def first_choice_likely(logits: torch.Tensor, _: torch.Tensor) -> None:
    logits[:, 0] += 18  # if this choice is dropped, the rest sums to about the smallest divisor of gates


def one_allowed(logits: torch.Tensor, _: torch.Tensor) -> None:
    logits[:, 1:] = float("-inf")


ROUTING_CASES = {
    "one token": routing_case(1, 1, 1, -1),
    "every expert chosen": routing_case(7, 7, 7, -1, modalities=3, noise=True),
    "overflow": routing_case(257, 13, 2, 11, modalities=3, invalid=0.2),
    "dropless": routing_case(300, 37, 3, -1, invalid=0.3, noise=True),
    "all to one expert": routing_case(300, 8, 1, 20, change=all_to_one),
    "an empty expert": routing_case(257, 5, 2, -1, change=one_empty),
    "no valid token": routing_case(300, 6, 2, 40, modalities=2, invalid=2.0),
    "no valid token, dropless": routing_case(7, 6, 2, -1, invalid=2.0),
    "ties": routing_case(257, 67, 4, 50, modalities=2, change=tied),
    "an unlikely expert left": routing_case(257, 5, 2, 30, change=first_choice_likely),
    "one expert allowed": routing_case(7, 5, 3, -1, change=one_allowed),
    "no capacity": routing_case(7, 5, 2, 0),
    "most experts and choices": routing_case(7, 1024, 16, -1, modalities=2),
    "half a thousand experts": routing_case(40, 521, 2, 1, modalities=2, noise=True),
    "many chunks and choices": routing_case(520, 17, 16, -1, noise=True),
    "more chunks than lanes": routing_case(8300, 3, 1, -1, modalities=2),
    "no token": routing_case(0, 4, 2, 3, modalities=2),
    "no token, dropless": routing_case(0, 4, 2, -1, modalities=2),
}


def reference_route(case: SimpleNamespace, dtype: torch.dtype) -> tuple[reference.Routing, torch.Tensor, torch.Tensor]:
    logits = case.logits.to(dtype, copy=True).requires_grad_()
    bias = None if case.bias is None else case.bias.to(dtype, copy=True).requires_grad_()
    routing = reference.route_topk(
        logits,
        top_k=case.top_k,
        capacity=case.capacity,
        modality_bias=bias,
        modality_ids=case.modality_ids,
        valid=case.valid,
        noise=case.noise,
    )
    return routing, logits, bias


def check_routing(kernels: Kernels, case: SimpleNamespace) -> None:
    ours = kernels.in_every_order(lambda: route(kernels, case))
    theirs, logits, bias = reference_route(case, torch.float64)
    as_fp32 = reference_route(case, torch.float32)[0]
    for name in ("expert_ids", "slots", "source", "counts"):
        assert torch.equal(getattr(ours, name), getattr(as_fp32, name)), name
        assert torch.equal(getattr(theirs, name), getattr(as_fp32, name)), f"{name}: this case must have no near ties"
    for name in ("gates", "probabilities", "first_choices", "probability_sum", "z_sum"):
        expected = getattr(theirs, name).detach().float()
        torch.testing.assert_close(getattr(ours, name), expected, **STATISTICS, msg=lambda text, n=name: f"{n}: {text}")

    generator = torch.Generator().manual_seed(1)
    names = ("gates", "probability_sum", "z_sum")
    upstream = SimpleNamespace(**{n: torch.randn(getattr(ours, n).shape, generator=generator) for n in names})
    backward = kernels.in_every_order(lambda: route_backward(kernels, case, ours, upstream))
    sum((getattr(theirs, name) * getattr(upstream, name)).sum() for name in names).backward()
    torch.testing.assert_close(backward.d_logits, logits.grad.float(), **GRADIENTS)
    if bias is not None:
        torch.testing.assert_close(backward.d_bias, bias.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROUTING_CASES)
def test_routing_matches_reference(kernels: Kernels, name: str) -> None:
    check_routing(kernels, ROUTING_CASES[name])


@pytest.mark.parametrize("given", ["gates", "probability_sum", "z_sum"])
def test_missing_upstream_gradients_count_as_zero(kernels: Kernels, given: str) -> None:
    case = ROUTING_CASES["every expert chosen"]
    ours = route(kernels, case)
    theirs, logits, _ = reference_route(case, torch.float64)
    gradient = torch.randn(getattr(ours, given).shape, generator=torch.Generator().manual_seed(2))
    upstream = SimpleNamespace(gates=None, probability_sum=None, z_sum=None)
    setattr(upstream, given, gradient)
    getattr(theirs, given).backward(gradient.double())
    backward = route_backward(kernels, case, ours, upstream)
    torch.testing.assert_close(backward.d_logits, logits.grad.float(), **GRADIENTS)


def test_nan_logits_give_valid_expert_ids(kernels: Kernels) -> None:
    case = routing_case(7, 5, 2, -1)
    case.logits[0] = float("nan")
    case.logits[1, 2] = -float("nan")
    ours = kernels.in_every_order(lambda: route(kernels, case))
    theirs = reference_route(case, torch.float32)[0]
    assert torch.equal(ours.expert_ids, theirs.expert_ids)
    assert torch.equal(ours.slots, theirs.slots)


# ---- Rows ----


def dispatch(
    kernels: Kernels, x: torch.Tensor, source: torch.Tensor, embedding: torch.Tensor | None, ids: torch.Tensor
) -> SimpleNamespace:
    rows, width = len(source), x.shape[1]
    out = kernels.blank(rows, width, dtype=x.dtype)
    kernels.call(
        "dispatch",
        "Dispatch",
        x.dtype,
        x=x,
        source=source,
        modality_embedding=embedding,
        modality_ids=ids if embedding is not None else None,
        rows=rows,
        width=width,
        out=out,
    )
    return SimpleNamespace(out=out)


def dispatch_backward(
    kernels: Kernels, d_rows: torch.Tensor, slots: torch.Tensor, modalities: int, ids: torch.Tensor
) -> SimpleNamespace:
    (tokens, top_k), width = slots.shape, d_rows.shape[1]
    d_x, d_embedding = kernels.blank(tokens, width, dtype=d_rows.dtype), kernels.blank(modalities, width)
    chunk_sums = kernels.blank(-(-tokens // EMBEDDING_TOKENS), modalities, width)
    kernels.call(
        "dispatch_backward",
        "DispatchBackward",
        d_rows.dtype,
        d_rows=d_rows,
        slots=slots,
        modality_ids=ids if modalities else None,
        tokens=tokens,
        top_k=top_k,
        width=width,
        modalities=modalities,
        d_x=d_x,
        d_embedding=d_embedding if modalities else None,
        chunk_d_embedding=chunk_sums if modalities else None,
    )
    return SimpleNamespace(d_x=d_x, d_embedding=d_embedding)


def combine(kernels: Kernels, rows: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor) -> SimpleNamespace:
    (tokens, top_k), width = slots.shape, rows.shape[1]
    out = kernels.blank(tokens, width, dtype=rows.dtype)
    sizes = {"tokens": tokens, "top_k": top_k, "width": width}
    kernels.call("combine", "Combine", rows.dtype, rows=rows, slots=slots, gates=gates, out=out, **sizes)
    return SimpleNamespace(out=out)


def combine_backward(
    kernels: Kernels,
    d_out: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    gates: torch.Tensor,
    source: torch.Tensor,
) -> SimpleNamespace:
    (tokens, top_k), (num_rows, width) = slots.shape, rows.shape
    d_rows, d_gates = kernels.blank(num_rows, width, dtype=rows.dtype), kernels.blank(tokens, top_k)
    kernels.call(
        "combine_backward",
        "CombineBackward",
        rows.dtype,
        d_out=d_out,
        expert_rows=rows,
        slots=slots,
        source=source,
        gates=gates,
        tokens=tokens,
        top_k=top_k,
        width=width,
        rows=num_rows,
        d_rows=d_rows,
        d_gates=d_gates,
    )
    return SimpleNamespace(d_rows=d_rows, d_gates=d_gates)


def random_rows(count: int, width: int, dtype: torch.dtype, seed: int, *, aligned: bool = True) -> torch.Tensor:
    """Rows whose first value is aligned to 16 bytes, or one value past an aligned address."""
    values = torch.randn(count * width + 1, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values[:-1].view(count, width) if aligned else values[1:].view(count, width)


def assert_rows_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    tolerances = {"rtol": ROUNDING[ours.dtype], "atol": SMALLEST[ours.dtype]}
    torch.testing.assert_close(ours, theirs.detach().to(ours.dtype), **tolerances)


WIDTHS = {"prime": (37, True), "vectors": (264, True), "not aligned": (264, False)}
"""264: more than one block of columns, with a partially filled last block."""
ROUTED = (
    *("one token", "every expert chosen", "overflow", "dropless", "all to one expert", "no valid token"),
    *("no capacity", "no token", "no token, dropless"),
)
ROW_CASES = [*((routed, "prime") for routed in ROUTED), ("overflow", "vectors"), ("overflow", "not aligned")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("routed", "width"), ROW_CASES)
def test_dispatch_and_combine_match_reference(kernels: Kernels, routed: str, width: str, dtype: torch.dtype) -> None:
    case = ROUTING_CASES[routed]
    routing = reference_route(case, torch.float32)[0]
    slots, source, gates = routing.slots.contiguous(), routing.source, routing.gates.detach().contiguous()
    (columns, aligned), (tokens, rows) = WIDTHS[width], (len(slots), len(source))
    x = random_rows(tokens, columns, dtype, 1, aligned=aligned)
    d_rows = random_rows(rows, columns, dtype, 2, aligned=aligned)
    embedding = random_rows(3, columns, torch.float32, 3)
    ids = torch.arange(tokens) * 5 // max(tokens, 5) % 2 * 2  # 0 and 2: modality 1 has no token

    ours = kernels.in_every_order(lambda: dispatch(kernels, x, source, None, ids))
    assert torch.equal(ours.out, reference.moe_dispatch(x, slots, source))
    ours = kernels.in_every_order(lambda: dispatch(kernels, x, source, embedding, ids))
    wide_x, wide_embedding = x.double().requires_grad_(), embedding.double().requires_grad_()
    theirs = reference.moe_dispatch(wide_x, slots, source, wide_embedding, ids)
    assert_rows_close(ours.out, theirs)

    theirs.backward(d_rows.double())
    ours = kernels.in_every_order(lambda: dispatch_backward(kernels, d_rows, slots, 3, ids))
    assert_rows_close(ours.d_x, wide_x.grad)
    torch.testing.assert_close(ours.d_embedding, wide_embedding.grad.float(), rtol=1e-5, atol=2e-5)
    plain = kernels.in_every_order(lambda: dispatch_backward(kernels, d_rows, slots, 0, ids))
    assert torch.equal(plain.d_x, ours.d_x)

    expert_rows, d_out = d_rows, x
    ours = kernels.in_every_order(lambda: combine(kernels, expert_rows, slots, gates))
    wide_rows, wide_gates = expert_rows.double().requires_grad_(), gates.double().requires_grad_()
    theirs = reference.moe_combine(wide_rows, slots, wide_gates, source)
    assert_rows_close(ours.out, theirs)
    theirs.backward(d_out.double())
    ours = kernels.in_every_order(lambda: combine_backward(kernels, d_out, expert_rows, slots, gates, source))
    assert_rows_close(ours.d_rows, wide_rows.grad)
    torch.testing.assert_close(ours.d_gates, wide_gates.grad.float(), rtol=1e-5, atol=2e-5)


def test_embedding_gradient_with_more_chunks_than_lanes(kernels: Kernels) -> None:
    tokens, generator = 33 * EMBEDDING_TOKENS + 5, torch.Generator().manual_seed(4)
    slots = torch.randperm(tokens, generator=generator).unsqueeze(1)
    ids = torch.randint(5, (tokens,), generator=generator)
    d_rows = random_rows(tokens, 8, torch.float32, 5)
    ours = kernels.in_every_order(lambda: dispatch_backward(kernels, d_rows, slots, 5, ids))
    theirs = torch.zeros(5, 8, dtype=torch.float64).index_add_(0, ids, d_rows.double()[slots[:, 0]])
    torch.testing.assert_close(ours.d_embedding, theirs.float(), rtol=1e-5, atol=2e-5)


# ---- Losses ----


def cross_entropy(
    kernels: Kernels, logits: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
) -> SimpleNamespace:
    rows, vocabulary = logits.shape
    gradients = kernels.blank(rows, vocabulary, dtype=logits.dtype).copy_(logits)
    losses = kernels.blank(rows)
    sizes = {"rows": rows, "vocabulary": vocabulary}
    kernels.call(
        "cross_entropy",
        "CrossEntropy",
        logits.dtype,
        logits=gradients,
        bias=bias,
        target=target,
        losses=losses,
        **sizes,
    )
    return SimpleNamespace(losses=losses, gradients=gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "scale", "with_bias"), [(1, 1.0, True), (1031, 1.0, True), (8200, 3.0, False), (8200, 100.0, True)]
)
def test_cross_entropy_matches_reference(
    kernels: Kernels, vocabulary: int, scale: float, with_bias: bool, dtype: torch.dtype
) -> None:
    logits = random_rows(3, vocabulary, dtype, 1) * scale
    bias = random_rows(1, vocabulary, torch.float32, 2)[0] if with_bias else None
    target = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    if vocabulary > 1:
        logits[2, : vocabulary // 2] = float("-inf")  # excluded words
    ours = kernels.in_every_order(lambda: cross_entropy(kernels, logits, bias, target))
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide if bias is None else wide + bias.double(), target, reduction="none")
    losses.sum().backward()
    torch.testing.assert_close(ours.losses, losses.detach().float(), rtol=1e-6, atol=1e-4)
    assert_rows_close(ours.gradients, wide.grad)


def pixel_loss(kernels: Kernels, case: SimpleNamespace) -> SimpleNamespace:
    shape = case.ids.shape
    outputs = {name: kernels.blank(*shape) for name in ("losses", "mean", "scale")}
    kernels.call("pixel_loss", "PixelLoss", case.predictions.dtype, **case.arguments, **outputs)
    return SimpleNamespace(**outputs)


def pixel_loss_backward(
    kernels: Kernels, case: SimpleNamespace, forward: SimpleNamespace, d_losses: torch.Tensor
) -> SimpleNamespace:
    d_predictions = kernels.blank(*case.predictions.shape, dtype=case.predictions.dtype)
    packed = kernels.pack("PixelLoss", **case.arguments, losses=None, mean=forward.mean, scale=forward.scale)
    kernels.call(
        "pixel_loss_backward",
        "PixelLossBackward",
        case.predictions.dtype,
        forward=packed,
        d_losses=d_losses,
        d_predictions=d_predictions,
    )
    return SimpleNamespace(d_predictions=d_predictions)


def pixel_case(batch: int, masked: int, patch_size: int, dtype: torch.dtype, normalize: bool) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(patch_size)
    height, width = 3 * patch_size, 5 * patch_size
    pixels = torch.randn(batch, 3, height, width, generator=generator) * 2 + 1
    predictions = torch.randn(batch, masked, 3 * patch_size**2, generator=generator).to(dtype)
    ids = torch.rand(batch, 15, generator=generator).argsort(dim=1)[:, :masked].contiguous()
    tensors = {"pixel_values": pixels, "predictions": predictions, "masked_patch_ids": ids}
    sizes = {"batch": batch, "masked": masked, "height": height, "width": width, "patch_size": patch_size}
    arguments = {**tensors, **sizes, "eps": 1e-6, "normalize": normalize}
    return SimpleNamespace(pixels=pixels, predictions=predictions, ids=ids, arguments=arguments)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "masked", "patch_size"), [(2, 7, 1), (2, 7, 7), (2, 7, 16), (2, 0, 7), (0, 7, 7)])
def test_pixel_loss_matches_reference(
    kernels: Kernels, batch: int, masked: int, patch_size: int, dtype: torch.dtype, normalize: bool
) -> None:
    case = pixel_case(batch, masked, patch_size, dtype, normalize)
    ours = kernels.in_every_order(lambda: pixel_loss(kernels, case))
    wide = case.predictions.double().requires_grad_()
    theirs = reference.masked_pixel_loss(case.pixels.double(), wide, case.ids, patch_size, normalize=normalize)
    torch.testing.assert_close(ours.losses, theirs.detach().float(), rtol=1e-5, atol=1e-5)
    if not normalize:
        assert ours.mean.eq(0).all()
        assert ours.scale.eq(1).all()

    d_losses = torch.randn(batch, masked, generator=torch.Generator().manual_seed(1))
    theirs.backward(d_losses.double())
    backward = kernels.in_every_order(lambda: pixel_loss_backward(kernels, case, ours, d_losses))
    tolerances = {"rtol": ROUNDING[dtype], "atol": 2e-5}
    torch.testing.assert_close(backward.d_predictions, wide.grad.to(dtype), **tolerances)


# ---- Activation ----


def quick_gelu(kernels: Kernels, x: torch.Tensor, d_out: torch.Tensor | None) -> SimpleNamespace:
    out = kernels.blank(x.numel(), dtype=x.dtype)
    kernels.call("quick_gelu", "QuickGelu", x.dtype, x=x, d_out=d_out, count=x.numel(), out=out)
    return SimpleNamespace(out=out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "offset"), [(0, 0), (1, 0), (1000, 0), (4096, 0), (4096, 1), (4099, 0)])
def test_quick_gelu_matches_reference(kernels: Kernels, count: int, offset: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(10)
    x = (torch.randn(count + offset, generator=generator) * 4).to(dtype)[offset:]
    x[:4] = torch.tensor([0.0, 200.0, -200.0, float("nan")])[:count]
    d_out = torch.randn(count, generator=generator).to(dtype)
    wide = x.double().requires_grad_()
    expected = reference.quick_gelu(wide)
    expected.backward(d_out.double())
    tolerances = {"rtol": ROUNDING[dtype], "atol": SMALLEST[dtype], "equal_nan": True}
    ours = kernels.in_every_order(lambda: quick_gelu(kernels, x, None))
    torch.testing.assert_close(ours.out, expected.detach().to(dtype), **tolerances)
    backward = kernels.in_every_order(lambda: quick_gelu(kernels, x, d_out))
    torch.testing.assert_close(backward.out, wide.grad.to(dtype), **tolerances)


GROUPS = {  # rows of each expert, and number of rows of no expert after them
    "empty experts": ((0, 5, 0, 130, 0, 301, 1, 0), 7),
    "chunks that end with experts": ((128, 256, 0, 128), 128),
    "all to one expert": ((0, 0, 300), 0),
    "rows of no expert": ((0, 0), 20),
    "no row": ((0, 0, 0), 0),
    "many experts": ((1,) * 700, 3),
}
GROUPED_CASES = [
    *((group, "prime") for group in GROUPS),
    ("empty experts", "vectors"),
    ("empty experts", "not aligned"),
]


def grouped_bias(
    kernels: Kernels, x: torch.Tensor, bias: torch.Tensor | None, ends: torch.Tensor, *, activate: bool, in_place: bool
) -> SimpleNamespace:
    out = kernels.blank(*x.shape, dtype=x.dtype)
    if in_place:
        x = out.copy_(x)
    sizes = {"rows": x.shape[0], "width": x.shape[1], "experts": len(ends)}
    kernels.call("grouped_bias", "GroupedBias", x.dtype, x=x, bias=bias, ends=ends, activate=activate, out=out, **sizes)
    return SimpleNamespace(out=out)


def grouped_bias_backward(
    kernels: Kernels, d_out: torch.Tensor, x: torch.Tensor | None, bias: torch.Tensor | None, ends: torch.Tensor
) -> SimpleNamespace:
    (rows, width), experts = d_out.shape, len(ends)
    d_x, d_bias = kernels.blank(rows, width, dtype=d_out.dtype), kernels.blank(experts, width, dtype=d_out.dtype)
    kernels.call(
        "grouped_bias_backward",
        "GroupedBiasBackward",
        d_out.dtype,
        d_out=d_out,
        x=x,
        bias=bias,
        ends=ends,
        rows=rows,
        width=width,
        experts=experts,
        d_x=None if x is None else d_x,
        d_bias=d_bias,
        piece_sums=kernels.blank(-(-rows // CHUNK_ROWS) + experts, width),
    )
    return SimpleNamespace(d_bias=d_bias) if x is None else SimpleNamespace(d_x=d_x, d_bias=d_bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "width"), GROUPED_CASES)
def test_grouped_bias_matches_reference(kernels: Kernels, group: str, width: str, dtype: torch.dtype) -> None:
    (sizes, unowned), (columns, aligned) = GROUPS[group], WIDTHS[width]
    filled, experts = sum(sizes), len(sizes)
    x = random_rows(filled + unowned, columns, dtype, 1, aligned=aligned)
    d_out = random_rows(filled + unowned, columns, dtype, 2, aligned=aligned)
    bias = random_rows(experts, columns, dtype, 3, aligned=aligned)
    x[filled:], d_out[filled:] = float("nan"), float("nan")  # grouped products may leave any value here
    ends = torch.tensor(sizes).cumsum(0).int()
    wide_x, wide_bias = x.double().requires_grad_(), bias.double().requires_grad_()

    plain = reference.grouped_bias(wide_x, wide_bias, ends)
    ours = kernels.in_every_order(lambda: grouped_bias(kernels, x, bias, ends, activate=False, in_place=True))
    assert_rows_close(ours.out, plain)
    cleared = kernels.in_every_order(lambda: grouped_bias(kernels, x, None, ends, activate=False, in_place=True))
    assert torch.equal(cleared.out, torch.cat([x[:filled], torch.zeros_like(x[filled:])]))

    expected = reference.quick_gelu(plain)
    ours = kernels.in_every_order(lambda: grouped_bias(kernels, x, bias, ends, activate=True, in_place=False))
    assert_rows_close(ours.out, expected)
    upstream = d_out.double()
    (plain[:filled] * upstream[:filled]).sum().backward(retain_graph=True)
    only_bias = kernels.in_every_order(lambda: grouped_bias_backward(kernels, d_out, None, None, ends))
    assert_sums_close(only_bias.d_bias, wide_bias.grad)
    wide_x.grad, wide_bias.grad = None, None
    (expected[:filled] * upstream[:filled]).sum().backward()
    both = kernels.in_every_order(lambda: grouped_bias_backward(kernels, d_out, x, bias, ends))
    assert_rows_close(both.d_x, wide_x.grad)
    assert_sums_close(both.d_bias, wide_bias.grad)


def assert_sums_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Compare sums of a few hundred terms of size 1, which may cancel."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=ROUNDING[ours.dtype], atol=2e-5)


# ---- Ids ----


CHECK = """
import ctypes, sys
library, check, *numbers = sys.argv[1:]
given, limits = (numbers[: numbers.index("/")], numbers[numbers.index("/") + 1 :])
kind = ctypes.c_int64 if check == "check_ids" else ctypes.c_int32
ids = (kind * len(given))(*map(int, given))
getattr(ctypes.CDLL(library), check)(ids, ctypes.c_int64(len(given)), *(ctypes.c_int64(int(each)) for each in limits))
"""


@pytest.mark.parametrize(
    ("check", "ids", "limits", "message"),
    [
        ("check_ids", (0, -1, 11), (-1, 12), None),
        ("check_ids", (*range(300), 12), (0, 300), None),
        ("check_ids", (0, 12, -1), (-1, 12), "source[1] is 12, which must be at least -1 and below 12"),
        (
            "check_ids",
            (*(0 for _ in range(300)), -1),
            (0, 12),
            "source[300] is -1, which must be at least 0 and below 12",
        ),
        ("check_ends", (0, 0, 5, 9), (9,), None),
        ("check_ends", (0, 5, 4), (9,), "ends[2] is 4, which must be at least 5 and below 10"),
        ("check_ends", (-1, 5), (9,), "ends[0] is -1, which must be at least 0 and below 10"),
        ("check_ends", (4, 10), (9,), "ends[1] is 10, which must be at least 4 and below 10"),
    ],
)
def test_bad_ids_end_the_program(
    kernels: Kernels, check: str, ids: tuple[int, ...], limits: tuple[int, ...], message: str | None
) -> None:
    command = [sys.executable, "-c", CHECK, kernels.library._name, check, *map(str, ids), "/", *map(str, limits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == ("" if message is None else f"eve_ds: {message}\n")
    assert done.returncode == (0 if message is None else -signal.SIGABRT)


# ---- Test harness ----


def test_missing_barrier_is_detected(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the host")
    copy = tmp_path / "kernels"
    shutil.copytree(KERNELS, copy)
    source = copy / "routing.cuh"
    before, barrier, after = source.read_text().partition("    partial[threadIdx.x] = total;\n    __syncthreads();\n")
    assert barrier
    source.write_text(before + barrier.replace("__syncthreads();", "") + after)
    library = build_for_host(copy, tmp_path)
    done = subprocess.run([sys.executable, __file__, str(library)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "AssertionError" in done.stderr or "host_shim: " in done.stderr, done.stderr


if __name__ == "__main__":
    check_routing(Kernels(Path(sys.argv[1])), ROUTING_CASES["overflow"])
