"""Sets of objectives with the real engine: gathered features, training, resume, export."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from collectives import recorded_collectives
from tiny import tiny_config

from eve_ds.config import load_config

SMALL = [
    *("model.patch_size=16", "masking.max_text_mask_ratio=null"),
    *("train.train_batch_size=8", "train.metrics_every=1", "optimizer.warmup_steps=2"),
]
SETS = ("itc+itm", "mim+mlm+itc+itm", "mlm+itc", "mim")
"""Sets of objectives whose resume is tested; test_engine_distributed.py tests `mim+mlm`."""
STAGES = (0, 3, 2, 1)
"""ZeRO stage of each set."""
CHEAP = ["masking.image_view_share=0.75", "masking.language_view_patch_share=0.5", "masking.image_view_word_share=0.5"]
PAIRS, WIDTH = 8, 5
pytestmark = pytest.mark.timeout(300)


def settings_for(folder, objectives, *more):
    return [f"model.objectives=[{objectives.replace('+', ',')}]", f"train.output_dir={folder}", *more]


def records(folder, kind="train"):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [item for item in map(json.loads, lines) if item["kind"] == kind]


def numbers(folder):
    """Loss terms by step; if a resumed run repeated a step, its last record counts."""
    names = ("loss", "mim", "mlm", "itc", "itm", "load_balancing", "router_z")
    return {item["step"]: [item.get(name) for name in names] for item in records(folder)}


# --- the gather -----------------------------------------------------------------------------------------------------


TP_SIZES = (1, 2)
"""Numbers of consecutive ranks with the same rows."""


def features():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(PAIRS, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2)]


def contrastive_gradients(rows, gather):
    """Return the loss, and its gradients for the rows of both features and the temperature's logarithm."""
    from eve_ds.objectives.contrastive import MatchingOutput, pair_contrastive_loss

    leaves = [part[rows].clone().requires_grad_() for part in features()]
    leaves.append(torch.tensor(math.log(0.07), dtype=torch.float64, requires_grad=True))
    unit = [torch.nn.functional.normalize(leaf, dim=1) for leaf in leaves[:2]]
    loss = pair_contrastive_loss(MatchingOutput(*unit, leaves[2].exp(), torch.zeros(0, 2)), gather)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def gathered(rank, world_size):
    from eve_ds.distributed import gather_rows
    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    initialize_deepspeed_distributed()
    found = []
    for tp_size in TP_SIZES:
        share, data_rank = PAIRS * tp_size // world_size, rank // tp_size
        rows = slice(data_rank * share, (data_rank + 1) * share)
        with recorded_collectives() as calls:
            loss, gradients = contrastive_gradients(rows, functools.partial(gather_rows, tp_size=tp_size))
        found.append((loss, gradients, [(call.kind, call.num_bytes) for call in calls]))
    return found


def test_gradients_through_the_gather_equal_those_of_one_process(run_ranks):
    from eve_ds.objectives.objective import only_this_rank

    world_size = 4
    loss, (images, texts, temperature) = contrastive_gradients(slice(None), only_this_rank)
    results = run_ranks(gathered, world_size)
    size = 8 * PAIRS * 2 * WIDTH  # features of both kinds, fp64
    for number, tp_size in enumerate(TP_SIZES):
        moved = size * tp_size  # all ranks send their rows, those of tensor-parallel ranks too
        assert all(of_rank[number][2] == [("all_gather", moved), ("reduce_scatter", moved)] for of_rank in results)
        found = [of_rank[number] for of_rank in results[::tp_size]]
        torch.testing.assert_close(sum(own for own, *_ in found) / len(found), loss, rtol=1e-12, atol=0)
        # Parameter gradients are averaged over ranks, so the gradients of a rank's rows are that many times as large.
        for place, whole in ((0, images), (1, texts)):
            rows = torch.cat([gradients[place] for _, gradients, _ in found]) / len(found)
            torch.testing.assert_close(rows, whole, rtol=1e-10, atol=1e-14)
        shares = [gradients[2] for _, gradients, _ in found]
        torch.testing.assert_close(sum(shares) / len(found), temperature, rtol=1e-10, atol=1e-14)


# --- the engine -----------------------------------------------------------------------------------------------------


def evaluate_few_scenes(pretraining):
    evaluate = pretraining.evaluate_scenes
    pretraining.evaluate_scenes = lambda *args, **options: evaluate(
        *args, **options | {"num_scenes": 8, "batch_size": 4}
    )


def learn(rank, world_size, folder):
    from eve_ds.training import pretrain as pretraining

    evaluate_few_scenes(pretraining)
    steps = ["train.max_steps=20", "train.train_batch_size=16", "train.metrics_every=1", "optimizer.warmup_steps=5"]
    settings = settings_for(folder, "mlm+itc+itm", "masking.max_text_mask_ratio=null", *steps)
    pretraining.pretrain(load_config("eve_tiny", settings), None)


def test_twenty_steps_of_eve_tiny_lower_the_loss(run_ranks, tmp_path):
    run_ranks(learn, 1, str(tmp_path), timeout=200)
    history = records(tmp_path)
    assert len(history) == 20
    for name in ("loss", "mlm", "itm"):
        first, last = ([item[name] for item in part] for part in (history[:5], history[-5:]))
        assert sum(last) < 0.97 * sum(first), name
    (evaluation,) = records(tmp_path, "eval")
    assert {"color", "hidden_words"} <= evaluation.keys()
    assert "pixel_loss" not in evaluation, "the model has no decoder"


def resume_both(rank, world_size, folder):
    """Train each set without interruption and in two halves; return names of unequal weights. Ranks share experts."""
    from deepspeed.runtime.zero import GatheredParameters

    from eve_ds.model.moe import local_plain_state_dict
    from eve_ds.training import pretrain as pretraining
    from eve_ds.training import start
    from eve_ds.training.trainer import Trainer

    class Watched(Trainer):
        def run(self):
            summary = super().run()
            with GatheredParameters(list(self.model.parameters())):  # does nothing below stage 3
                found.append({k: v.clone() for k, v in local_plain_state_dict(self.model).items()})
            return summary

    start.Trainer = Watched
    evaluate_few_scenes(pretraining)
    results = []
    for number, objectives in enumerate(SETS):
        found, stage = [], STAGES[number]
        zero = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        clip = f"optimizer.clip_grad_norm={0.0 if stage == 0 else 1.0}"
        common = [
            *SMALL,
            *CHEAP,
            clip,
            f"train.pack_views={number < 2}",
            "optimizer.decay=constant",
            f"parallel.ep_size={world_size}",
        ]
        common.append(f"train.gradient_accumulation_steps={2 // world_size}")
        for name, steps in (("whole", (4,)), ("parts", (2, 4))):
            for last in steps:
                run = f"{folder}/{objectives}/{name}"
                settings = settings_for(run, objectives, *common, f"train.max_steps={last}")
                pretraining.pretrain(tiny_config(*settings), zero)
        whole, _, parts = found
        results.append([name for name in whole if not torch.equal(whole[name], parts[name])])
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_run_exactly_and_exports(run_ranks, runs, world_size):
    from eve_ds.export import load
    from eve_ds.export.plain import export
    from eve_ds.report.run_report import Exported, write_report

    folder = runs / str(world_size)
    assert run_ranks(resume_both, world_size, str(folder), timeout=280) == [[[]] * len(SETS)] * world_size
    outputs = {"mim": {"pixel_predictions"}, "mlm": {"token_logits"}, "itm": {"matching_logits"}}
    outputs |= {"itc": {"image_features", "text_features"}}
    for objectives in SETS:
        whole, parts = numbers(folder / objectives / "whole"), numbers(folder / objectives / "parts")
        assert whole == parts
        assert len({tuple(terms) for terms in whole.values()}) == 4
        tasks = objectives.split("+")
        report = export(folder / objectives / "parts", folder / "export" / objectives, must_check=True)
        assert set(report.check.outputs) == set().union(*(outputs[task] for task in tasks))
        stage = STAGES[SETS.index(objectives)]
        assert report.check.max_abs_diff == 0 or (stage == 3 and report.check.relative <= report.check.tolerance)
        exported = Exported(*load(folder / "export" / objectives))
        assert exported.config.model.objectives == tasks
        written = write_report(folder / objectives / "parts", folder / "report" / objectives, exported)
        pictures = ["reconstructions.png"] if "mim" in tasks else []
        assert [path.name for path in written] == ["report.md", "curves.png", *pictures, "experts.png"]
        assert f"| {tasks[-1]} |" in written[0].read_text()
