"""Stacked experts: names in their state dict, and loading by these names."""

import copy

import pytest
import torch

from eve_ds.model.experts import Experts
from eve_ds.model.feed_forward import FeedForward

COUNT, WIDTH, HIDDEN = 3, 8, 12


def drawn(seed=0):
    experts = Experts(COUNT, WIDTH, HIDDEN)
    generator = torch.Generator().manual_seed(seed)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return experts


def separate():
    return torch.nn.ModuleList(FeedForward(WIDTH, HIDDEN) for _ in range(COUNT))


def test_state_dict_equals_that_of_separate_networks():
    experts, networks = drawn(), separate()
    networks.load_state_dict(experts.state_dict())
    assert {name: tensor.shape for name, tensor in experts.state_dict().items()} == {
        name: tensor.shape for name, tensor in networks.state_dict().items()
    }
    rows = torch.randn(6, WIDTH)
    out = experts(rows, torch.tensor([2, 0, 3]))
    torch.testing.assert_close(out[:2], networks[0](rows[:2]))
    torch.testing.assert_close(out[2:5], networks[2](rows[2:5]))
    assert out[5].eq(0).all()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_separate_networks_load_into_stacked_ones(assign, nested):
    networks = separate()
    with torch.device("meta" if assign else "cpu"):
        experts = Experts(COUNT, WIDTH, HIDDEN)
    source, target = networks, experts
    if nested:
        source, target = torch.nn.Sequential(networks), torch.nn.Sequential(experts)
    state = source.state_dict()
    target.load_state_dict(state, assign=assign)
    assert list(state) == list(source.state_dict()), "loading must not change the caller's state dict"
    for expert, network in enumerate(networks):
        assert torch.equal(experts.fc1_weight[expert], network.fc1.weight)
        assert torch.equal(experts.fc2_bias[expert], network.fc2.bias)
    assert experts.fc1_weight.requires_grad


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("1.fc2.bias"), r'Missing key\(s\) in state_dict: "1\.fc2\.bias"\.'),
        (lambda state: state.update({"3.fc1.bias": torch.zeros(HIDDEN)}), r'Unexpected key.*"3\.fc1\.bias"'),
        (lambda state: state.update({"2.fc1.bias": torch.zeros(7)}), r"mismatch for 2\.fc1\.bias: .*\[7\].*\[12\]"),
    ],
)
def test_load_errors_name_the_tensor_and_change_nothing(change, text):
    experts = drawn()
    before, state = copy.deepcopy(experts.state_dict()), drawn(1).state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=text):
        experts.load_state_dict(state)
    broken = {name.partition(".")[2] for name in before if torch.equal(before[name], experts.state_dict()[name])}
    assert broken == ({"fc2.bias"} if "Missing" in text else {"fc1.bias"} if "mismatch" in text else set())


def test_deep_copy_has_its_own_hooks():
    experts = drawn()
    other = copy.deepcopy(experts)
    other.load_state_dict(drawn(1).state_dict())
    assert torch.equal(other.fc1_weight, drawn(1).fc1_weight)
    assert torch.equal(experts.fc1_weight, drawn().fc1_weight)
