"""Parameter groups: which parameters decay, and which group of processes shares them."""

import functools

from tiny import tiny_model

from eve_ds.model.eve import EVE
from eve_ds.parallel.experts.moe import DeepSpeedMoE
from eve_ds.training.optimizer import optimizer_parameter_groups


def plain():
    return EVE(tiny_model())


def part(ep_size, ep_rank):
    """Part of the model that rank `ep_rank` of an expert-parallel group holds."""
    return EVE(tiny_model(), functools.partial(DeepSpeedMoE, ep_size=ep_size, ep_rank=ep_rank))


def group_names(model, weight_decay=0.05):
    """Parameter name -> group, as (decays, name of the group)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer_parameter_groups(model, weight_decay):
        assert group["weight_decay"] in (0.0, weight_decay)
        for parameter in group["params"]:
            assert id(parameter) in names
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["weight_decay"] > 0, group["name"])
    assert len(found) == len(names)
    return found


def test_matrices_decay_and_biases_norms_scales_and_embeddings_do_not():
    found = group_names(part(1, 0))
    kept = {name for name, (decays, _) in found.items() if decays}
    assert kept == {
        name
        for name in found
        if name.endswith((".fc1.weight", ".fc2.weight", ".qkv.weight", ".proj.weight", ".projection.weight"))
        or name.endswith((".fc1_weight", ".fc2_weight"))
        or name.endswith((".router.weight", ".query.weight", ".key_value.weight", ".pixels.weight", ".dense.weight"))
    }
    for name in ("text_embedding.word.weight", "image_embedding.position", "blocks.0.gamma_1", "norm.weight"):
        assert f"backbone.{name}" in found.keys() - kept
    assert "backbone.blocks.1.moe.router.modality_embedding" in found.keys() - kept


def test_expert_parameters_have_groups_named_after_their_process_group():
    found = group_names(part(4, 3))
    for name, (_, group) in found.items():
        assert (group == "ep_size_4") == ("deepspeed_experts" in name)
    moe = [group for group in optimizer_parameter_groups(part(4, 3), 0.05) if group.get("moe")]
    assert [(group["name"], group["weight_decay"]) for group in moe] == [("ep_size_4", 0.05), ("ep_size_4", 0.0)]


def test_plain_model_has_two_groups():
    groups = optimizer_parameter_groups(plain(), 0.05)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 0.05), ("no_decay", 0.0)]
