"""Every setting of the DeepSpeed JSON that could change gradients: two ranks with ep_size 2 against plain torch.

One start of two processes trains all cases. The reference is one process with the plain model, torch's AdamW and the
mean of both ranks' losses.
"""

import functools

import pytest
import torch
from joint_loss import MICRO_SIZE, joint_loss
from tiny import MODEL

from eve_ds.config import parse_config
from eve_ds.parallel.deepspeed_json.keys import NOTED, TAKEN, ZERO, Rule

RANKS, STEPS, MICRO_STEPS = 2, 2, 2
CLIP = 0.5
EPS = 1e-3
"""Large enough that gradients which are zero but for rounding (biases of keys) do not move weights."""
LOW_PRECISION = 2.0**-7
"""Tolerance for gradients sent in bf16, which are rounded by up to 2^-9 twice (sent, summed) in each of two steps. Only
the first moment, a mean of gradients, is compared then: the others are squares and quotients of it."""
FULL_PRECISION = 2e-5
"""Tolerance for fp32, relative to the largest element of a tensor (measured: below 2e-6)."""
BF16 = {"communication_data_type": "bf16"}
OF_ZERO = [
    {"contiguous_gradients": False},
    {"reduce_scatter": False},
    {"overlap_comm": True},
    {"overlap_comm": True, "reduce_bucket_size": 100, "contiguous_gradients": False},
    {"reduce_bucket_size": 1, "use_multi_rank_bucket_allreduce": False},
    {"use_multi_rank_bucket_allreduce": False, "round_robin_gradients": True},
    {"allgather_partitions": False, "allgather_bucket_size": 2},
    {"round_robin_gradients": True},
    {"parameter_alignment": True},
    {"parameter_alignment": True, "round_robin_gradients": True, "overlap_comm": True},
    {"offload_optimizer": {"device": "cpu"}},
    {"offload_optimizer": {"device": "cpu", "pin_memory": False}, "round_robin_gradients": True, "overlap_comm": True},
    {"cpu_offload": True},
]
"""Values of `zero_optimization`, tried at ZeRO 1 and 2."""
CPU = {"device": "cpu"}
OF_ZERO_3 = [
    {"overlap_comm": False, "contiguous_gradients": False, "reduce_scatter": False},
    {"overlap_comm": True, "reduce_bucket_size": 100},
    {"sub_group_size": 0, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0},
    {"sub_group_size": 2000, "prefetch_bucket_size": 10**9, "param_persistence_threshold": 10**9},
    {"stage3_model_persistence_threshold": 100, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
    {"model_persistence_threshold": 5000, "max_live_parameters": 3000, "max_reuse_distance": 10**9},
    {"stage3_use_all_reduce_for_fetch_params": True, "stage3_allgather_sequential": True},
    {"use_all_reduce_for_fetch_params": True, "allgather_sequential": True},
    {"memory_efficient_linear": False, "log_trace_cache_warnings": True, "enable_sanity_checks": True},
    {"offload_optimizer": CPU},
    {"offload_param": CPU | {"pin_memory": True}, "sub_group_size": 2000},
    {"offload_optimizer": CPU | {"pin_memory": True}, "offload_param": CPU, "overlap_comm": True},
    {"cpu_offload": True, "cpu_offload_param": True},
]
"""Values of `zero_optimization`, tried at ZeRO 3."""
OF_TOP = [
    {},
    {"prescale_gradients": True},
    {"gradient_predivide_factor": 4.0},
    {"prescale_gradients": True, "gradient_predivide_factor": 0.5},
    {"communication_data_type": "fp32"},
    BF16,
]
"""Values at the top of the JSON, tried at all stages."""
CASES = [
    *({"zero_optimization": {"stage": stage, **values}} for stage in (1, 2) for values in OF_ZERO),
    *({"zero_optimization": {"stage": 3, **values}} for values in OF_ZERO_3),
    *({"zero_optimization": {"stage": stage}, **values} for stage in (0, 1, 2, 3) for values in OF_TOP),
]


def configuration(dictionary):
    clip = CLIP if dictionary["zero_optimization"]["stage"] else 0.0
    return parse_config(
        {
            "model": MODEL | {"objectives": ["joint"], "image_size": 16, "text_length": 6},
            "parallel": {"ep_size": RANKS},
            "optimizer": {"clip_grad_norm": clip, "lr": 1e-2, "weight_decay": 0.1, "eps": EPS},
            "train": {
                "train_batch_size": RANKS * MICRO_STEPS * MICRO_SIZE,
                "gradient_accumulation_steps": MICRO_STEPS,
            },
        }
    )


PLAIN = configuration({"zero_optimization": {"stage": 1}})


def train(rank, world_size, cases):
    """For each case: gradient norms, and (name, first element, kind, values) of the state that this rank holds."""
    from eve_ds.checkpoint.engine_tensors import fragments
    from eve_ds.model.eve import EVE
    from eve_ds.model.with_losses import ModelWithLosses
    from eve_ds.parallel.engine import initialize_engine
    from eve_ds.parallel.experts.moe_factory import moe_factory
    from eve_ds.parallel.settings import resolve_deepspeed_config
    from eve_ds.parallel.startup import initialize_deepspeed_distributed
    from eve_ds.topology import Topology
    from eve_ds.training.optimizer import build_optimizer

    initialize_deepspeed_distributed()
    results = []
    for case in cases:
        config, resolved = resolve_deepspeed_config(case, configuration(case), world_size)
        torch.manual_seed(3)
        stage = resolved["zero_optimization"]["stage"]
        model = EVE(config.model, moe_factory(stage, Topology.current(RANKS)))
        module = ModelWithLosses(model, losses=None, weights={})
        engine = initialize_engine(module, build_optimizer(model, config, resolved), resolved)
        norms = []
        for step in range(STEPS):
            for part in range(MICRO_STEPS):
                loss = functools.partial(joint_loss, config=config.model, rank=rank, step=step, part=part)
                engine.backward(engine(call=loss))
                engine.step()
            norms.append(float(engine.get_global_grad_norm() or 0))
        state = [
            (part.name, part.start, kind, tensor.detach().clone())
            for part in fragments(engine)
            for kind, tensor in part.tensors.items()
        ]
        results.append((norms, state))
        engine.destroy()
    return results


def reference(clip):
    """Gradient norms and the state by (name, kind) of the plain model in one process."""
    from eve_ds.model.eve import EVE
    from eve_ds.training.optimizer import optimizer_parameter_groups

    config, settings = PLAIN.model, PLAIN.optimizer
    torch.manual_seed(3)
    model = EVE(config)
    optimizer = torch.optim.AdamW(optimizer_parameter_groups(model, 0.1), settings.lr, settings.betas, settings.eps)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(MICRO_STEPS):
            for rank in range(RANKS):
                (joint_loss(model, config, rank, step, part) / (MICRO_STEPS * RANKS)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        optimizer.step()
    state = {}
    for name, parameter in model.named_parameters():
        own = optimizer.state[parameter]
        state[name, "master"] = parameter.detach()
        state |= {(name, kind): own[kind] for kind in ("exp_avg", "exp_avg_sq")}
    return norms, state


def plain_state(state):
    """The reference under the names of :func:`fragments`, where each expert has a tensor of its own."""
    from eve_ds.model.eve import EVE
    from eve_ds.model.moe import plain_names_of

    model = EVE(PLAIN.model)
    found = {}
    for name, _ in model.named_parameters():
        names = plain_names_of(model, name)
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            for one, tensor in zip(names, state[name, kind].reshape(len(names), -1), strict=True):
                found[one, kind] = tensor
    return found


@pytest.fixture(scope="module")
def references():
    """Clipping -> (norms, state of the plain model)."""
    return {clip: (norms, plain_state(state)) for clip in (0.0, CLIP) for norms, state in [reference(clip)]}


def is_low_precision(case):
    return case.get("communication_data_type") == "bf16"


def worst(case, results, norms, expected):
    """Largest difference of one case from the reference, relative to the norm or to the largest element of a tensor."""
    kinds = ("exp_avg",) if is_low_precision(case) else ("master", "exp_avg", "exp_avg_sq")
    seen, errors = {}, []
    for own_norms, state in results:
        if case["zero_optimization"]["stage"]:
            errors += [(abs(ours - theirs) / theirs, "norm") for ours, theirs in zip(own_norms, norms, strict=True)]
        for name, start, kind, values in state:
            seen[name, kind] = seen.get((name, kind), 0) + values.numel()
            if kind not in kinds:
                continue
            wanted = expected[name, kind]
            error = (values - wanted[start : start + values.numel()]).abs().max() / wanted.abs().max().clamp(min=1e-12)
            errors.append((float(error), f"{kind} of {name}"))
    assert seen.keys() == expected.keys(), case
    assert all(seen[key] >= expected[key].numel() for key in seen), case
    return max(errors)


def test_every_setting_gives_the_gradients_of_one_process(run_ranks, references):
    results = run_ranks(train, RANKS, CASES, timeout=240)
    norms, _ = references[CLIP]
    assert min(norms) > CLIP, "the reference must clip"
    wrong = []
    for number, case in enumerate(CASES):
        of_case = [of_rank[number] for of_rank in results]
        error, where = worst(case, of_case, *references[CLIP if case["zero_optimization"]["stage"] else 0.0])
        if error > (LOW_PRECISION if is_low_precision(case) else FULL_PRECISION):
            wrong.append((case, error, where))
    assert wrong == []


def test_cases_cover_every_zero_setting_that_ranks_average_by():
    rules = {key: rule for key, rule in ZERO.items() if isinstance(rule, Rule)}
    kept_on = {key for key, rule in rules.items() if rule.use == NOTED and "stays on" in rule.why}
    for stages, cases in (({1, 2}, OF_ZERO), ({3}, OF_ZERO_3)):
        acting = {key for key, rule in rules.items() if rule.use == TAKEN and set(rule.stages) & stages}
        assert acting | kept_on <= {key for values in cases for key in values}
