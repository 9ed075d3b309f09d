"""Plain and DeepSpeed parameter names map onto each other."""

import pytest

from eve_ds.model.naming import expert_id, to_deepspeed_name, to_plain_name

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
