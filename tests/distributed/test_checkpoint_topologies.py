"""Resuming with another number of ranks, another distribution of experts or another ZeRO stage changes nothing.

Every topology saves after three steps and trains to the end. Then every topology resumes from the checkpoint of another
one. Restored tensors must be equal to the last bit. The steps after that are compared with those of the uninterrupted
run.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import tiny_tree

from eve_ds.config import parse_config

STEPS, SAVED = 6, 3
"""The epoch has 4 steps: a checkpoint within the first, and steps of the second after it. Steps 3 and 6 are saved."""
TOPOLOGIES = [(w, ep, zero) for w in (1, 2, 4) for ep in (1, 2, 4) if ep <= w for zero in (0, 1, 2)]
"""(number of ranks, number of ranks that share the experts, ZeRO stage)."""
SHIFT = 7
"""Topology i resumes from topology i + 7, of 18, which always has another number of ranks."""
STAGE_3 = [(1, 1, 3), (2, 2, 3), (4, 1, 3), (4, 2, 3), (4, 4, 3)]
MOVES_OF_STAGE_3 = [
    ((4, 2, 3), (2, 2, 1)),
    ((4, 4, 1), (4, 2, 3)),
    ((2, 2, 3), (4, 4, 2)),
    ((2, 1, 2), (4, 4, 3)),
    ((1, 1, 3), (2, 2, 0)),
    ((2, 2, 0), (4, 1, 3)),
    ((4, 4, 3), (4, 2, 3)),
    ((4, 2, 3), (4, 4, 3)),
]
"""(topology, topology that it resumes from): ZeRO 3 from and to every other stage and number of ranks per expert."""
OFFLOAD = {"offload": {"offload_optimizer": {"device": "cpu"}}}
OFFLOAD_ALL = {
    "offload": {
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "sub_group_size": 5000,
    }
}
TOLERANCE = 1e-6
"""Relative tolerance of an fp32 loss."""
TOLERANCE_BF16 = 2e-2
"""Relative tolerance in bf16: a weight has 8 bits, and another number of ranks rounds gradients in another order."""
LIMIT = 400
pytestmark = pytest.mark.timeout(6 * LIMIT)


def settings(folder, topology, *, precision="fp32", offload=()):
    _, ep_size, stage = topology
    config = parse_config(
        {
            "model": tiny_tree(moe={"routing": "dropless"}, image_size=32),
            "data": {"sources": [{"kind": "scenes", "num_samples": 32}]},
            "optimizer": {"lr": 1e-3, "eps": 1e-4, "warmup_steps": 2, "decay": "cosine", "clip_grad_norm": 0},
            "parallel": {"ep_size": ep_size},
            "train": {
                "train_batch_size": 8,
                "max_steps": STEPS,
                "metrics_every": 1,
                "precision": precision,
                "save_every_steps": SAVED,
                "output_dir": str(folder),
            },
        }
    )
    some_stay = {"stage3_param_persistence_threshold": 500} if stage == 3 else {}  # small weights are not partitioned
    dictionary = {"zero_optimization": {"stage": stage, **some_stay, **dict(offload)}}
    return config, dictionary | ({"zero_force_ds_cpu_optimizer": False} if offload else {})


def train(config, deepspeed_config, look=None, resume="auto"):
    """Pre-train; `look(engine)` is called before the first step."""
    from eve_ds.training import pretrain as pretraining
    from eve_ds.training import start
    from eve_ds.training.trainer import Trainer

    class Watched(Trainer):
        def _train_step(self):
            nonlocal look
            if look is not None:
                look, call = None, look
                call(self.engine)
            return super()._train_step()

    with (
        mock.patch.object(start, "Trainer", Watched),
        mock.patch.object(pretraining, "trains_on_scenes", return_value=False),
    ):
        pretraining.pretrain(config, deepspeed_config, resume)


def train_uninterrupted(rank, world_size, folder, cases):
    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    initialize_deepspeed_distributed()
    for name, topology, options in cases:
        train(*settings(Path(folder) / name, topology, **options))


def unequal_tensors(engine, checkpoint):
    """Tensors of the engine that differ from the checkpoint in any bit, and the number of compared tensors."""
    from eve_ds.checkpoint.engine_tensors import fragments
    from eve_ds.checkpoint.files import PieceReader

    reader = PieceReader(checkpoint)
    held = [(part.name, part.start, *item) for part in fragments(engine) for item in part.tensors.items()]
    return [
        (name, kind)
        for name, start, kind, tensor in held
        if not torch.equal(tensor.cpu(), reader.read(kind, name, start, start + tensor.numel()))
    ], sum(tensor.numel() for *_, tensor in held)


def resume_elsewhere(rank, world_size, folder, cases):
    """Resume elsewhere; return for each case which tensors differ, and whether weights follow their masters."""
    from deepspeed.runtime.zero import GatheredParameters

    from eve_ds.model.moe import local_plain_state_dict
    from eve_ds.model.with_losses import plain_model
    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    initialize_deepspeed_distributed()
    results = []
    for name, topology, source, options in cases:
        run, found = Path(folder) / name, []
        checkpoint = Path(folder) / source / "checkpoints" / f"step-{SAVED:08d}"

        def look(engine, found=found, checkpoint=checkpoint):
            from eve_ds.checkpoint.files import PieceReader

            found.append(unequal_tensors(engine, checkpoint))
            reader = PieceReader(checkpoint)
            with GatheredParameters(list(engine.module.parameters())):  # does nothing below stage 3
                weights = local_plain_state_dict(plain_model(engine.module))
                found.append(
                    [
                        key
                        for key, weight in weights.items()
                        if not torch.equal(weight.flatten(), reader.read("master", key).to(weight.dtype))
                    ]
                )

        train(*settings(run, topology, **options), look, checkpoint)
        results.append(found)
    return results


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {item["step"]: item["loss"] for item in lines if item["kind"] == "train"}


def named(topology):
    return "-".join(map(str, topology))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("topologies")


@pytest.fixture
def uninterrupted_runs(folder, run_ranks):
    """Folder of the uninterrupted runs; created by the first test that uses it."""
    if not (folder / "done").exists():
        for world_size in (1, 2, 4):
            cases = [(f"stay-{named(t)}", t, {}) for t in TOPOLOGIES + STAGE_3 if t[0] == world_size]
            if world_size == 2:
                cases.append(("stay-bf16", (2, 2, 1), {"precision": "bf16"}))
                cases.append(("stay-bf16-3", (2, 2, 3), {"precision": "bf16"}))
                cases.append(("stay-offloaded-3", (2, 2, 3), OFFLOAD_ALL))
            run_ranks(train_uninterrupted, world_size, str(folder), cases, timeout=LIMIT)
        (folder / "done").touch()
    return folder


def test_all_topologies_give_the_same_losses(uninterrupted_runs):
    expected = losses(uninterrupted_runs / f"stay-{named(TOPOLOGIES[0])}")
    assert len(set(expected.values())) == STEPS
    for topology in TOPOLOGIES[1:] + STAGE_3:
        assert losses(uninterrupted_runs / f"stay-{named(topology)}") == pytest.approx(expected, rel=TOLERANCE), (
            topology
        )


def test_any_topology_resumes_from_any_other(uninterrupted_runs, run_ranks):
    worst = 0.0
    for world_size in (1, 2, 4):
        cases = [
            (f"move-{named(t)}", t, f"stay-{named(TOPOLOGIES[(number + SHIFT) % len(TOPOLOGIES)])}", {})
            for number, t in enumerate(TOPOLOGIES)
            if t[0] == world_size
        ]
        cases += [
            (f"move-{named(t)}-from-{named(source)}", t, f"stay-{named(source)}", {})
            for t, source in MOVES_OF_STAGE_3
            if t[0] == world_size
        ]
        for results in run_ranks(resume_elsewhere, world_size, str(uninterrupted_runs), cases, timeout=LIMIT):
            for case, ((unequal, compared), weights) in zip(cases, results, strict=True):
                assert unequal == [], case
                assert compared > 1000
                assert weights == [], case
        for name, _, source, *_ in cases:
            assert source.split("-")[1:] != name.split("-")[1:4]
            expected, found = losses(uninterrupted_runs / source), losses(uninterrupted_runs / name)
            assert sorted(found) == list(range(SAVED + 1, STEPS + 1))
            worst = max(worst, *(abs(found[step] / expected[step] - 1) for step in found))
    print(f"largest relative difference of a loss: {worst:.1e}")
    assert worst <= TOLERANCE


def test_resuming_with_other_precision_or_offload(uninterrupted_runs, run_ranks):
    bf16 = {"precision": "bf16"}
    cases = {
        1: [("bf16-alone", (1, 1, 2), "stay-bf16", bf16)],
        2: [
            ("bf16-zero0", (2, 1, 0), "stay-bf16", bf16),
            ("bf16-from-fp32", (2, 2, 1), "stay-2-2-1", bf16),
            ("fp32-from-bf16", (2, 2, 2), "stay-bf16", {}),
            ("offloaded", (2, 1, 2), "stay-4-2-1", OFFLOAD),
            ("bf16-3-from-1", (2, 2, 3), "stay-bf16", bf16),
            ("bf16-1-from-3", (2, 1, 1), "stay-bf16-3", bf16),
            ("offloaded-3", (2, 1, 3), "stay-4-4-3", OFFLOAD_ALL),
            ("offloaded-3-again", (2, 2, 3), "stay-offloaded-3", OFFLOAD_ALL),
            ("offloaded-3-no-more", (2, 1, 1), "stay-offloaded-3", {}),
            ("offloaded-3-bf16", (2, 2, 3), "stay-bf16-3", bf16 | OFFLOAD_ALL),
        ],
    }
    for world_size, chosen in cases.items():
        for results in run_ranks(resume_elsewhere, world_size, str(uninterrupted_runs), chosen, timeout=LIMIT):
            for case, ((unequal, _), weights) in zip(chosen, results, strict=True):
                assert unequal == [], case
                assert weights == [], case
    for name, _, source, options in itertools.chain(*cases.values()):
        exact = "precision" not in options and "bf16" not in source
        expected, found = losses(uninterrupted_runs / source), losses(uninterrupted_runs / name)
        tolerance = TOLERANCE if exact else TOLERANCE_BF16
        assert found == pytest.approx({step: expected[step] for step in found}, rel=tolerance), name


def test_universal_checkpoint_can_be_resumed(uninterrupted_runs, run_ranks, tmp_path):
    from eve_ds.checkpoint.manifest import problems
    from eve_ds.checkpoint.universal import write_universal

    name = f"step-{SAVED:08d}"
    source, universal = (
        uninterrupted_runs / "stay-4-2-3" / "checkpoints" / name,
        uninterrupted_runs / "universal" / "checkpoints" / name,
    )
    shutil.rmtree(uninterrupted_runs / "universal", ignore_errors=True)
    report = write_universal(source, universal)
    assert problems(universal) == []
    assert report.step == SAVED
    assert len(list(universal.glob("tensors-*"))) == report.files == 1
    case = ("move-universal", (2, 2, 1), "universal", {})
    for (((unequal, _), weights),) in run_ranks(resume_elsewhere, 2, str(uninterrupted_runs), [case], timeout=LIMIT):
        assert unequal == weights == []
    expected, found = losses(uninterrupted_runs / "stay-4-2-3"), losses(uninterrupted_runs / "move-universal")
    assert found == pytest.approx({step: expected[step] for step in found}, rel=TOLERANCE)


def test_export_of_a_zero_3_run_computes_the_recorded_outputs(uninterrupted_runs, tmp_path):
    from eve_ds.export.plain import export

    for name in ("stay-4-2-3", "stay-bf16-3"):
        report = export(uninterrupted_runs / name, tmp_path / name, must_check=True)
        assert report.step == STEPS
        assert report.check.relative <= report.check.tolerance
