"""Time the ops and a training step on a GPU: `python -m eve_ds.benchmark.gpu PART` writes one JSON line per result.

`launcher/gpu.py` runs the parts one after the other, each in its own process with a time limit, so that a part that
hangs or fails does not affect the others. Every part also runs on a CPU, for tests; such times have no meaning.

Times of ops are measured in a CUDA graph, with alternating inputs that together exceed the cache, so they exclude the
work of the host. Times of steps are measured by the clock of the host around a synchronized step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from eve_ds import ops
from eve_ds.benchmark.harness import rounded
from eve_ds.benchmark.inputs import REAL_TOKENS, backward, device, draw_weights, random_inputs
from eve_ds.config import load_config
from eve_ds.model.attention import attend
from eve_ds.model.eve import EVE
from eve_ds.objectives.pretraining import pretraining_flops
from eve_ds.ops.build import build, use_built
from eve_ds.training.flops import peak_flops
from eve_ds.views import Layout

Row = dict[str, Any]
"""Result with the keys `part`, `what`, and one key per figure."""
Run = Callable[[], object]
EXPERTS, TOP_K, WIDTH, VOCABULARY = 32, 2, 768, 64_000
TOKENS = (4096, 16384, 65536)
"""Numbers of tokens of the parts `routing` and `layers`."""
BEYOND_CACHE = 4e8
"""Total size of the alternating inputs, in bytes."""


class Timing(NamedTuple):
    """Time of one call, in microseconds: median, minimum and maximum."""

    median: float
    low: float
    high: float


def facts() -> Iterator[Row]:
    """Yield device, versions, and the speed of a copy and of matrix products."""
    cuda = torch.cuda.is_available()
    yield {
        "what": "device",
        "name": torch.cuda.get_device_name() if cuda else "cpu",
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }
    yield {"what": "copy", "tb_s": copy_bandwidth()}
    shapes = [(8192, 8192, 8192), (16896, 3072, 768), (16896, 768, 3072), (640, VOCABULARY, WIDTH)]
    for m, n, k in shapes if cuda else [(64, 64, 64)]:
        x, weight = _normal(m, k), _normal(n, k)
        timing = graph_time([partial(torch.matmul, x, weight.t())])
        yield {
            "what": "matrix product",
            "shape": [m, n, k],
            "us": timing.median,
            "tflop_s": 2 * m * n * k / timing.median / 1e6,
        }


def copy_bandwidth() -> float:
    """Return the TB/s that a copy of 2 GB (on a CPU 2 MB) reads and writes."""
    source = torch.empty(2**30 if torch.cuda.is_available() else 2**20, dtype=torch.bfloat16, device=device()).normal_()
    target = torch.empty_like(source)
    return 4 * source.numel() / graph_time([partial(target.copy_, source)]).median / 1e6


def build_ops() -> Iterator[Row]:
    """Compile and load the ops of the device."""
    started = time.monotonic()
    library = build(device().type)
    if not use_built(torch.zeros(1, device=device())):
        raise RuntimeError("the built ops are not used: EVE_DS_OPS is `reference`")
    yield {"what": "build", "seconds": time.monotonic() - started, "library": library.name}


def step(preset: str, batch: int, compiled: bool, profiled: bool) -> Iterator[Row]:
    """Time a training step of two views in bf16: forward, backward and AdamW, without DeepSpeed."""
    training = Step(preset, batch)
    if compiled:
        training.model.backbone.compile_blocks()
    started = time.perf_counter()
    training.step()
    _synchronize()
    first = time.perf_counter() - started
    for _ in range(3):
        training.step()
    if profiled and torch.cuda.is_available():
        yield {"what": "host waits", "lines": _waits(training.step)}
    total, host = _step_time(training.step, 8 if torch.cuda.is_available() else 2)
    config = training.config
    flop = 3 * batch * pretraining_flops(config.model, config.masking, REAL_TOKENS)
    peak = peak_flops("bf16")
    yield {
        "what": "step",
        "preset": preset,
        "batch": batch,
        "compiled": compiled,
        "ms": total,
        "host_ms": host,
        "first_s": first,
        "pairs_s": batch / total * 1e3,
        "mfu": None if peak is None else flop / total * 1e3 / peak,
        "gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
    }
    if profiled:
        yield from _profile(training.step)


class Step:
    """EVE with random weights, one batch, and an optimizer."""

    def __init__(self, preset: str, batch: int) -> None:
        torch.manual_seed(0)
        self.config = load_config(preset)
        with torch.device("meta"):
            model = EVE(self.config.model)
        model = model.to_empty(device=device())
        draw_weights(model)
        self.model = model.to(torch.bfloat16).train()
        self.inputs = random_inputs(self.config, self.config.masking, batch)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self) -> None:
        """Run one training step."""
        backward(self.model, self.config, self.inputs)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def engine(preset: str, batch: int) -> Iterator[Row]:
    """Count host calls and milliseconds of an engine step at ZeRO 1, compared with DeepSpeed's own optimizer."""
    from eve_ds.benchmark.calls import compare_calls, step_config  # imports DeepSpeed

    for row in compare_calls(step_config(preset, batch), 10.0 if torch.cuda.is_available() else 0.0):
        yield {
            "what": row.measure,
            "batch": batch,
            "host_ms": row.ours_ms,
            "calls": row.ours_calls,
            "deepspeed_host_ms": row.peer_ms,
            "deepspeed_calls": row.peer_calls,
        }


def routing(tokens: Sequence[int]) -> Iterator[Row]:
    """Time routing, dispatch, combine and their backward passes in bf16, with their fraction of copy bandwidth."""
    use_built(torch.zeros(1, device=device()))  # loads the ops; this part calls them without autograd
    copy = copy_bandwidth()
    for number in tokens:
        sides = [RoutedTokens(number) for _ in range(_turns(number * WIDTH * 6))]
        token = number * WIDTH * 2  # bytes of all tokens
        moved = {
            "route": 8 * number * EXPERTS,
            "route, backward": 8 * number * EXPERTS,
            "dispatch": token * (1 + TOP_K),
            "combine": token * (1 + TOP_K),
            "dispatch, backward": token * (1 + TOP_K),
            "dispatch, backward, with the embedding": token * (1 + TOP_K),
            "combine, backward": token * (1 + 2 * TOP_K),
            "route, dispatch, combine": 2 * token * (1 + TOP_K),
            "sort, index, index_add": 2 * token * (1 + TOP_K),
            "router's product, fp32": token,
            "router's product, bf16 to fp32": token,
            "router's weight gradient, fp32": token,
            "router's weight gradient, bf16 to fp32": token,
        }
        for name, bytes_moved in moved.items():
            timing = graph_time([side.runs()[name] for side in sides])
            speed = bytes_moved / timing.median / 1e6
            yield {"what": name, "tokens": number, **_microseconds(timing), "tb_s": speed, "of_copy": speed / copy}


class RoutedTokens:
    """Tokens in bf16 and their routes from `route_topk`."""

    def __init__(self, tokens: int) -> None:
        self.x, self.upstream = _normal(tokens, WIDTH), _normal(tokens, WIDTH)
        self.logits = torch.randn(tokens, EXPERTS, device=device()) * 1.5
        self.bias = torch.randn(2, EXPERTS, device=device())
        self.modality_ids = (torch.arange(tokens, device=device()) % 7 < 2).long()
        self.router = torch.randn(EXPERTS, WIDTH, device=device())
        self.router_bf16 = self.router.bfloat16()
        # Not a result of a timed call: results of a recorded call are in the memory of its graph.
        self.route = self._route()
        self.gates, self.expert_ids, self.slots, self.source, self.sizes, self.probabilities = self.route[:6]
        self.rows = torch.ops.eve_ds.moe_dispatch(self.x, self.slots, self.source, None, None)

    def _route(self) -> Sequence[Tensor]:
        routed: Sequence[Tensor] = torch.ops.eve_ds.route_topk(
            self.logits, self.bias, self.modality_ids, None, None, TOP_K, -1
        )
        return routed

    def runs(self) -> dict[str, Run]:
        """Return the timed calls by name."""
        op = torch.ops.eve_ds
        *_, log_sum_exp, z_sum = self.route
        kept = (self.probabilities, log_sum_exp, self.expert_ids, self.slots, self.gates, None, self.modality_ids, 2)
        runs: dict[str, Run] = {
            "route": self._route,
            "route, backward": partial(op.route_topk_backward, self.gates, self.probabilities[0], z_sum, *kept),
            "dispatch": partial(op.moe_dispatch, self.x, self.slots, self.source, None, None),
            "combine": partial(op.moe_combine, self.rows, self.slots, self.gates, self.source),
            "dispatch, backward": partial(op.moe_dispatch_backward, self.rows, self.slots, self.modality_ids, 0),
            "dispatch, backward, with the embedding": partial(
                op.moe_dispatch_backward, self.rows, self.slots, self.modality_ids, 2
            ),
            "combine, backward": partial(
                op.moe_combine_backward, self.upstream, self.rows, self.slots, self.gates, self.source
            ),
            "route, dispatch, combine": self._layer,
            "sort, index, index_add": self._plain,
            "router's product, fp32": lambda: self.x.float() @ self.router.t(),
            "router's product, bf16 to fp32": partial(self._short_product, self.x, self.router_bf16.t()),
            "router's weight gradient, fp32": lambda: self.logits.t() @ self.x.float(),
            "router's weight gradient, bf16 to fp32": lambda: self._short_product(self.logits.bfloat16().t(), self.x),
        }
        return runs

    def _layer(self) -> None:
        gates, _, slots, source, *_ = self._route()
        rows = torch.ops.eve_ds.moe_dispatch(self.x, slots, source, None, None)
        torch.ops.eve_ds.moe_combine(rows, slots, gates, source)

    def _plain(self) -> None:
        """Sort, gather and sum with plain torch ops, given the chosen experts."""
        order = self.expert_ids.flatten().argsort(stable=True)
        token = order // TOP_K
        weighed = self.x[token] * self.gates.flatten()[order].unsqueeze(1).to(self.x.dtype)
        torch.zeros_like(self.x).index_add_(0, token, weighed)

    @staticmethod
    def _short_product(a: Tensor, b: Tensor) -> Tensor:
        if a.device.type == "cpu":  # the CPU has no product of bf16 into fp32
            return a @ b
        return torch.mm(a, b, out_dtype=torch.float32)


def layers(tokens: Sequence[int]) -> Iterator[Row]:
    """Time experts, their activation, losses and attention in bf16, compared with torch."""
    use_built(torch.zeros(1, device=device()))
    for number in tokens:
        yield from _experts(number)
    for rows in (1024, 4096, 8192) if torch.cuda.is_available() else (64,):
        yield from _cross_entropy(rows)
    yield from _pixel_loss(256 if torch.cuda.is_available() else 2)
    for batch, length in ((256, 66), (256, 213)) if torch.cuda.is_available() else ((2, 16),):
        yield from _attention(batch, length)


def _experts(tokens: int) -> Iterator[Row]:
    hidden, rows = 4 * WIDTH, tokens * TOP_K
    routed = RoutedTokens(tokens)
    x = routed.rows.clone().requires_grad_()
    weights = {
        "fc1": _normal(EXPERTS, hidden, WIDTH) * 0.02,
        "fc1_bias": torch.zeros(EXPERTS, hidden, dtype=torch.bfloat16, device=device()),
        "fc2": _normal(EXPERTS, WIDTH, hidden) * 0.02,
        "fc2_bias": torch.zeros(EXPERTS, WIDTH, dtype=torch.bfloat16, device=device()),
    }
    for weight in weights.values():
        weight.requires_grad_()

    flop = 4 * rows * WIDTH * hidden
    plain_x, plain_weight = routed.rows, weights["fc1"].detach()[0]
    if torch.cuda.is_available():  # omitted on a CPU, where the experts read the sizes on the host
        both = partial(_experts_both, x, routed.sizes, weights)
        yield _flop_row("experts, forward + backward", tokens, both, 3 * flop)
        yield from _experts_one_by_one(tokens, routed, weights, 3 * flop)
    yield _flop_row("a plain product of as many rows", tokens, lambda: plain_x @ plain_weight.t(), flop / 2)
    yield from _between_products(tokens, routed, weights)
    hidden_states = _normal(rows, hidden).requires_grad_()
    upstream = torch.randn_like(hidden_states)
    for name, activation in (
        ("quick_gelu", ops.quick_gelu),
        ("torch's GELU by tanh", partial(F.gelu, approximate="tanh")),
    ):
        run = partial(_gradient, activation, hidden_states, upstream)
        timing = graph_time([run])
        speed = 5 * hidden_states.numel() * 2 / timing.median / 1e6
        yield {"what": f"{name}, forward + backward", "tokens": tokens, **_microseconds(timing), "tb_s": speed}


def _experts_both(x: Tensor, sizes: Tensor, weights: dict[str, Tensor]) -> None:
    out = ops.grouped_feed_forward(x, sizes, **weights)
    torch.autograd.grad(out, [x, *weights.values()], out)


def _experts_one_by_one(tokens: int, routed: RoutedTokens, weights: dict[str, Tensor], flop: float) -> Iterator[Row]:
    """Time fp16 and fp32 by the clock of the host: the host waits for the GPU, so no graph can record the calls."""
    for dtype in (torch.float16, torch.float32):
        x = routed.rows.to(dtype).requires_grad_()
        mine = {name: weight.detach().to(dtype).requires_grad_() for name, weight in weights.items()}
        both = partial(_experts_both, x, routed.sizes, mine)
        both()
        spent = _step_time(both, 5)[0] * 1e3
        what = f"experts in {str(dtype).removeprefix('torch.')}, forward + backward, by the host's clock"
        yield {"what": what, "tokens": tokens, "us": spent, "tflop_s": flop / spent / 1e6}


def _between_products(tokens: int, routed: RoutedTokens, weights: dict[str, Tensor]) -> Iterator[Row]:
    """Time a grouped product and the ops that follow grouped products, with the bytes that they must move."""
    op, ends = torch.ops.eve_ds, routed.sizes.cumsum(0, dtype=torch.int32)
    fc1, fc1_bias, fc2_bias = (weights[name].detach() for name in ("fc1", "fc1_bias", "fc2_bias"))
    product = partial(F.grouped_mm, routed.rows, fc1.transpose(1, 2), offs=ends)
    yield _flop_row("a grouped product", tokens, product, 2 * len(routed.rows) * fc1[0].numel())
    hidden, out = _normal(len(routed.rows), fc1.shape[1]), torch.empty_like(routed.rows)
    d_hidden = torch.randn_like(hidden)
    runs: dict[str, tuple[Run, int]] = {
        "experts' bias and quick_gelu": (
            partial(op.grouped_bias_quick_gelu, hidden, fc1_bias, ends),
            2 * hidden.nbytes,
        ),
        "experts' bias and quick_gelu, backward": (
            partial(op.grouped_bias_quick_gelu_backward, d_hidden, hidden, fc1_bias, ends),
            3 * hidden.nbytes,
        ),
        "experts' bias in place": (partial(op.grouped_bias_, out, fc2_bias, ends), 2 * out.nbytes),
        "experts' bias, backward": (partial(op.grouped_bias_backward, out, ends), out.nbytes),
    }
    for name, (run, moved) in runs.items():
        timing = graph_time([run])
        yield {"what": name, "tokens": tokens, **_microseconds(timing), "tb_s": moved / timing.median / 1e6}


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> None:
    torch.autograd.grad(function(x), x, upstream)


def _cross_entropy(rows: int) -> Iterator[Row]:
    vocabulary = VOCABULARY if torch.cuda.is_available() else 512
    hidden, weight = _normal(rows, WIDTH).requires_grad_(), (_normal(vocabulary, WIDTH) * 0.02).requires_grad_()
    target = torch.randint(0, vocabulary, (rows,), device=device())
    chunk = max(3 * 2**25 // (2 * vocabulary) // 64 * 64, 64)

    def plain() -> None:
        loss = F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")
        torch.autograd.grad(loss, [hidden, weight])

    def ours(size: int | None) -> None:
        torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, None, target, size), [hidden, weight])

    flop = 6 * rows * WIDTH * vocabulary
    sides: dict[str, Run] = {
        "as it is": partial(ours, None),
        "in chunks of 96 MiB": partial(ours, chunk),
        "by torch": plain,
    }
    for name, run in sides.items():
        yield _flop_row(f"linear cross entropy, {name}", rows, run, flop)


def _pixel_loss(batch: int) -> Iterator[Row]:
    pixels = torch.randn(batch, 3, 224, 224, device=device())
    ids = torch.rand(batch, 196, device=device()).argsort(1)[:, :147].sort().values.contiguous()
    predictions = _normal(batch, 147, 768).requires_grad_()

    def run() -> None:
        torch.autograd.grad(ops.masked_pixel_loss(pixels, predictions, ids, 16).sum(), predictions)

    timing = graph_time([run])
    yield {
        "what": "masked pixel loss, forward + backward",
        "shape": [batch, 147],
        **_microseconds(timing),
        "tb_s": predictions.numel() * 14 / timing.median / 1e6,
    }


def _attention(batch: int, length: int) -> Iterator[Row]:
    heads, width = 12, 64
    q, k, v = (_normal(batch, heads, length, width).requires_grad_() for _ in range(3))
    upstream = torch.randn_like(q)
    real = torch.randint(length // 2, length + 1, (batch, 1), device=device())
    mask = (torch.arange(length, device=device()) < real)[:, None, None]
    flop = 14 * batch * heads * length**2 * width

    def run(backend: SDPBackend, key_mask: Tensor | None) -> None:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        torch.autograd.grad(out, [q, k, v], upstream)

    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    for name, backend in backends.items() if torch.cuda.is_available() else (("plain", SDPBackend.MATH),):
        for how, key_mask in (("masked", mask), ("without a mask", None)):
            yield _flop_row(f"attention, {name}, {how}", batch * length, partial(run, backend, key_mask), flop)
    layout = Layout.of(mask[:, 0, 0])
    packed = _normal(layout.num_tokens, 3 * heads * width).requires_grad_()
    mixed = _normal(layout.num_tokens, heads * width)

    def of_the_model() -> None:
        torch.autograd.grad(attend(None, packed, heads, layout), packed, mixed)

    yield _flop_row("attention of the model, padding left out", layout.num_tokens, of_the_model, flop)


def _flop_row(name: str, tokens: int, run: Run, flop: float) -> Row:
    timing = graph_time([run])
    return {"what": name, "tokens": tokens, **_microseconds(timing), "tflop_s": flop / timing.median / 1e6}


def images(count: int) -> Iterator[Row]:
    """Time decoding of `count` photographs; imported here, as no other part needs packages of the data pipeline."""
    from eve_ds.benchmark.gpu_images import images

    return images(count)


def graph_time(runs: Sequence[Run], repeats: int = 10) -> Timing:
    """Return the mean time of one run. All runs are recorded in one CUDA graph; on a CPU they run once."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for run in runs:
            run()
        spent = (time.perf_counter() - started) / len(runs) * 1e6
        return Timing(spent, spent, spent)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the setup of first calls must not be recorded
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    spans = []
    for number in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= 3:
            spans.append(begin.elapsed_time(end) * 1e3 / len(runs))
    return Timing(statistics.median(spans), min(spans), max(spans))


def _microseconds(timing: Timing) -> Row:
    return {"us": timing.median, "us_low": timing.low, "us_high": timing.high}


def _turns(bytes_each: int) -> int:
    return max(2, min(16, int(BEYOND_CACHE / bytes_each))) if torch.cuda.is_available() else 1


def _step_time(run: Run, repeats: int) -> tuple[float, float]:
    """Return the median milliseconds of a step, and of the host until it has issued the step."""
    spans = []
    for _ in range(repeats):
        _synchronize()
        begin = time.perf_counter()
        run()
        issued = time.perf_counter()
        _synchronize()
        spans.append((time.perf_counter() - begin, issued - begin))
    total, host = (statistics.median(column) * 1e3 for column in zip(*spans, strict=True))
    return total, host


def _waits(run: Run) -> dict[str, int]:
    """Return the lines of this package at which the host waited for the GPU, with counts."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{warning.filename.rpartition('eve_ds/')[2]}:{warning.lineno}" for warning in seen))


def _profile(run: Run) -> Iterator[Row]:
    """Yield number of launches, busy time of the GPU, and the 30 slowest kernels (on a CPU: operators)."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
        _synchronize()
    kind, key = ("CUDA", "self_device_time_total") if cuda else ("CPU", "self_cpu_time_total")
    events = [event for event in profiler.key_averages() if str(event.device_type).endswith(kind)]
    spent = {event.key: (getattr(event, key) / 1e3, event.count) for event in events}
    yield {
        "what": "profile",
        "launches": sum(count for _, count in spent.values()),
        "busy_ms": sum(milliseconds for milliseconds, _ in spent.values()),
    }
    for name, (milliseconds, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:30]:
        yield {"what": "kernel", "name": name[:90], "ms": milliseconds, "count": count}


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Run one part; print and write each row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("facts", "build", "step", "routing", "layers", "engine", "images"))
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="file to append JSON lines to")
    parser.add_argument("--preset", default="eve_base")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--profiled", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "facts": facts,
        "build": build_ops,
        "step": partial(step, arguments.preset, arguments.batch, arguments.compiled, arguments.profiled),
        "routing": partial(routing, arguments.tokens),
        "layers": partial(layers, arguments.tokens),
        "engine": partial(engine, arguments.preset, arguments.batch),
        "images": partial(images, arguments.batch),
    }
    for row in parts[arguments.part]():
        line = json.dumps({"part": arguments.part, **rounded(row)})
        print(line, flush=True)
        with arguments.rows.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
