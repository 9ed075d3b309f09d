"""Plain mixture of experts: its results, and the inputs on which a token's output does and does not depend."""

import math

import pytest
import torch
from tiny import MODEL, tiny_model

from eve_ds.model.moe import MoE, RouterStatistics, on_host, router_metrics

WIDTH, EXPERTS = MODEL["hidden_size"], MODEL["moe"]["num_experts"]
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


def layer(profile="default", *, training=False, seed=0, **moe):
    """An MoE layer with random weights large enough for distinct routes."""
    config = tiny_model(profile=profile, moe={"top_k": 2, "routing": "capacity", "min_capacity": 1} | moe)
    made = MoE(config).train(training)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


def batch(num_samples=3, image_tokens=5, text_tokens=4, padding=0, seed=1):
    """Tokens, modality ids and mask of samples [image, text, padding]; the real tokens do not depend on the padding."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(num_samples, image_tokens + text_tokens, WIDTH, generator=generator)
    noise = torch.randn(num_samples, padding, WIDTH, generator=generator)
    modality = torch.tensor([0] * image_tokens + [1] * (text_tokens + padding)).expand(num_samples, -1)
    mask = torch.tensor([True] * (image_tokens + text_tokens) + [False] * padding).expand(num_samples, -1)
    return torch.cat([real, noise], dim=1), modality, mask


def first_sample(inputs):
    return tuple(value[:1] for value in inputs)


def token_by_loop(moe, x, modality, *, top_k=2):
    """One token alone through its experts, in fp64: the required result of a dropless layer."""
    router = moe.router
    seen = x.double() + router.modality_embedding[modality].double()
    probabilities = (router.weight.double() @ seen).softmax(dim=0)
    chosen = probabilities.argsort(descending=True)[:top_k]
    total = probabilities[chosen].sum() if top_k > 1 else 1.0
    enters = seen if router.official else x.double()
    out = torch.zeros(WIDTH, dtype=torch.float64)
    for expert in chosen:
        experts = moe.experts
        hidden = experts.fc1_weight[expert].double() @ enters + experts.fc1_bias[expert].double()
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        done = experts.fc2_weight[expert].double() @ hidden + experts.fc2_bias[expert].double()
        out = out + probabilities[expert] / total * done
    return out


@pytest.mark.parametrize("profile", ["default", "official"])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_dropless_layer_is_the_sum_over_chosen_experts(profile, top_k):
    moe = layer(profile, routing="dropless", top_k=top_k)
    x, modality, mask = batch()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    ours = moe(x, modality, mask).hidden_states
    (ours * upstream).sum().backward()
    gradients = [parameter.grad.clone() for parameter in moe.parameters()]
    moe.zero_grad()
    expected = torch.stack(
        [token_by_loop(moe, t, m, top_k=top_k) for t, m in zip(x.flatten(0, 1), modality.flatten(), strict=True)]
    ).view(x.shape)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.double(), expected, **FLOAT32)
    for gradient, (name, parameter) in zip(gradients, moe.named_parameters(), strict=True):
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


class TestEvaluationByDefault:
    def test_does_not_depend_on_other_samples(self):
        moe = layer(second_choice_noise=True, router_jitter=0.1, capacity_factor=0.5)
        inputs = batch()
        alone = moe(*first_sample(inputs)).hidden_states
        torch.testing.assert_close(moe(*inputs).hidden_states[:1], alone, **FLOAT32)

    def test_does_not_depend_on_padding(self):
        moe = layer(capacity_factor=0.5)
        short, padded = batch(), batch(padding=6)
        ours = moe(*padded)
        torch.testing.assert_close(ours.hidden_states[:, :9], moe(*short).hidden_states, **FLOAT32)
        assert ours.hidden_states[:, 9:].eq(0).all()
        torch.testing.assert_close(ours.load_balancing_loss, moe(*short).load_balancing_loss)
        torch.testing.assert_close(ours.router_z_sum, moe(*short).router_z_sum)
        assert ours.statistics.tokens.tolist() == [15, 12]

    def test_is_deterministic_and_drops_nothing(self):
        moe = layer(second_choice_noise=True, router_jitter=0.1, capacity_factor=0.5)
        one, other = moe(*batch()), moe(*batch())
        assert torch.equal(one.hidden_states, other.hidden_states)
        assert one.statistics.dropped.tolist() == [0, 0]

    def test_experts_do_not_see_the_modality_embedding(self):
        moe = layer()
        moe.experts.forward = lambda rows, sizes: rows
        x, modality, mask = batch()
        torch.testing.assert_close(moe(x, modality, mask).hidden_states, x, **FLOAT32)


class TestOfficialEvaluation:
    """Behavior of the release; the default profile corrects each of these quirks."""

    def test_depends_on_other_samples(self):
        moe = layer("official", capacity_factor=0.5)
        inputs = batch()
        alone = moe(*first_sample(inputs)).hidden_states
        assert (moe(*inputs).hidden_states[:1] - alone).abs().max() > 0.1

    def test_depends_on_padding(self):
        moe = layer("official", capacity_factor=0.5)
        ours = moe(*batch(padding=6))
        expected = moe(*batch())
        assert (ours.hidden_states[:, :9] - expected.hidden_states).abs().max() > 0.1
        assert ours.hidden_states[:, 9:].abs().max() > 0.1
        assert ours.statistics.tokens.tolist() == [15, 12 + 18]
        assert ours.load_balancing_loss != expected.load_balancing_loss

    def test_second_choice_is_noisy_if_enabled(self):
        noisy, quiet = (layer("official", second_choice_noise=noise, capacity_factor=9.0) for noise in (True, False))
        torch.manual_seed(0)
        assert not torch.equal(noisy(*batch()).hidden_states, noisy(*batch()).hidden_states)
        assert torch.equal(quiet(*batch()).hidden_states, quiet(*batch()).hidden_states)

    def test_drops_routes(self):
        assert layer("official", capacity_factor=0.5)(*batch()).statistics.dropped.sum() > 0

    def test_experts_see_the_modality_embedding(self):
        moe = layer("official", routing="dropless")
        moe.experts.forward = lambda rows, sizes: rows
        x, modality, mask = batch()
        expected = x + moe.router.modality_embedding[modality]
        torch.testing.assert_close(moe(x, modality, mask).hidden_states, expected, **FLOAT32)


class TestTraining:
    def test_capacity_drops_routes_and_counts_them(self):
        moe = layer(training=True, capacity_factor=0.5)
        inputs = batch(padding=2)
        routed = moe.router(inputs[0].flatten(0, 1), inputs[1].flatten(), inputs[2].flatten())
        slots = routed.routing.slots.view(3, 11, 2)
        statistics = moe(*inputs).statistics
        assert statistics.dropped.tolist() == [(slots[:, :5] < 0).sum(), (slots[:, 5:9] < 0).sum()]
        assert statistics.dropped.sum() > 0
        assert (slots[:, 9:] == -1).all()
        assert routed.routing.counts.max() <= 9  # ceil(2 * 0.5 * 33 / 4)

    def test_dropless_drops_no_route(self):
        assert layer(training=True, routing="dropless")(*batch()).statistics.dropped.tolist() == [0, 0]

    @pytest.mark.parametrize("switch", [{"second_choice_noise": True}, {"router_jitter": 0.3}])
    def test_noise_is_off_by_default(self, switch):
        noisy = layer(training=True, routing="dropless", **switch)
        quiet = layer(training=True, routing="dropless")
        assert not torch.equal(noisy(*batch()).hidden_states, noisy(*batch()).hidden_states)
        assert torch.equal(quiet(*batch()).hidden_states, quiet(*batch()).hidden_states)

    @pytest.mark.parametrize("top_k", [1, 2])
    def test_router_gets_gradients_from_the_output_alone(self, top_k):
        moe = layer(training=True, routing="dropless", top_k=top_k)
        moe(*batch()).hidden_states.square().sum().backward()
        assert moe.router.weight.grad.abs().max() > 1e-3
        assert moe.router.modality_embedding.grad.abs().max() > 1e-3


def test_second_choice_noise_draws_from_the_softmax_of_the_other_experts():
    """Gumbel-max: the second expert is e with the probability of e among the experts other than the first choice."""
    moe = layer(training=True, routing="dropless", second_choice_noise=True)
    x = batch(1, 1, 0)[0].flatten(0, 1).expand(20_000, -1)
    torch.manual_seed(0)
    zeros = torch.zeros(len(x), dtype=torch.int64)
    routing = moe.router(x, zeros, zeros == 0).routing
    first = routing.expert_ids[0, 0]
    assert (routing.expert_ids[:, 0] == first).all()
    others = routing.probabilities[0].index_fill(0, first, 0.0)
    drawn = torch.bincount(routing.expert_ids[:, 1], minlength=EXPERTS) / len(x)
    # Five standard deviations of a share of 20,000 draws.
    torch.testing.assert_close(drawn, others / others.sum(), rtol=0, atol=5 * math.sqrt(0.25 / 20_000))


def test_losses_and_statistics_are_sums_over_routed_tokens():
    moe = layer()
    x, modality, mask = batch(padding=3)
    output = moe(x, modality, mask)
    routes, entropy, z_sum = torch.zeros(2, EXPERTS), 0.0, 0.0
    first, mean = torch.zeros(EXPERTS), torch.zeros(EXPERTS)
    real = [(t, m) for t, m, keep in zip(x.flatten(0, 1), modality.flatten(), mask.flatten(), strict=True) if keep]
    for token, kind in real:
        logits = moe.router.weight @ (token + moe.router.modality_embedding[kind])
        probabilities = logits.softmax(dim=0).detach()
        best = probabilities.argsort(descending=True)
        routes[kind, best[:2]] += 1
        first[best[0]] += 1 / len(real)
        mean += probabilities / len(real)
        entropy -= float((probabilities * probabilities.log()).sum())
        z_sum += float(logits.detach().logsumexp(dim=0) ** 2)
    assert torch.equal(output.statistics.routes, routes)
    assert output.statistics.tokens.tolist() == [15, 12]
    assert output.statistics.entropy_sum.item() == pytest.approx(entropy, rel=1e-5)
    assert output.router_z_sum.item() == pytest.approx(z_sum, rel=1e-5)
    assert output.load_balancing_loss.item() == pytest.approx(EXPERTS * float((first * mean).sum()), rel=1e-5)


def test_module_keeps_no_state_of_a_forward():
    moe = layer(training=True)
    before = set(vars(moe)) | set(vars(moe.router))
    moe(*batch())
    assert set(vars(moe)) | set(vars(moe.router)) == before


@pytest.mark.parametrize("routing", ["capacity", "dropless"])
def test_batch_of_padding_gives_zeros_and_zero_gradients(routing):
    moe = layer(training=True, routing=routing)
    x, modality, mask = batch()
    output = moe(x, modality, torch.zeros_like(mask))
    assert output.hidden_states.eq(0).all()
    assert output.load_balancing_loss == 0
    (output.hidden_states.sum() + output.load_balancing_loss + output.router_z_sum).backward()
    assert all(parameter.grad is not None for parameter in moe.experts.parameters())
    assert all(parameter.grad.eq(0).all() for parameter in moe.parameters() if parameter.grad is not None)


def test_bf16_tokens_are_routed_in_fp32():
    moe = layer()
    x, modality, mask = batch()
    rounded = x.bfloat16()
    expected = moe.router(rounded.float().flatten(0, 1), modality.flatten(), mask.flatten()).routing
    ours = moe.router(rounded.flatten(0, 1), modality.flatten(), mask.flatten()).routing
    assert torch.equal(ours.slots, expected.slots)
    assert torch.equal(ours.gates, expected.gates)


def test_router_metrics_match_hand_computed_values():
    statistics = RouterStatistics(
        routes=torch.tensor([[6.0, 2.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0]]),
        dropped=torch.tensor([2.0, 1.0]),
        tokens=torch.tensor([4.0, 2.0]),
        entropy_sum=torch.tensor(3.0),
    )
    metrics = router_metrics(statistics)
    assert metrics.pop("image_share") == pytest.approx(4 / 6)
    assert metrics.pop("entropy") == pytest.approx(0.5)
    assert metrics.pop("dead_experts") == 2
    assert metrics.pop("max_load") == pytest.approx(7 / 3)
    assert metrics.pop("dropped_image") == pytest.approx(0.25)
    assert metrics.pop("dropped_text") == pytest.approx(0.25)
    assert metrics == {
        **{f"image_routes/{expert}": routes for expert, routes in enumerate([6, 2, 0, 0])},
        **{f"text_routes/{expert}": routes for expert, routes in enumerate([1, 3, 0, 0])},
    }


def test_statistics_of_all_layers_reach_the_host_in_one_copy(monkeypatch):
    copies, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor) or copy(tensor))
    layers = [RouterStatistics(torch.rand(2, 4), torch.rand(2), torch.rand(2), torch.rand(())) for _ in range(3)]
    for found, expected in zip(on_host(layers), layers, strict=True):
        for mine, wanted in zip(found, expected, strict=True):
            assert torch.equal(mine, wanted)
            assert mine.shape == wanted.shape
    assert len(copies) == 1
    assert on_host([]) == []


def test_router_metrics_without_tokens_are_finite():
    zeros = RouterStatistics(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2), torch.zeros(()))
    metrics = router_metrics(zeros)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["dead_experts"] == 4
