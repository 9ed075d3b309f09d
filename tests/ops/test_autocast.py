"""Ops and model under autocast: the dtypes of `F.linear` for products, fp32 for routing, compiled or not.

Tolerances. A bf16 value is rounded to 2**-9 of its size at most, an fp16 value to 2**-12. Rounding inputs, weights and
results of a product of independent terms once each moves it by less than EPS = 2**-8 (2**-11) of its norm; a chain of n
products, by less than n EPS.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hf_export import CONFIG, inputs

from eve_ds import ops
from eve_ds.model.eve import EVE
from eve_ds.model.moe import MoE
from eve_ds.ops import reference

EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
TOKENS, WIDTH, EXPERTS, HIDDEN = 40, 16, 4, 24

pytestmark = [
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"]),
    pytest.mark.parametrize("form", ["build", "reference"]),
]


@pytest.fixture(autouse=True)
def _form(form, monkeypatch):
    if form == "build" and not shutil.which("g++"):
        pytest.skip("no g++ to build the ops with")
    monkeypatch.setenv("EVE_DS_OPS", form)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def assert_near(found, expected, tolerance):
    assert (found.float() - expected).norm() <= tolerance * expected.norm()


def router_inputs(dtype=torch.float32):
    ids = torch.arange(TOKENS) % 2
    return drawn(TOKENS, WIDTH, dtype=dtype), drawn(EXPERTS, WIDTH, seed=1), drawn(2, WIDTH, seed=2), ids


@pytest.mark.parametrize("token_dtype", ["fp32", "autocast"])
@pytest.mark.parametrize("embed_rows", [False, True])
def test_routing_stays_in_fp32_and_rows_keep_their_dtype(dtype, token_dtype, embed_rows):
    arguments = router_inputs(torch.float32 if token_dtype == "fp32" else dtype)
    options = {"top_k": 2, "capacity": -1, "embed_rows": embed_rows}
    expected_rows, expected = ops.route_and_dispatch(*arguments, **options)
    with torch.autocast("cpu", dtype):
        rows, routing = ops.route_and_dispatch(*arguments, **options)
        mixed = ops.moe_combine(rows, routing.slots, routing.gates, routing.source)
    assert rows.dtype == mixed.dtype == arguments[0].dtype
    assert torch.equal(rows, expected_rows)
    for name, value in routing._asdict().items():
        assert torch.equal(value, getattr(expected, name)), name
    assert torch.equal(mixed, ops.moe_combine(expected_rows, expected.slots, expected.gates, expected.source))
    mixed.sum().backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in arguments[:3])


def test_logits_are_routed_in_fp32(dtype):
    logits = drawn(TOKENS, EXPERTS)
    options = {"top_k": 2, "capacity": 8, "modality_bias": drawn(2, EXPERTS), "modality_ids": torch.arange(TOKENS) % 2}
    expected = ops.route_topk(logits, **options)
    with torch.autocast("cpu", dtype):
        found = ops.route_topk(logits, **options)
    assert all(torch.equal(value, getattr(expected, name)) for name, value in found._asdict().items())


def test_expert_products_have_the_dtype_of_autocast(dtype):
    sizes = torch.tensor([7, 0, 20, 9])
    shapes = ((EXPERTS, HIDDEN, WIDTH), (EXPERTS, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH))
    mine = [drawn(TOKENS, WIDTH), *(drawn(*shape, seed=seed) for seed, shape in enumerate(shapes))]
    fp32 = [leaf.detach().clone().requires_grad_() for leaf in mine]
    with torch.autocast("cpu", dtype):
        found = ops.grouped_feed_forward(mine[0], sizes, *mine[1:])
    expected = reference.grouped_feed_forward(fp32[0], sizes, *fp32[1:])
    assert found.dtype == dtype
    assert_near(found, expected, 2 * EPS[dtype])
    found.float().square().sum().backward()
    expected.square().sum().backward()
    for own, right in zip(mine, fp32, strict=True):
        assert own.grad.dtype == torch.float32
        assert_near(own.grad, right.grad, 6 * EPS[dtype])  # two products forward, the square, two backward


def test_word_loss_has_the_products_of_autocast_and_a_sum_in_fp32(dtype):
    hidden, weight, bias = drawn(TOKENS, WIDTH), drawn(30, WIDTH, seed=1), drawn(30, seed=2)
    target = torch.arange(TOKENS) % 30
    with torch.autocast("cpu", dtype):
        found = ops.linear_cross_entropy(hidden, weight, bias, target)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="sum")
    assert found.dtype == torch.float32
    assert_near(found, expected, EPS[dtype])
    gradients = torch.autograd.grad(found, (hidden, weight, bias))
    for own, right in zip(gradients, torch.autograd.grad(expected, (hidden, weight, bias)), strict=True):
        assert own.dtype == torch.float32
        assert_near(own, right, 2 * EPS[dtype])


@pytest.mark.parametrize("normalize", [False, True])
def test_pixel_loss_is_computed_in_fp32(dtype, normalize):
    pixels, predictions = drawn(2, 3, 16, 16), drawn(2, 3, 192, seed=1, dtype=dtype)
    ids = torch.tensor([[0, 2, 3], [1, 3, 0]])
    expected = ops.masked_pixel_loss(pixels, predictions, ids, 8, normalize=normalize)
    with torch.autocast("cpu", dtype):
        found = ops.masked_pixel_loss(pixels, predictions, ids, 8, normalize=normalize)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_activation_keeps_the_dtype_of_its_input(dtype):
    for own in (dtype, torch.float32):
        x = drawn(TOKENS, WIDTH, dtype=own)
        with torch.autocast("cpu", dtype):
            assert torch.equal(ops.quick_gelu(x), ops.quick_gelu(x.detach()))
            assert ops.quick_gelu(x).dtype == own


@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_router_counts_are_exact(dtype, jitter):
    """300 tokens of one modality: bf16 cannot count above 256."""
    config = CONFIG.model.model_copy(update={"moe": CONFIG.model.moe.model_copy(update={"router_jitter": jitter})})
    torch.manual_seed(0)
    layer = MoE(config).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    with torch.autocast("cpu", dtype):
        output = layer(torch.randn(301, config.hidden_size), torch.zeros(301, dtype=torch.int64))
    assert float(output.statistics.tokens.sum()) == 301
    assert output.load_balancing_loss.dtype == torch.float32
    assert float(output.statistics.routes.sum()) == 301 * config.moe.top_k


def test_model_is_near_its_fp32_outputs_and_trains(dtype):
    torch.manual_seed(0)
    model = EVE(CONFIG.model).train()
    expected = model.predict(**inputs())
    with torch.autocast("cpu", dtype):
        found = model.predict(**inputs())
        logits = found.token_logits()
    assert found.pixel_predictions.dtype == logits.dtype == found.token_logits().dtype == dtype
    # Of the encoder's three blocks and the decoder, six products follow one another in a block, and one ends the model.
    tolerance = EPS[dtype] * (6 * 4 + 1) ** 0.5
    assert_near(found.pixel_predictions, expected.pixel_predictions, tolerance)
    assert_near(logits, expected.token_logits(), tolerance)
    right = [loss(output) for output, loss in ((expected, squares), (found, squares))]
    gradients = [torch.autograd.grad(value, list(model.parameters()), allow_unused=True) for value in right]
    for (name, _), exact, own in zip(model.named_parameters(), *gradients, strict=True):
        assert (exact is None) == (own is None), name
        assert own is None or bool(own.isfinite().all()), name
    total = [torch.cat([g.flatten() for g in own if g is not None]) for own in gradients]
    assert_near(total[1], total[0], 3 * tolerance)  # forward, and two products for each in the backward


def squares(output):
    return output.pixel_predictions.float().square().mean() + output.token_logits().float().square().mean()


def test_backward_inside_autocast_gives_gradients(dtype):
    model = EVE(CONFIG.model).train()
    with torch.autocast("cpu", dtype):
        squares(model.predict(**inputs())).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
