"""Initial weights depend on the seed and a parameter's plain name."""

import torch
from tiny import tiny_config

from eve_ds.model.eve import EVE, initialize_weights
from eve_ds.model.moe import plain_named_tensors

CONFIG = tiny_config().model


def drawn(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    initialize_weights(model, CONFIG, 3)
    return {name: tensor.clone() for name, tensor in plain_named_tensors(model)}


def test_plain_names_decide_how_parameters_are_initialized():
    found = drawn(EVE(CONFIG))
    kept = {name for name, tensor in found.items() if (tensor == 7.0).all()}
    assert {name.rpartition(".")[2] for name in kept} <= {"gamma_1", "gamma_2", "log_temperature"}
    for name, tensor in found.items():
        kind = name.rpartition(".")[2]
        if kind.endswith("bias"):
            assert not tensor.any(), name
        elif kind == "weight" and tensor.ndim == 1:
            assert (tensor == 1).all(), name
        elif name not in kept and kind != "position":  # the preset draws positions as sines
            bound = CONFIG.position_initializer_range if kind in ("class_token", "mask_token") else 0.08
            assert 0 < tensor.abs().max() <= bound, name


def test_every_expert_is_drawn_separately():
    found = drawn(EVE(CONFIG))
    names = [f"backbone.blocks.1.moe.experts.{expert}.fc1.weight" for expert in range(CONFIG.moe.num_experts)]
    experts = [found[name] for name in names]
    assert all(not torch.equal(experts[0], other) for other in experts[1:])
