"""Reference operations against loops in double precision that follow the definitions token by token."""

import itertools
import math

import pytest
import torch

from eve_ds.ops import reference as ops

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
"""fp32 results of a few dozen operations compared with fp64."""


def route_by_loop(logits, top_k, capacity, valid, noise):
    """GShard's algorithm 1, token by token: expert ids, slots, gates, source, counts, probabilities; fp64, autograd."""
    num_tokens, num_experts = logits.shape
    probabilities = logits.softmax(dim=1)
    expert_ids = []
    for token in range(num_tokens):
        chosen = []
        for choice in range(top_k):
            scores = logits[token] if choice == 0 or noise is None else logits[token] + noise[token]
            scores = scores.tolist()
            free = [expert for expert in range(num_experts) if expert not in chosen]
            chosen.append(free[0])
            for expert in free:
                if scores[expert] > scores[chosen[-1]]:
                    chosen[-1] = expert
        expert_ids.append(chosen)
    queues = [[] for _ in range(num_experts)]
    for choice, token in itertools.product(range(top_k), range(num_tokens)):
        expert = expert_ids[token][choice]
        if valid[token] and (capacity < 0 or len(queues[expert]) < capacity):
            queues[expert].append((token, choice))
    slots = [[-1] * top_k for _ in range(num_tokens)]
    source = [-1] * (num_tokens * top_k if capacity < 0 else num_experts * capacity)
    for expert, queue in enumerate(queues):
        start = sum(map(len, queues[:expert])) if capacity < 0 else expert * capacity
        for place, (token, choice) in enumerate(queue):
            slots[token][choice] = start + place
            source[start + place] = token
    gates = torch.zeros(num_tokens, top_k, dtype=torch.float64)
    for token in range(num_tokens):
        kept = [choice for choice in range(top_k) if slots[token][choice] >= 0]
        total = sum(probabilities[token, expert_ids[token][choice]] for choice in kept) if top_k > 1 else 1.0
        for choice in kept:
            gates[token, choice] = probabilities[token, expert_ids[token][choice]] / total
    return expert_ids, slots, gates, source, [len(queue) for queue in queues], probabilities


def assert_routed_like_loop(logits, top_k, capacity, valid=None, noise=None):
    ours_logits, loop_logits = logits.float().requires_grad_(), logits.clone().requires_grad_()
    ours = ops.route_topk(ours_logits, top_k=top_k, capacity=capacity, valid=valid, noise=noise)
    mask = torch.ones(len(logits), dtype=torch.bool) if valid is None else valid
    expert_ids, slots, gates, source, counts, probabilities = route_by_loop(
        loop_logits, top_k, capacity, mask, None if noise is None else noise.double()
    )
    assert ours.expert_ids.tolist() == expert_ids
    assert ours.slots.tolist() == slots
    assert ours.source.tolist() == source
    assert ours.counts.tolist() == counts
    torch.testing.assert_close(ours.gates.double(), gates, **FLOAT32)
    torch.testing.assert_close(ours.probabilities.double(), probabilities, **FLOAT32)
    first = [sum(1 for token in mask.nonzero() if expert_ids[token][0] == e) for e in range(logits.shape[1])]
    assert ours.first_choices.tolist() == first
    probability_sum = (probabilities * mask.unsqueeze(1)).sum(dim=0)
    torch.testing.assert_close(ours.probability_sum.double(), probability_sum, **FLOAT32)
    assert {ours.gates.dtype, ours.probabilities.dtype, ours.first_choices.dtype} == {torch.float32}
    assert {ours.expert_ids.dtype, ours.slots.dtype, ours.source.dtype, ours.counts.dtype} == {torch.int64}
    generator = torch.Generator().manual_seed(7)
    up_gates = torch.randn(gates.shape, generator=generator, dtype=torch.float64)
    up_sum = torch.randn(probability_sum.shape, generator=generator, dtype=torch.float64)
    ((ours.gates * up_gates.float()).sum() + (ours.probability_sum * up_sum.float()).sum()).backward()
    ((gates * up_gates).sum() + (probability_sum * up_sum).sum()).backward()
    torch.testing.assert_close(ours_logits.grad.double(), loop_logits.grad, **FLOAT32)
    return ours


def logits_with_ties(num_tokens, num_experts, seed):
    """Multiples of 1/2 in [-2, 2]: exact in every precision, with many exact ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (num_tokens, num_experts), generator=generator).double() / 2


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("capacity", [-1, 1, 3, 100])
def test_route_topk_matches_loop(top_k, capacity):
    for seed in range(4):
        logits = logits_with_ties(19, 4, seed)
        valid = torch.rand(19, generator=torch.Generator().manual_seed(seed)) < 0.7
        noise = logits_with_ties(19, 4, seed + 100).float()
        assert_routed_like_loop(logits, top_k, capacity)
        assert_routed_like_loop(logits, top_k, capacity, valid=valid, noise=noise)


@pytest.mark.parametrize("capacity", [-1, 2])
class TestEdgeCasesEqualTheLoop:
    def test_one_token(self, capacity):
        assert_routed_like_loop(logits_with_ties(1, 4, 0), 2, capacity)

    def test_no_token(self, capacity):
        routing = ops.route_topk(torch.zeros(0, 4), top_k=2, capacity=capacity)
        assert routing.counts.tolist() == [0] * 4
        assert routing.source.tolist() == ([] if capacity < 0 else [-1] * 8)

    def test_one_expert(self, capacity):
        assert_routed_like_loop(logits_with_ties(5, 1, 0), 1, capacity)

    def test_every_expert_is_chosen(self, capacity):
        assert_routed_like_loop(logits_with_ties(5, 4, 0), 4, capacity)

    def test_all_tokens_to_one_expert(self, capacity):
        logits = logits_with_ties(9, 4, 0)
        logits[:, 2] = 5.0
        routing = assert_routed_like_loop(logits, 1, capacity)
        assert routing.counts.tolist() == [0, 0, 9 if capacity < 0 else 2, 0]

    def test_no_valid_token(self, capacity):
        valid = torch.zeros(6, dtype=torch.bool)
        routing = assert_routed_like_loop(logits_with_ties(6, 4, 0), 2, capacity, valid=valid)
        assert routing.slots.eq(-1).all()
        assert routing.source.eq(-1).all()

    def test_all_logits_equal(self, capacity):
        routing = assert_routed_like_loop(torch.zeros(6, 4).double(), 2, capacity)
        assert routing.expert_ids.tolist() == [[0, 1]] * 6


def test_first_choices_of_later_tokens_precede_second_choices_of_earlier_tokens():
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    routing = ops.route_topk(logits, top_k=2, capacity=1)
    assert routing.slots.tolist() == [[0, -1], [1, -1]]
    assert routing.gates.tolist() == [[1.0, 0.0], [1.0, 0.0]]  # renormalized over the kept choices


def test_single_choice_keeps_its_probability_as_gate():
    routing = ops.route_topk(torch.tensor([[1.0, 0.0]]), top_k=1, capacity=-1)
    assert routing.gates.item() == pytest.approx(math.e / (math.e + 1))


def test_noise_never_moves_the_first_choice():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    routing = ops.route_topk(logits, top_k=2, capacity=-1, noise=torch.tensor([[0.0, 0.0, 9.0]]))
    assert routing.expert_ids.tolist() == [[0, 2]]


def test_modality_bias_is_added_by_modality():
    logits, bias = torch.randn(6, 4), torch.randn(2, 4)
    modality = torch.tensor([0, 1, 1, 0, 1, 0])
    ours = ops.route_topk(logits, top_k=2, capacity=-1, modality_bias=bias, modality_ids=modality)
    summed = torch.stack([logits[token] + bias[modality[token]] for token in range(6)])
    expected = ops.route_topk(summed, top_k=2, capacity=-1)
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


def test_bf16_logits_are_routed_in_fp32():
    logits = torch.randn(8, 4).bfloat16()
    ours, expected = (ops.route_topk(x, top_k=2, capacity=-1) for x in (logits, logits.float()))
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "minimum", "slots"),
    [
        (50, 8, 2, 1.0, 4, 13),  # 12.5
        (48, 8, 2, 1.0, 4, 12),
        (10, 1, 1, 1.1, 1, 11),  # 10 * 1.1 is 11.000000000000002 in binary
        (4, 2, 1, 1.1, 1, 3),  # 2.2
        (7, 2, 1, 1.25, 1, 5),  # 4.375
        (10, 8, 2, 1.0, 4, 4),  # 2.5, below the minimum
        (0, 8, 2, 1.0, 4, 4),
    ],
)
def test_expert_capacity_is_rounded_up(tokens, experts, top_k, factor, minimum, slots):
    assert ops.expert_capacity(tokens, experts, top_k, factor, minimum) == slots


def test_load_balancing_loss_matches_loop():
    first, probabilities = torch.tensor([3.0, 1.0, 0.0, 4.0]), torch.tensor([2.0, 2.5, 0.5, 3.0])
    expected = 4 * sum(float(f) / 8 * float(p) / 8 for f, p in zip(first, probabilities, strict=True))
    assert ops.load_balancing_loss(first, probabilities, torch.tensor(8.0)).item() == pytest.approx(expected)
    balanced = torch.full((4,), 2.0)
    assert ops.load_balancing_loss(balanced, balanced, torch.tensor(8.0)).item() == 1.0
    nothing = torch.zeros(4)
    assert ops.load_balancing_loss(nothing, nothing, torch.tensor(0.0)).item() == 0.0


@pytest.mark.parametrize("embedded", [False, True])
def test_dispatch_copies_tokens_into_rows(embedded):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    modality, source = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([4, -1, 0, 4, 2, -1])

    def dispatch(x, embedding):
        return ops.moe_dispatch(x, None, source, embedding if embedded else None, modality)

    rows = dispatch(x, embedding)
    for row, token in enumerate(source.tolist()):
        expected = torch.zeros(3, dtype=torch.float64)
        if token >= 0:
            expected = x[token] + embedding[modality[token]] if embedded else x[token]
        assert torch.equal(rows[row], expected)
    torch.autograd.gradcheck(dispatch, (x, embedding))


def test_dispatch_without_routes_gives_zero_rows():
    rows = ops.moe_dispatch(torch.ones(2, 3), None, torch.full((4,), -1))
    assert torch.equal(rows, torch.zeros(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_is_the_gated_sum_of_rows(dtype):
    rows = torch.randn(6, 3).to(dtype).requires_grad_()
    slots = torch.tensor([[3, 0], [-1, 5], [-1, -1], [2, 1]])
    gates = torch.tensor([[0.25, 0.75], [0.4, 1.0], [0.3, 0.7], [0.5, 0.5]], requires_grad=True)
    loop_rows, loop_gates = rows.detach().double().requires_grad_(), gates.detach().double().requires_grad_()
    expected = [torch.zeros(3, dtype=torch.float64) for _ in slots]
    for token, choice in itertools.product(range(4), range(2)):
        if slots[token, choice] >= 0:
            expected[token] = expected[token] + loop_gates[token, choice] * loop_rows[slots[token, choice]]
    expected = torch.stack(expected)
    ours = ops.moe_combine(rows, slots, gates, None)
    tolerance = FLOAT32 if dtype == torch.float32 else {"rtol": 2**-8, "atol": 0.0}  # rounded once, to 8 bits
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, **tolerance)
    upstream = torch.randn(4, 3).to(dtype)
    (ours * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    torch.testing.assert_close(rows.grad.double(), loop_rows.grad, **tolerance)
    torch.testing.assert_close(gates.grad.double(), loop_gates.grad, **FLOAT32)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [5, 1, 0])
def test_linear_cross_entropy_matches_definition(num_tokens, with_bias):
    hidden, weight, bias = torch.randn(num_tokens, 4), torch.randn(7, 4), torch.randn(7)
    target = torch.randint(0, 7, (num_tokens,))
    ours_inputs = [value.clone().requires_grad_() for value in (hidden, weight, bias)]
    loop_inputs = [value.double().requires_grad_() for value in (hidden, weight, bias)]
    ours = ops.linear_cross_entropy(ours_inputs[0], ours_inputs[1], ours_inputs[2] if with_bias else None, target)
    expected = (loop_inputs[0].sum() + loop_inputs[1].sum() + loop_inputs[2].sum()) * 0.0
    for token in range(num_tokens):
        logits = [
            (loop_inputs[0][token] * loop_inputs[1][word]).sum() + (loop_inputs[2][word] if with_bias else 0.0)
            for word in range(7)
        ]
        expected = expected + torch.stack(logits).exp().sum().log() - logits[target[token]]
    assert ours.dtype == torch.float32
    assert ours.shape == ()
    torch.testing.assert_close(ours.double(), expected, **FLOAT32)
    (3 * ours).backward()
    (3 * expected).backward()
    for one, other in list(zip(ours_inputs, loop_inputs, strict=True))[: 3 if with_bias else 2]:
        torch.testing.assert_close(one.grad.double(), other.grad, **FLOAT32)


@pytest.mark.parametrize("normalize", [True, False])
def test_masked_pixel_loss_matches_loop(normalize):
    size, patch = 6, 2
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    pixels[1, :, 0:2, 2:4] = 0.25  # patch 1 of the second image is constant
    masked = torch.tensor([[8, 0], [1, 5]])
    predictions = torch.randn(2, 2, patch * patch * 3, generator=generator)
    ours_predictions = predictions.clone().requires_grad_()
    loop_predictions = predictions.double().requires_grad_()
    ours = ops.masked_pixel_loss(pixels, ours_predictions, masked, patch, eps=1e-6, normalize=normalize)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for image, place in itertools.product(range(2), range(2)):
        row, column = divmod(int(masked[image, place]), size // patch)
        values = [
            float(pixels[image, channel, row * patch + y, column * patch + x])
            for y in range(patch)
            for x in range(patch)
            for channel in range(3)
        ]
        if normalize:
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
            values = [(value - mean) / math.sqrt(variance + 1e-6) for value in values]
        errors = [(loop_predictions[image, place, index] - value) ** 2 for index, value in enumerate(values)]
        expected[image, place] = sum(errors) / len(values)
    assert ours.shape == (2, 2)
    torch.testing.assert_close(ours.double(), expected, **FLOAT32)
    upstream = torch.randn(2, 2, generator=generator)
    (ours * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    torch.testing.assert_close(ours_predictions.grad.double(), loop_predictions.grad, **FLOAT32)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("batch", "masked"), [(2, 0), (0, 3), (0, 0)])
def test_masked_pixel_loss_without_patches_is_empty(batch, masked, normalize):
    predictions = torch.zeros(batch, masked, 12, requires_grad=True)
    ids = torch.zeros(batch, masked, dtype=torch.int64)
    loss = ops.masked_pixel_loss(torch.zeros(batch, 3, 4, 4), predictions, ids, 2, normalize=normalize)
    assert loss.shape == (batch, masked)
    loss.sum().backward()
    assert predictions.grad.shape == predictions.shape


def test_normalized_masked_pixel_loss_ignores_patch_scale():
    pixels, masked = torch.randn(1, 3, 4, 4), torch.tensor([[0, 3]])
    predictions = torch.randn(1, 2, 12)
    one, other = (ops.masked_pixel_loss(x, predictions, masked, 2) for x in (pixels, 100 * pixels + 7))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_raw_pixel_loss_is_zero_for_the_pixels_themselves():
    pixels = torch.randn(2, 3, 8, 6)
    every = torch.arange(12).expand(2, -1)
    predictions = ops.patchify(pixels, 2)
    assert ops.masked_pixel_loss(pixels, predictions, every, 2, normalize=False).eq(0).all()
    assert ops.masked_pixel_loss(pixels, predictions, every, 2).gt(0).all()
