"""Fine-tuning: DeepSpeed engine around a task's model, and one readable loop.

The loop is that of :mod:`eve_ds.training.pretrain` without what only pre-training has. What is saved at the end, and
evaluated, is the plain model.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eve_ds.checkpoint import commit, manifest, state
from eve_ds.checkpoint.files import PieceReader, write_pieces
from eve_ds.config import Config, ConfigError, LossConfig, TaskConfig
from eve_ds.data.device_queue import DeviceQueue
from eve_ds.data.sources import UnusableData
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.distributed import all_reduce_sum, get_logger, rank_zero, seed_everything
from eve_ds.evaluation.predictions import evaluate
from eve_ds.model.eve import Backbone, initialize_weights
from eve_ds.ops.build import use_built
from eve_ds.parallel.moe import DeepSpeedMoE, load_plain_state_dict
from eve_ds.parallel.settings import resolve_deepspeed_config
from eve_ds.parallel.startup import initialize_deepspeed_distributed
from eve_ds.parallel.zero import initialize_engine
from eve_ds.tasks.agreement import AgreementHead
from eve_ds.tasks.batches import TaskBatch, TaskCollator, training_batches
from eve_ds.tasks.formats import load_examples
from eve_ds.tasks.saved import (
    BACKBONE,
    load_task_model,
    save_task_model,
    start_head_weights,
    start_weights,
    task_shapes,
)
from eve_ds.tasks.task import Task, new_task
from eve_ds.training.nonfinite import MOST_NAMED, NonFiniteError, poison_if_nonfinite
from eve_ds.training.optimizer import CheckedAdamW, optimizer_parameter_groups
from eve_ds.training.progress import MetricsWriter, ProgressLine, peak_memory_bytes, training_clock
from eve_ds.training.run_folder import FolderLock, check_output_dir, on_rank_zero
from eve_ds.training.schedule import learning_rate
from eve_ds.training.signals import StopSignals

MODEL, EVALUATION = "model", "evaluation"
"""Folders of the output folder."""
EVALUATION_BATCH = 64


class FinetuneSummary(NamedTuple):
    """What a run did."""

    steps: int
    samples: int
    train_seconds: float
    metrics: dict[str, Any]
    """Of the last evaluation; empty if there was none."""
    model: Path
    stopped: bool
    """By a signal, before the end; the same command goes on from there."""


def finetune(config: Config, deepspeed_config: dict[str, Any] | None = None) -> FinetuneSummary:
    """Fine-tune as `config.task` says, save the model, evaluate it; collective over the ranks that were launched.

    Args:
        config: `train.init` names where the backbone comes from; None draws it.
        deepspeed_config: DeepSpeed's JSON as a dictionary; None means ZeRO 1 with everything "auto".

    Raises:
        ConfigError: settings that contradict each other, data or weights that cannot be used, or a folder that holds
            another run.
        UnusableData: too many examples have no usable image.
        NonFiniteError: a loss or gradient that is not finite.
        SaveError: checkpoints could not be written, time after time.
    """
    info = initialize_deepspeed_distributed()
    examples = load_examples(config, "train")
    load_examples(config, "val")  # what is wrong with them is said now, and not after hours of training
    task = new_task(config, examples)
    examples = task.trainable(examples)
    config = with_schedule(config, len(examples))
    # Stage 0 would refuse to clip where experts are spread over ranks.
    default = {"zero_optimization": {"stage": 1}}
    config, deepspeed_config = resolve_deepspeed_config(
        default if deepspeed_config is None else deepspeed_config, config, info.world_size
    )
    lock = FolderLock(config.train.output_dir)
    on_rank_zero(partial(check_folder, config))
    on_rank_zero(lock.acquire)
    checkpoint = commit.choose(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    seed_everything(config.train.seed)
    model = task.model(partial(DeepSpeedMoE, ep_size=config.parallel.ep_size))
    prepare_weights(model, config, task)
    optimizer = build_optimizer(model, config, deepspeed_config)
    engine = initialize_engine(model, optimizer, deepspeed_config)
    if frozen(config):
        # Only now: DeepSpeed refuses a model with experts whose optimiser has none.
        model.get_submodule("backbone").requires_grad_(False)
    use_built(next(model.parameters()))
    collate = TaskCollator(config, tokenizer, task.targets)
    with lock, StopSignals() as stop:
        finetuner = Finetuner(config, engine, optimizer, task, tokenizer, stop)
        if checkpoint is not None:
            finetuner.resume(checkpoint)
        batches = training_batches(
            examples,
            config,
            collate,
            step=finetuner.step,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            micro_batch_size=engine.train_micro_batch_size_per_gpu(),
            pin_memory=engine.device.type == "cuda",
        )
        return finetuner.run(batches)


def check_folder(config: Config) -> None:
    """Create the output folder, or check that it can be written to.

    A run that was stopped goes on from its newest checkpoint; one without any begins anew.

    Raises:
        ConfigError: it cannot be written, holds the model of a run that has ended, or was begun with other settings.
    """
    check_output_dir(config, "auto")
    out = config.train.output_dir
    if (out / MODEL).exists() and not manifest.committed(out):
        raise ConfigError(
            f"train.output_dir ({config.train.output_dir}) holds a fine-tuned model: name another folder, or remove it"
        )


def with_schedule(config: Config, num_examples: int) -> Config:
    """The configuration with `max_steps` and `warmup_steps` from `task.epochs` and `task.warmup_share`.

    Raises:
        ConfigError: fewer examples than one batch.
    """
    train, task = config.train, _task(config)
    if num_examples < train.train_batch_size:
        raise ConfigError(
            f"train.train_batch_size ({train.train_batch_size}) must not exceed the number of training examples "
            f"({num_examples}): lower it"
        )
    steps = train.max_steps
    if task.epochs is not None:
        steps = min(steps, task.epochs * num_examples // train.train_batch_size)
    warmup = config.optimizer.warmup_steps
    if task.warmup_share is not None:
        warmup = round(task.warmup_share * steps)
    return config.model_copy(
        update={
            "train": train.model_copy(update={"max_steps": steps}),
            "optimizer": config.optimizer.model_copy(update={"warmup_steps": warmup}),
        }
    )


def _task(config: Config) -> TaskConfig:
    if config.task is None:
        raise ConfigError("fine-tuning needs the section `task`: take a recipe, or set task.name")
    return config.task


def prepare_weights(model: nn.Module, config: Config, task: Task) -> None:
    """Draw all weights, then take from `train.init`, if there is one, the backbone and what it has of the head."""
    initialize_weights(model, config.model, int(torch.randint(2**62, (), device="cpu")))
    head = model.get_submodule("head")
    if isinstance(head, AgreementHead):
        head.draw_weights()
    backbone = cast(Backbone, model.get_submodule("backbone"))
    backbone.activation_checkpointing = config.train.activation_checkpointing
    if config.train.compile == "blocks":
        backbone.compile_blocks()
    if config.train.init is not None:
        read = start_weights(config.train.init, config.model)
        load_plain_state_dict(backbone, lambda name: read(BACKBONE + name))
        parameters = dict(model.named_parameters())
        taken = {
            name: weight
            for name, weight in start_head_weights(config.train.init, task.pretrained_names()).items()
            if name in parameters and parameters[name].shape == weight.shape  # else it is the head of another task
        }
        with torch.no_grad():
            for name, weight in taken.items():
                parameters[name].copy_(weight)
        get_logger().info("starting from the backbone%s of %s", " and head" * bool(taken), config.train.init)


def lr_scale(name: str, num_layers: int, layer_decay: float, head_multiple: float, frozen: bool = False) -> float:
    """Factor of a parameter's learning rate: 1 at the last block, times `layer_decay` for each block below it.

    Embeddings lie below the first block, the final LayerNorm counts as the last block, the head has a factor of its
    own (BEiT, `get_num_layer_for_vit`). Of a frozen backbone the factor is 0.
    """
    if name.startswith("head."):
        return head_multiple
    if frozen:
        return 0.0
    parts = name.removeprefix(BACKBONE).split(".")
    if parts[0] == "blocks":
        return layer_decay ** (num_layers - 1 - int(parts[1]))
    return 1.0 if parts[0] == "norm" else layer_decay**num_layers


def frozen(config: Config) -> bool:
    """Whether the backbone stays as it is."""
    return _task(config).freeze_backbone and config.train.init is not None


def build_optimizer(model: nn.Module, config: Config, deepspeed_config: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW whose groups carry `lr_scale` beside weight decay."""
    settings, task = config.optimizer, _task(config)
    scale = partial(
        lr_scale,
        num_layers=config.model.num_hidden_layers,
        layer_decay=task.layer_decay,
        head_multiple=task.head_lr_multiple,
        frozen=frozen(config),
    )
    cls = CheckedAdamW if deepspeed_config["zero_optimization"]["stage"] == 0 else torch.optim.AdamW
    return cls(
        optimizer_parameter_groups(model, settings.weight_decay, scale),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def loss_weights(task: TaskConfig, loss: LossConfig) -> dict[str, float]:
    """Weight of every term that a task may have."""
    return {
        "vqa": 1.0,
        "nlvr": 1.0,
        "itc": task.itc_weight,
        "itm": task.itm_weight,
        "load_balancing": loss.load_balancing_weight,
        "router_z": loss.router_z_weight,
    }


class _Agreement(NamedTuple):
    """What all ranks know alike after a step."""

    done: bool
    save_due: bool
    stop: bool
    """Some rank has been asked by a signal to stop."""


class Finetuner:
    """State of one run: engine, counters, what is written."""

    def __init__(
        self,
        config: Config,
        engine: deepspeed.DeepSpeedEngine,
        optimizer: torch.optim.Optimizer,
        task: Task,
        tokenizer: PreTrainedTokenizerFast,
        stop: StopSignals,
    ) -> None:
        self.config, self.engine, self.optimizer, self.task, self.tokenizer = config, engine, optimizer, task, tokenizer
        self.weights = loss_weights(_task(config), config.loss)
        self.step = self.samples = self.nonfinite_skips = 0
        self.seconds = 0.0
        self.stop, self.saved_at = stop, time.monotonic()
        self.host_group = dist.new_group(backend="gloo")
        self.saver = commit.Saver(config, tokenizer, self.host_group)
        self.queue: DeviceQueue[TaskBatch] = DeviceQueue(engine.device)
        self.next_data: list[TaskBatch] | Exception | None = None
        self.skipped: Counter[str] = Counter()
        self.terms: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.clock = training_clock(engine.device)
        out = config.train.output_dir
        on_rank_zero(partial(_write_text, out / "config.json", config.model_dump_json(indent=2)))
        self.metrics = MetricsWriter(out)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint of any topology; which examples come next follows from the step."""
        numbers, _ = commit.load(self.engine, checkpoint, task_shapes(self.task))
        self.step, self.samples, self.seconds = numbers["step"], numbers["samples"], numbers["seconds"]
        self.nonfinite_skips = numbers["nonfinite_skips"]
        self.engine.global_steps, self.engine.global_samples = self.step, self.samples
        self.metrics.write("event", **self._stamp(), event="resumed", message=f"from {checkpoint}")
        get_logger().info("resumed from %s", checkpoint)

    def run(self, batches: Any) -> FinetuneSummary:
        """Train until `max_steps` or `max_seconds`; save the model and evaluate it then and every `eval_every` steps.

        Checkpoints are written as `save_every_steps` and `save_every_minutes` say, and where a signal asks to stop;
        none is left at the end.
        """
        train, result = self.config.train, {}
        with ProgressLine(train.log_every, self._progress()) as progress:
            agreed = _Agreement(done=self._progress() >= 1, save_due=False, stop=False)
            while not (agreed.done or agreed.stop):
                started = self.clock()
                self._train_step(batches)
                self.seconds += self.clock() - started
                agreed = self._agree()
                ends = agreed.done or agreed.stop
                if ends or self.step % train.metrics_every == 0 or self.step % train.log_every == 0:
                    progress.update(self.step, self._progress(), self._write_metrics())
                if not ends and train.eval_every and self.step % train.eval_every == 0:
                    self.save()
                    result = self._evaluate()
                if agreed.save_due or (agreed.stop and not agreed.done):
                    self._save_checkpoint()
        stopped = agreed.stop and not agreed.done
        if not stopped:
            self.save()
            result = self._evaluate()
            on_rank_zero(partial(shutil.rmtree, train.output_dir / manifest.FOLDER, ignore_errors=True))
        self.metrics.close()
        return FinetuneSummary(self.step, self.samples, self.seconds, result, train.output_dir / MODEL, stopped)

    def _train_step(self, batches: Any) -> None:
        """One optimiser update; randomness is a function of (seed, step, rank)."""
        micro_batches = self._take_data(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.seconds) * group["lr_scale"]
        seed_everything((self.config.train.seed * 1_000_003 + self.step) % 2**43, dist.get_rank())
        computed: list[tuple[TaskBatch, Tensor]] = []
        for host_batch in micro_batches:
            self.skipped += host_batch.skipped
            batch = self.queue.get()
            terms = self.task.losses(self.engine(**batch.model_inputs()), batch)
            weighted = [self.weights[name] * term for name, term in terms.items() if self.weights[name] > 0]
            loss = torch.stack(weighted).sum()
            self.engine.backward(poison_if_nonfinite(loss))
            if self.engine.is_gradient_accumulation_boundary() and self.step + 1 < self.config.train.max_steps:
                self.next_data = self._fetch(batches)  # now the device has work; the update makes the host wait for it
            self.engine.step()
            computed.append((host_batch, loss.detach()))
            for name, term in {"loss": loss, **terms}.items():
                self.terms[name].append(term.detach())
        self.step += 1
        self.samples += self.engine.train_batch_size()
        if not self.engine.was_step_applied() or getattr(self.optimizer, "overflow", False):
            self._handle_nonfinite(computed)

    def _take_data(self, batches: Any) -> list[TaskBatch]:
        """The micro-batches of the step that begins; what kept them from being fetched is raised now."""
        data, self.next_data = self.next_data or self._fetch(batches), None
        if isinstance(data, Exception):
            raise data
        return data

    def _fetch(self, batches: Any) -> list[TaskBatch] | Exception:
        """The micro-batches of one step, their copies under way, or why this rank cannot have them."""
        try:
            micro_batches = [next(batches) for _ in range(self.engine.gradient_accumulation_steps())]
        except Exception as error:
            return error
        for batch in micro_batches:
            self.queue.put(batch)
        return micro_batches

    def _handle_nonfinite(self, computed: list[tuple[TaskBatch, Tensor]]) -> None:
        """Stop, or count the skip; collective. Weights and optimiser are as they were."""
        train = self.config.train
        bad = [
            f"rank {dist.get_rank()}: loss {float(loss)}, keys {', '.join(e.key for e in batch.examples[:MOST_NAMED])}"
            for batch, loss in computed
            if not math.isfinite(float(loss))
        ]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, bad, group=self.host_group)
        found = [text for texts in gathered for text in texts]
        if train.precision == "fp16" and not found:  # an overflow that the loss scaler answers
            return
        what = "; ".join(found[:MOST_NAMED]) or "gradient norm"
        message = f"step {self.step}: not finite, the update was not applied; {what}"
        self.nonfinite_skips += 1
        if train.on_nonfinite == "stop" or self.nonfinite_skips > train.max_nonfinite_skips:
            raise NonFiniteError(message)
        get_logger().warning("%s; skipped", message)

    def _agree(self) -> _Agreement:
        """What happens now, by steps and by the time that rank 0 has spent; collective.

        Raises:
            UnusableData: too many examples were replaced, on all ranks together.
        """
        train = self.config.train
        skipped = float(self.skipped.total())
        clocks = [self.seconds, time.monotonic() - self.saved_at] if rank_zero() else [0.0, 0.0]
        numbers = torch.tensor([*clocks, skipped, self.stop.requested], dtype=torch.float64)
        dist.all_reduce(numbers, group=self.host_group)
        self.seconds, since_save, skipped, num_stopped = numbers.tolist()
        if self.samples >= 1000 and skipped > self.config.data.max_bad_share * (self.samples + skipped):
            raise UnusableData(
                f"{skipped:.0f} of {self.samples + skipped:.0f} examples had no usable image, more than "
                f"data.max_bad_share ({self.config.data.max_bad_share}): check task.train.images; on this rank "
                f"{', '.join(f'{reason} ({count})' for reason, count in self.skipped.items())}"
            )
        out_of_time = train.max_seconds is not None and self.seconds * (1 + 1 / self.step) >= train.max_seconds
        save_due = bool(train.save_every_steps and self.step % train.save_every_steps == 0)
        save_due |= bool(train.save_every_minutes and since_save >= 60 * train.save_every_minutes)
        return _Agreement(self.step >= train.max_steps or out_of_time, save_due, num_stopped > 0)

    def _save_checkpoint(self) -> None:
        """Weights, optimiser and counters, whole or not at all; collective."""
        counters = {"samples": self.samples, "seconds": self.seconds, "nonfinite_skips": self.nonfinite_skips}
        self.saver.begin(self.engine, commit.Content(self.step, counters, position={}, check_inputs=None))
        saved = self.saver.finish()
        self.saved_at = time.monotonic()
        if saved is not None:
            get_logger().info("saved %s", saved.folder)

    def _progress(self) -> float:
        train = self.config.train
        return min(1.0, max(self.step / train.max_steps, self.seconds / train.max_seconds if train.max_seconds else 0))

    def _write_metrics(self) -> dict[str, float]:
        names = sorted(self.terms)
        local = torch.stack([torch.stack(self.terms[name]).float().mean() for name in names])
        means = all_reduce_sum(local) / dist.get_world_size()
        numbers = dict(zip(names, means.tolist(), strict=True))
        numbers |= {
            "lr": learning_rate(self.config, self.step, self.seconds),
            "samples_per_second": self.samples / max(self.seconds, 1e-9),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        skipped = {f"skipped/{reason}": count for reason, count in self.skipped.items()}
        self.metrics.write("train", **self._stamp(), **numbers, **skipped)
        self.terms.clear()
        return numbers

    def _stamp(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "samples": self.samples}

    def save(self) -> None:
        """Write the plain model into `output_dir/model`, from the fp32 masters of all ranks; collective."""
        out = self.config.train.output_dir
        pieces = out / ".pieces"
        on_rank_zero(partial(_new_folder, pieces))
        held = state.pieces_to_write(self.engine, self.config.parallel.ep_size)
        masters = [piece for piece in held if piece.kind == "master"]
        write_pieces(pieces / f"tensors-{dist.get_rank():05d}.safetensors", masters)
        dist.barrier(group=self.host_group)
        on_rank_zero(partial(self._assemble, pieces, out / MODEL))

    def _assemble(self, pieces: Path, out: Path) -> None:
        reader = PieceReader(pieces)
        weights = {name: reader.read("master", name).view(shape) for name, shape in task_shapes(self.task).items()}
        provenance = {"init": self.config.train.init, "step": self.step, "samples": self.samples}
        save_task_model(out, self.task, self.config, self.tokenizer, weights, provenance)
        shutil.rmtree(pieces)

    def _evaluate(self) -> dict[str, Any]:
        """Of the model that was saved, on `task.val`; every rank loads it whole."""
        out = self.config.train.output_dir
        loaded = load_task_model(out / MODEL)
        result = evaluate(
            loaded.task,
            loaded.model.to(self.engine.device),
            load_examples(self.config, "val"),
            TaskCollator(loaded.config, loaded.tokenizer),
            out=out / EVALUATION / f"step-{self.step:08d}",
            weights=loaded.sha256,
            batch_size=EVALUATION_BATCH,
        )
        self.metrics.write("eval", **self._stamp(), **result)
        get_logger().info("evaluation at step %d: %s", self.step, json.dumps(result))
        return result


def _new_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
