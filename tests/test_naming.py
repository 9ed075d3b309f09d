"""Plain and DeepSpeed parameter names map onto each other."""

import pytest

from eve_ds.model.naming import expert_id, is_stacked, plain_names, to_deepspeed_name, to_plain_name

PAIRS = [
    (
        "backbone.blocks.5.moe.experts.7.fc1.weight",
        "backbone.blocks.5.moe.deepspeed_moe.experts.deepspeed_experts.3.fc1.weight",
    ),
    (
        "backbone.blocks.11.moe.experts.4.fc2.bias",
        "backbone.blocks.11.moe.deepspeed_moe.experts.deepspeed_experts.0.fc2.bias",
    ),
]


@pytest.mark.parametrize(("plain", "deepspeed"), PAIRS)
def test_experts_are_counted_from_the_first_of_the_rank(plain, deepspeed):
    assert to_plain_name(deepspeed, first_expert=4) == plain
    assert to_deepspeed_name(plain, first_expert=4) == deepspeed
    assert expert_id(plain) == expert_id(deepspeed) + 4


@pytest.mark.parametrize(
    "name", ["backbone.blocks.5.moe.router.weight", "backbone.blocks.5.norm2.weight", "text_head.bias", "experts.3.fc1"]
)
def test_other_names_stay(name):
    assert to_plain_name(name, first_expert=4) == name
    assert to_deepspeed_name(name, first_expert=4) == name
    assert expert_id(name) is None


def test_expert_zero_is_an_expert():
    assert expert_id("blocks.1.moe.experts.0.fc1.weight") == 0


@pytest.mark.parametrize("infix", ["experts", "deepspeed_moe.experts.deepspeed_experts"])
def test_a_stacked_parameter_holds_experts_in_order(infix):
    name = f"backbone.blocks.5.moe.{infix}.fc2.bias"
    assert is_stacked(name)
    assert plain_names(name, 6, 2) == tuple(f"backbone.blocks.5.moe.experts.{expert}.fc2.bias" for expert in (6, 7))


@pytest.mark.parametrize("name", [*(name for pair in PAIRS for name in pair), "backbone.blocks.0.ffn.image.fc1.weight"])
def test_one_weight_is_not_stacked(name):
    assert not is_stacked(name)
    assert plain_names(name, 4, 2) == (to_plain_name(name, 4),)
