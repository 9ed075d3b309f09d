"""Compiled CPU ops against the reference in fp64, for unusual shapes, with random upstream gradients.

Tolerances. Integers must be equal for equal logits: the fp64 reference routes by the same fp32 logits, so near ties
resolve the same way. fp32: FLOAT32 allows the last bits of a sum of a few hundred terms. bf16: a stored value is
rounded once, to 8 bits, so it is within one unit in the last place, BFLOAT16, of the fp64 value for the same bf16
inputs.
"""

import itertools
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from eve_ds import ops
from eve_ds.ops import build, reference
from eve_ds.ops import routing as routing_ops
from eve_ds.ops.feed_forward import grouped_products

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
BFLOAT16 = {"rtol": 2**-7, "atol": 1e-6}
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = {  # tokens, experts, choices, width
    "one token": (1, 8, 2, 16),
    "one expert": (5, 1, 1, 3),
    "every expert chosen": (7, 5, 5, 11),
    "primes": (257, 13, 3, 37),
    "several chunks": (600, 32, 2, 48),
    "no tokens": (0, 4, 2, 8),
}

pytestmark = pytest.mark.skipif(
    os.environ.get("EVE_DS_OPS") != "build" and not shutil.which("g++"), reason="no g++ to build the ops with"
)


@pytest.fixture(autouse=True)
def _fatal(monkeypatch):
    """Make a failed build an error; otherwise these tests would compare the reference with itself."""
    monkeypatch.setenv("EVE_DS_OPS", "build")


def leaf(tensor, dtype):
    return tensor.detach().clone().to(dtype).requires_grad_()


def tolerance(dtype):
    return FLOAT32 if dtype == torch.float32 else BFLOAT16


def assert_close(ours, expected, dtype=torch.float32, scale=1.0):
    """Compare two tensors; `scale` is the size of the summed terms, for sums whose terms cancel."""
    allowed = tolerance(dtype)
    torch.testing.assert_close(
        ours.double(), expected.double(), rtol=allowed["rtol"], atol=allowed["atol"] * max(scale, 1.0)
    )


def both(name, *arguments, dtype, **options):
    """Call the compiled op and the fp64 reference on leaves of their own; floating tensors take the dtype."""
    results = []
    for module, wanted in ((ops, dtype), (reference, torch.float64)):
        mine = [
            leaf(item, wanted if item.dtype == dtype else torch.promote_types(item.dtype, wanted))
            if isinstance(item, torch.Tensor) and item.is_floating_point()
            else item
            for item in arguments
        ]
        results.append((getattr(module, name)(*mine, **options), mine))
    return results


def random_logits(tokens, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator) * 2


def check_route(logits, top_k, capacity, valid=None, noise=None, bias=None, modality=None):
    options = {"top_k": top_k, "capacity": capacity, "valid": valid, "modality_ids": modality}
    results = []
    for module, dtype in ((ops, torch.float32), (reference, torch.float64)):
        mine, mine_bias = leaf(logits, dtype), None if bias is None else leaf(bias, dtype)
        shift = None if noise is None else noise.to(dtype)
        results.append((module.route_topk(mine, **options, noise=shift, modality_bias=mine_bias), mine, mine_bias))
    (ours, logits_ours, bias_ours), (expected, logits_expected, bias_expected) = results
    for name in ("expert_ids", "slots", "source", "counts"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    for name in ("gates", "probabilities", "first_choices", "probability_sum", "z_sum"):
        assert_close(getattr(ours, name), getattr(expected, name), scale=float(expected.z_sum.detach()) / 10)
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(getattr(ours, n).shape, generator=generator) for n in ("gates", "probability_sum", "z_sum")]
    for routing in (ours, expected):
        kept = (routing.gates, routing.probability_sum, routing.z_sum)
        sum((out * up.to(out.dtype)).sum() for out, up in zip(kept, upstream, strict=True)).backward()
    torch.testing.assert_close(logits_ours.grad.double(), logits_expected.grad, rtol=1e-4, atol=2e-6)
    if bias is not None:
        torch.testing.assert_close(bias_ours.grad.double(), bias_expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("capacity", [-1, 0, 3])
@pytest.mark.parametrize("extras", [False, True])
def test_route_topk_matches_reference(shape, capacity, extras):
    tokens, experts, top_k, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    logits = random_logits(tokens, experts)
    if not extras:
        check_route(logits, top_k, capacity)
        return
    check_route(
        logits,
        top_k,
        capacity,
        valid=torch.rand(tokens, generator=generator) > 0.3,
        noise=torch.randn(tokens, experts, generator=generator),
        bias=torch.randn(3, experts, generator=generator),
        modality=torch.randint(0, 3, (tokens,), generator=generator),
    )


def test_route_topk_with_overflowing_and_empty_experts():
    logits = torch.full((300, 6), -3.0)
    logits[:, 4] = 5.0
    logits[:, 2] = 1.0
    for capacity in (-1, 7, 300):
        check_route(logits, 2, capacity)
        check_route(logits, 1, capacity)


def test_route_topk_without_valid_tokens():
    check_route(random_logits(20, 4), 2, 5, valid=torch.zeros(20, dtype=torch.bool))


def test_ties_go_to_the_lowest_expert():
    for experts in (3, 16, 33):
        routing = ops.route_topk(torch.zeros(4, experts), top_k=3, capacity=-1)
        assert routing.expert_ids.tolist() == [[0, 1, 2]] * 4


def test_route_topk_with_large_and_infinite_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 2.0, 1.0], [80.0, 80.0, -80.0]])
    check = ops.route_topk(logits, top_k=2, capacity=-1)
    expected = reference.route_topk(logits.double(), top_k=2, capacity=-1)
    assert torch.equal(check.expert_ids, expected.expert_ids)
    assert_close(check.probabilities, expected.probabilities)


@settings(max_examples=40)
@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 6), st.integers(-1, 30), st.integers(0, 10**6))
def test_route_topk_matches_reference_for_random_shapes(tokens, experts, top_k, capacity, seed):
    check_route(random_logits(tokens, experts, seed), min(top_k, experts), capacity)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("capacity", "embedded"), [(-1, False), (-1, True), (0, True), (4, False), (4, True)])
def test_dispatch_and_combine_match_reference(dtype, shape, capacity, embedded):
    tokens, experts, top_k, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(2)
    valid = torch.rand(tokens, generator=generator) > 0.2
    routing = ops.route_topk(random_logits(tokens, experts), top_k=top_k, capacity=capacity, valid=valid)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    embedding = torch.randn(2, width, generator=generator)
    modality = torch.randint(0, 2, (tokens,), generator=generator)
    arguments = (x, routing.slots, routing.source, *((embedding, modality) if embedded else ()))
    (rows, mine), (expected, theirs) = both("moe_dispatch", *arguments, dtype=dtype)
    assert rows.dtype == dtype
    assert_close(rows, expected, dtype)
    upstream = torch.randn(rows.shape, generator=generator).to(dtype)
    rows.backward(upstream)
    expected.backward(upstream.double())
    assert_close(mine[0].grad, theirs[0].grad, dtype, scale=10.0)
    if embedded:
        assert_close(mine[3].grad, theirs[3].grad, scale=100.0)

    expert_rows = torch.randn(rows.shape, generator=generator).to(dtype)
    (out, mine), (expected, theirs) = both(
        "moe_combine", expert_rows, routing.slots, routing.gates.detach(), routing.source, dtype=dtype
    )
    assert_close(out, expected, dtype)
    upstream = torch.randn(out.shape, generator=generator).to(dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    assert_close(mine[0].grad, theirs[0].grad, dtype)
    assert_close(mine[2].grad, theirs[2].grad, scale=20.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("embed_rows", [False, True])
@pytest.mark.parametrize("capacity", [-1, 5])
def test_route_and_dispatch_is_one_node_with_the_gradients_of_its_parts(dtype, embed_rows, capacity):
    generator = torch.Generator().manual_seed(4)
    tokens, experts, width = 300, 8, 24
    # Multiples of 1/8 have exact products, so that fp32 and fp64 logits have the same order and ties.
    x = (torch.randn(tokens, width, generator=generator) * 8).round().div(8).to(dtype)
    weight = (torch.randn(experts, width, generator=generator) * 8).round() / 8
    embedding = (torch.randn(2, width, generator=generator) * 8).round() / 8
    modality = torch.randint(0, 2, (tokens,), generator=generator)
    valid = torch.rand(tokens, generator=generator) > 0.2
    options = {"top_k": 2, "capacity": capacity, "valid": valid, "embed_rows": embed_rows}
    results = both("route_and_dispatch", x, weight, embedding, modality, dtype=dtype, **options)
    (rows, routing), mine = results[0]
    (expected_rows, expected), theirs = results[1]
    assert torch.equal(routing.slots, expected.slots)
    assert rows.grad_fn is routing.gates.grad_fn
    assert_close(rows, expected_rows, dtype)
    up_rows = torch.randn(rows.shape, generator=generator).to(dtype)
    up_gates, up_sum = torch.randn(tokens, 2, generator=generator), torch.randn(experts, generator=generator)
    for out, route in ((rows, routing), (expected_rows, expected)):
        total = (out * up_rows.to(out.dtype)).sum() + (route.gates * up_gates).sum() * 3
        (total + (route.probability_sum * up_sum).sum() + route.z_sum / 50).backward()
    for index, kind in ((0, dtype), (1, torch.float32), (2, torch.float32)):
        error = (mine[index].grad.double() - theirs[index].grad).norm() / theirs[index].grad.norm()
        # bf16: the gradient through the rows is rounded, then its sum with the gradient through the router.
        assert error < (2e-6 if kind == torch.float32 else 4e-3), index


@pytest.mark.parametrize("form", [ops, reference], ids=["built", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("embed_rows", [False, True])
@pytest.mark.parametrize("capacity", [-1, 0, 3])
def test_zero_tokens_give_zero_rows_and_zero_gradients(form, dtype, embed_rows, capacity):
    generator = torch.Generator().manual_seed(12)
    experts, width, none = 4, 8, torch.zeros(0, dtype=torch.int64)
    x = torch.zeros(0, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(experts, width, generator=generator, requires_grad=True)
    embedding = torch.randn(2, width, generator=generator, requires_grad=True)
    options = {"top_k": 2, "capacity": capacity, "valid": none.bool(), "embed_rows": embed_rows}
    rows, routing = form.route_and_dispatch(x, weight, embedding, none, **options)
    assert rows.shape == (experts * max(capacity, 0), width)
    assert rows.eq(0).all()
    assert routing.source.eq(-1).all()
    assert routing.counts.tolist() == [0] * experts
    out = form.moe_combine(rows, routing.slots, routing.gates, routing.source)
    assert out.shape == (0, width)
    assert out.dtype == rows.dtype == dtype
    terms = (rows, out, routing.gates, routing.probability_sum, routing.z_sum)
    sum((term * torch.randn(term.shape, generator=generator)).sum() for term in terms).backward()
    for parameter in (x, weight, embedding):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "chunk"),
    [(70, 48, 501, 32), (70, 48, 501, 8), (1, 7, 3, 4), (9, 16, 64, 100), (0, 8, 16, 4), (0, 8, 16, None)],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_cross_entropy_matches_reference(dtype, rows, width, vocabulary, chunk, with_bias):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.3).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype) if with_bias else None
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    ours = [None if item is None else leaf(item, dtype) for item in (hidden, weight, bias)]
    theirs = [None if item is None else leaf(item, torch.float64) for item in (hidden, weight, bias)]
    loss = ops.linear_cross_entropy(*ours, target, chunk)
    expected = reference.linear_cross_entropy(*theirs, target)
    # bf16 logits of up to 8 are rounded by up to 1/64 each; the errors are random over the row.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=1e-4)
    (loss * 0.7).backward()
    (expected * 0.7).backward()
    for mine, wanted in zip(ours, theirs, strict=True):
        if mine is None:
            continue
        assert mine.grad.dtype == dtype
        assert mine.grad.shape == mine.shape
        error = float((mine.grad.double() - wanted.grad).norm() / wanted.grad.norm().clamp(min=1e-6))
        assert error < (1e-6 if dtype == torch.float32 else 6e-3)


def test_linear_cross_entropy_in_bf16_is_as_accurate_as_torch():
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(256, 64, generator=generator).bfloat16()
    weight = (torch.randn(1000, 64, generator=generator) * 0.3).bfloat16()
    target = torch.randint(0, 1000, (256,), generator=generator)
    exact = [leaf(item, torch.float64) for item in (hidden, weight)]
    reference.linear_cross_entropy(*exact, None, target).backward()
    errors = {}
    for name, module in (("ours", ops), ("torch", reference)):
        mine = [leaf(item, torch.bfloat16) for item in (hidden, weight)]
        module.linear_cross_entropy(*mine, None, target).backward()
        errors[name] = [float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in zip(mine, exact, strict=True)]
    for mine, torchs in zip(errors["ours"], errors["torch"], strict=True):
        assert mine < 1.1 * torchs


def test_linear_cross_entropy_works_without_gradients_and_refuses_a_second_backward():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target = torch.arange(6)
    with torch.no_grad():
        loss = ops.linear_cross_entropy(hidden, weight, None, target, 2)
        nothing = ops.linear_cross_entropy(hidden[:0], weight, None, target[:0])
    assert not loss.requires_grad
    assert_close(loss, reference.linear_cross_entropy(hidden, weight, None, target))
    assert nothing.item() == 0.0
    loss = ops.linear_cross_entropy(hidden, weight, None, target, 2)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs backward once"):
        loss.backward()


def pixel_loss_by_unfolding(pixels, predictions, ids, patch, normalize):
    """Masked patches by an independent path: unfolded pixels are (B, channel * row * column, patches)."""
    patches = F.unfold(pixels, patch, stride=patch).unflatten(1, (3, patch * patch)).permute(0, 3, 2, 1).flatten(2)
    target = patches[torch.arange(len(ids)).unsqueeze(1), ids]
    if normalize:
        centered = target - target.mean(dim=-1, keepdim=True)
        variance = centered.square().sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)
        target = centered / (variance + 1e-6).sqrt()
    return (predictions - target).square().mean(dim=-1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "height", "width", "patch", "masked"),
    [(3, 28, 21, 7, 5), (1, 16, 16, 16, 1), (2, 8, 8, 1, 9), (2, 32, 16, 8, 0), (0, 28, 21, 7, 5), (0, 8, 8, 8, 0)],
)
def test_masked_pixel_loss_matches_reference(dtype, batch, height, width, patch, masked, normalize):
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(batch, 3, height, width, generator=generator) * 2 + 1
    pixels[:, :, :patch, :patch] = 0.25  # a patch of one color, whose variance is 0
    count = (height // patch) * (width // patch)
    ids = torch.rand(batch, count, generator=generator).argsort(dim=1)[:, :masked]
    predictions = torch.randn(batch, masked, patch**2 * 3, generator=generator).to(dtype)
    ours, theirs = leaf(predictions, dtype), leaf(predictions, torch.float64)
    losses = ops.masked_pixel_loss(pixels, ours, ids, patch, normalize=normalize)
    expected = pixel_loss_by_unfolding(pixels.double(), theirs, ids, patch, normalize)
    assert losses.shape == (batch, masked)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    plain = reference.masked_pixel_loss(pixels.double(), theirs, ids, patch, normalize=normalize)
    torch.testing.assert_close(plain, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(losses.shape, generator=generator)
    losses.backward(upstream)
    expected.backward(upstream.double())
    assert_close(ours.grad, theirs.grad, dtype, scale=10.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_quick_gelu_matches_reference(dtype, count):
    generator = torch.Generator().manual_seed(10)
    x = (torch.randn(count, generator=generator) * 4).to(dtype)
    x[:3] = torch.tensor([0.0, 200.0, -200.0])[: min(count, 3)]
    (ours, mine), (expected, theirs) = both("quick_gelu", x, dtype=dtype)
    assert_close(ours, expected, dtype)
    upstream = torch.randn(count, generator=generator).to(dtype)
    ours.backward(upstream)
    expected.backward(upstream.double())
    assert_close(mine[0].grad, theirs[0].grad, dtype)


def one_by_one(rows, sizes, *parameters):
    """Apply the experts in a loop over single rows."""
    owners = [expert for expert, size in enumerate(sizes.tolist()) for _ in range(size)]
    out = []
    for row, expert in zip(rows, owners, strict=False):
        w1, b1, w2, b2 = (kind[expert] for kind in parameters)
        hidden = w1 @ row + b1
        out.append(w2 @ (hidden * torch.sigmoid(1.702 * hidden)) + b2)
    nothing = sum(kind.sum() for kind in (rows, *parameters)) * 0
    return torch.stack([*out, *(row * 0 for row in rows[len(owners) :])]) + nothing if len(rows) else rows * 1 + nothing


def products_of_torch(*arguments):
    """Grouped products with PyTorch ops between them, as if these were not compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVE_DS_OPS", "reference")
        return grouped_products(*arguments)


FORMS = {
    "built": ops.grouped_feed_forward,
    "plain": reference.grouped_feed_forward,
    "products": grouped_products,
    "products of torch": products_of_torch,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(5, 0, 7, 1), (0, 0, 0, 0), (13, 0, 0, 0)])
@pytest.mark.parametrize("empty", [0, 3])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_grouped_feed_forward_matches_reference(dtype, sizes, empty, form):
    generator = torch.Generator().manual_seed(11)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) * 0.5).to(dtype)

    rows = draw(sum(sizes) + empty, 16)
    kinds = [draw(len(sizes), *shape) for shape in ((24, 16), (24,), (16, 24), (16,))]
    upstream = draw(*rows.shape)
    results = []
    for run, wanted in ((form, dtype), (one_by_one, torch.float64)):
        mine, parameters = leaf(rows, wanted), [leaf(kind, wanted) for kind in kinds]
        out = run(mine, torch.tensor(sizes), *parameters)
        out.backward(upstream.to(wanted))
        results.append([out, mine.grad, *(kind.grad for kind in parameters)])
    assert results[0][0][sum(sizes) :].eq(0).all()
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == dtype
        # bf16: hidden states, activations and their gradients are each rounded to 8 bits.
        error = float((ours.double() - expected).norm() / expected.norm().clamp(min=1e-6))
        assert error < (2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 37])
@pytest.mark.parametrize(
    ("sizes", "unowned"), [((0, 5, 0, 130, 300, 1, 0), 7), ((128, 256), 128), ((0, 0, 300), 0), ((0, 0), 9), ((0,), 0)]
)
def test_grouped_bias_matches_reference(dtype, width, sizes, unowned):
    generator = torch.Generator().manual_seed(12)
    filled, ends = sum(sizes), torch.tensor(sizes).cumsum(0).int()
    x, d_out, bias = (
        torch.randn(count, width, generator=generator).to(dtype)
        for count in (filled + unowned, filled + unowned, len(sizes))
    )
    x[filled:], d_out[filled:] = float("nan"), float("nan")  # grouped products may leave any value here
    op = torch.ops.eve_ds
    wide_x, wide_bias = leaf(x, torch.float64), leaf(bias, torch.float64)
    plain = reference.grouped_bias(wide_x, wide_bias, ends)
    activated = reference.quick_gelu(plain)
    shifted, cleared = x.clone(), x.clone()
    op.grouped_bias_(shifted, bias, ends)
    assert_close(shifted, plain, dtype)
    op.grouped_bias_(cleared, None, ends)
    assert torch.equal(cleared, torch.cat([x[:filled], torch.zeros_like(x[filled:])]))
    assert_close(op.grouped_bias_quick_gelu(x, bias, ends), activated, dtype)
    d_x, d_bias = op.grouped_bias_quick_gelu_backward(d_out, x, bias, ends)
    upstream = d_out[:filled].double()
    expected = torch.autograd.grad((activated[:filled] * upstream).sum(), [wide_x, wide_bias], retain_graph=True)
    assert_close(d_x, expected[0], dtype)
    assert_close(d_bias, expected[1], dtype, scale=20.0)
    expected = torch.autograd.grad((plain[:filled] * upstream).sum(), wide_bias)
    assert_close(op.grouped_bias_backward(d_out, ends), expected[0], dtype, scale=20.0)


def test_router_products_in_low_precision_give_the_same_logits(monkeypatch):
    """Run the CUDA path with a product that replaces the missing CPU one: same logits, rounded gradients."""
    dtype, generator = torch.bfloat16, torch.Generator().manual_seed(13)
    x, weight, embedding = (torch.randn(count, 40, generator=generator).to(dtype) for count in (300, 8, 2))
    modality = torch.randint(0, 2, (300,), generator=generator)
    upstream = torch.randn(8, generator=generator)
    widened = []

    def product(a, b, out_dtype):
        assert (a.dtype, b.dtype, out_dtype) == (dtype, dtype, torch.float32)
        widened.append(a.shape)
        return a.float() @ b.float()

    results = []
    for short in (False, True):
        monkeypatch.setattr(routing_ops, "_multiplies_in_low_precision", lambda x, weight, short=short: short)
        leaves = [leaf(each, dtype) for each in (x, weight, embedding)]
        with monkeypatch.context() as patch:
            if short:
                patch.setattr(torch, "mm", product)
            rows, routed = ops.route_and_dispatch(*leaves, modality, top_k=2, capacity=-1)
            ((routed.probability_sum * upstream).sum() + rows.float().square().sum()).backward()
        results.append([rows, *routed, *(each.grad for each in leaves)])
    assert widened == [(300, 40), (8, 300)]
    *outputs, d_x, d_weight, d_embedding = zip(*results, strict=True)
    for one, other in (*outputs, d_x, d_embedding):
        assert torch.equal(one, other)
    wide, short = d_weight
    assert short.dtype == dtype
    assert float((short.double() - wide.double()).norm() / wide.double().norm()) < 2 * torch.finfo(dtype).eps


def test_inputs_need_not_be_contiguous():
    x = torch.randn(16, 40).t()
    routing = ops.route_topk(torch.randn(4, 40).t(), top_k=2, capacity=-1)
    rows = ops.moe_dispatch(x, routing.slots, routing.source)
    assert torch.equal(rows, reference.moe_dispatch(x, routing.slots, routing.source))
    out = ops.moe_combine(rows.t().contiguous().t(), routing.slots, routing.gates, routing.source)
    assert_close(out, reference.moe_combine(rows, routing.slots, routing.gates, routing.source))


def every_output():
    """Outputs and gradients of all ops for fixed inputs, as one list."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(1500, 40, generator=generator, requires_grad=True)
    weight = torch.randn(16, 40, generator=generator, requires_grad=True)
    embedding = torch.randn(2, 40, generator=generator, requires_grad=True)
    modality = torch.randint(0, 2, (1500,), generator=generator)
    logits = (torch.randn(1500, 16, generator=generator)).requires_grad_()
    routing = ops.route_topk(logits, top_k=2, capacity=100, modality_bias=weight[:2, :16], modality_ids=modality)
    rows = ops.moe_dispatch(x, routing.slots, routing.source, embedding, modality)
    out = ops.moe_combine(rows, routing.slots, routing.gates, routing.source)
    pixels = torch.rand(8, 3, 64, 64, generator=generator)
    ids = torch.stack([torch.randperm(64, generator=generator)[:48] for _ in range(8)])
    predictions = torch.randn(8, 48, 192, generator=generator, requires_grad=True)
    losses = ops.masked_pixel_loss(pixels, predictions, ids, 8)
    raw = ops.masked_pixel_loss(pixels, predictions, ids, 8, normalize=False)
    upstream = torch.randn(out.shape, generator=generator)
    total = (out * upstream).sum() + routing.probability_sum.square().sum() + routing.z_sum
    (total + losses.sum() + raw.square().sum()).backward()
    scratch = torch.randn(64, 999, generator=generator)
    row_losses = torch.ops.eve_ds.cross_entropy_inplace_(scratch, None, torch.arange(64))
    activated = torch.ops.eve_ds.quick_gelu(scratch)
    d_scratch = torch.ops.eve_ds.quick_gelu_backward(activated, scratch)
    ends, shift = torch.tensor([0, 3, 30, 60], dtype=torch.int32), torch.randn(4, 999, generator=generator)
    grouped = torch.ops.eve_ds.grouped_bias_quick_gelu(scratch, shift, ends)
    d_grouped = torch.ops.eve_ds.grouped_bias_quick_gelu_backward(activated, scratch, shift, ends)
    gradients = [tensor.grad for tensor in (x, embedding, logits, weight, predictions)]
    gradients += [grouped, *d_grouped]
    return [rows, out, *routing, losses, raw, scratch, row_losses, activated, d_scratch, *gradients]


def test_results_are_bit_identical_across_runs_and_thread_counts():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(every_output())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_results_are_bit_identical_across_instruction_sets(tmp_path):
    code = (
        "import importlib.util, sys, torch; spec = importlib.util.spec_from_file_location('t', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "torch.set_num_threads(1); torch.save(module.every_output(), sys.argv[2])"
    )
    results = []
    for isa in ("base", "v3", "v4"):
        file = tmp_path / isa
        env = os.environ | {"EVE_DS_ISA": isa, "EVE_DS_OPS": "build"}
        done = subprocess.run(
            [sys.executable, "-c", code, __file__, str(file)], env=env, capture_output=True, text=True, check=False
        )
        if done.returncode and "EVE_DS_ISA" in done.stderr:
            continue  # this processor does not have the instruction set
        assert done.returncode == 0, done.stderr
        results.append(torch.load(file))
    for one, other in itertools.pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_ops_pass_opcheck():
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(20, 8, generator=generator, requires_grad=True)
    modality = torch.randint(0, 2, (20,), generator=generator)
    valid = torch.rand(20, generator=generator) > 0.2
    bias = torch.randn(2, 8, generator=generator, requires_grad=True)
    opcheck = torch.library.opcheck
    opcheck(torch.ops.eve_ds.route_topk, (logits, bias, modality, valid, None, 2, -1))
    opcheck(torch.ops.eve_ds.route_topk, (logits, None, None, None, None, 2, 4))
    routing = ops.route_topk(logits.detach(), top_k=2, capacity=-1)
    x = torch.randn(20, 6, generator=generator, requires_grad=True)
    embedding = torch.randn(2, 6, generator=generator, requires_grad=True)
    opcheck(torch.ops.eve_ds.moe_dispatch, (x, routing.slots, routing.source, embedding, modality))
    rows = torch.randn(40, 6, generator=generator, requires_grad=True)
    gates = routing.gates.clone().requires_grad_()
    opcheck(torch.ops.eve_ds.moe_combine, (rows, routing.slots, gates, routing.source))
    ids = torch.tensor([[0, 2], [1, 3]])
    predictions = torch.randn(2, 2, 48, generator=generator, requires_grad=True)
    for count, normalize in itertools.product((2, 0), (True, False)):
        pixels, some = torch.rand(count, 3, 8, 8), predictions[:count].detach().requires_grad_()
        opcheck(torch.ops.eve_ds.masked_pixel_loss, (pixels, some, ids[:count], 4, 1e-6, normalize))
    opcheck(torch.ops.eve_ds.quick_gelu, (torch.randn(20, generator=generator, requires_grad=True),))
    without_autograd = ("test_schema", "test_faketensor")
    ends, shift = torch.tensor([0, 11, 30], dtype=torch.int32), torch.randn(3, 6, generator=generator)
    hidden, d_hidden = rows.detach(), torch.randn(40, 6, generator=generator)
    for name, arguments in (
        ("grouped_bias_quick_gelu", (hidden, shift, ends)),
        ("grouped_bias_quick_gelu_backward", (d_hidden, hidden, shift, ends)),
        ("grouped_bias_", (hidden.clone(), shift, ends)),
        ("grouped_bias_", (hidden.clone(), None, ends)),
        ("grouped_bias_backward", (d_hidden, ends)),
    ):
        opcheck(getattr(torch.ops.eve_ds, name), arguments, test_utils=without_autograd)
    target = torch.arange(5)
    opcheck(
        torch.ops.eve_ds.cross_entropy_inplace_,
        (torch.randn(5, 9), None, target),
        test_utils=without_autograd,
    )
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    opcheck(
        torch.ops.eve_ds.linear_cross_entropy,
        (hidden, weight, None, target, 2, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda: ops.route_topk(torch.zeros(3, 4), top_k=5, capacity=-1),
            "top_k (5) must be 1 to 4",
        ),
        (
            lambda: ops.moe_dispatch(torch.zeros(3, 4), ids([0], [1], [2]), ids(3)),
            "source must be at least -1 and below 3",
        ),
        (
            lambda: ops.moe_combine(torch.zeros(3, 4), ids([7]), torch.ones(1, 1), ids(0, 1, 2)),
            "slots must be at least -1 and below 3",
        ),
        (
            lambda: ops.linear_cross_entropy(torch.zeros(1, 2), torch.zeros(3, 2), None, ids(3)),
            "target must be at least 0 and below 3",
        ),
        (
            lambda: ops.masked_pixel_loss(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 48), ids([4]), 4),
            "masked_patch_ids must be at least 0 and below 4",
        ),
        (
            lambda: ops.masked_pixel_loss(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 47), ids([0]), 4),
            "predictions has the wrong shape",
        ),
        *(
            (
                partial(torch.ops.eve_ds.grouped_bias_, torch.zeros(3, 4), None, torch.tensor(ends, dtype=torch.int32)),
                "ends must ascend from 0 to 3",
            )
            for ends in ([2, 1], [-1, 1], [1, 4])
        ),
    ],
)
def test_bad_input_is_refused_before_memory_is_touched(call, expected):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert expected in str(caught.value)


def clear_load_cache():
    build._loaded.cache_clear()
    build._loading_problem.cache_clear()


def test_missing_compiler_falls_back_with_one_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("EVE_DS_CACHE", str(tmp_path))
    clear_load_cache()
    try:
        monkeypatch.setenv("EVE_DS_OPS", "build")
        with pytest.raises(build.OpsBuildError, match=r"no C\+\+ compiler found .*apt install g\+\+"):
            build.use_built(torch.zeros(1))
        monkeypatch.setenv("EVE_DS_OPS", "auto")
        with caplog.at_level("WARNING", logger="eve_ds"):
            assert not build.use_built(torch.zeros(1))
            assert not build.use_built(torch.zeros(1))
        monkeypatch.setenv("EVE_DS_OPS", "fast")
        with pytest.raises(build.OpsBuildError, match=r"EVE_DS_OPS \(fast\) must be one of auto, build, reference"):
            build.use_built(torch.zeros(1))
    finally:
        clear_load_cache()


def test_failed_build_is_not_retried(monkeypatch):
    tried = []

    def fail(device_type):
        tried.append(device_type)
        raise build.OpsBuildError("no compiler found")

    monkeypatch.setattr(build, "build", fail)
    monkeypatch.setenv("EVE_DS_OPS", "build")
    clear_load_cache()
    try:
        for _ in range(3):
            with pytest.raises(build.OpsBuildError, match="no compiler found"):
                build.use_built(torch.zeros(1))
    finally:
        clear_load_cache()
    assert tried == ["cpu"]


def test_compiler_error_is_reported(monkeypatch, tmp_path):
    sources = tmp_path / "kernels"
    shutil.copytree(build.KERNELS, sources, ignore=shutil.ignore_patterns("bench"))
    (sources / "routing_cpu.cpp").write_text("this is not C++;\n")
    monkeypatch.setattr(build, "KERNELS", sources)
    monkeypatch.setenv("EVE_DS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.OpsBuildError, match=r"could not build the fused ops: .*routing_cpu.cpp:1:1: error"):
        build.build("cpu")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_concurrent_processes_build_once(monkeypatch, tmp_path):
    env = os.environ | {"EVE_DS_CACHE": str(tmp_path / "cache"), "EVE_DS_OPS": "build"}
    code = "import torch; from eve_ds import ops; ops.route_topk(torch.zeros(2, 4), top_k=1, capacity=-1)"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    messages = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    assert sum("compiling the fused ops" in message for message in messages) == 1
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1


def test_reference_mode_never_builds(monkeypatch):
    monkeypatch.setenv("EVE_DS_OPS", "reference")
    assert not build.use_built(torch.zeros(1))
    assert ops.route_topk(torch.zeros(2, 4), top_k=1, capacity=-1).gates.shape == (2, 1)
