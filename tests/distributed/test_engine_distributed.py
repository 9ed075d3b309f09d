"""Training loop with the real DeepSpeed engine on one and on two ranks, on a model of a few thousand parameters.

All jobs (JOBS, at the end) run in one start of one process and one start of two processes; the tests check the results.
To look inside a run, a test uses `Watch`, which gives the trainer, and every step's micro-batches as the step begins.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import tiny_tree

from eve_ds.config import parse_config

MODEL = tiny_tree(patch_size=16, initializer_range=0.02)
NOISY = {"drop_path_rate": 0.2, "text_dropout": 0.2, "moe": {"num_experts": 4, "router_jitter": 0.1}}
LIMIT_SECONDS = 500
"""Time limit for all jobs of one start, which take 20 CPU-seconds per rank."""
pytestmark = pytest.mark.timeout(LIMIT_SECONDS + 60)

PLAIN_STEP_TOLERANCE = 2e-5
"""Tolerance relative to the norm of a parameter's update. A weight of 0.02 is rounded to 1e-9, which is 5e-5 of an
update of 2e-5; most elements round to the same number (measured: 3e-6)."""


def config_for(folder, *, ep_size=1, model=(), optimizer=(), loss=(), num_workers=0, **train):
    train = {"train_batch_size": 8, "max_steps": 3, "metrics_every": 1, "output_dir": str(folder), **train}
    return parse_config(
        {
            "model": {**MODEL, **dict(model)},
            "data": {"sources": [{"kind": "scenes", "num_samples": 64}], "num_workers": num_workers},
            "loss": dict(loss),
            "optimizer": {"lr": 1e-2, "warmup_steps": 2, "decay": "cosine", **dict(optimizer)},
            "parallel": {"ep_size": ep_size},
            "train": train,
        }
    )


class Watch:
    """Runs `pretrain` with a small evaluation; records micro-batches, and may change them.

    Args:
        change: called with (number of the step, its micro-batches, trainer) as the step begins; returns the
            micro-batches to train on. May raise.
        fetch: called with (micro-batches of the next step, trainer) as they leave the loader; returns their
            replacements.
    """

    def __init__(self, change=None, fetch=None):
        self.change, self.fetch = change, fetch
        self.trainer = None
        self.steps = []
        self.evaluations = 0

    def run(self, config, deepspeed_config=None, resume="auto"):
        from eve_ds.training import pretrain as pretraining
        from eve_ds.training import start
        from eve_ds.training.trainer import Trainer

        watch, evaluate = self, pretraining.evaluate_scenes

        class WatchedTrainer(Trainer):
            def __init__(self, *args):
                watch.trainer = self
                super().__init__(*args)
                watch._watch(self.feed)

        def evaluate_few(*args, **options):
            self.evaluations += 1
            return evaluate(*args, **options | {"num_scenes": 8, "batch_size": 4})

        with (
            mock.patch.object(start, "Trainer", WatchedTrainer),
            mock.patch.object(pretraining, "evaluate_scenes", evaluate_few),
        ):
            return pretraining.pretrain(config, deepspeed_config, resume)

    def _watch(self, feed):
        from eve_ds.data.device_queue import DeviceQueue

        load, take = feed._load, feed.take

        def watched_load():
            loaded = load()
            if self.fetch is None:
                return loaded
            return loaded._replace(micro_batches=self.fetch(loaded.micro_batches, self.trainer))

        def watched_take(samples):
            data = take(samples)
            if self.change is not None:
                trainer = self.trainer
                data = data._replace(micro_batches=self.change(trainer.step + 1, data.micro_batches, trainer))
                feed.queue = DeviceQueue(trainer.engine.device)
                for batch in data.micro_batches:
                    feed.queue.put(batch)
            self.steps.append(data.micro_batches)
            return data

        feed._load, feed.take = watched_load, watched_take

    def weights(self):
        return weights_of(self.trainer)


def weights_of(trainer):
    from deepspeed.runtime.zero import GatheredParameters

    from eve_ds.model.moe import local_plain_state_dict

    with GatheredParameters(list(trainer.model.parameters())):  # does nothing below stage 3
        return {name: value.clone() for name, value in local_plain_state_dict(trainer.model).items()}


def records(folder, kind="train"):
    """Metrics of a run; fails for NaN and Infinity, which JSON lacks."""

    def refuse(word):
        raise AssertionError(f"{word} in metrics.jsonl is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [item for item in (json.loads(line, parse_constant=refuse) for line in lines) if item["kind"] == kind]


def trace(folder):
    """Loss terms by step; if a resumed run repeated a step, its last record counts."""
    terms = ("loss", "mim", "mlm", "load_balancing", "router_z", "lr")
    return {item["step"]: [item[name] for name in terms] for item in records(folder)}


def zero(stage, **more):
    return {"zero_optimization": {"stage": stage}, **more}


def clip_for(stage, ep_size, precision="fp32"):
    """Return a clipping norm, or 0 (off) where eve_ds refuses it: at ZeRO 0 with experts spread over ranks or bf16."""
    return 0.0 if stage == 0 and (ep_size > 1 or precision != "fp32") else 0.5


def run_jobs(rank, world_size, folder):
    """Run every job for this number of ranks, each in its own folder."""
    from eve_ds.parallel.startup import initialize_deepspeed_distributed

    initialize_deepspeed_distributed()
    found = {}
    for job in JOBS[world_size]:
        started = time.monotonic()
        found[job.__name__] = job(rank, world_size, Path(folder) / job.__name__)
        print(f"{job.__name__}: {time.monotonic() - started:.1f} s", flush=True)
    return found


_FINISHED = {}


@pytest.fixture
def finished(run_ranks, tmp_path_factory):
    """Function that returns folder and results, in rank order, of a job; the first call starts the processes."""

    def look(job, world_size):
        if world_size not in _FINISHED:
            _FINISHED[world_size] = None
            folder = tmp_path_factory.mktemp(f"engine{world_size}")
            _FINISHED[world_size] = folder, run_ranks(run_jobs, world_size, str(folder), timeout=LIMIT_SECONDS)
        if _FINISHED[world_size] is None:
            pytest.fail(f"the start of {world_size} ranks failed; see the first test of this file that did")
        folder, results = _FINISHED[world_size]
        return folder / job.__name__, [result[job.__name__] for result in results]

    return look


# --- resume ---------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def resume_cases(rank, world_size, folder):
    """For each case, compare an uninterrupted run with a run that dies in step 5 and resumes from step 3."""

    def die(step, micro_batches, trainer):
        if step == 4 and trainer.saves.saver.pending is not None:  # otherwise the checkpoint may be published too late
            trainer.saves.saver.pending.thread.join()
        if step == 5:
            raise Killed
        return micro_batches

    found = []
    for number, (stage, settings, precision) in enumerate(RESUMED):
        ep_size = world_size
        common = {
            "ep_size": ep_size,
            "model": NOISY,
            "optimizer": {"clip_grad_norm": clip_for(stage, ep_size, precision)},
            "max_steps": 6,
            "save_every_steps": 3,
            "precision": precision,
            **settings,
        }
        whole, parts = folder / f"whole{number}", folder / f"parts{number}"
        watch = Watch()
        watch.run(config_for(whole, **common), zero(stage))
        expected = watch.weights()
        with contextlib.suppress(Killed):
            Watch(die).run(config_for(parts, **common), zero(stage))
        again = Watch()
        summary = again.run(config_for(parts, **common), zero(stage))
        weights = again.weights()
        unequal = [name for name in expected if not torch.equal(expected[name], weights[name])]
        keys = [[batch.keys for batch in step] for step in watch.steps[3:]]
        keys_again = [[batch.keys for batch in step] for step in again.steps]
        found.append((unequal, keys == keys_again, len(again.steps), summary.steps, summary.samples))
    return found


RESUMED = [
    (0, {}, "fp32"),
    (1, {"num_workers": 2}, "fp32"),
    (2, {"gradient_accumulation_steps": 2}, "fp32"),
    (1, {"async_save": True}, "bf16"),
    (0, {"num_workers": 2, "gradient_accumulation_steps": 2}, "bf16"),
    (3, {"gradient_accumulation_steps": 2, "async_save": True}, "bf16"),
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_run_exactly(finished, world_size):
    folder, results = finished(resume_cases, world_size)
    for result in results:
        for number, (unequal, same_keys, steps, last_step, samples) in enumerate(result):
            assert unequal == [], RESUMED[number]
            assert same_keys
            assert (steps, last_step, samples) == (3, 6, 48)
    for number, case in enumerate(RESUMED):
        whole, parts = trace(folder / f"whole{number}"), trace(folder / f"parts{number}")
        assert sorted(parts) == [1, 2, 3, 4, 5, 6]
        assert parts == whole, case
        assert len({tuple(terms) for terms in whole.values()}) == 6, (
            "every step must differ, or equality proves nothing"
        )
        (event,) = records(folder / f"parts{number}", "event")
        assert (event["event"], event["step"], event["samples"]) == ("resumed", 3, 24)


# --- a step against plain torch -------------------------------------------------------------------------------------


def decays(name):
    """Whether a parameter decays, by its name, independently of the engine's rule."""
    words = ("norm", "bias", "gamma_", "position", "class_token", "mask_token", "modality", "word")
    return not any(word in name for word in words)


def plain_step(config, weights, micro_batches):
    """Take one AdamW step of the plain model on all samples in plain torch; return weights, gradient norm and loss."""
    from eve_ds.model.eve import EVE
    from eve_ds.model.with_losses import weighted_sum
    from eve_ds.objectives.pretraining import pretraining_losses

    model = EVE(config.model)
    model.load_state_dict(weights)
    model.train()
    losses = []
    images = sum(len(batch) for batch in micro_batches)
    visible, masked = (micro_batches[0].visible_patch_ids.shape[1], micro_batches[0].masked_patch_ids.shape[1])
    # Both views have the captions: one beside the visible patches, the other beside all patches.
    captions = 2 * sum(float(batch.attention_mask.sum()) for batch in micro_batches)
    counts = {
        "masked_patches": images * masked,
        "masked_tokens": sum(batch.token_labels.numel() for batch in micro_batches),
        "tokens": captions + images * (1 + visible + 1 + visible + masked),
    }
    for batch in micro_batches:
        terms = pretraining_losses(model(**batch.model_inputs()), batch.targets(), counts, config.model)
        terms["load_balancing"] = terms["load_balancing"] / len(micro_batches)
        losses.append(weighted_sum(terms, config.loss.weights))
        losses[-1].backward()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if decays(n)], "weight_decay": 0.3},
            {"params": [p for n, p in named.items() if not decays(n)], "weight_decay": 0.0},
        ],
        lr=1e-2 / 2,  # first of two warm-up steps
        betas=(0.9, 0.98),
        eps=1e-3,
    )
    norm = torch.nn.utils.clip_grad_norm_(named.values(), config.optimizer.clip_grad_norm)
    optimizer.step()
    return model.state_dict(), float(norm), sum(map(float, losses))


def plain_step_cases(rank, world_size, folder):
    found = []
    for number, (stage, accumulation) in enumerate(STEPS):
        config = config_for(
            folder / str(number),
            optimizer={"weight_decay": 0.3, "eps": 1e-3, "clip_grad_norm": 0.5},
            loss={"load_balancing_weight": 0.1},
            max_steps=1,
            gradient_accumulation_steps=accumulation,
        )
        before = {}

        def remember(step, micro_batches, trainer, before=before):
            before.update(weights_of(trainer))
            return micro_batches

        watch = Watch(remember)
        watch.run(config, zero(stage))
        expected, norm, loss = plain_step(config, before, watch.steps[0])
        weights = watch.weights()
        worst = max(
            (
                float((weights[name] - value).norm() / (value - before[name]).norm().clamp(min=1e-12)),
                name,
                float((value - before[name]).norm()),
            )
            for name, value in expected.items()
        )
        (record,) = records(config.train.output_dir)
        found.append((worst, record.get("grad_norm"), norm, record["loss"], loss))
    return found


STEPS = [(0, 1), (1, 1), (1, 2), (2, 2), (0, 4), (3, 2)]


def test_a_step_equals_plain_torch(finished):
    _, (results,) = finished(plain_step_cases, 1)
    for case, (worst, norm, expected_norm, loss, expected_loss) in zip(STEPS, results, strict=True):
        assert worst[0] < PLAIN_STEP_TOLERANCE, (case, worst)
        assert expected_norm > 0.5, "the norm must exceed the limit, so that clipping is tested"
        assert norm is None if case[0] == 0 else norm == pytest.approx(expected_norm, rel=1e-5)
        assert loss == pytest.approx(expected_loss, rel=1e-6)


# --- losses that are not finite ---------------------------------------------------------------------------------------


def poison(*, steps, rank, how, micro=0):
    """Return a `change` that makes a pixel or the gradient of one parameter non-finite, on `rank` at `steps`."""

    def change(step, micro_batches, trainer):
        if step not in steps or trainer.topology.rank != rank:
            return micro_batches
        if how == "mim":
            pixels = micro_batches[micro].normalized_pixels.clone()
            pixels[0, 0, 0, 0] = math.nan
            spoiled = replace(micro_batches[micro], pixel_values=pixels)
            return [*micro_batches[:micro], spoiled, *micro_batches[micro + 1 :]]
        word = "experts" if how == "expert gradient" else "projection.weight"
        parameter = next(p for name, p in trainer.model.named_parameters() if word in name)
        value = math.inf if how == "expert gradient" else math.nan

        def spoil(gradient):
            handle.remove()
            return torch.full_like(gradient, value)

        handle = parameter.register_hook(spoil)
        return micro_batches

    return change


def then(*changes):
    def change(step, micro_batches, trainer):
        for one in changes:
            micro_batches = one(step, micro_batches, trainer)
        return micro_batches

    return change


def stop_cases(rank, world_size, folder):
    """For each case, return the message, weights that the bad step changed, keys, and the newest checkpoint."""
    from eve_ds.checkpoint.manifest import committed
    from eve_ds.training.nonfinite import NonFiniteError

    found = []
    for number, (stage, how, precision, accumulation) in enumerate(STOPS):
        before = {}

        def remember(step, micro_batches, trainer, before=before):
            if step == 3:
                before.update(weights_of(trainer))
                before["keys"] = [batch.keys for batch in micro_batches]
            return micro_batches

        watch = Watch(then(remember, poison(steps=[3], rank=world_size - 1, how=how, micro=accumulation - 1)))
        run = folder / str(number)
        config = config_for(
            run,
            ep_size=world_size,
            optimizer={"clip_grad_norm": clip_for(stage, world_size)},
            max_steps=6,
            save_every_steps=2,
            precision=precision,
            gradient_accumulation_steps=accumulation,
        )
        message = "no error"
        try:
            watch.run(config, zero(stage))
        except NonFiniteError as error:
            message = str(error)
        after = watch.weights()
        keys = before.pop("keys")
        unequal = [name for name, value in before.items() if not torch.equal(value, after[name])]
        found.append((message, unequal, keys, committed(run)[0].name, len(watch.steps)))
    return found


STOPS = [
    (0, "mim", "fp32", 1),
    (0, "expert gradient", "fp32", 2),
    (1, "mim", "fp32", 2),
    (1, "expert gradient", "fp32", 1),
    (2, "mim", "fp32", 1),
    (2, "gradient", "fp32", 2),
    (1, "gradient", "bf16", 1),
    (2, "mim", "bf16", 1),
    (3, "mim", "fp32", 2),
    (3, "expert gradient", "bf16", 1),
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_non_finite_value_stops_the_run_before_the_update(finished, world_size):
    folder, results = finished(stop_cases, world_size)
    bad = world_size - 1
    for number, (_, how, _, accumulation) in enumerate(STOPS):
        messages = {result[number][0] for result in results}
        assert len(messages) == 1, "every rank must raise the same message"
        (message,) = messages
        keys = results[bad][number][2]
        if how == "mim":
            start = f"step 3: loss is not finite, the update was not applied; rank {bad}: mim nan"
            assert message.startswith(start), message
            assert ", ".join(keys[accumulation - 1]) in message
            assert message.count("rank ") == 1, "only the bad rank must be named"
        else:
            assert message.startswith("step 3: gradient norm is not finite, the update was not applied;"), message
            assert all(f"rank {rank}: loss " in message for rank in range(world_size))
            assert all(key in message for micro_batch in keys for key in micro_batch)
        assert message.endswith("step-00000002"), message
        run = folder / str(number)
        (event,) = records(run, "event")
        assert event["event"] == "nonfinite"
        assert event["step"] == 3
        assert event["message"] in message
        assert max(trace(run)) == 2
        for unequal, _, latest, steps in (result[number][1:] for result in results):
            assert unequal == []
            assert (latest, steps) == ("step-00000002", 3)


def leave_out(bad):
    """Return a `fetch` that drops the batches of the steps in `bad` from the stream."""

    def fetch(micro_batches, trainer):
        while trainer.feed.batches.num_samples // sum(map(len, micro_batches)) in bad:
            micro_batches = [next(trainer.feed.batches) for _ in micro_batches]
        return micro_batches

    return fetch


def skip_cases(rank, world_size, folder):
    """For each case, compare six steps of which two are skipped with four steps that never see those batches."""
    found = []
    for number, (stage, how, precision, accumulation) in enumerate(SKIPS):
        common = {
            "ep_size": world_size,
            "optimizer": {"clip_grad_norm": clip_for(stage, world_size), "decay": "constant", "warmup_steps": 0},
            "precision": precision,
            "gradient_accumulation_steps": accumulation,
            "on_nonfinite": "skip",
            "save_every_steps": 3,
        }
        bad = [3, 5]
        watch = Watch(poison(steps=bad, rank=world_size - 1, how=how))
        run = folder / str(number)
        summary = watch.run(config_for(run, max_steps=6, **common), zero(stage))
        engine = watch.trainer.engine
        counters = (engine.global_steps, engine.skipped_steps, engine.micro_steps, watch.trainer.nonfinite.skips)
        weights = watch.weights()
        clean = Watch(fetch=leave_out(bad))
        clean.run(config_for(f"{run}-clean", max_steps=4, **common), zero(stage))
        expected = clean.weights()
        unequal = [name for name, value in expected.items() if not torch.equal(value, weights[name])]
        same_keys = [
            [batch.keys for batch in step] for number, step in enumerate(watch.steps, start=1) if number not in bad
        ] == [[batch.keys for batch in step] for step in clean.steps]
        found.append((unequal, same_keys, counters, summary.steps, summary.samples))
    return found


SKIPS = [
    (0, "mim", "fp32", 2),
    (1, "expert gradient", "fp32", 1),
    (1, "mim", "fp32", 2),
    (2, "mim", "fp32", 2),
    (2, "gradient", "bf16", 2),
    (3, "expert gradient", "fp32", 2),
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_skipped_step_leaves_no_trace(finished, world_size):
    folder, results = finished(skip_cases, world_size)
    for result in results:
        for case, (unequal, same_keys, counters, steps, samples) in zip(SKIPS, result, strict=True):
            assert same_keys
            assert unequal == [], case
            assert counters == (6, 2, 6 * case[3], 2), case
            assert (steps, samples) == (6, 48)
    for number in range(len(SKIPS)):
        run = folder / str(number)
        assert sorted(trace(run)) == [1, 2, 4, 6], "a skipped step must have no record"
        assert [event["step"] for event in records(run, "event")] == [3, 5]


def limit_of_skips(rank, world_size, folder):
    from eve_ds.training.nonfinite import NonFiniteError

    watch = Watch(poison(steps=[2, 3, 5], rank=0, how="mim"))
    config = config_for(folder / "run", max_steps=9, on_nonfinite="skip", max_nonfinite_skips=2)
    with pytest.raises(NonFiniteError) as caught:
        watch.run(config)
    return str(caught.value), len(watch.steps)


def test_too_many_skipped_steps_stop_the_run(finished):
    _, ((message, steps),) = finished(limit_of_skips, 1)
    assert message.startswith("step 5: loss is not finite")
    assert "This is skip number 3, more than train.max_nonfinite_skips (2): lower optimizer.lr, or" in message
    assert message.endswith("Last good checkpoint: none yet")
    assert steps == 5


# --- files and log lines of a run -------------------------------------------------------------------------------------


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def messages():
    from eve_ds.log import get_logger

    handler = _Messages()
    get_logger().addHandler(handler)
    try:
        yield handler.texts
    finally:
        get_logger().removeHandler(handler)


def everything_written(rank, world_size, folder):
    config = config_for(
        folder / "written",
        ep_size=world_size,
        max_steps=7,
        metrics_every=3,
        log_every=2,
        eval_every=4,
        save_every_steps=5,
    )
    monitors = {
        "csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"},
        "tensorboard": {"enabled": True, "output_path": str(folder / "tensorboard"), "job_name": "job"},
    }
    with messages() as texts:
        watch = Watch()
        watch.run(config, zero(1, **monitors))
    done = Watch()
    nothing = done.run(config, zero(1, **monitors))
    return texts, watch.evaluations, nothing, len(done.steps)


def test_a_run_writes_metrics_log_lines_checkpoints_and_monitors(finished):
    folder, ((texts, evaluations, nothing, more_steps), (peer_texts, *_rest)) = finished(everything_written, 2)
    train = records(folder / "written")
    assert [record["step"] for record in train] == [2, 3, 4, 6, 7]
    assert [record["samples"] for record in train] == [16, 24, 32, 48, 56]
    seconds = [record["seconds"] for record in train]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    for record, previous in zip(train, [{"seconds": 0.0, "samples": 0}, *train], strict=False):
        spent = record["seconds"] - previous["seconds"]
        made = record["samples"] - previous["samples"]
        # The record rounds seconds to milliseconds.
        assert record["samples_per_second"] == pytest.approx(made / spent, rel=2e-3 / spent)
        assert record["peak_memory_bytes"] > 50e6
        tokens = record["tokens_per_second"] / record["samples_per_second"]
        views = 1 + 4 + 1 + 16  # class token and 4 visible patches, class token and all patches
        assert views + 2 * 5 < tokens < views + 2 * 24, "both views must count the caption"
        assert {"loss", "mim", "mlm", "load_balancing", "router_z", "lr", "grad_norm"} <= set(record)
        assert {"moe0/entropy", "moe0/dead_experts", "moe0/image_routes/3", "moe0/text_routes/0"} <= set(record)
        assert {"moe0/mim/entropy", "moe0/mlm/dropped_text", "moe0/mlm/image_share"} <= set(record)
        assert "moe0/mim/image_routes/3" not in record
    evals = records(folder / "written", "eval")
    assert [record["step"] for record in evals] == [4, 7]
    assert all({"seconds", "samples", "color", "binding", "pixel_loss"} <= set(record) for record in evals)
    assert evaluations == 2
    assert not [text for text in peer_texts if text.startswith("step ")]
    lines = [text for text in texts if text.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2", "4", "6"]
    assert all(word in lines[0] for word in ("loss", "mim", "mlm", "lr", "samples_per_second", "eta"))
    assert [text.split("/")[-1] for text in texts if text.startswith("saved")] == ["step-00000005", "step-00000007"]
    assert (nothing.steps, more_steps) == (7, 0), "a finished run must take no further step"
    assert (folder / "written" / "checkpoints" / "latest").read_text().strip() == "step-00000007"
    with_loss = (folder / "csv" / "job" / "train_loss.csv").read_text().splitlines()
    written = [line.split(",") for line in with_loss[1:]]
    assert [(int(samples), float(loss)) for samples, loss in written] == [(r["samples"], r["loss"]) for r in train]
    assert list((folder / "tensorboard" / "job").glob("events.out.tfevents.*"))


def other_settings(rank, world_size, folder):
    found = {}
    watch = Watch()
    config = config_for(folder / "timed", ep_size=world_size, max_steps=100_000, max_seconds=0.4, eval_every=10**6)
    summary = watch.run(config, zero(1))
    found["timed"] = (summary.steps, summary.train_seconds)
    again = Watch()
    same = again.run(config, zero(1))
    longer = Watch()
    more = config_for(folder / "timed", ep_size=world_size, max_steps=summary.steps + 1)
    longer.run(more, zero(1))
    found["again"] = (same.steps == summary.steps, len(again.steps), again.evaluations, len(longer.steps))
    watch = Watch()
    watch.run(config_for(folder / "minutes", ep_size=world_size, save_every_minutes=1e-7), zero(1))
    found["minutes"] = sorted(path.name for path in (folder / "minutes" / "checkpoints").iterdir())
    watch = Watch()
    watch.run(
        config_for(folder / "bf16", ep_size=world_size, max_steps=12, metrics_every=1), zero(1, bf16={"enabled": True})
    )
    found["bf16"] = {str(parameter.dtype) for parameter in watch.trainer.engine.module.parameters()}
    groups = watch.trainer.optimizer.param_groups
    found["groups"] = [(g["name"], g["weight_decay"], g.get("moe", False), g["betas"]) for g in groups]
    return found


def test_max_seconds_save_every_minutes_and_bf16_take_effect(finished):
    folder, results = finished(other_settings, 2)
    (steps, seconds), (peer_steps, _) = results[0]["timed"], results[1]["timed"]
    assert steps == peer_steps > 1
    # The run stops before the step that would exceed the budget, so only one slow step can exceed it.
    assert 0.2 < seconds < 1.5
    assert results[0]["again"] == (True, 0, 0, 1), "a finished run takes no step, and one with other limits goes on"
    assert results[0]["minutes"] == ["latest", "step-00000001", "step-00000002", "step-00000003"]
    assert results[0]["bf16"] == {"torch.bfloat16"}
    losses = [record["loss"] for record in records(folder / "bf16")]
    assert losses[-1] < losses[0]
    for name, weight_decay, moe, betas in results[0]["groups"]:
        assert betas == (0.9, 0.98)
        assert weight_decay == (0.0 if "no_decay" in name or "no_decay" in str(name) else 0.05) or moe
    assert {group[2] for group in results[0]["groups"]} == {False, True}


def killed_in_the_last_evaluation(rank, world_size, folder):
    """Checkpoints after the kill, and (steps, evaluations) of two reruns."""
    from eve_ds.training.trainer import Trainer

    config = config_for(folder / "run", ep_size=world_size, max_seconds=100.0, async_save=True)
    with mock.patch.object(Trainer, "_evaluate", mock.Mock(side_effect=Killed)), contextlib.suppress(Killed):
        Watch().run(config, zero(1))
    saved = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    reruns = [Watch(), Watch()]
    for watch in reruns:
        watch.run(config, zero(1))
    return saved, [(len(watch.steps), watch.evaluations) for watch in reruns]


def test_a_run_killed_in_its_last_evaluation_repeats_the_evaluation_only(finished):
    folder, results = finished(killed_in_the_last_evaluation, 2)
    assert results == [(["latest", "step-00000003"], [(0, 1), (0, 0)])] * 2
    assert [record["step"] for record in records(folder / "run", "eval")] == [3]


# --- splits of the same stream over ranks -----------------------------------------------------------------------------


def traces_for(rank, world_size, folder):
    for number, (stage, ep_size, accumulation) in enumerate(SPLITS[world_size]):
        config = config_for(
            folder / str(number),
            ep_size=ep_size,
            optimizer={"eps": 1e-3, "clip_grad_norm": 0.5},
            loss={"load_balancing_weight": 0.0},
            max_steps=4,
            gradient_accumulation_steps=accumulation,
        )
        Watch().run(config, zero(stage))


SPLITS = {1: [(1, 1, 1), (2, 1, 4)], 2: [(1, 1, 1), (1, 2, 2), (2, 2, 1)]}
"""Number of ranks -> cases: ZeRO stage, ranks that share a set of experts, micro-steps."""


def test_losses_do_not_depend_on_ranks_or_accumulation(finished):
    runs = {
        (world_size, split): finished(traces_for, world_size)[0] / str(number)
        for world_size, splits in SPLITS.items()
        for number, split in enumerate(splits)
    }
    expected = trace(runs.pop((1, (1, 1, 1))))
    for (world_size, split), run in runs.items():
        found = trace(run)
        assert sorted(found) == [1, 2, 3, 4]
        for step, (loss, mim, mlm, balance, z, lr) in expected.items():
            # The fp32 rounding of a step (4e-7 of a gradient) grows over the following steps.
            others = [found[step][term] for term in (0, 1, 2, 4, 5)]
            assert others == pytest.approx([loss, mim, mlm, z, lr], rel=2e-5), (world_size, split, step)
            # Balance is a product of means; over micro-steps it is, by design, the mean of these products.
            assert found[step][3] == pytest.approx(balance, rel=2e-5 if split[2] == 1 else 0.2)


# --- data that runs out -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def loader_that_fails(error, at, calls=None):
    """Make loaders raise `error` instead of their batch number `at`, and count a bad sample with each earlier batch."""
    from eve_ds.data.pipeline import Loader

    original, count = Loader.__next__, 0

    def following(self):
        nonlocal count
        count += 1
        if calls is not None:
            calls.append("fetch")
        if count == at:
            raise error
        self.skipped["bad"] += 1
        return original(self)

    with mock.patch.object(Loader, "__next__", following):
        yield


def data_runs_out(rank, world_size, folder):
    """Return the messages of runs whose data runs out, and the steps of a run whose data would after its last step."""
    from eve_ds.data.errors import UnusableData

    error = UnusableData("shard a.tar, key 7: truncated")
    for name, at in (("first", 1), ("second", 2), ("third", 3)):
        config = config_for(folder / name, ep_size=2)
        with pytest.raises(UnusableData) as caught, loader_that_fails(error, at=at if rank == 1 else None):
            Watch().run(config, zero(1))
    Watch().run(config, zero(1))
    with loader_that_fails(error, at=4 if rank == 1 else None):
        summary = Watch().run(config_for(folder / "fourth", ep_size=2), zero(1))
    return str(caught.value), summary.steps


def test_missing_data_on_one_rank_ends_all_ranks_at_the_step_that_needs_it(finished):
    folder, results = finished(data_runs_out, 2)
    assert results == [("rank 1: shard a.tar, key 7: truncated", 3)] * 2
    assert sorted(trace(folder / "second")) == [1]
    saved = {name: [record["checkpoint"] for record in records(folder / name, "save")] for name in ("first", "second")}
    assert saved == {"first": [], "second": ["step-00000001"]}


def test_a_run_whose_data_ran_out_resumes_after_its_last_step(finished):
    folder, _ = finished(data_runs_out, 2)
    (resumed_from,) = [event["message"].partition(";")[0] for event in records(folder / "third", "event")]
    assert resumed_from.endswith("step-00000002")
    whole, resumed = (trace(folder / name) for name in ("fourth", "third"))
    assert sorted(resumed) == [1, 2, 3]
    assert resumed == whole


# --- data that is fetched in advance ----------------------------------------------------------------------------------


def fetched_ahead(rank, world_size, folder):
    """Return the calls, in order, of a whole run, of one that is stopped in step 2, and of one whose loader fails."""
    from deepspeed import DeepSpeedEngine

    def recorded(name, original):
        def call(self, *args, **options):
            calls.append(name)
            return original(self, *args, **options)

        return mock.patch.object(DeepSpeedEngine, name, call)

    def stop(step, micro_batches, trainer):
        trainer.stop.requested = step == 2
        return micro_batches

    found = {}
    for name, change, broken in (("whole", None, 7), ("stopped", stop, 5), ("broken", None, 5)):
        calls = []
        config = config_for(folder / name, gradient_accumulation_steps=2, save_every_steps=1)
        with (
            recorded("backward", DeepSpeedEngine.backward),
            recorded("step", DeepSpeedEngine.step),
            loader_that_fails(RuntimeError("worker died"), at=broken, calls=calls),
            pytest.raises(RuntimeError, match="worker died") if name == "broken" else contextlib.nullcontext(),
        ):
            Watch(change).run(config, zero(1))
        found[name] = calls
    return found


def test_the_next_step_is_fetched_while_the_device_computes_the_last_gradient(finished):
    _, (calls,) = finished(fetched_ahead, 1)
    fetch = ["fetch", "fetch"]
    step, last_step = ["backward", "step", "backward", *fetch, "step"], ["backward", "step", "backward", "step"]
    assert calls["whole"] == [*fetch, *step, *step, *last_step]
    assert calls["stopped"] == [*fetch, *step, *last_step], "the last step must fetch nothing"
    broken = [*step[:-2], "step"]  # the first of two micro-batches fails
    assert calls["broken"] == [*fetch, *step, *broken]


def test_data_fetched_in_advance_does_not_count_for_earlier_steps(finished):
    """Its data is not in an earlier step's metrics or checkpoint, and a loader error does not prevent the save."""
    folder, _ = finished(fetched_ahead, 1)
    for name, steps in (("whole", 3), ("stopped", 2), ("broken", 2)):
        run = folder / name
        assert [record["skipped/bad"] for record in records(run)] == [2 * step for step in range(1, steps + 1)]
        for step in range(1, steps + 1):
            checkpoint = run / "checkpoints" / f"step-{step:08d}"
            position = json.loads((checkpoint / "rank-00000.json").read_text())["position"]
            assert position["num_samples"] == 8 * step
            assert position["skipped"] == {"bad": 2 * step}


JOBS = {
    1: [resume_cases, plain_step_cases, stop_cases, skip_cases, limit_of_skips, traces_for, fetched_ahead],
    2: [
        resume_cases,
        stop_cases,
        skip_cases,
        everything_written,
        other_settings,
        killed_in_the_last_evaluation,
        traces_for,
        data_runs_out,
    ],
}
