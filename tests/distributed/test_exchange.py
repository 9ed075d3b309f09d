"""Exchange of rows in an MoE layer on 4 ranks: every way gives the same bits, and the sums of the plain layer.

The ranks have different numbers of tokens, some of them padding, in two views.
"""

import functools
import itertools
import os

import torch
from collectives import recorded_collectives
from tiny import tiny_model

RANKS = 4
TOKENS = ((13, 8), (20, 5), (7, 11), (16, 9))
"""Number of tokens of each rank in each of two views."""
PADDING = 3
"""Number of the last tokens of each view that are padding."""
WAYS = {
    "direct": {},
    "overlap": {"overlap": 2},
    "hierarchical": {"hierarchical": True},
    "both": {"overlap": 2, "hierarchical": True},
}
MESSAGES = {"direct": 1, "overlap": 2, "hierarchical": 2, "both": 4}
"""Number of all-to-alls that bring rows to the experts, or back."""
ROUTINGS = {
    "dropless": {"routing": "dropless"},
    "capacity 1": {"routing": "capacity", "capacity_factor": 1.0, "min_capacity": 1},
    "capacity 2": {"routing": "capacity", "capacity_factor": 2.0, "min_capacity": 1},
}
TOLERANCE = 1e-6
"""Largest difference from the plain layer in fp32, relative to the largest element: a product over the rows of four
ranks sums in another order than four products."""
SIZES = torch.int64
"""Data type of the numbers of rows, which no other tensor of an exchange has."""


def configuration(routing, num_experts=8):
    return tiny_model(moe={"num_experts": num_experts, "top_k": 2, **ROUTINGS[routing]})


def tokens_of(rank, dtype):
    """(hidden states, modality ids, mask, upstream gradient) of a rank."""
    generator = torch.Generator().manual_seed(rank)
    count = sum(TOKENS[rank])
    x = torch.randn(count, 32, generator=generator).to(dtype)
    mask = torch.cat([torch.arange(size) < size - PADDING for size in TOKENS[rank]])
    return x, torch.arange(count) % 2, mask, torch.randn(count, 32, generator=generator).to(dtype)


def drawn(layer, dtype):
    """The layer with weights that depend on their plain names only."""
    from eve_ds.model.moe import plain_named_tensors

    with torch.no_grad():
        for name, tensor in plain_named_tensors(torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"moe": layer})})):
            generator = torch.Generator().manual_seed(sum(name.encode()))
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return layer.to(dtype).train()


def run(layer, rank, dtype, views, checkpointed, known):
    """Output, gradient of the input, and gradients of the parameters by name."""
    from torch.utils.checkpoint import checkpoint

    from eve_ds.model.moe import Peers

    x, ids, mask, upstream = tokens_of(rank, dtype)
    x.requires_grad_()
    sizes = list(TOKENS[rank]) if views else None
    by_view = zip(*TOKENS, strict=True) if views else [[sum(of_rank) for of_rank in TOKENS]]
    tokens = tuple(tuple(of_view) if known else None for of_view in by_view)
    peers = Peers(tokens, {} if checkpointed else None)
    mix = functools.partial(checkpoint, layer.mix, use_reentrant=False) if checkpointed else layer.mix
    mixed, *_ = mix(x, ids, mask, sizes, peers)
    (mixed * upstream).float().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    return {"output": mixed.detach(), "input": x.grad, **gradients}


def layer_of(config, way, dtype, nodes, ep_size=RANKS):
    from eve_ds.config import ParallelConfig
    from eve_ds.parallel.exchange.connect import connect_experts
    from eve_ds.parallel.experts.moe import DeepSpeedMoE
    from eve_ds.topology import Topology

    layer = DeepSpeedMoE(config, ep_size)
    layer.set_deepspeed_parallelism()
    connect_experts(layer, ParallelConfig(ep_size=ep_size, **WAYS[way]), Topology.current(ep_size), nodes)
    return drawn(layer, dtype)


def off_from_plain(config, ours, rank, views):
    """Largest difference of the results from those of the plain layer on the tokens of one rank after another."""
    from eve_ds.model.moe import MoE

    plain = drawn(MoE(config), torch.float32)
    held = config.moe.num_experts // RANKS
    for peer in range(RANKS):
        x, ids, mask, upstream = tokens_of(peer, torch.float32)
        x.requires_grad_()
        mixed, *_ = plain.mix(x, ids, mask, list(TOKENS[peer]) if views else None)
        (mixed * upstream).sum().backward()
        if peer == rank:
            expected = {"output": mixed.detach(), "input": x.grad}
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        whole = getattr(plain.experts, name).grad
        expected[f"deepspeed_moe.experts.deepspeed_experts.{name}"] = whole[rank * held : (rank + 1) * held]
    return max(float((ours[name] - wanted).abs().max() / wanted.abs().max()) for name, wanted in expected.items())


def exchange_in_every_way(rank, world_size):
    """(case, way, names of unequal tensors, number of exchanges of sizes), and differences from the plain layer."""
    from eve_ds.parallel.nodes import nodes_of_run
    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(rank % 2), "2"  # two nodes
    initialize_deepspeed_distributed()
    nodes = nodes_of_run()
    assert nodes == [0, 0, 1, 1]
    found, off = [], []
    for routing, dtype in itertools.product(ROUTINGS, (torch.float32, torch.bfloat16)):
        config = configuration(routing)
        layers = {way: layer_of(config, way, dtype, nodes) for way in WAYS}
        for views, checkpointed in itertools.product((False, True), (False, True)):
            expected = run(layers["direct"], rank, dtype, views, False, False)
            if dtype == torch.float32 and not checkpointed:
                off.append((off_from_plain(config, expected, rank, views), routing, views))
            for way, layer in layers.items():
                known = routing != "dropless"
                with recorded_collectives() as calls:
                    ours = run(layer, rank, dtype, views, checkpointed, known)
                unequal = [name for name, tensor in ours.items() if not torch.equal(tensor, expected[name])]
                integers = [call for call in calls if call.dtype == SIZES]
                found.append(((routing, str(dtype), views, checkpointed), way, unequal, len(integers), len(calls)))
    return found, off, unusual_sizes(rank, nodes), order_of_parts(rank, nodes)


def order_of_parts(rank, nodes):
    """Events of a forward and a backward in two parts: S starts an exchange, A waits for one, E computes experts."""
    from unittest import mock

    from eve_ds.parallel.exchange.steps import Trip

    layer, events = layer_of(configuration("dropless"), "overlap", torch.float32, nodes), []
    start, arrive = Trip.start, Trip.arrive
    experts = layer.deepspeed_moe.experts["deepspeed_experts"]
    experts.register_forward_hook(lambda *_: events.append("E"))
    experts.register_full_backward_hook(lambda *_: events.append("E"))
    with (
        mock.patch.object(Trip, "start", lambda trip, *rows, **way: (events.append("S"), start(trip, *rows, **way))[1]),
        mock.patch.object(Trip, "arrive", lambda trip: (events.append("A"), arrive(trip))[1]),
    ):
        run(layer, rank, torch.float32, False, False, False)
    return "".join(events)


def unusual_sizes(rank, nodes):
    """Names of unequal tensors for one expert a rank, three experts in two parts, and groups inside a node."""
    found = {}
    for num_experts, ep_size, way in ((4, 4, "hierarchical"), (12, 4, "both"), (8, 2, "both"), (8, 4, "both")):
        config = configuration("dropless", num_experts)
        direct, other = (layer_of(config, name, torch.float32, nodes, ep_size) for name in ("direct", way))
        expected, ours = (run(layer, rank, torch.float32, False, False, False) for layer in (direct, other))
        found[num_experts, ep_size] = [name for name in ours if not torch.equal(ours[name], expected[name])]
    return found


def test_every_way_gives_the_same_bits_and_the_sums_of_the_plain_layer(run_ranks):
    for found, off, unusual, order in run_ranks(exchange_in_every_way, RANKS):
        assert order == "SSAESAESAA" + "SSAESAESAA", "each part travels while the other is computed"
        assert len(found) == 3 * 2 * 4 * len(WAYS)
        for case, way, unequal, sizes, calls in found:
            routing, _, views, checkpointed = case
            assert unequal == [], (case, way)
            assert sizes == (1 if routing == "dropless" else 0), (case, way)
            exchanges = 2 if views and routing != "dropless" else 1
            passes = 3 if checkpointed else 2  # forward, backward, and the recomputation, which asks for no sizes
            assert calls - sizes == exchanges * MESSAGES[way] * 2 * passes, (case, way)
        for difference, *case in off:
            assert difference < TOLERANCE, case
        assert all(unequal == [] for unequal in unusual.values()), unusual
