"""Measures of `launcher/benchmark.py`: routing, complete MoE layers, losses, training steps.

Each measure yields one row per installed peer, and an :class:`Absent` for each other peer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds import ops
from eve_ds.benchmark.data import data
from eve_ds.benchmark.harness import Absent, Figures, Measure, Run, compare, is_quick
from eve_ds.benchmark.inputs import REAL_TOKENS, backward, device, random_inputs, reference_ops
from eve_ds.benchmark.peers import StockMoE, StockRouting, find, join_group_of_one, megatron_permutation
from eve_ds.config import Config, MaskingConfig, ModelConfig, MoEConfig, load_config
from eve_ds.model.eve import EVE
from eve_ds.model.experts import Experts
from eve_ds.model.moe import MoE
from eve_ds.ops import reference
from eve_ds.ops.feed_forward import grouped_products

TOKENS, WIDTH, EXPERTS = 4096, 768, 32
"""Sizes of the MoE layers of EVE-Base."""
DTYPES = (torch.float32, torch.bfloat16)
Rows = Iterator[list[Measure] | Absent | Figures]


def routing(seconds: float) -> Rows:
    """Time gate, dispatch and combine, forward and backward, without and with the matrix product of the router."""
    stock = StockRouting(capacity_factor=1.0)
    capacity = ops.expert_capacity(TOKENS, EXPERTS, 2, 1.0, 4)
    for dtype in DTYPES:
        inputs = _routing_inputs(dtype, TOKENS)
        for with_router in (False, True):
            name = "routing with router" if with_router else "routing"
            ours = partial(_our_routing, inputs, capacity, with_router)
            peers: dict[str, Run] = {
                "deepspeed": partial(_stock_routing, inputs, stock, with_router),
                "torch": partial(_our_routing, inputs, capacity, with_router, ops=reference),
            }
            yield compare(name, dtype, f"T={TOKENS} D={WIDTH} E={EXPERTS} k=2", ours, peers, seconds)
        megatron = megatron_permutation()
        if megatron is None:
            yield Absent("permutation", "megatron-core", "not installed")
            continue
        ours = partial(_our_permutation, inputs)
        yield compare(
            "permutation",
            dtype,
            f"T={TOKENS} D={WIDTH} E={EXPERTS} k=2 dropless",
            ours,
            {"megatron-core": partial(_megatron_permutation, inputs, megatron)},
            seconds,
        )
    yield Absent("routing", "tutel", "not installed" if find("tutel") is None else "runs on CUDA only")


def _routing_inputs(dtype: torch.dtype, tokens: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {
        "x": torch.randn(tokens, WIDTH).to(dtype),
        "weight": torch.randn(EXPERTS, WIDTH) / math.sqrt(WIDTH),
        "embedding": torch.randn(2, WIDTH),
        "logits": torch.randn(tokens, EXPERTS),
        "upstream": torch.randn(tokens, WIDTH).to(dtype),
    }
    leaves = {name: tensor.to(device()).requires_grad_(name != "upstream") for name, tensor in made.items()}
    return leaves | {"modality": torch.randint(0, 2, (tokens,), device=device())}


def _backward(out: Tensor, balance: Tensor, inputs: dict[str, Tensor]) -> None:
    torch.autograd.backward([out, balance], [inputs["upstream"], None])
    for tensor in inputs.values():
        tensor.grad = None


def _our_routing(inputs: dict[str, Tensor], capacity: int, with_router: bool, ops: object = ops) -> None:
    x, modality = inputs["x"], inputs["modality"]
    if with_router:
        rows, routed = ops.route_and_dispatch(  # type: ignore[attr-defined]
            x, inputs["weight"], inputs["embedding"], modality, top_k=2, capacity=capacity, embed_rows=True
        )
    else:
        routed = ops.route_topk(inputs["logits"], top_k=2, capacity=capacity)  # type: ignore[attr-defined]
        rows = ops.moe_dispatch(x, routed.slots, routed.source, inputs["embedding"], modality)  # type: ignore[attr-defined]
    out = ops.moe_combine(rows, routed.slots, routed.gates, routed.source)  # type: ignore[attr-defined]
    tokens = torch.tensor(float(len(x)), device=x.device)
    _backward(out, reference.load_balancing_loss(routed.first_choices, routed.probability_sum, tokens), inputs)


def _stock_routing(inputs: dict[str, Tensor], stock: StockRouting, with_router: bool) -> None:
    x = inputs["x"] + inputs["embedding"].to(inputs["x"].dtype)[inputs["modality"]]
    logits = F.linear(x.float(), inputs["weight"]) if with_router else inputs["logits"]
    balance, slots, gates, capacity = stock.route(logits)
    rows = stock.dispatch(x, slots, EXPERTS, capacity)
    _backward(stock.combine(rows.flatten(0, 1), slots, gates, len(x)), balance, inputs)


def _our_permutation(inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        routed = ops.route_topk(inputs["logits"], top_k=2, capacity=-1)
    rows = ops.moe_dispatch(inputs["x"], routed.slots, routed.source)
    out = ops.moe_combine(rows, routed.slots, routed.gates, routed.source)
    out.backward(inputs["upstream"])
    inputs["x"].grad = None


def _megatron_permutation(inputs: dict[str, Tensor], megatron: object) -> None:
    with torch.no_grad():
        probabilities, ids = inputs["logits"].softmax(dim=1).topk(2)
        chosen = torch.zeros_like(inputs["logits"]).scatter(1, ids, probabilities / probabilities.sum(1, keepdim=True))
        routing_map = chosen > 0
    rows, *_, order = megatron.permute(inputs["x"], routing_map)[:3]  # type: ignore[attr-defined]
    out = megatron.unpermute(rows, order, inputs["x"].shape, probs=chosen, routing_map=routing_map)  # type: ignore[attr-defined]
    out.backward(inputs["upstream"].to(out.dtype))
    inputs["x"].grad = None


def moe(seconds: float) -> Rows:
    """Time our dropless layer against DeepSpeed's layer with capacity factors 1, 1.5 and 2, and the experts alone.

    The results determined the implementation of experts in :func:`eve_ds.ops.grouped_feed_forward`.
    """
    join_group_of_one()
    for dtype in DTYPES:
        torch.manual_seed(0)
        layer = MoE(ModelConfig(moe=MoEConfig(num_experts=EXPERTS, routing="dropless"))).to(device())
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=0.02)
        layer = layer.to(dtype).train()
        tokens = 512 if is_quick(seconds) else TOKENS
        inputs = _routing_inputs(dtype, tokens)
        for factor in (1.5,) if is_quick(seconds) else (1.0, 1.5, 2.0):
            stock = StockMoE(layer, factor).train()
            yield compare(
                f"moe layer, capacity factor {factor}",
                dtype,
                f"T={tokens} D={WIDTH} E={EXPERTS} k=2",
                partial(_layer_step, layer, inputs),
                {"deepspeed": partial(_layer_step, stock, inputs)},
                seconds,
            )
        experts = partial(_experts_step, layer.experts, inputs)
        forms: dict[str, Run] = {
            "F.grouped_mm": partial(experts, grouped_products),
            "torch, expert by expert": partial(experts, reference.grouped_feed_forward),
        }
        shape = f"{2 * tokens} rows D={WIDTH} E={EXPERTS}"
        yield compare("experts", dtype, shape, partial(experts, ops.grouped_feed_forward), forms, seconds)


def _experts_step(experts: Experts, inputs: dict[str, Tensor], form: object) -> None:
    rows = torch.cat([inputs["x"], inputs["upstream"]])
    sizes = torch.full((EXPERTS,), len(rows) // EXPERTS, device=rows.device)
    out = form(rows, sizes, experts.fc1_weight, experts.fc1_bias, experts.fc2_weight, experts.fc2_bias)  # type: ignore[operator]
    out.backward(rows.detach())
    for tensor in (inputs["x"], *experts.parameters()):
        tensor.grad = None


def _layer_step(layer: torch.nn.Module, inputs: dict[str, Tensor]) -> None:
    output = layer(inputs["x"], inputs["modality"])
    _backward(output.hidden_states, output.load_balancing_loss, inputs)
    for parameter in layer.parameters():
        parameter.grad = None


def losses(seconds: float) -> Rows:
    """Time linear cross entropy and masked pixel loss, forward and backward."""
    yield from _cross_entropy(seconds)
    torch.manual_seed(0)
    pixels = torch.randn(32, 3, 224, 224, device=device())
    ids = torch.stack([torch.randperm(196) for _ in range(32)])[:, :147].to(device())
    for dtype in DTYPES:
        predictions = torch.randn(32, 147, 768).to(device(), dtype).requires_grad_()
        for measure, normalized in (("masked pixel loss", True), ("masked pixel loss, raw pixels", False)):
            step = partial(_pixel_step, pixels, predictions, ids, normalized)
            yield compare(
                measure,
                dtype,
                "B=32 N=147 P=16 at 224",
                partial(step, ops.masked_pixel_loss),
                {"torch, masked rows": partial(step, reference.masked_pixel_loss)},
                seconds,
                memory=True,
            )


def _cross_entropy(seconds: float) -> Rows:
    quick = is_quick(seconds)
    rows, vocabulary = (128, 16_000) if quick else (640, 64_000)
    chunked = find("deepspeed.runtime.chunked_cross_entropy")
    for dtype in reversed(DTYPES):
        torch.manual_seed(0)
        hidden = torch.randn(rows, WIDTH).to(device(), dtype).requires_grad_()
        weight = (torch.randn(vocabulary, WIDTH) * 0.02).to(device(), dtype).requires_grad_()
        step = partial(_cross_entropy_step, hidden, weight, torch.randint(0, vocabulary, (rows,), device=device()))
        peers: dict[str, Run] = {"torch, float cast": partial(step, reference.linear_cross_entropy)}
        if chunked is not None:
            peers["deepspeed chunked"] = partial(step, partial(_deepspeed_cross_entropy, chunked.chunked_cross_entropy))
        if hasattr(F, "linear_cross_entropy"):
            peers["F.linear_cross_entropy"] = partial(step, _torch_linear_cross_entropy)
        ours = partial(step, ops.linear_cross_entropy)
        shape = f"N={rows} D={WIDTH} V={vocabulary}"
        yield compare("linear cross entropy", dtype, shape, ours, peers, seconds, memory=True)
    missing = "not installed" if find("liger_kernel") is None else "runs on CUDA only"
    yield Absent("linear cross entropy", "liger", missing)


def _cross_entropy_step(hidden: Tensor, weight: Tensor, target: Tensor, loss: object) -> None:
    loss(hidden, weight, None, target).backward()  # type: ignore[operator]
    hidden.grad = weight.grad = None


def _deepspeed_cross_entropy(chunked: object, hidden: Tensor, weight: Tensor, bias: None, target: Tensor) -> Tensor:
    return chunked(F.linear(hidden, weight, bias), target, reduction="sum")  # type: ignore[operator]


def _torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: None, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, target, reduction="sum")


def _pixel_step(pixels: Tensor, predictions: Tensor, ids: Tensor, normalized: bool, loss: object) -> None:
    loss(pixels, predictions, ids, 16, normalize=normalized).sum().backward()  # type: ignore[operator]
    predictions.grad = None


def step(seconds: float) -> Rows:
    """Time a training step (forward, backward, AdamW) with captions of 12 tokens.

    The peer is the same model with DeepSpeed's MoE layer, torch losses, and captions padded to `model.text_length`.
    """
    join_group_of_one()
    for preset, batch in (("eve_tiny", 32), ("eve_base", 4)):
        if preset == "eve_base" and is_quick(seconds):
            yield Absent("training step", "deepspeed, torch losses, padding", "eve_base is left out by --quick")
            continue
        config = load_config(preset)
        both = BothForms(config, batch)
        yield compare(
            f"training step, {preset}",
            torch.float32,
            f"batch {batch}, captions of {REAL_TOKENS} of {config.model.text_length}",
            partial(both.step, stock=False),
            {"deepspeed MoE, torch losses, padding": partial(both.step, stock=True)},
            seconds,
        )


class BothForms:
    """Two implementations of a step that share all weights except the experts; each has its own optimizer."""

    def __init__(self, config: Config, batch: int) -> None:
        torch.manual_seed(0)
        self.config = config
        self.model = EVE(config.model).train().to(device())
        blocks = [block for block in self.model.backbone.blocks if block.is_moe]
        factor = config.model.moe.capacity_factor
        self.layers = [(block, block.moe, StockMoE(cast(MoE, block.moe), factor).train()) for block in blocks]
        self.optimizers = [self._optimizer(stock) for stock in (False, True)]
        masks = {name: getattr(config.masking, name) for name in ("patch_mask_ratio", "predicted_patch_share")}
        self.inputs = random_inputs(config, MaskingConfig.model_validate(masks), batch)  # views of whole batches

    def _place(self, stock: bool) -> None:
        for block, ours, theirs in self.layers:
            block.moe = theirs if stock else ours

    def _optimizer(self, stock: bool) -> torch.optim.AdamW:
        self._place(stock)
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, stock: bool) -> None:
        """Run one step of the peer (`stock`) or of ours."""
        self.model.backbone.keep_padding = stock
        self.model.pack_views = not stock  # DeepSpeed's layer accepts the tokens of one view only
        self._place(stock)
        with reference_ops() if stock else nullcontext():
            backward(self.model, self.config, self.inputs | ({"layouts": None} if stock else {}))
            optimizer = self.optimizers[stock]
            optimizer.step()
            optimizer.zero_grad()


MEASURES = {"routing": routing, "moe": moe, "losses": losses, "step": step, "data": data}
