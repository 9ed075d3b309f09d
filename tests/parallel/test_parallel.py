"""Parts of eve_ds.parallel that need one process only: initial weights, names, parameter groups, refusals."""

import functools

import pytest
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from tiny import tiny_model

from eve_ds.config import ConfigError
from eve_ds.model.eve import EVE
from eve_ds.model.moe import load_plain_state_dict, local_plain_state_dict
from eve_ds.parallel.moe import DeepSpeedMoE, UpstreamMoE
from eve_ds.parallel.moe_layers import moe_factory
from eve_ds.parallel.moe_stage3 import Stage3MoE
from eve_ds.parallel.refused import check_topology
from eve_ds.topology import Topology

CONFIG = tiny_model(moe={"num_experts": 8})
TOPOLOGY = {"world_size": 4, "num_experts": 8, "ep_size": 2, "zero_stage": 1, "clip_grad_norm": 1.0}


def eve(moe_cls=None, seed=0):
    torch.manual_seed(seed)
    return EVE(CONFIG) if moe_cls is None else EVE(CONFIG, moe_cls)


def part(ep_size, ep_rank, seed=0):
    """Model part that rank `ep_rank` of an expert-parallel group holds."""
    return eve(functools.partial(DeepSpeedMoE, ep_size=ep_size, ep_rank=ep_rank), seed)


def test_parts_of_all_ranks_equal_the_plain_model_with_the_same_seed():
    plain = eve().state_dict()
    for ep_size in (1, 2, 4, 8):
        seen = set()
        for ep_rank in range(ep_size):
            held = local_plain_state_dict(part(ep_size, ep_rank))
            assert all(torch.equal(tensor, plain[name]) for name, tensor in held.items())
            assert len([name for name in held if ".moe.experts." in name]) == 2 * 4 * 8 // ep_size
            seen |= held.keys()
        assert seen == plain.keys()


def test_experts_have_different_initial_weights():
    weights = [
        tensor for name, tensor in part(2, 1).state_dict().items() if name.endswith("fc1.weight") and "expert" in name
    ]
    assert len(weights) == 8
    for index, weight in enumerate(weights):
        assert all(not torch.equal(weight, other) for other in weights[:index])


def test_another_seed_gives_other_weights():
    one, other = (eve(seed=seed).state_dict() for seed in (0, 1))
    same = {name for name in one if torch.equal(one[name], other[name])}
    assert all("bias" in name or "norm" in name or "gamma" in name for name in same)


def test_engine_and_checkpoints_find_the_layer_by_class_and_names():
    model = part(4, 1)
    layers = [module for module in model.modules() if isinstance(module, UpstreamMoE)]
    assert [(layer.num_experts, layer.num_local_experts, layer.ep_size) for layer in layers] == [(8, 2, 4)] * 2
    names = list(model.state_dict())
    assert "backbone.blocks.1.moe.deepspeed_moe.experts.deepspeed_experts.1.fc1.weight" in names
    assert len([name for name in names if "deepspeed_experts" in name]) == 2 * 2 * 4
    assert "backbone.blocks.1.moe.router.modality_embedding" in names
    assert not [name for name in names if ".gate." in name]
    marked = {name for name, parameter in model.named_parameters() if getattr(parameter, "allreduce", True) is False}
    assert marked == {name for name, _ in model.named_parameters() if "deepspeed_experts" in name}
    assert len(marked) == 2 * 4
    assert {parameter.group_name for name, parameter in model.named_parameters() if name in marked} == {"ep_size_4"}


def test_the_layer_of_zero_3_has_the_parameters_of_the_others_with_marks_for_the_engine():
    topology = Topology(rank=3, world_size=8, ep_size=4)
    others, model = (eve(moe_factory(stage, topology)) for stage in (2, 3))
    assert not [module for module in model.modules() if isinstance(module, UpstreamMoE)], "the engine refuses it"
    layers = [module for module in model.modules() if isinstance(module, AutoEPMoELayer)]
    assert [(layer.num_experts, layer.num_local_experts, layer.ep_rank) for layer in layers] == [(8, 2, 3)] * 2
    expected = others.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    for name, parameter in model.named_parameters():
        marks = [getattr(parameter, mark, None) for mark in ("allreduce", "group_name", "ds_zero_placement_family")]
        is_expert = "deepspeed_experts" in name
        assert marks == ([False, "ep_size_4", "autoep_expert"] if is_expert else [None, None, None]), name


def test_plain_weights_load_into_a_part():
    plain, model = eve(seed=1), part(2, 1)
    load_plain_state_dict(model, plain.state_dict().__getitem__)
    wanted = plain.state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in local_plain_state_dict(model).items())
    state = plain.state_dict()
    del state["backbone.blocks.2.moe.experts.6.fc2.bias"]
    with pytest.raises(KeyError, match=r"blocks\.2\.moe\.experts\.6\.fc2\.bias"):
        load_plain_state_dict(model, state.__getitem__)


def test_layer_on_one_rank_needs_no_process_group():
    torch.manual_seed(2)
    batch = {"input_ids": torch.randint(5, 11, (2, 6)), "pixel_values": torch.randn(2, 3, 64, 64)}
    expected, ours = (model.eval().backbone(**batch).moe[1].hidden_states for model in (eve(), part(1, 0)))
    assert torch.equal(ours, expected)


def test_missing_expert_parallel_group_error_says_what_to_do():
    layer = DeepSpeedMoE(CONFIG, ep_size=2, ep_rank=1)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    arguments = (
        torch.zeros(1, 3, CONFIG.hidden_size),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.ones(1, 3, dtype=torch.bool),
    )
    with pytest.raises(RuntimeError, match=r"spread over 2 ranks.*pass the model to deepspeed\.initialize first"):
        layer(*arguments)


@pytest.mark.parametrize("layer", [DeepSpeedMoE, Stage3MoE])
def test_indivisible_number_of_experts_is_refused(layer):
    with pytest.raises(ConfigError, match=r"num_experts \(8\) must be divisible by parallel\.ep_size \(3\)"):
        layer(CONFIG, ep_size=3)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"ep_size": 1},
        {"ep_size": 4, "zero_stage": 2},
        {"zero_stage": 0, "clip_grad_norm": 0.0},
        {"zero_stage": 0, "ep_size": 1},
        {"overlap": 4},
        {"overlap": 9, "ep_size": 1},
        {"zero_stage": 3},
    ],
)
def test_valid_topologies_are_accepted(change):
    check_topology(**TOPOLOGY | change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"num_experts": 6, "ep_size": 4},
            r"model\.moe\.num_experts \(6\) must be divisible by parallel\.ep_size \(4\).*one of 1, 2, 3, 6 as ep_size",
        ),
        (
            {"world_size": 6, "ep_size": 4},
            r"number of ranks \(6\) must be divisible by parallel\.ep_size \(4\).*start a multiple of 4 ranks, or "
            r"take one of 1, 2 as ep_size",
        ),
        (
            {"overlap": 5},
            r"parallel\.overlap \(5\) must be at most the number of experts of a rank \(4\), model\.moe\.num_experts "
            r"\(8\) / parallel\.ep_size \(2\), .*take fewer parts, or a smaller ep_size",
        ),
        (
            {"zero_stage": 0},
            r"clip_grad_norm \(1\) cannot be used with zero_optimization\.stage 0 and parallel\.ep_size \(2\).*"
            r"average of the ranks' gradient norms.*use a higher stage, where it is, or clip_grad_norm=0",
        ),
    ],
)
def test_topologies_that_fail_or_give_other_results_are_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        check_topology(**TOPOLOGY | change)
