"""ZeRO optimizer with fewer host calls against DeepSpeed's own, on the same model, batches and steps."""

import dataclasses
import functools

import torch
from tiny import tiny_model

CONFIG = tiny_model(objectives=["joint"], image_size=16, text_length=6)
STEPS, MICRO_SIZE = 3, 3
BAD_STEP = 1
"""Step in which a case with `bad` has a gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Training configuration; `bad` is a value that replaces one element of a gradient."""

    zero_stage: int
    ep_size: int = 1
    precision: str = "bf16"
    micro_steps: int = 1
    clip: float = 0.0
    bad: float | None = None
    of_expert: bool = False
    frozen: bool = False
    """Only the experts of the backbone learn, and the text head has no gradient in the last step."""
    loss_scale: float = 1.0
    settings: tuple[tuple[str, object], ...] = ()
    """Options of `zero_optimization`."""


def engine_of(case, ours):
    import deepspeed

    from eve_ds.model.eve import EVE
    from eve_ds.parallel.experts.moe import DeepSpeedMoE
    from eve_ds.parallel.zero import lower_host_calls
    from eve_ds.training.optimizer import optimizer_parameter_groups

    torch.manual_seed(3)
    model = EVE(CONFIG, functools.partial(DeepSpeedMoE, ep_size=case.ep_size))
    config = {
        "train_micro_batch_size_per_gpu": MICRO_SIZE,
        "gradient_accumulation_steps": case.micro_steps,
        "zero_optimization": {"stage": case.zero_stage, **dict(case.settings)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": case.clip,
        "bf16": {"enabled": case.precision == "bf16"},
    }
    optimizer = torch.optim.AdamW(optimizer_parameter_groups(model, 0.1), lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    engine.optimizer.loss_scaler.cur_scale = case.loss_scale  # a scale like that of fp16, which CPUs do not support
    replaced = ours and lower_host_calls(engine)
    if case.frozen:  # frozen after the start of the engine, as in fine-tuning
        for name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_("experts" in name)
    return engine, replaced


def loss_of(engine, case, rank, step, part):
    """Loss to which every parameter contributes, with other samples on every rank and in every micro-step."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * part + rank)
    order = torch.stack([torch.randperm(CONFIG.num_patches, generator=generator) for _ in range(MICRO_SIZE)])
    dtype = next(engine.module.parameters()).dtype
    output = engine(
        pixel_values=torch.randn(MICRO_SIZE, 3, CONFIG.image_size, CONFIG.image_size, generator=generator).to(dtype),
        visible_patch_ids=order[:, :2].sort().values,
        masked_patch_ids=order[:, 2:].sort().values,
        input_ids=torch.randint(5, CONFIG.vocab_size, (MICRO_SIZE, 5), generator=generator),
        attention_mask=torch.ones(MICRO_SIZE, 5, dtype=torch.bool),
        masked_token_ids=torch.tensor([1, 2, 6, 8]),
    )
    tensors = output.tensors()
    if case.frozen and step == STEPS - 1:
        del tensors["token_logits"]
    predictions = sum(tensor.float().square().mean() for tensor in tensors.values())
    return predictions + sum(layer.load_balancing_loss for layer in output.moe["joint"])


def replace_gradient_element(engine, case, rank):
    """Replace one element of one gradient of the last rank by `case.bad`, in the next backward."""
    import torch.distributed as dist

    if rank < dist.get_world_size() - 1:
        return []
    name, parameter = next(
        (name, parameter)
        for name, parameter in engine.module.named_parameters()
        if ("deepspeed_experts" in name) == case.of_expert and name.endswith("weight")
    )
    assert parameter.requires_grad, name

    def replace(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[-1] = case.bad
        return gradient

    return [parameter.register_hook(replace)]


def train(case, ours, rank):
    """Results of a run: losses, norms, number of updates, fp32 masters and moments, weights."""
    from eve_ds.checkpoint.engine_tensors import fragments

    engine, replaced = engine_of(case, ours)
    losses, norms, applied = [], [], []
    for step in range(STEPS):
        for part in range(case.micro_steps):
            bad = step == BAD_STEP and case.bad is not None and part == 0
            handles = replace_gradient_element(engine, case, rank) if bad else []
            loss = loss_of(engine, case, rank, step, part)
            engine.backward(loss)
            for handle in handles:
                handle.remove()
            engine.step()
            losses.append(float(loss))
        norms.append(float(engine.get_global_grad_norm()))
        applied.append(bool(engine.was_step_applied()))
    state = {
        (part.name, part.start, kind): tensor.clone()
        for part in fragments(engine)
        for kind, tensor in part.tensors.items()
    }
    weights = {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}
    skipped = engine.skipped_steps
    flat = replaced and engine.optimizer.flat_gradients is not None
    engine.destroy()
    return {
        **{"losses": losses, "norms": norms, "applied": applied, "skipped": skipped},
        **{"state": state, "weights": weights, "replaced": replaced, "flat": flat},
    }


def train_both(rank, world_size, described):
    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    initialize_deepspeed_distributed()
    cases = [Case(**fields) for fields in described]
    return [[train(case, ours, rank) for ours in (False, True)] for case in cases]


def both(run_ranks, world_size, cases):
    """For each case and rank, the results of DeepSpeed's own optimizer and of ours."""
    results = run_ranks(train_both, world_size, [dataclasses.asdict(case) for case in cases], timeout=240)
    return [(case, *of_rank[number]) for number, case in enumerate(cases) for of_rank in results]


def assert_same(case, own, ours):
    """Compare bit for bit: a sum of two numbers does not depend on their order, and norms are computed in fp64."""
    for kind in ("losses", "norms", "applied", "skipped"):
        assert repr(ours[kind]) == repr(own[kind]), (case, kind)
    for kind in ("state", "weights"):
        assert ours[kind].keys() == own[kind].keys()
        different = [name for name in own[kind] if not torch.equal(ours[kind][name], own[kind][name])]
        assert different == [], case


CASES = [
    Case(1, 1, clip=0.5),
    Case(1, 2, micro_steps=2),
    Case(1, 2, "fp32", 2, 0.5, loss_scale=1024.0),
    Case(1, 2, clip=0.5, frozen=True),
    Case(2, 1, micro_steps=2, clip=0.5),
    Case(2, 2, "fp32", loss_scale=1024.0),
    Case(2, 2, clip=0.5),
]


def test_two_ranks_match_deepspeeds_optimizer(run_ranks):
    for case, own, ours in both(run_ranks, 2, CASES):
        assert ours["replaced"]
        assert ours["flat"] == (case.zero_stage == 1)
        assert own["applied"] == [True] * STEPS
        assert_same(case, own, ours)


def test_one_rank_matches_deepspeeds_optimizer(run_ranks):
    for case, own, ours in both(run_ranks, 1, [Case(1, clip=0.5), Case(1, 1, "fp32", 2, 0.5), Case(2, clip=0.5)]):
        assert ours["replaced"]
        assert_same(case, own, ours)


def test_nonfinite_element_on_one_rank_stops_the_update_on_all_ranks(run_ranks):
    inf, nan = float("inf"), float("nan")
    cases = [
        Case(1, 1, bad=inf),
        Case(1, 1, "fp32", bad=nan, of_expert=True),
        Case(1, 2, bad=nan, of_expert=True, clip=0.5),
        Case(1, 2, bad=-inf, micro_steps=2),
        Case(2, 1, bad=-inf, of_expert=True),
        Case(2, 2, bad=inf, of_expert=True, clip=0.5),
    ]
    for case, own, ours in both(run_ranks, 2, cases):
        assert ours["applied"] == [step != BAD_STEP for step in range(STEPS)], case
        assert ours["norms"][BAD_STEP] == inf
        assert ours["skipped"] == 1
        assert_same(case, own, ours)


def test_settings_that_reduce_in_another_order_keep_deepspeeds_reduction(run_ranks):
    cases = [
        Case(1, settings=(("overlap_comm", True),)),
        Case(1, settings=(("contiguous_gradients", False),)),
        Case(1, settings=(("use_multi_rank_bucket_allreduce", False),)),
        Case(1, settings=(("round_robin_gradients", True),)),
        Case(1, settings=(("offload_optimizer", {"device": "cpu"}),)),
    ]
    for case, own, ours in both(run_ranks, 2, cases):
        setting = dict(case.settings)
        assert ours["replaced"] == ("offload_optimizer" not in setting)
        assert ours["flat"] == ("round_robin_gradients" in setting)
        assert_same(case, own, ours)


def step_with_moved_weights(rank, world_size):
    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    initialize_deepspeed_distributed()
    engine, _ = engine_of(Case(1), ours=True)
    optimizer = engine.optimizer
    found = []
    for number, (flat, parameters) in enumerate(zip(optimizer.bit16_groups_flat, optimizer.bit16_groups, strict=True)):
        before = [parameter.data_ptr() for parameter in parameters]
        parameters[-1].data = parameters[-1].data + 1
        flat.zero_()
        optimizer._update_model_bit16_weights(number)
        found.append(before == [parameter.data_ptr() for parameter in parameters])
        found.append(not any(parameter.any() for parameter in parameters))
    return found


def test_moved_weights_become_views_of_the_flat_weights_again(run_ranks):
    (found,) = run_ranks(step_with_moved_weights, 1)
    assert len(found) == 2 * 4
    assert all(found)


def keep_methods_of_another_version(rank, world_size):
    import logging

    from eve_ds.parallel import zero
    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    initialize_deepspeed_distributed()
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    zero.get_logger().addHandler(handler)
    zero.FOLLOWED = "0.0.1"
    engine, replaced = engine_of(Case(1), ours=True)
    engine.backward(loss_of(engine, Case(1), rank, 0, 0))
    engine.step()
    return replaced, type(engine.optimizer).__name__, engine.was_step_applied(), found


def test_another_deepspeed_version_keeps_its_methods_and_logs_a_warning(run_ranks):
    ((replaced, name, applied, messages),) = run_ranks(keep_methods_of_another_version, 1)
    assert (replaced, name, applied) == (False, "DeepSpeedZeroOptimizer", True)
    (message,) = messages
    assert "is not 0.0.1" in message
