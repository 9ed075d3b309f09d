"""Start of a run: set up output folder, checkpoint, model, optimizer and engine, then run the training loop."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from eve_ds.checkpoint.resuming import check_tokenizer, newest_good, read_positions
from eve_ds.config import TrainConfig
from eve_ds.distributed import seed_everything
from eve_ds.model.eve import Backbone
from eve_ds.model.with_losses import plain_model
from eve_ds.ops.build import use_built
from eve_ds.parallel.engine import initialize_engine
from eve_ds.parallel.exchange.connect import connect_experts
from eve_ds.parallel.experts.moe_factory import moe_factory
from eve_ds.parallel.nodes import check_expert_groups, nodes_of_run
from eve_ds.parallel.startup import tensor_parallel_unit
from eve_ds.signals import StopSignals
from eve_ds.together import from_rank_zero, on_rank_zero
from eve_ds.topology import Topology
from eve_ds.training.feed import Feed
from eve_ds.training.job import Job, Loading, Summary
from eve_ds.training.optimizer import build_optimizer
from eve_ds.training.run_folder import FolderLock
from eve_ds.training.trainer import Trainer


def start(job: Job, deepspeed_config: dict[str, Any], stop: StopSignals | None = None) -> Summary:
    """Build model, optimizer and engine of a job, resume from a checkpoint if one is chosen, and train; collective.

    Args:
        job: pre-training or fine-tuning, whose configuration agrees with `deepspeed_config`.
        deepspeed_config: DeepSpeed's configuration, from :func:`eve_ds.parallel.settings.resolve_deepspeed_config`.
        stop: handlers of the signals, if the caller has installed them; None installs them during training.
    """
    config, resume = job.config, job.resume
    topology, nodes = Topology.of(config.parallel), nodes_of_run()
    check_expert_groups(config.parallel, topology, nodes)  # before anything is written
    lock = FolderLock(config.train.output_dir)
    on_rank_zero(job.check_folder)
    on_rank_zero(lock.acquire)
    checkpoint = None if resume == "none" else newest_good(config, resume if isinstance(resume, Path) else None)
    if checkpoint is not None:
        on_rank_zero(partial(check_tokenizer, checkpoint, job.tokenizer))
    stop = stop or StopSignals()
    # Before the model is built, so that worker processes start meanwhile.
    with _open_feed(job, topology, checkpoint, stop) as feed:
        return _train(job, deepspeed_config, feed, checkpoint, lock, stop, nodes)


def _open_feed(job: Job, topology: Topology, checkpoint: Path | None, stop: StopSignals) -> Feed:
    """Open the batches at the position of a checkpoint, or at the start of the run; collective."""
    # Counts and clocks live on the host: agreeing on them must not make the accelerator wait.
    group = dist.new_group(backend="gloo")
    step, positions = 0, None
    if checkpoint is not None:
        step, positions = from_rank_zero(partial(read_positions, checkpoint), group)
    device = torch.device(get_accelerator().current_device_name())
    train = job.config.train
    assert train.micro_batch_size is not None  # as in DeepSpeed's configuration
    assert train.gradient_accumulation_steps is not None
    loading = Loading(topology, train.micro_batch_size, step, positions, device.type == "cuda", group)
    return Feed(job, loading, train.gradient_accumulation_steps, device, stop)


def _train(
    job: Job,
    deepspeed_config: dict[str, Any],
    feed: Feed,
    checkpoint: Path | None,
    lock: FolderLock,
    stop: StopSignals,
    nodes: list[int] | None,
) -> Summary:
    config, topology = job.config, feed.topology
    mpu = tensor_parallel_unit(topology, timedelta(seconds=config.train.timeout_seconds))
    seed_everything(config.train.seed)
    moe_cls = moe_factory(deepspeed_config["zero_optimization"]["stage"], topology)
    module = job.build_model(moe_cls, from_checkpoint=checkpoint is not None)
    model = plain_model(module)
    if topology.tp_size > 1:
        from eve_ds.parallel.tensor.swap import split_model  # imports megatron-core, which takes seconds

        split_model(model, topology, config.parallel.split_experts)
    optimizer = build_optimizer(model, config, deepspeed_config, job.lr_scale())
    engine = initialize_engine(module, optimizer, deepspeed_config, mpu)
    connect_experts(model, config.parallel, topology, nodes)
    job.freeze(model)
    use_built(next(model.parameters()))  # a build, if needed, must not count as time of the first step
    with lock, stop as signals, Trainer(job, engine, optimizer, feed, signals) as trainer:
        if checkpoint is not None:
            trainer.resume(checkpoint)
        summary = trainer.run()
    # Otherwise hooks keep the memory of a ZeRO 2 engine for ever, and the destructor of the others imports modules
    # whenever Python collects garbage. Within another import that is a KeyError in CPython before 3.12.
    engine.destroy()
    return summary


def set_up_backbone(backbone: Backbone, train: TrainConfig) -> None:
    """Turn on recomputation of activations and compilation as configured; call before the engine is built."""
    if train.activation_checkpointing:
        backbone.checkpoint_blocks()
    if train.compile == "blocks":
        backbone.compile_blocks()
