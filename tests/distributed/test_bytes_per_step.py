"""Bytes that a training step moves over 4 ranks, kind by kind, against formulas of the model's sizes.

In bf16: gradients and weights of dense parameters over all ranks, those of experts over the ranks with the same
experts, rows of tokens, numbers of rows, and the sums of the balance of all layers together.
"""

import functools
import itertools
import os

import torch
from collectives import Collectives, recorded_collectives
from joint_loss import joint_loss
from tiny import tiny_tree

from eve_ds.config import parse_config

RANKS = 4
WIDTH, EXPERTS, LAYERS = 64, 8, 2
BF16, FP32 = 2, 4
FORWARD_AND_BACKWARD, RECOMPUTED = 2, 1
"""Passes that bring rows to the experts and back."""
SMALL_SUMS = 64
"""Most bytes of sums of norms and flags, which no formula counts."""
PADDING = 32
"""Most bytes by which ZeRO fills up its shards."""
CASES = [*itertools.product((0, 1, 2), (1, 2, 4), (False,)), (1, 2, True)]
"""ZeRO stage, ep_size, and whether activations are computed again in the backward."""


def configuration(**sections):
    model = tiny_tree(
        hidden_size=WIDTH,
        moe={"num_experts": EXPERTS, "routing": "dropless"},
        image_size=16,
        text_length=6,
        objectives=["joint"],
    )
    return parse_config(
        {
            "model": model,
            "optimizer": {"clip_grad_norm": 0.0},
            "train": {"train_batch_size": RANKS * 3, "precision": "bf16"},
            **sections,
        }
    )


def count_bytes(rank, world_size, cases):
    """For each case: bytes by kind in the second step, and elements and rows that the formulas are made of."""
    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    initialize_deepspeed_distributed()
    return [count_case(rank, world_size, *case) for case in cases]


def count_case(rank, world_size, stage, ep_size, checkpointed):
    from eve_ds.model.eve import EVE
    from eve_ds.model.moe import Router
    from eve_ds.parallel.engine import initialize_engine
    from eve_ds.parallel.experts.moe import DeepSpeedMoE
    from eve_ds.parallel.settings import resolve_deepspeed_config
    from eve_ds.training.optimizer import build_optimizer

    settings = configuration(parallel={"ep_size": ep_size})
    config, resolved = resolve_deepspeed_config({"zero_optimization": {"stage": stage}}, settings, world_size)
    torch.manual_seed(3)
    model = EVE(config.model, functools.partial(DeepSpeedMoE, ep_size=ep_size))
    expert = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    dense = sum(parameter.numel() for parameter in model.parameters()) - expert
    if checkpointed:
        model.backbone.checkpoint_blocks()
    engine = initialize_engine(model, build_optimizer(model, config, resolved), resolved)
    rows = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, inputs, output: rows.append(output.rows_per_expert))
    for step in range(2):
        rows.clear()
        with recorded_collectives() as calls:
            loss = joint_loss(engine, config.model, rank, step, 0)
            counts = torch.stack(rows)  # of the forward alone
            engine.backward(loss)
            engine.step()
    engine.destroy()
    held = EXPERTS // ep_size
    everyone = torch.stack([counts] * world_size)
    torch.distributed.all_gather_into_tensor(everyone, counts.unsqueeze(0))
    first = rank // ep_size * ep_size
    place = rank - first
    received = int(everyone[first : first + ep_size, :, place * held : (place + 1) * held].sum())
    return {"calls": list(calls), "dense": dense, "expert": expert, "sent": int(counts.sum()), "received": received}


def test_bytes_of_a_step_follow_the_formulas(run_ranks):
    results = run_ranks(count_bytes, RANKS, CASES)
    for rank, (number, (stage, ep_size, checkpointed)) in itertools.product(range(RANKS), enumerate(CASES)):
        passes = FORWARD_AND_BACKWARD + RECOMPUTED * checkpointed
        found = results[rank][number]
        calls, case = Collectives(found["calls"]), CASES[number]
        everyone, first = tuple(range(RANKS)), rank // ep_size * ep_size
        group = tuple(range(first, first + ep_size))
        same_experts = tuple(range(rank % ep_size, RANKS, ep_size))
        dense, expert = BF16 * found["dense"], BF16 * found["expert"]
        by_group = {everyone: dense}
        if len(same_experts) > 1:
            by_group[same_experts] = by_group.get(same_experts, 0) + expert
        gradients = calls.of("all_reduce", torch.bfloat16)
        assert {call.ranks for call in gradients} == by_group.keys(), case
        weights = calls.of("all_gather", torch.bfloat16)
        assert {call.ranks for call in weights} == (by_group.keys() if stage else set()), case
        for ranks, formula in by_group.items():
            assert 0 <= gradients.of("all_reduce", ranks=ranks).num_bytes - formula <= PADDING, case
            if stage:
                assert 0 <= weights.of("all_gather", ranks=ranks).num_bytes - formula <= PADDING, case
        rows = found["sent"] + found["received"] if ep_size > 1 else 0
        assert calls.of("all_to_all", torch.bfloat16, group).num_bytes == BF16 * WIDTH * rows * passes
        sizes = calls.of("all_to_all", torch.int64, group)
        assert [call.num_bytes for call in sizes] == [8 * EXPERTS] * (LAYERS if ep_size > 1 else 0), case
        statistics = calls.of("all_reduce", torch.float32, everyone)
        assert statistics[0].num_bytes == FP32 * (2 * EXPERTS + 1) * LAYERS, case
        counted = [*gradients, *weights, *sizes, *calls.of("all_to_all", torch.bfloat16), statistics[0]]
        assert calls.num_bytes - sum(call.num_bytes for call in counted) <= SMALL_SUMS, case


def train_with_capacity(rank, world_size, folder):
    """Tokens by view of each micro-batch, and calls of two steps, in the pre-training of ranks that share experts."""
    from eve_ds.training import pretrain as pretraining
    from eve_ds.training.feed import Feed
    from eve_ds.training.trainer import Trainer

    seen, found, take, step = [], [], Feed.next_batch, Trainer._train_step

    def watched(feed):
        batch = take(feed)
        seen.append({view: (layout.num_tokens, layout.tokens_of_group) for view, layout in batch.layouts.items()})
        return batch

    def recorded(trainer):
        with recorded_collectives() as calls:
            agreed = step(trainer)
        found.extend(calls)
        return agreed

    Feed.next_batch, Trainer._train_step = watched, recorded
    pretraining.evaluate_scenes = lambda *arguments, **options: {}
    tree = configuration().model_dump()
    tree["model"]["moe"] |= {"routing": "capacity"}
    tree["model"] |= {"objectives": ["mim", "mlm"], "text_length": 24, "patch_size": 8}
    config = parse_config(
        tree
        | {
            "data": {"sources": [{"kind": "scenes", "num_samples": 64}], "num_workers": 0},
            "parallel": {"ep_size": world_size},
            "optimizer": {"warmup_steps": 1},
            "train": {
                "train_batch_size": world_size * 4,
                "gradient_accumulation_steps": 2,
                "max_steps": 2,
                "output_dir": folder,
            },
        }
    )
    refused = refusal_of_nodes(rank, config)
    pretraining.pretrain(config, {"zero_optimization": {"stage": 1}})
    return seen, found, refused


def refusal_of_nodes(rank, config):
    """Error of a hierarchical exchange if ranks of a node are not consecutive, and whether something was written."""
    from eve_ds.config import ConfigError
    from eve_ds.training.pretrain import pretrain

    parallel = config.parallel.model_copy(update={"hierarchical": True})
    try:
        os.environ["LOCAL_RANK"] = str(1 - rank)
        pretrain(config.model_copy(update={"parallel": parallel}), {"zero_optimization": {"stage": 1}})
    except ConfigError as error:
        return str(error), config.train.output_dir.exists()
    finally:
        os.environ["LOCAL_RANK"] = str(rank)


def test_ranks_with_capacity_ask_for_no_sizes_in_the_layers(run_ranks, tmp_path):
    results = run_ranks(train_with_capacity, 2, str(tmp_path / "run"))
    tokens = [[{view: own for view, (own, _) in step.items()} for step in seen] for seen, *_ in results]
    assert len(tokens[0]) == 4, "micro-steps"
    assert tokens[0] != tokens[1], "the ranks must have different numbers of tokens"
    for seen, calls, (refusal, was_written) in results:
        assert refusal.startswith("parallel.hierarchical (true) needs the ranks of a node to be consecutive")
        assert not was_written
        for number, step in enumerate(seen):
            for view, (_, of_group) in step.items():
                assert of_group == tuple(of_rank[number][view] for of_rank in tokens)
        rows = Collectives(calls).of("all_to_all", torch.float32)
        assert len(rows) == 4 * LAYERS * 2 * 2 * FORWARD_AND_BACKWARD, "of two views, there and back"
        assert [call for call in calls if call.dtype == torch.int64] == [], "nobody asks for sizes"
