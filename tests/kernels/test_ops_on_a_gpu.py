"""Compiled ops on a GPU against the reference in fp64 on the CPU; skipped without a GPU.

Tolerances are those of `tests/ops/test_built.py`; fp16 values are rounded to 11 bits.
"""

import os
import subprocess
import sys

import pytest
import torch

from eve_ds import ops
from eve_ds.model import attention
from eve_ds.model.stream import take_rows
from eve_ds.ops import build, reference
from eve_ds.views import Layout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(1, 8, 2, 16), (257, 13, 3, 37), (600, 32, 2, 48), (4096, 32, 2, 768), (0, 4, 2, 8)]


@pytest.fixture(autouse=True)
def _fatal(monkeypatch):
    monkeypatch.setenv("EVE_DS_OPS", "build")
    assert build.use_built(torch.zeros(1, device="cuda"))


def pair(tensor, dtype):
    """The same values as a leaf on the GPU and as an fp64 leaf on the CPU."""
    values = tensor.to(dtype)
    return values.cuda().requires_grad_(), values.double().requires_grad_()


def close(ours, expected, dtype, scale=1.0):
    rtol = RELATIVE[dtype]
    torch.testing.assert_close(ours.double().cpu(), expected.double(), rtol=rtol, atol=2e-6 * max(scale, 1.0))


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("capacity", [-1, 0, 5])
def test_routing_matches_reference(dtype, shape, capacity):
    tokens, experts, top_k, width = shape
    torch.manual_seed(0)
    logits, logits_64 = pair(torch.randn(tokens, experts) * 2, torch.float32)
    x, x_64 = pair(torch.randn(tokens, width), dtype)
    embedding, embedding_64 = pair(torch.randn(2, width), torch.float32)
    modality, valid = torch.randint(0, 2, (tokens,)), torch.rand(tokens) > 0.2
    bias, bias_64 = pair(torch.randn(2, experts), torch.float32)
    options = {"top_k": top_k, "capacity": capacity}
    ours = ops.route_topk(logits, modality_bias=bias, modality_ids=modality.cuda(), valid=valid.cuda(), **options)
    expected = reference.route_topk(logits_64, modality_bias=bias_64, modality_ids=modality, valid=valid, **options)
    for name in ("expert_ids", "slots", "source", "counts"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(expected, name)), name
    rows = ops.moe_dispatch(x, ours.slots, ours.source, embedding, modality.cuda())
    rows_64 = reference.moe_dispatch(x_64, expected.slots, expected.source, embedding_64, modality)
    close(rows, rows_64, dtype)
    out = ops.moe_combine(rows, ours.slots, ours.gates, ours.source)
    out_64 = reference.moe_combine(rows_64, expected.slots, expected.gates, expected.source)
    close(out, out_64, dtype, scale=10.0)
    upstream, up_sum = torch.randn(tokens, width).to(dtype), torch.randn(experts)
    ((out * upstream.cuda()).sum() + (ours.probability_sum * up_sum.cuda()).sum() + ours.z_sum / 50).backward()
    total = (out_64 * upstream).sum() + (expected.probability_sum * up_sum).sum() + expected.z_sum / 50
    total.backward()
    for mine, wanted in ((x, x_64), (embedding, embedding_64), (logits, logits_64), (bias, bias_64)):
        assert mine.grad.shape == mine.shape
        error = float((mine.grad.double().cpu() - wanted.grad).norm() / wanted.grad.norm().clamp(min=1e-6))
        assert error < {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "chunk"), [(70, 48, 501, 32), (640, 128, 8000, None), (0, 8, 16, None)]
)
def test_linear_cross_entropy_matches_reference(dtype, rows, width, vocabulary, chunk):
    torch.manual_seed(1)
    hidden, hidden_64 = pair(torch.randn(rows, width), dtype)
    weight, weight_64 = pair(torch.randn(vocabulary, width) * 0.1, dtype)
    target = torch.randint(0, vocabulary, (rows,))
    loss = ops.linear_cross_entropy(hidden, weight, None, target.cuda(), chunk)
    expected = reference.linear_cross_entropy(hidden_64, weight_64, None, target)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-3, atol=1e-3)
    loss.backward()
    expected.backward()
    for mine, wanted in ((hidden, hidden_64), (weight, weight_64)):
        error = float((mine.grad.double().cpu() - wanted.grad).norm() / wanted.grad.norm().clamp(min=1e-6))
        assert error < {torch.float32: 1e-4, torch.bfloat16: 6e-3, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(
    ("batch", "size", "patch", "masked"), [(4, 224, 16, 147), (4, 28, 7, 5), (4, 8, 1, 9), (4, 28, 7, 0), (0, 28, 7, 5)]
)
def test_masked_pixel_loss_matches_reference(dtype, batch, size, patch, masked, normalize):
    torch.manual_seed(2)
    pixels = torch.randn(batch, 3, size, size) * 2 + 1
    ids = torch.rand(batch, (size // patch) ** 2).argsort(dim=1)[:, :masked]
    predictions, predictions_64 = pair(torch.randn(batch, masked, patch**2 * 3), dtype)
    losses = ops.masked_pixel_loss(pixels.cuda(), predictions, ids.cuda(), patch, normalize=normalize)
    expected = reference.masked_pixel_loss(pixels.double(), predictions_64, ids, patch, normalize=normalize)
    torch.testing.assert_close(losses.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(batch, masked)
    losses.backward(upstream.cuda())
    expected.backward(upstream.double())
    close(predictions.grad, predictions_64.grad, dtype, scale=10.0)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(("count", "offset"), [(0, 0), (1, 0), (4096, 0), (4096, 1), (4099, 0), (3_000_000, 0)])
def test_quick_gelu_matches_reference(dtype, count, offset):
    torch.manual_seed(4)
    x, x_64 = pair(torch.randn(count + offset) * 4, dtype)
    ours, expected = ops.quick_gelu(x[offset:]), reference.quick_gelu(x_64[offset:])
    close(ours, expected, dtype)
    upstream = torch.randn(count).to(dtype)
    ours.backward(upstream.cuda())
    expected.backward(upstream.double())
    close(x.grad, x_64.grad, dtype)


def test_quick_gelu_of_values_whose_exponential_overflows():
    x = torch.tensor([0.0, 200.0, -200.0], device="cuda", requires_grad=True)
    ops.quick_gelu(x).sum().backward()
    assert ops.quick_gelu(x).tolist() == [0.0, 200.0, 0.0]
    assert x.grad.tolist() == [0.5, 1.0, 0.0]


def test_runs_are_bit_identical():
    torch.manual_seed(3)
    logits, x = torch.randn(4096, 32, device="cuda"), torch.randn(4096, 768, device="cuda").bfloat16()
    results = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        routing = ops.route_topk(logits, top_k=2, capacity=-1)
        rows = ops.moe_dispatch(leaf, routing.slots, routing.source)
        out = ops.moe_combine(rows, routing.slots, routing.gates, routing.source)
        out.float().square().sum().backward()
        results.append([*routing, rows, out, leaf.grad])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- Experts ----

GROUPS = [((50, 0, 130, 1, 0), 7), ((0, 0, 300, 0, 0), 0), ((0, 0, 0, 0, 0), 9), ((0, 0, 0, 0, 0), 0)]
"""Rows of each expert, and number of rows of no expert after them."""


def experts(sizes, unowned, dtype):
    """Arguments of `grouped_feed_forward` and an upstream gradient, as leaves on both devices."""
    generator = torch.Generator().manual_seed(5)
    rows, count, width, hidden = sum(sizes) + unowned, len(sizes), 64, 136
    x, upstream = (torch.randn(rows, width, generator=generator) * 0.5 for _ in range(2))
    x[sum(sizes) :], upstream[sum(sizes) :] = float("nan"), float("nan")  # the ops must ignore these values
    shapes = ((count, hidden, width), (count, hidden), (count, width, hidden), (count, width))
    parameters = [torch.randn(shape, generator=generator) * 0.2 for shape in shapes]
    ours, expected = zip(*(pair(each, dtype) for each in (x, *parameters)), strict=True)
    return ours, expected, upstream.to(dtype)


def relative_error(mine, wanted):
    return float((mine.detach().double().cpu() - wanted).norm() / wanted.norm().clamp(min=1e-6))


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(("sizes", "unowned"), GROUPS)
def test_grouped_feed_forward_matches_reference(dtype, sizes, unowned):
    ours, expected, upstream = experts(sizes, unowned, dtype)
    filled, counts = sum(sizes), torch.tensor(sizes)
    out = ops.grouped_feed_forward(ours[0], counts.cuda(), *ours[1:])
    products = dtype == torch.bfloat16 and filled + unowned > 0 and torch.cuda.get_device_capability() >= (9, 0)
    assert (type(out.grad_fn).__name__ == "GroupedProductsBackward") == products
    out_64 = reference.grouped_feed_forward(expected[0], counts, *expected[1:])
    assert out[filled:].eq(0).all()
    out.backward(upstream.cuda())
    (out_64[:filled] * upstream[:filled].double()).sum().backward()
    # Hidden states, activations and their gradients are rounded in between.
    allowed = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert relative_error(out[:filled], out_64[:filled].detach()) < allowed
    assert ours[0].grad[filled:].eq(0).all()
    assert relative_error(ours[0].grad[:filled], expected[0].grad[:filled]) < allowed
    for mine, wanted in zip(ours[1:], expected[1:], strict=True):
        assert mine.grad.dtype == dtype
        assert relative_error(mine.grad, wanted.grad) < allowed
        for expert, size in enumerate(sizes):
            assert size or mine.grad[expert].eq(0).all(), "an expert without rows"


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("width", [136, 37])
@pytest.mark.parametrize(("sizes", "unowned"), GROUPS)
def test_ops_between_grouped_products_match_reference(dtype, width, sizes, unowned):
    generator = torch.Generator().manual_seed(6)
    filled, ends = sum(sizes), torch.tensor(sizes).cumsum(0).int()
    x, bias = torch.randn(filled + unowned, width, generator=generator), torch.randn(len(sizes), width)
    d_out = torch.randn(filled + unowned, width, generator=generator).to(dtype)
    x[filled:], d_out[filled:] = float("nan"), float("nan")
    (mine, wide), (mine_bias, wide_bias) = pair(x, dtype), pair(bias, dtype)
    arguments = (mine.detach(), mine_bias.detach(), ends.cuda())
    plain = reference.grouped_bias(wide, wide_bias, ends)
    expected = reference.quick_gelu(plain)
    op = torch.ops.eve_ds
    close(op.grouped_bias_quick_gelu(*arguments), expected.detach(), dtype)
    shifted = mine.detach().clone()
    op.grouped_bias_(shifted, *arguments[1:])
    close(shifted, plain.detach(), dtype)
    upstream = d_out[:filled].double()
    wanted = torch.autograd.grad((expected[:filled] * upstream).sum(), [wide, wide_bias], retain_graph=True)
    d_x, d_bias = op.grouped_bias_quick_gelu_backward(d_out.cuda(), *arguments)
    close(d_x, wanted[0], dtype)
    close(d_bias, wanted[1], dtype, scale=20.0)
    wanted = torch.autograd.grad((plain[:filled] * upstream).sum(), wide_bias)
    close(op.grouped_bias_backward(d_out.cuda(), arguments[2]), wanted[0], dtype, scale=20.0)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="no grouped products"
)
def test_bf16_experts_never_synchronize_with_the_host():
    ours, _, upstream = experts(*GROUPS[0], torch.bfloat16)
    counts, upstream = torch.tensor(GROUPS[0][0]).cuda(), upstream.cuda()
    ops.grouped_feed_forward(ours[0], counts, *ours[1:]).backward(upstream)  # setup in the first call may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.grouped_feed_forward(ours[0], counts, *ours[1:]).backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- The router ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_products_in_low_precision_match_reference(dtype):
    torch.manual_seed(7)
    # Values with few bits, so that logits and choices do not depend on the order of summation.
    x, x_64 = pair(torch.randint(-8, 9, (600, 64)) / 8, dtype)
    weight, weight_64 = pair(torch.randint(-8, 9, (16, 64)) / 16, dtype)
    embedding, embedding_64 = pair(torch.randint(-8, 9, (2, 64)) / 8, dtype)
    modality, upstream = torch.randint(0, 2, (600,)), torch.randn(600, 16)
    ids = (modality.cuda(), modality)
    options = {"top_k": 2, "capacity": -1}
    rows, ours = ops.route_and_dispatch(x, weight, embedding, ids[0], **options)
    rows_64, expected = reference.route_and_dispatch(x_64, weight_64, embedding_64, ids[1], **options)
    assert torch.equal(ours.expert_ids.cpu(), expected.expert_ids)
    assert torch.equal(rows.double().cpu(), rows_64)
    for routing, up in ((ours, upstream.cuda()), (expected, upstream.double())):
        ((routing.gates * up[:, :2]).sum() + (routing.probability_sum * up[0]).sum() + routing.z_sum / 50).backward()
    allowed = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for mine, wanted in ((x, x_64), (weight, weight_64), (embedding, embedding_64)):
        assert mine.grad.dtype == dtype
        assert relative_error(mine.grad, wanted.grad) < allowed


# ---- Token streams, CUDA streams, and addresses ----


@pytest.mark.parametrize("dtype", RELATIVE)
def test_packing_and_padding_match_reference(dtype):
    """Gather tokens of a stream into a padded batch, and scatter them back."""
    torch.manual_seed(8)
    mask = torch.rand(5, 33) > 0.3
    token_ids = mask.flatten().nonzero().squeeze(1)
    places = torch.full((mask.numel(),), -1)
    places[token_ids] = torch.arange(len(token_ids))
    tokens, tokens_64 = pair(torch.randn(len(token_ids), 40), dtype)
    padded = take_rows(tokens, places.cuda(), token_ids.cuda())
    expected = tokens_64.new_zeros(mask.numel(), 40).index_copy(0, token_ids, tokens_64)
    assert torch.equal(padded.double().cpu(), expected)
    packed = take_rows(padded, token_ids.cuda(), places.cuda())
    assert torch.equal(packed, tokens)
    upstream, back = torch.randn(mask.numel(), 40).to(dtype), torch.randn(len(token_ids), 40).to(dtype)
    torch.autograd.backward([padded, packed], [upstream.cuda(), back.cuda()])
    close(tokens.grad, upstream.double()[token_ids] + back.double(), dtype)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attention_over_packed_tokens_matches_padded_fp64(dtype, kind):
    """Compare with padded tokens in fp64; flash attention also rounds probabilities, twice as often in the backward."""
    torch.manual_seed(7)
    mask = torch.rand(9, 70) > 0.3
    mask[3] = False
    layout = Layout.of(mask)
    packed, packed_64 = pair(torch.randn(layout.num_tokens, (3 if kind == "self" else 2) * 128), dtype)
    queries, queries_64 = pair(torch.randn(9, 13, 128), dtype) if kind == "cross" else (None, None)
    assert attention._takes_packed(packed, 64, layout) == (dtype != torch.float32)
    ours = attention.attend(queries, packed, 2, layout.with_each(torch.Tensor.cuda))
    expected = attention.attend(queries_64, packed_64, 2, layout)
    upstream = torch.randn(expected.shape).to(dtype)
    ours.backward(upstream.cuda())
    expected.backward(upstream.double())
    assert relative_error(ours, expected.detach()) < RELATIVE[dtype]
    assert relative_error(packed.grad, packed_64.grad) < 2 * RELATIVE[dtype]
    if kind == "cross":
        assert relative_error(queries.grad, queries_64.grad) < 2 * RELATIVE[dtype]


def every_output(dtype=torch.bfloat16, offset=0):
    """Outputs and gradients of the ops for fixed inputs that start `offset` values past an aligned address."""
    generator = torch.Generator().manual_seed(9)

    def draw(*shape, dtype=dtype):
        values = torch.randn(torch.Size(shape).numel(), generator=generator)
        placed = torch.empty(len(values) + offset, dtype=dtype, device="cuda")[offset:]
        return placed.copy_(values).view(shape).requires_grad_()

    logits, x, upstream = draw(600, 16, dtype=torch.float32), draw(600, 64), draw(600, 64).detach()
    routing = ops.route_topk(logits, top_k=2, capacity=-1)
    rows = draw(1200, 64)
    dispatched = ops.moe_dispatch(x, routing.slots, routing.source)
    combined = ops.moe_combine(rows, routing.slots, routing.gates.detach(), routing.source)
    hidden = draw(300, 64)
    activated = ops.quick_gelu(hidden)
    torch.autograd.backward(
        [dispatched, combined, activated], [rows.detach(), upstream, activated.detach()], inputs=[x, rows, hidden]
    )
    scores = draw(64, 512).detach()
    losses = torch.ops.eve_ds.cross_entropy_inplace_(scores, None, torch.arange(64, device="cuda"))
    exact = [dispatched, combined, activated, x.grad, rows.grad, hidden.grad, *routing]
    return [each.detach().clone() for each in exact], [scores.clone(), losses]


def test_results_are_bit_identical_on_another_cuda_stream():
    exact, sums = every_output()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        others = every_output()
    stream.synchronize()
    for one, other in zip([*exact, *sums], [*others[0], *others[1]], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", RELATIVE)
def test_misaligned_addresses_give_the_same_results(dtype):
    """Rows that no wide load can read give the same bits, unless they are summed in another order."""
    (exact, sums), (exact_odd, sums_odd) = every_output(dtype), every_output(dtype, offset=1)
    for one, other in zip(exact, exact_odd, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(sums, sums_odd, strict=True):
        torch.testing.assert_close(one, other, rtol=RELATIVE[one.dtype], atol=2e-6)


# ---- Ids ----


@pytest.mark.parametrize(
    ("bad", "message"),
    [(None, None), (5, "eve_ds: source[2] is 5, which must be at least -1 and below 5")],
)
def test_bad_ids_end_the_program_if_checks_are_enabled(bad, message):
    """Run in a separate process, which cannot use the GPU after the error."""
    code = (
        "import sys, torch; from eve_ds import ops; "
        "x, slots = torch.zeros(5, 8, device='cuda'), torch.zeros(5, 1, dtype=torch.int64, device='cuda'); "
        "ops.moe_dispatch(x, slots, torch.tensor([0, -1, int(sys.argv[1])], device='cuda')); torch.cuda.synchronize()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(4 if bad is None else bad)],
        env=os.environ | {"EVE_DS_CHECK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (bad is None), done.stderr
    assert message is None or message in done.stdout
