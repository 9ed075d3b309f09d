"""Names of experts' weights in the plain model, in state dicts and in stacked parameters."""

import pytest

from eve_ds.model.naming import expert_id, is_stacked, plain_names

OTHERS = [
    "backbone.blocks.5.moe.router.weight",
    "backbone.blocks.0.ffn.image.fc1.weight",
    "text_head.bias",
    "experts.3.fc1",
    "backbone.blocks.5.moe.experts.7.fc1.weight",
]


@pytest.mark.parametrize("infix", ["experts", "deepspeed_moe.experts.deepspeed_experts"])
def test_stacked_parameter_holds_experts_in_order(infix):
    name = f"backbone.blocks.5.moe.{infix}.fc2_bias"
    assert is_stacked(name)
    assert plain_names(name, 6, 2) == tuple(f"backbone.blocks.5.moe.experts.{expert}.fc2.bias" for expert in (6, 7))


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_do_not_change(name):
    assert not is_stacked(name)
    assert plain_names(name, 4, 2) == (name,)


def test_expert_id_is_read_from_the_name():
    assert expert_id("blocks.1.moe.experts.0.fc1.weight") == 0
    assert expert_id("backbone.blocks.11.moe.experts.31.fc2.bias") == 31
    assert [expert_id(name) for name in OTHERS[:-1]] == [None] * 4
