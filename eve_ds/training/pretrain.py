"""Pre-training: DeepSpeed engine around EVE, and one readable loop.

`pretrain` builds the parts and runs `Trainer.run`; a step agrees with the other ranks on what happens after it,
accumulates gradients over its micro-batches and updates. While a device computes them, the host fetches those of the
next step, agrees with the other ranks on what its losses are averaged over, and begins to copy them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eve_ds.checkpoint import commit
from eve_ds.checkpoint.files import CheckpointError
from eve_ds.checkpoint.manifest import name_of
from eve_ds.checkpoint.weights import weight_reader
from eve_ds.config import Config, ConfigError, ModelConfig
from eve_ds.data.batch import Batch
from eve_ds.data.device_queue import DeviceQueue
from eve_ds.data.pipeline import build_loader
from eve_ds.data.sources import UnusableData
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.distributed import gather_rows, get_logger, rank_zero, seed_everything
from eve_ds.evaluation.scenes import evaluate_scenes, trains_on_scenes
from eve_ds.model.eve import EVE, model_shapes
from eve_ds.model.moe import MoEOutput, RouterStatistics, on_host, router_metrics, sum_statistics
from eve_ds.objectives.losses import Counts, pretraining_losses, total_loss
from eve_ds.ops.build import use_built
from eve_ds.parallel.moe import DeepSpeedMoE, load_plain_state_dict
from eve_ds.parallel.settings import resolve_deepspeed_config
from eve_ds.parallel.startup import initialize_deepspeed_distributed
from eve_ds.parallel.zero import initialize_engine
from eve_ds.training.flops import peak_flops, pretraining_flops
from eve_ds.training.nonfinite import MOST_NAMED, NonFiniteError, poison_if_nonfinite
from eve_ds.training.optimizer import CheckedAdamW, optimizer_parameter_groups
from eve_ds.training.progress import MetricsWriter, ProgressLine, peak_memory_bytes, training_clock
from eve_ds.training.run_folder import FolderLock, check_output_dir, on_rank_zero
from eve_ds.training.schedule import learning_rate
from eve_ds.training.signals import StopSignals

CHECK_SAMPLES = 2
"""Samples of a rank whose outputs are recorded at a save."""
EVALUATED_SCENES = 256
"""Scenes of an evaluation within a run, a quarter of what `launcher/evaluate.py scenes` takes."""


class Summary(NamedTuple):
    """What a run did."""

    steps: int
    samples: int
    train_seconds: float
    samples_per_second: float
    checkpoint: Path | None
    stopped: bool
    """By a signal, before the end."""


def pretrain(
    config: Config, deepspeed_config: dict[str, Any] | None, resume: Literal["auto", "none"] | Path = "auto"
) -> Summary:
    """Pre-train as configured; collective over the ranks that the launcher started.

    Args:
        config: what we own.
        deepspeed_config: DeepSpeed's JSON as a dictionary; None means ZeRO 0 with everything "auto".
        resume: `auto` goes on with the newest checkpoint of `train.output_dir` if there is one, `none` demands a fresh
            folder, a path names a checkpoint of the same run.

    Raises:
        ConfigError: settings that contradict each other, or an output folder of another run.
        UnusableData: too many samples cannot be used.
        NonFiniteError: see there.
        OpsBuildError: `EVE_DS_OPS=build`, and the fused ops cannot be built.
    """
    info = initialize_deepspeed_distributed()
    config, deepspeed_config = resolve_deepspeed_config(
        {} if deepspeed_config is None else deepspeed_config, config, info.world_size
    )
    for task in config.tasks_without_source:
        lacking = {"mim": "images", "mlm": "captions"}[task]
        get_logger().info("model.objectives: %s is not trained, as no source has %s", task, lacking)
    lock = FolderLock(config.train.output_dir)
    on_rank_zero(partial(check_output_dir, config, resume))
    on_rank_zero(lock.acquire)
    checkpoint = None if resume == "none" else commit.choose(config, resume if isinstance(resume, Path) else None)
    tokenizer = load_tokenizer(config.data.tokenizer)
    seed_everything(config.train.seed)
    moe_cls = partial(DeepSpeedMoE, ep_size=config.parallel.ep_size)
    model = EVE(config.model, moe_cls=moe_cls)
    model.backbone.activation_checkpointing = config.train.activation_checkpointing
    model.pack_views = config.train.pack_views
    if config.train.compile == "blocks":
        model.backbone.compile_blocks()
    if checkpoint is None and config.train.init is not None:
        _start_from(model, config.train.init, config)
    optimizer = build_optimizer(model, config, deepspeed_config)
    engine = initialize_engine(model, optimizer, deepspeed_config)
    use_built(next(model.parameters()))  # compiled here, if at all, and not while the first step is timed
    with lock, Trainer(config, engine, optimizer, tokenizer) as trainer:
        if checkpoint is not None:
            trainer.resume(checkpoint)
        return trainer.run()


class _StepData(NamedTuple):
    """What a step is computed on; its copies are in the device's queue."""

    micro_batches: list[Batch]
    """Of this rank, on the host; none where `problem` is not None."""
    problem: Exception | None
    """Why this rank has no data."""
    position: dict[str, Any]
    """Of this rank's loader just after them."""
    num_failed: float
    """Ranks without data; this and all below is known to all ranks alike."""
    counts: Counts
    """Denominators of the losses."""
    tokens: float
    """That enter the encoder in the step, on all ranks, in all views."""
    caption_tokens: float
    """Of the step's captions, on all ranks, each counted once."""


class _Agreement(NamedTuple):
    """What all ranks know alike before they compute a step."""

    done: bool
    """It is the last one."""
    save_due: bool
    """A checkpoint is due after it."""
    save_written: bool
    """Every rank has written its part of the checkpoint under way."""
    stop: bool
    """Some rank has been asked by a signal to stop: save after it, and end."""


def _start_from(model: EVE, source: Path, config: Config) -> None:
    """Take what this rank holds from weights that were trained elsewhere."""
    try:
        read = weight_reader(source, model_shapes(config.model))
        load_plain_state_dict(model, read)
    except CheckpointError as error:
        raise ConfigError(f"train.init: {error}") from None
    get_logger().info("starting from the weights of %s", source)


class Trainer:
    """State of one run: engine, loader, counters; use as a context manager."""

    def __init__(
        self,
        config: Config,
        engine: deepspeed.DeepSpeedEngine,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self.config = config
        self.engine = engine
        self.optimizer = optimizer
        self.tokenizer = tokenizer
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.step = self.samples = self.nonfinite_skips = 0
        self.seconds = 0.0
        self.clock = training_clock(engine.device)
        self.saved_at = time.monotonic()
        self.checkpoint: Path | None = None
        self.stop = StopSignals()
        # Counts and clocks live on the host: agreeing on them must not make the accelerator wait.
        self.host_group = dist.new_group(backend="gloo")
        self.saver = commit.Saver(config, tokenizer, self.host_group)
        self.window = _Window()
        self.queue: DeviceQueue[Batch] = DeviceQueue(engine.device)
        self.next_data: _StepData | None = None
        self._open_loader(None)
        # Last, so that a run which could not be built leaves nothing in the folder that would claim it.
        on_rank_zero(partial(_write_config, config))
        self.metrics = MetricsWriter(config.train.output_dir)

    def __enter__(self) -> Trainer:
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop.__exit__()
        if kind is not None and issubclass(kind, (NonFiniteError, UnusableData)):  # raised by all ranks together
            self._finish_save()
        self.loader.close()
        self.metrics.close()

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint of any topology: weights, optimiser, counters, data position."""
        state, positions = commit.load(self.engine, checkpoint, model_shapes(self.config.model))
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        self.nonfinite_skips = state["nonfinite_skips"]
        self.engine.global_steps, self.engine.global_samples = self.step, self.samples
        self.window = _Window(started=self.seconds)
        self.loader.close()
        self._open_loader(positions)
        self.checkpoint = checkpoint
        # Records of later steps that stand above this one belong to updates that were lost.
        self.metrics.write("event", **self._stamp(), event="resumed", message=f"from {checkpoint}")
        get_logger().info("resumed from %s", checkpoint)

    def run(self) -> Summary:
        """Train until `max_steps` or `max_seconds`, evaluating and saving on the way and at the end."""
        train = self.config.train
        started_at, steps_before, samples_before = self.seconds, self.step, self.samples
        with ProgressLine(train.log_every, self._progress()) as progress:
            done, stopped = self._progress() >= 1.0, False
            while not (done or stopped):
                with self._clock():
                    agreed = self._train_step()
                done, stopped = agreed.done, agreed.stop and not agreed.done
                written = self.step % train.metrics_every == 0 or self.step % train.log_every == 0
                if (written or done or stopped) and self.window.steps:
                    progress.update(self.step, self._progress(), self._write_metrics())
                if done or (train.eval_every and self.step % train.eval_every == 0 and not stopped):
                    self._evaluate()
                if agreed.save_written:
                    self._finish_save()
                if done or stopped or agreed.save_due:
                    self._save()
            if self.step > steps_before:
                self._finish_last_save()
        spent = max(self.seconds - started_at, 1e-9)
        return Summary(
            steps=self.step,
            samples=self.samples,
            train_seconds=self.seconds,
            samples_per_second=(self.samples - samples_before) / spent,
            checkpoint=self.checkpoint,
            stopped=stopped,
        )

    def _train_step(self) -> _Agreement:
        """One optimiser update; returns what the ranks agreed on before it.

        Randomness is a function of (seed, step, rank).
        """
        data = self._take_data()
        agreed = self._agree()
        self._set_learning_rate()
        seed_everything((self.config.train.seed * 1_000_003 + self.step) % 2**43, self.rank)
        computed = []
        for _ in data.micro_batches:
            batch = self.queue.get()
            output = self.engine(**batch.model_inputs())
            terms = pretraining_losses(
                output,
                **batch.targets(),
                patch_size=self.config.model.patch_size,
                counts=data.counts,
                normalize_pixels=self.config.model.normalizes_pixels,
                gather=gather_rows,
            )
            loss = total_loss(terms, self.config.loss)
            self.engine.backward(poison_if_nonfinite(loss))
            if self.engine.is_gradient_accumulation_boundary() and not (agreed.done or agreed.stop):
                self.next_data = self._prepare()  # now the device has work; the update makes the host wait for it
            self.engine.step()
            computed.append({name: term.detach() for name, term in {"loss": loss, **terms}.items()})
        self.step += 1
        self.samples += self.engine.train_batch_size()
        self.last_batch, self.position = data.micro_batches[-1], data.position
        if self._updated():
            self.window.add_step(computed, output.moe, data)
        else:
            self._handle_nonfinite(computed, data.micro_batches)
        return agreed

    def _take_data(self) -> _StepData:
        """What the step that begins is computed on; the first one of a start fetches it now.

        Raises:
            UnusableData: on every rank, if any of them has no data.
        """
        data, self.next_data = self.next_data or self._prepare(), None
        problem = data.problem
        if problem is not None and not isinstance(problem, UnusableData):
            raise problem
        if data.num_failed:
            raise UnusableData("; ".join(self._gather(None if problem is None else f"rank {self.rank}: {problem}")))
        return data

    def _prepare(self) -> _StepData:
        """Fetch what a step is made of, begin its copies, and sum over ranks what losses are averaged over.

        Whatever goes wrong is raised at that step: the one under way is still finished, and saved where that is due.
        """
        micro_batches, problem = self._fetch()
        for batch in micro_batches:
            self.queue.put(batch)
        own = [(*denominators(batch, self.config.model), caption_tokens(batch)) for batch in micro_batches]
        local = torch.tensor([[0.0] * 4, *own], dtype=torch.float64).sum(dim=0)
        numbers = torch.tensor([*local.tolist(), problem is not None], dtype=torch.float64)
        dist.all_reduce(numbers, group=self.host_group)
        *totals, captions, num_failed = numbers.tolist()
        share = self.world_size * self.engine.gradient_accumulation_steps()
        return _StepData(
            micro_batches=micro_batches,
            problem=problem,
            position=self.loader.state_dict(),
            num_failed=num_failed,
            counts=Counts(*(total / share for total in totals)),
            tokens=totals[2],
            caption_tokens=captions,
        )

    def _fetch(self) -> tuple[list[Batch], Exception | None]:
        """The micro-batches of one step, or why this rank cannot have them."""
        try:
            return [next(self.loader) for _ in range(self.engine.gradient_accumulation_steps())], None
        except Exception as error:
            return [], error

    def _agree(self) -> _Agreement:
        """Decide with the other ranks what happens after the step that begins, by the clock of rank 0."""
        clocks = [self.seconds, time.monotonic() - self.saved_at] if self.rank == 0 else [0.0, 0.0]
        flags = [self.saver.written, self.stop.requested]
        numbers = torch.tensor([*clocks, *flags], dtype=torch.float64)
        dist.all_reduce(numbers, group=self.host_group)
        self.seconds, since_save, num_written, num_stopped = numbers.tolist()
        train = self.config.train
        next_step = self.step + 1
        save_due = bool(train.save_every_steps and next_step % train.save_every_steps == 0)
        save_due |= bool(train.save_every_minutes and since_save >= 60 * train.save_every_minutes)
        return _Agreement(
            done=next_step >= train.max_steps or self._out_of_time(),
            save_due=save_due,
            save_written=num_written == self.world_size,
            stop=num_stopped > 0,
        )

    def _gather(self, item: Any) -> list[Any]:
        """What every rank passed, without None, in rank order."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, item, group=self.host_group)
        return [item for item in gathered if item is not None]

    def _updated(self) -> bool:
        """Whether the last step changed the weights; ZeRO reports overflow on the engine, ZeRO 0 on our optimiser."""
        return bool(self.engine.was_step_applied()) and not getattr(self.optimizer, "overflow", False)

    def _handle_nonfinite(self, computed: list[dict[str, Tensor]], micro_batches: list[Batch]) -> None:
        """Stop, or count the skip; collective. The step that was taken has left weights and optimiser as they were."""
        train = self.config.train
        local = [_describe(terms, batch) for terms, batch in zip(computed, micro_batches, strict=True)]
        found = [(rank, *item) for rank, items in enumerate(self._gather(local)) for item in items]
        bad = [item for item in found if item[1] == max(worst for _, worst, _ in found)]
        severity = bad[0][1]
        if train.precision == "fp16" and severity == 0:  # an overflow that the loss scaler answers
            return
        what = "; ".join(f"rank {rank}: {text}" for rank, _, text in bad[:MOST_NAMED])
        more = f"; and {len(bad) - MOST_NAMED} more micro-batches" if len(bad) > MOST_NAMED else ""
        kind = "loss" if severity else "gradient norm"
        message = f"step {self.step}: {kind} is not finite, the update was not applied; {what}{more}"
        self.nonfinite_skips += 1
        self.metrics.write("event", **self._stamp(), event="nonfinite", message=message)
        if train.on_nonfinite == "stop":
            raise NonFiniteError(f"{message}. Last good checkpoint: {self.checkpoint or 'none yet'}")
        if self.nonfinite_skips > train.max_nonfinite_skips:
            raise NonFiniteError(
                f"{message}. That is skip number {self.nonfinite_skips}, "
                f"train.max_nonfinite_skips ({train.max_nonfinite_skips}) are allowed. "
                f"Last good checkpoint: {self.checkpoint or 'none yet'}"
            )
        get_logger().warning("%s; skipped", message)

    def _write_metrics(self) -> dict[str, float]:
        numbers: dict[str, Any] = self.window.reduce(self.world_size)
        train = self.config.train
        elapsed = max(self.seconds - self.window.started, 1e-9)
        samples = self.window.steps * self.engine.train_batch_size()
        numbers |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "samples_per_second": samples / elapsed,
            "tokens_per_second": self.window.tokens / elapsed,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        norm = self.engine.get_global_grad_norm()  # DeepSpeed takes none at ZeRO 0 without clipping
        if norm is not None and math.isfinite(norm):
            numbers["grad_norm"] = float(norm)
        peak = peak_flops(train.precision)
        if peak is not None:
            flops = 3 * samples * self._forward_flops() / elapsed
            numbers["model_flops_utilisation"] = flops / (peak * self.world_size)
        skipped = {f"skipped/{reason}": count for reason, count in self.position["skipped"].items()}
        self.metrics.write("train", **self._stamp(), **numbers, **skipped)
        if self.engine.monitor.enabled and rank_zero():
            self.engine.monitor.write_events([(f"train/{k}", v, self.samples) for k, v in numbers.items()])
        self.window = _Window(started=self.seconds)
        return numbers

    def _evaluate(self) -> None:
        if not trains_on_scenes(self.config):
            return
        share = 2 * self.world_size
        result = evaluate_scenes(
            self.engine.module,
            self.config,
            self.tokenizer,
            num_scenes=math.ceil(EVALUATED_SCENES / share) * share,
            rank=self.rank,
            world_size=self.world_size,
        )
        self.metrics.write("eval", **self._stamp(), **result)
        gaps = [f"{key} {value['right']:.3f}/{value['wrong']:.3f}" for key, value in result.items() if "right" in value]
        get_logger().info("eval at step %d, right/wrong: %s", self.step, ", ".join(gaps))

    def _save(self) -> None:
        """Write a checkpoint; with `async_save` begin it, and publish it after the step that finds it written."""
        self._finish_save()
        content = commit.Content(
            step=self.step,
            numbers={"samples": self.samples, "seconds": self.seconds, "nonfinite_skips": self.nonfinite_skips},
            position=self.position,
            check_inputs=_first_samples(self.last_batch, CHECK_SAMPLES).to(self.engine.device).model_inputs(),
        )
        self.saver.begin(self.engine, content)
        if not self.config.train.async_save:
            self._finish_save()
        self.saved_at = time.monotonic()

    def _finish_save(self) -> None:
        saved = self.saver.finish()
        if saved is not None:
            self.checkpoint = saved.folder
            self.metrics.write(
                "save",
                **self._stamp(),
                checkpoint=saved.folder.name,
                stall_seconds=saved.stall_seconds,
                bytes=saved.bytes,
            )
            get_logger().info("saved %s", saved.folder)

    def _finish_last_save(self) -> None:
        """Wait for the checkpoint of the last step; nothing is left that could save it again.

        Raises:
            SaveError: it could not be written.
        """
        self._finish_save()
        if self.checkpoint is None or self.checkpoint.name != name_of(self.step):
            raise commit.SaveError(
                f"the run ends at step {self.step} without a checkpoint of it, the newest is {self.checkpoint}: make "
                "room or change permissions and start it again, it goes on from there"
            )

    def _open_loader(self, positions: list[dict[str, Any]] | None) -> None:
        self.loader = build_loader(
            self.config,
            self.tokenizer,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.engine.train_micro_batch_size_per_gpu(),
            state=positions,
            pin_memory=self.engine.device.type == "cuda",
        )
        self.position = self.loader.state_dict()  # of finished steps: the loader itself is a step ahead

    def _set_learning_rate(self) -> None:
        lr = learning_rate(self.config, self.step, self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _progress(self) -> float:
        """Done share of the run, 1 when it is over."""
        train = self.config.train
        by_time = self.seconds / train.max_seconds if train.max_seconds else 0.0
        return max(self.step / train.max_steps, by_time)

    def _out_of_time(self) -> bool:
        """Whether the time budget will be spent when the step that begins now is over."""
        train = self.config.train
        if train.max_seconds is None:
            return False
        step_seconds = self.seconds / self.step if self.step else 0.0
        return self.seconds + step_seconds >= train.max_seconds

    @contextmanager
    def _clock(self) -> Iterator[None]:
        started = self.clock()
        yield
        self.seconds += self.clock() - started

    def _stamp(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "samples": self.samples}

    def _forward_flops(self) -> float:
        samples = max(self.window.steps * self.engine.train_batch_size(), 1)
        return pretraining_flops(self.config.model, self.config.masking, self.window.caption_tokens / samples)


class _Window:
    """Numbers since the last metrics record; tensors stay on the device until they are read."""

    def __init__(self, started: float = 0.0) -> None:
        self.started = started
        self.steps = 0
        self.tokens = self.caption_tokens = 0.0
        self._terms: list[dict[str, Tensor]] = []
        self._moe: dict[str, tuple[RouterStatistics, ...]] = {}

    def add_step(self, terms: list[dict[str, Tensor]], moe: dict[str, tuple[MoEOutput, ...]], data: _StepData) -> None:
        """One update: loss terms of its micro-batches, detached; MoE outputs of the last by view; tokens."""
        self.steps += 1
        self.tokens += data.tokens
        self.caption_tokens += data.caption_tokens
        self._terms += terms
        self._moe = {view: tuple(layer.statistics for layer in layers) for view, layers in moe.items()}

    def reduce(self, world_size: int) -> dict[str, float]:
        """Mean of every term over micro-batches and ranks, and router statistics of the last micro-batch.

        Those are over all views, and where there are several of each view too, without what each expert got.
        """
        names = sorted(self._terms[0])
        values = torch.stack([torch.stack([terms[name] for name in names]) for terms in self._terms]).mean(dim=0)
        dist.all_reduce(values)
        numbers = dict(zip(names, (values / world_size).tolist(), strict=True))
        counted = iter(on_host([own for layers in self._moe.values() for own in layers]))
        by_view = {view: [next(counted) for _ in layers] for view, layers in self._moe.items()}
        for layer, of_views in enumerate(zip(*by_view.values(), strict=True)):
            numbers |= {f"moe{layer}/{name}": value for name, value in router_metrics(sum_statistics(of_views)).items()}
            for view, own in zip(self._moe, of_views, strict=True) if len(of_views) > 1 else ():
                figures = {name: value for name, value in router_metrics(own).items() if "routes/" not in name}
                numbers |= {f"moe{layer}/{view}/{name}": value for name, value in figures.items()}
        return numbers


def build_optimizer(model: EVE, config: Config, deepspeed_config: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW over decaying, non-decaying and expert parameters; weight decay is always set explicitly."""
    stage = deepspeed_config["zero_optimization"]["stage"]
    cls = CheckedAdamW if stage == 0 else torch.optim.AdamW
    settings = config.optimizer
    groups = optimizer_parameter_groups(model, settings.weight_decay)
    return cls(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,  # one pass over weights, gradients and moments instead of ten
    )


def _write_config(config: Config) -> None:
    (config.train.output_dir / "config.json").write_text(config.model_dump_json(indent=2), encoding="utf-8")


def _describe(terms: dict[str, Tensor], batch: Batch) -> tuple[int, str]:
    """How likely this micro-batch is the cause, and its loss and keys.

    2: a term made of its own samples is not finite. 1: only terms that ranks share are not. 0: its loss is finite.
    """
    bad = [name for name, term in terms.items() if not math.isfinite(float(term))]
    own = [name for name in bad if name not in ("loss", "load_balancing", "itc")]
    more = " ..." if len(batch) > MOST_NAMED else ""
    values = ", ".join(f"{name} {float(terms[name])}" for name in (own or bad or ["loss"]))
    return 2 if own else 1 if bad else 0, f"{values}, sample keys {', '.join(batch.keys[:MOST_NAMED])}{more}"


def denominators(batch: Batch, model: ModelConfig) -> list[float]:
    """Masked patches, masked tokens and encoder tokens of a micro-batch: the fields of Counts."""
    samples = float(len(batch) if batch.image_view_ids is None else len(batch.image_view_ids))
    if batch.image_mask is not None and "joint" in model.objectives:
        samples = float(batch.image_mask.sum())
    masked = 0 if batch.masked_patch_ids is None else batch.masked_patch_ids.shape[1]
    labels = 0 if batch.token_labels is None else batch.token_labels.numel()
    return [float(samples * masked), float(labels), sum(encoder_tokens(batch, model).values())]


def encoder_tokens(batch: Batch, model: ModelConfig) -> dict[str, float]:
    """Tokens that enter the encoder, class tokens included, by task.

    In `itm` a negative caption counts as the one it stands for, as it is not drawn yet when tokens are counted.
    """
    tokens = {view: float(layout.mask.sum()) for view, layout in (batch.layouts or {}).items()}
    if "itc" in model.objectives:
        tokens["itc"] = tokens.pop("itc_image") + tokens.pop("itc_text")
    if "itm" in model.objectives:
        tokens["itm"] = 3 * tokens["itc"]
    return tokens


def caption_tokens(batch: Batch) -> float:
    """Real tokens of the captions, [CLS] and [SEP] included."""
    return 0.0 if batch.attention_mask is None else float(batch.attention_mask.sum())


def _first_samples(batch: Batch, count: int) -> Batch:
    """The batch cut to its first samples, up to one with an image view if there is any, without its layouts.

    Flat indices into the text stay right, as rows keep their length.
    """
    if batch.image_view_ids is not None and len(batch.image_view_ids):
        count = max(count, int(batch.image_view_ids[0]) + 1)
    in_image_view = count if batch.image_view_ids is None else int((batch.image_view_ids < count).sum())
    of_image_view = ("image_view_ids", "visible_patch_ids", "visible_patch_mask", "masked_patch_ids")
    rows = dict.fromkeys((*of_image_view, "image_view_text_mask"), in_image_view)
    if batch.input_ids is not None and batch.masked_token_ids is not None:
        chosen = int((batch.masked_token_ids < count * batch.input_ids.shape[1]).sum())  # they are ascending
        rows |= {"masked_token_ids": chosen, "token_labels": chosen}
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    kept: dict[str, Any] = {name: tensor[: rows.get(name, count)] for name, tensor in tensors.items()}
    return Batch(keys=batch.keys[:count], **kept)
