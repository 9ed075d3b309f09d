"""Tasks on two ranks equal those on one rank: contrastive gradient, evaluation, and a whole fine-tuning run."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

NUM_SAMPLES = 8


def contrastive_gradients(rank, world_size, tree, lengths):
    """Return the ITC loss over all samples and its gradients by name, averaged over ranks as DeepSpeed does."""
    import torch.distributed as dist

    from eve_ds.config import parse_config
    from eve_ds.model.eve import initialize_weights
    from eve_ds.tasks.batches import TaskBatch
    from eve_ds.tasks.features.words import Template
    from eve_ds.tasks.retrieval import Retrieval

    task = Retrieval(parse_config(tree), Template(lengths, cls_id=2, sep_id=3, mask_id=4) if lengths else None)
    model = task.model()
    initialize_weights(model, task.config.model, seed=5)
    model.train()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(NUM_SAMPLES, 1, 3, 64, 64, generator=generator)
    ids = torch.randint(5, 200, (NUM_SAMPLES, 6), generator=generator)
    mine = slice(rank * NUM_SAMPLES // world_size, (rank + 1) * NUM_SAMPLES // world_size)
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 6, 7])  # samples 0 and 5, on different ranks, share an image
    mask = torch.ones(NUM_SAMPLES, 6, dtype=torch.bool)
    batch = TaskBatch([], pixels[mine], ids[mine], mask[mine], targets[mine])
    loss = task.losses(model(**batch.model_inputs()), batch)["itc"]
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            gradients[name] = parameter.grad / world_size
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / world_size, gradients


@pytest.mark.parametrize(
    ("features", "lengths", "weight"),
    [("class_token", None, "image_projection.weight"), ("words", (4,), "text_head.dense.weight")],
)
def test_gradient_through_the_gather_equals_that_of_one_process(run_ranks, task_tree, features, lengths, weight):
    tree = task_tree("retrieval", itm_weight=0, rerank=0, features=features)
    (loss, gradients), _ = run_ranks(contrastive_gradients, 2, tree, lengths)
    ((expected_loss, expected),) = run_ranks(contrastive_gradients, 1, tree, lengths)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        # Another summation order in fp32 changes 1e-5 of the largest gradient of the tensor.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))
    assert float(gradients[f"head.{weight}"].abs().max()) > 0


def finetune_and_read(rank, world_size, trees, deepspeed_config, folders):
    from pathlib import Path

    from eve_ds.config import parse_config
    from eve_ds.training.finetune import finetune

    return [
        finetune(parse_config(tree | {"train": {**tree["train"], "output_dir": Path(folder)}}), deepspeed_config)[:2]
        for tree, folder in zip(trees, folders, strict=True)
    ]


@pytest.mark.parametrize(("ep_size", "stage"), [(1, 2), (2, 3)])
def test_two_ranks_fine_tune_and_evaluate_like_one_rank(run_ranks, task_tree, tmp_path, ep_size, stage):
    names = ["vqa", "nlvr", "retrieval"]
    trees = [task_tree(name) for name in names]
    trees[1]["train"]["eval_every"] = 2
    trees[2] = task_tree("retrieval", itm_weight=0, rerank=0)  # ITM draws its negatives within a rank
    zero = {"zero_optimization": {"stage": stage}}
    folders = {count: [str(tmp_path / f"{name}-{count}") for name in names] for count in (1, 2)}
    spread = [tree | {"parallel": {"ep_size": ep_size}} for tree in trees]
    two = run_ranks(finetune_and_read, 2, spread, zero, folders[2])
    one = run_ranks(finetune_and_read, 1, trees, {"zero_optimization": {"stage": 1}}, folders[1])
    assert two[0] == two[1] == one[0] == [(3, 24)] * 3
    for folder, alone in zip(folders[2], folders[1], strict=True):
        losses, expected = ([r["loss"] for r in _records(path) if r["kind"] == "train"] for path in (folder, alone))
        assert losses == pytest.approx(expected, rel=1e-4)
        steps = [r["step"] for r in _records(folder) if r["kind"] == "eval"]
        assert steps == ([2, 3] if "nlvr" in folder else [3])
        results = [[r for r in _records(path) if r["kind"] == "eval"][-1] for path in (folder, alone)]
        assert results[0]["num_examples"] == results[1]["num_examples"] > 0
        keys = [_keys(f"{path}/evaluation/step-00000003/predictions.jsonl") for path in (folder, alone)]
        assert keys[0] == keys[1]
        assert len(set(keys[0])) == len(keys[0])


@pytest.mark.parametrize(("ep_size", "stage"), [(2, 1), (1, 0), (1, 2)])
def test_a_frozen_backbone_does_not_change_while_the_head_learns(
    run_ranks, task_tree, pretrained, tmp_path, ep_size, stage
):
    from safetensors.torch import load_file

    init = pretrained("mim+mlm")
    tree = task_tree("nlvr", features="words", freeze_backbone=True)
    tree["train"]["init"] = str(init)
    zero = {"zero_optimization": {"stage": stage}}
    folders = {count: str(tmp_path / str(count)) for count in (1, 2)}
    spread = tree | {"parallel": {"ep_size": ep_size}}
    (result, _) = run_ranks(stopped_and_resumed, 2, spread, folders[2], 2, zero)
    assert result == (True, 2, (["latest", "step-00000002"], False), True, False, 3)
    run_ranks(finetune_and_read, 1, [tree], zero, [folders[1]])
    before = load_file(init / "model.safetensors")
    two, one = (load_file(f"{folders[count]}/model/model.safetensors") for count in (2, 1))
    assert two.keys() == one.keys()
    for name in two:
        found, expected = two[name], one[name]
        if name.startswith("backbone."):
            assert torch.equal(found, before[name]), name
            continue
        if name.endswith("in_proj_bias"):  # softmax ignores the bias of keys, and Adam amplifies its rounding error
            found, expected = (bias.unflatten(0, (3, -1))[[0, 2]] for bias in (found, expected))
        # Adam moves every weight by about the learning rate; two summation orders agree far better than that.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    moved = (two["head.text_head.dense.weight"] - before["text_head.dense.weight"]).abs().mean()
    assert 1e-3 < float(moved) < 3e-3  # three steps of 1e-3


def stopped_and_resumed(rank, world_size, tree, folder, stop_at, deepspeed_config=None):
    """Fine-tune until rank 1 gets SIGTERM in step `stop_at`, and until a kill in the evaluation; then to the end."""
    import os
    import signal
    from pathlib import Path
    from unittest import mock

    from eve_ds.config import parse_config
    from eve_ds.training import finetune as finetuning
    from eve_ds.training.trainer import Trainer

    config = parse_config(tree | {"train": {**tree["train"], "output_dir": Path(folder)}})
    step = Trainer._train_step

    def step_with_signal(self):
        if self.step + 1 == stop_at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with mock.patch.object(Trainer, "_train_step", step_with_signal):
        first = finetuning.finetune(config, deepspeed_config)
    held = sorted(path.name for path in Path(folder, "checkpoints").iterdir()), Path(folder, "model").exists()
    killed = mock.patch.object(finetuning, "evaluate", mock.Mock(side_effect=KeyboardInterrupt))
    with killed, contextlib.suppress(KeyboardInterrupt):
        finetuning.finetune(config, deepspeed_config)
    before = len(_records(folder))
    last = finetuning.finetune(config, deepspeed_config)
    evaluated = [record["kind"] for record in _records(folder)[before:]] == ["event", "eval"]
    return first.stopped, first.steps, held, evaluated, last.stopped, last.steps


def test_a_run_stopped_by_a_signal_resumes_to_the_same_weights(run_ranks, task_tree, tmp_path):
    tree = task_tree("vqa", visible_patch_share=0.5)
    tree["train"] |= {"max_steps": 6}
    run_ranks(finetune_and_read, 2, [tree], None, [str(tmp_path / "whole")])
    (result, again) = run_ranks(stopped_and_resumed, 2, tree, str(tmp_path / "cut"), 3)
    assert result == again == (True, 3, (["latest", "step-00000003"], False), True, False, 6)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    losses = [{r["step"]: r["loss"] for r in _records(tmp_path / n) if r["kind"] == "train"} for n in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert not (tmp_path / "cut" / "checkpoints").exists(), "a finished run must remove its checkpoints"


def fetched_ahead(rank, world_size, tree, folder):
    """Return the calls, in order, of a run whose data ends after its last step, and of one whose data ends before."""
    from pathlib import Path
    from unittest import mock

    from deepspeed import DeepSpeedEngine

    from eve_ds.config import parse_config
    from eve_ds.data.errors import BadSample
    from eve_ds.training import finetune as finetuning

    def recorded(name, original):
        def call(self, *args, **options):
            calls.append(name)
            return original(self, *args, **options)

        return mock.patch.object(DeepSpeedEngine, name, call)

    def failing(*args, original=finetuning.training_batches, **options):
        batches = original(*args, **options)
        while True:
            calls.append("fetch")
            if calls.count("fetch") > last:
                raise BadSample("missing image")
            yield next(batches)

    found = []
    for last in (6, 5):
        calls, out = [], Path(folder, str(last))
        config = parse_config(tree | {"train": {**tree["train"], "output_dir": out}})
        error = None
        with (
            mock.patch.object(finetuning, "training_batches", failing),
            recorded("backward", DeepSpeedEngine.backward),
            recorded("step", DeepSpeedEngine.step),
        ):
            try:
                finetuning.finetune(config)
            except BadSample as raised:
                error = str(raised)
        found.append((calls, error, [record["step"] for record in _records(out) if record["kind"] == "train"]))
    return found


def test_the_next_step_is_fetched_while_the_device_computes_the_last_gradient(run_ranks, task_tree, tmp_path):
    tree = task_tree("vqa")
    tree["train"]["gradient_accumulation_steps"] = 2
    (((calls, error, steps), (broken_calls, broken_error, broken_steps)),) = run_ranks(
        fetched_ahead, 1, tree, str(tmp_path)
    )
    fetch = ["fetch", "fetch"]
    step, last_step = ["backward", "step", "backward", *fetch, "step"], ["backward", "step", "backward", "step"]
    assert calls == [*fetch, *step, *step, *last_step]
    assert (error, steps) == (None, [1, 2, 3])
    assert broken_calls == [*fetch, *step, *step]
    assert (broken_error, broken_steps) == ("missing image", [1, 2]), "the previous step must finish"


def _records(folder):
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def _keys(file):
    with open(file) as opened:
        return [json.loads(line)["key"] for line in opened]


def evaluated(rank, world_size, model, out, batch_size):
    from pathlib import Path

    from eve_ds.evaluation.predictions import evaluate
    from eve_ds.tasks.batches import TaskCollator
    from eve_ds.tasks.load_examples import load_examples
    from eve_ds.tasks.saved import load_task_model

    loaded = load_task_model(model)
    return evaluate(
        loaded.task,
        loaded.model,
        load_examples(loaded.config, "val"),
        TaskCollator(loaded.config, loaded.tokenizer),
        out=Path(out),
        weights=loaded.sha256,
        batch_size=batch_size,
    )


def test_metrics_do_not_depend_on_the_number_of_ranks(run_ranks, task_tree, tmp_path):
    tree = task_tree("retrieval")
    run_ranks(finetune_and_read, 1, [tree], {}, [str(tmp_path / "run")])
    model = str(tmp_path / "run" / "model")
    results = {}
    for world_size, batch_size in ((1, 8), (2, 5)):
        out = str(tmp_path / f"out{world_size}")
        results[world_size] = run_ranks(evaluated, world_size, model, out, batch_size)
    assert results[2] == results[1] * 2
    files = [tmp_path / f"out{count}" / "predictions.jsonl" for count in (1, 2)]
    assert files[0].read_text() == files[1].read_text()


def refused(rank, world_size, tree, folder):
    """Return error messages of runs in one folder, in this order.

    A loss that diverges, another seed, a run that is killed after an evaluation, whether that left a model, a good run
    (None), the same run again.
    """
    from pathlib import Path
    from unittest import mock

    from eve_ds.config import ConfigError, parse_config
    from eve_ds.training.finetune import finetune
    from eve_ds.training.nonfinite import NonFiniteError
    from eve_ds.training.trainer import Trainer

    def attempt(**changes):
        train = {**tree["train"], "output_dir": Path(folder), **changes.pop("train", {})}
        try:
            finetune(parse_config({**tree, **changes, "train": train}))
        except (ConfigError, NonFiniteError) as error:
            return str(error)
        return None

    exploding = attempt(optimizer={"lr": 1e30, "warmup_steps": 0, "clip_grad_norm": 0})
    other_seed = attempt(train={"seed": 9})
    step = Trainer._train_step

    def step_or_die(self):
        if self.step == 1:
            raise NonFiniteError("killed")
        return step(self)

    with mock.patch.object(Trainer, "_train_step", step_or_die):
        killed = attempt(train={"eval_every": 1})
    evaluated = Path(folder, "model").exists()
    return [exploding, other_seed, killed, evaluated, attempt(train={"eval_every": 2}), attempt()]


def test_errors_of_a_run_name_their_reason(run_ranks, task_tree, tmp_path):
    ((exploding, other_seed, killed, evaluated, good, again),) = run_ranks(
        refused, 1, task_tree("vqa"), str(tmp_path / "out")
    )
    assert "not finite, the update was not applied; " in exploding
    assert "its train.seed is 0, this run's is 9" in other_seed
    assert (killed, evaluated) == ("killed", True)
    assert good is None, "a model of an evaluation within a run that was killed must not prevent its restart"
    assert "holds a fine-tuned model: name another folder, or remove it" in again
