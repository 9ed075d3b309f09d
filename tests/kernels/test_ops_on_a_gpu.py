"""The built ops on a GPU against the reference in fp64 on the CPU; skipped where there is none.

Tolerances are those of `tests/test_ops_built.py`; fp16 is rounded to 11 bits.
"""

import pytest
import torch

from eve_ds import ops
from eve_ds.ops import build, reference

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
def test_routing(dtype, shape, capacity):
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
def test_linear_cross_entropy(dtype, rows, width, vocabulary, chunk):
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
def test_masked_pixel_loss(dtype, batch, size, patch, masked, normalize):
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
def test_quick_gelu(dtype, count, offset):
    torch.manual_seed(4)
    x, x_64 = pair(torch.randn(count + offset) * 4, dtype)
    ours, expected = ops.quick_gelu(x[offset:]), reference.quick_gelu(x_64[offset:])
    close(ours, expected, dtype)
    upstream = torch.randn(count).to(dtype)
    ours.backward(upstream.cuda())
    expected.backward(upstream.double())
    close(x.grad, x_64.grad, dtype)


def test_quick_gelu_of_what_no_exponential_holds():
    x = torch.tensor([0.0, 200.0, -200.0], device="cuda", requires_grad=True)
    ops.quick_gelu(x).sum().backward()
    assert ops.quick_gelu(x).tolist() == [0.0, 200.0, 0.0]
    assert x.grad.tolist() == [0.5, 1.0, 0.0]


def test_runs_repeat_bit_for_bit():
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
