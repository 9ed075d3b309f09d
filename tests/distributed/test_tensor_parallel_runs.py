"""Whole runs on tensor-parallel ranks: losses, metrics, checkpoints that move between topologies, exports, tasks.

All runs have four ranks and the same global batches. Each saves after three of five steps. Every topology then resumes
from the checkpoint of another one, saves what it has read at once, and trains to the end.
"""

import importlib.util
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import tiny_tree

from eve_ds.config import parse_config

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")

RANKS, STEPS, SAVED, BATCH = 4, 5, 3, 8
TOPOLOGIES = {
    "plain": {"ep_size": 4, "tp_size": 1, "stage": 1},
    "tp2": {"ep_size": 2, "tp_size": 2, "stage": 2},
    "split": {"ep_size": 1, "tp_size": 2, "stage": 1, "split_experts": True},
    "tp4": {"ep_size": 1, "tp_size": 4, "stage": 0},
    "zero3": {"ep_size": 2, "tp_size": 1, "stage": 3},
    "tp2-zero3": {"ep_size": 2, "tp_size": 2, "stage": 3},
}
MOVES = {"plain": "split", "tp2": "zero3", "split": "tp4", "tp4": "tp2-zero3", "zero3": "tp2", "tp2-zero3": "plain"}
"""Topology that resumes -> topology whose checkpoint it reads."""
SCENES = {"kind": "scenes", "num_samples": 32}
TOLERANCE = 1e-6
"""Relative tolerance of an fp32 loss, as in test_checkpoint_topologies.py."""


def settings(folder, stage, model=None, **parallel):
    config = parse_config(
        {
            "model": tiny_tree(**{"moe": {"routing": "dropless"}, "image_size": 32, "vocab_size": 251} | (model or {})),
            "data": {"sources": [SCENES], "validation": {"sources": [SCENES], "num_samples": 16}},
            "optimizer": {"lr": 1e-3, "eps": 1e-4, "warmup_steps": 2, "clip_grad_norm": 0},
            "parallel": parallel,
            "train": {
                "train_batch_size": BATCH,
                "max_steps": STEPS,
                "metrics_every": 1,
                "save_every_steps": SAVED,
                "output_dir": str(folder),
            },
        }
    )
    return config, {"zero_optimization": {"stage": stage}}


def train(config, deepspeed_config, resume="auto", look=None):
    """Pre-train without the evaluation on scenes; `look(trainer)` is called before the first step."""
    from eve_ds.training import pretrain as pretraining
    from eve_ds.training import start
    from eve_ds.training.trainer import Trainer

    class Watched(Trainer):
        def run(self):
            if look is not None:
                look(self)
            return super().run()

    with (
        mock.patch.object(start, "Trainer", Watched),
        mock.patch.object(pretraining, "trains_on_scenes", return_value=False),
    ):
        return pretraining.pretrain(config, deepspeed_config, resume)


def write_again(trainer, folder):
    """Write the state that a run has just read."""
    from eve_ds.checkpoint.engine_tensors import pieces_to_write
    from eve_ds.checkpoint.files import tensor_file, write_pieces

    Path(folder).mkdir(exist_ok=True)
    topology = trainer.topology
    write_pieces(Path(folder) / tensor_file(topology.rank), pieces_to_write(trainer.engine, topology))


def train_and_move(rank, world_size, folder):
    from functools import partial

    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    initialize_deepspeed_distributed()
    summaries = {}
    for name, topology in TOPOLOGIES.items():
        summaries[name] = train(*settings(f"{folder}/{name}", **topology))
    for name, source in MOVES.items():
        checkpoint = Path(folder) / source / "checkpoints" / f"step-{SAVED:08d}"
        look = partial(write_again, folder=f"{folder}/{name}-again")
        train(*settings(f"{folder}/{name}-moved", **TOPOLOGIES[name]), checkpoint, look)
    return {name: (summary.steps, summary.samples) for name, summary in summaries.items()}


def train_with_noise(rank, world_size, folder, tp_size):
    """Train with all random draws that a model can have; return the losses."""
    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    initialize_deepspeed_distributed()
    moe = {"routing": "dropless", "router_jitter": 0.1, "second_choice_noise": True}
    train(*settings(folder, 1, model={"text_dropout": 0.2, "drop_path_rate": 0.5, "moe": moe}, tp_size=tp_size))


def records(run, kind="train"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {item["step"]: item for item in lines if item["kind"] == kind}


def state(folder):
    """(kind, name) -> whole tensor of a folder of pieces."""
    from eve_ds.checkpoint.files import KINDS, PieceReader

    reader = PieceReader(folder)
    return {(kind, name): reader.read(kind, name) for kind in KINDS for name in sorted(reader.names(kind))}


def bits(folder):
    """Bytes of every tensor of a state."""
    return {key: tensor.view(torch.uint8) for key, tensor in state(folder).items()}


def test_runs_move_between_topologies(run_ranks, tmp_path):
    results = run_ranks(train_and_move, RANKS, str(tmp_path), timeout=280)
    assert results == [dict.fromkeys(TOPOLOGIES, (STEPS, STEPS * BATCH))] * RANKS
    expected = records(tmp_path / "plain")
    step = f"checkpoints/step-{SAVED:08d}"
    shapes = {key: tensor.shape for key, tensor in state(tmp_path / "plain" / step).items()}
    for name in TOPOLOGIES:
        found = records(tmp_path / name)
        assert sorted(found) == list(range(1, STEPS + 1))
        for number, record in found.items():
            assert record["samples"] == number * BATCH
            for key in ("loss", "mim", "mlm", "load_balancing"):
                assert record[key] == pytest.approx(expected[number][key], rel=TOLERANCE), (name, number, key)
            tokens = (item["tokens_per_second"] / item["samples_per_second"] for item in (record, expected[number]))
            assert next(tokens) == pytest.approx(next(tokens))
        held_out = (records(run, "eval")[STEPS]["held_out"] for run in (tmp_path / name, tmp_path / "plain"))
        ours, theirs = ({key: value["right"] for key, value in figures.items()} for figures in held_out)
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert {key: tensor.shape for key, tensor in state(tmp_path / name / step).items()} == shapes
        ranks = sorted(path.name for path in (tmp_path / name / step).glob("rank-*.json"))
        assert len(ranks) == RANKS // TOPOLOGIES[name]["tp_size"]
    for name, source in MOVES.items():
        read, written = bits(tmp_path / source / step), bits(tmp_path / f"{name}-again")
        assert read.keys() == written.keys()
        assert [key for key, tensor in read.items() if not torch.equal(tensor, written[key])] == [], (name, source)
        found = {number: record["loss"] for number, record in records(tmp_path / f"{name}-moved").items()}
        assert found == pytest.approx({n: expected[n]["loss"] for n in range(SAVED + 1, STEPS + 1)}, rel=TOLERANCE)
    exports_are_plain(tmp_path)


def exports_are_plain(folder):
    """Exports of tensor-parallel runs agree with the outputs recorded by them, and load on one process."""
    from eve_ds.cli.convert import main as convert
    from eve_ds.export import load
    from eve_ds.model.eve import model_shapes

    for name in ("tp2", "split", "tp4", "tp2-zero3"):
        out = folder / f"{name}-export"
        assert convert([str(folder / name), "--out", str(out)]) == 0
        model, config, _ = load(out)
        assert {key: tensor.shape for key, tensor in model.state_dict().items()} == model_shapes(config.model)
        last = state(folder / name / f"checkpoints/step-{STEPS:08d}")
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor.flatten(), last["master", key]), (name, key)


def test_random_draws_are_those_of_one_process(run_ranks, tmp_path):
    for ranks in (1, RANKS):
        run_ranks(train_with_noise, ranks, str(tmp_path / str(ranks)), ranks, timeout=120)
    expected, found = ({n: item["loss"] for n, item in records(tmp_path / str(ranks)).items()} for ranks in (1, RANKS))
    assert found == pytest.approx(expected, rel=TOLERANCE)


def finetune_all(rank, world_size, folder, trees):
    from eve_ds.training.finetune import finetune

    found = {}
    for name, tree in trees.items():
        config = parse_config(tree | {"train": {**tree["train"], "output_dir": f"{folder}/{name}"}})
        summary = finetune(config, {"zero_optimization": {"stage": 2}})
        found[name] = (summary.steps, summary.samples)
    return found


def test_tasks_fine_tune_like_without_tensor_parallelism(run_ranks, task_tree, pretrained, tmp_path):
    trees = {}
    for task, options in (("vqa", {}), ("retrieval", {"itm_weight": 0, "rerank": 0}), ("nlvr", {"features": "words"})):
        tree = task_tree(task, **options)
        tree["train"]["init"] = str(pretrained("mim+mlm"))
        trees[f"{task}-plain"] = tree | {"parallel": {"ep_size": 2}}
        trees[f"{task}-tp"] = tree | {"parallel": {"ep_size": 2, "tp_size": 2, "split_experts": task == "vqa"}}
    results = run_ranks(finetune_all, RANKS, str(tmp_path), trees, timeout=200)
    assert results == [dict.fromkeys(trees, (3, 24))] * RANKS
    for task in ("vqa", "retrieval", "nlvr"):
        ours, expected = (records(tmp_path / f"{task}-{kind}") for kind in ("tp", "plain"))
        losses = [{step: record["loss"] for step, record in found.items()} for found in (ours, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), task
        evaluated = [records(tmp_path / f"{task}-{kind}", "eval")[3]["num_examples"] for kind in ("tp", "plain")]
        assert evaluated[0] == evaluated[1] > 0
