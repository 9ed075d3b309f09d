"""Pre-training EVE with its objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eve_ds.checkpoint.files import CheckpointError
from eve_ds.checkpoint.weights import weight_reader
from eve_ds.config import Config, ConfigError
from eve_ds.data.batch import Batch
from eve_ds.data.pipeline import Loader, build_loader
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.data.workers import start_server
from eve_ds.distributed import gather_rows
from eve_ds.evaluation.held_out import HeldOut, evaluate_held_out, load_held_out
from eve_ds.evaluation.scenes import evaluate_scenes, trains_on_scenes, word_without_token
from eve_ds.log import get_logger
from eve_ds.model.eve import EVE, EVEOutput, MoEFactory, model_shapes
from eve_ds.model.moe import is_dropless, load_plain_state_dict
from eve_ds.model.with_losses import ModelWithLosses
from eve_ds.objectives.pretraining import (
    caption_tokens,
    count,
    pretraining_flops,
    pretraining_losses,
    view_names,
)
from eve_ds.objectives.registry import objectives_of
from eve_ds.parallel.settings import resolve_deepspeed_config
from eve_ds.parallel.startup import initialize_deepspeed_distributed
from eve_ds.signals import StopSignals
from eve_ds.training.engine_model import EngineModel
from eve_ds.training.job import Evaluation, Loading, Resume, Summary, summed_counts
from eve_ds.training.run_folder import check_output_dir
from eve_ds.training.start import set_up_backbone, start
from eve_ds.training.trainer import Trainer

CHECK_SAMPLES = 2
"""Number of samples per rank whose outputs a checkpoint records."""
EVALUATED_SCENES = 256
"""Number of scenes of an evaluation within a run, a quarter of that of `launcher/evaluate.py scenes`."""
CAPTION_TOKENS = "caption_tokens"
"""Name of the count of real tokens in captions; each token counts once, whatever the number of views."""


def pretrain(
    config: Config,
    deepspeed_config: dict[str, Any] | None,
    resume: Resume = "auto",
    stop: StopSignals | None = None,
) -> Summary:
    """Pre-train as configured; collective over the ranks that the launcher started.

    Args:
        config: settings of model, data and training loop.
        deepspeed_config: DeepSpeed's JSON as a dictionary; None means ZeRO 0 with everything "auto".
        resume: see :data:`eve_ds.training.job.Resume`.
        stop: see :func:`eve_ds.training.start.start`.

    Raises:
        ConfigError: settings that contradict each other, or an output folder of another run.
        UnusableData: too many samples cannot be used.
        NonFiniteError: a loss or gradient that is not finite.
        OpsBuildError: `EVE_DS_OPS=build`, and the fused ops cannot be built.
    """
    info = initialize_deepspeed_distributed(timedelta(seconds=config.train.timeout_seconds))
    if config.data.num_workers:
        start_server("eve_ds.data.pipeline", "eve_ds.objectives.registry")
    given = {} if deepspeed_config is None else deepspeed_config
    config, deepspeed_config = resolve_deepspeed_config(given, config, info.world_size)
    for objective, lacking in config.objectives_without_source.items():
        get_logger().info("model.objectives: %s is not trained, as no source has %s", objective, lacking)
    return start(Pretraining(config, resume), deepspeed_config, stop)


class Pretraining:
    """Pre-training job; see :class:`eve_ds.training.job.Job`.

    Args:
        config: settings of model, data and training loop.
        resume: see :data:`eve_ds.training.job.Resume`.
    """

    keeps_checkpoints = True

    def __init__(self, config: Config, resume: Resume = "auto") -> None:
        self.config, self.resume = config, resume
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.shapes = model_shapes(config.model)
        self.exchanged_views: tuple[str, ...] = _exchanged_views(config)
        self.held_out: HeldOut | None = None
        split_word = word_without_token(self.tokenizer, config) if trains_on_scenes(config) else None
        self._evaluates_scenes = trains_on_scenes(config) and split_word is None
        if split_word is not None:
            get_logger().warning(
                "data.tokenizer (%s) splits words of scenes, such as '%s', so this run is not evaluated on scenes: "
                "leave the source {kind: scenes} out of data.sources, or train a tokenizer on captions of scenes too",
                config.data.tokenizer,
                split_word,
            )

    def check_folder(self) -> None:
        """Create the output folder; raises ConfigError if it cannot be used."""
        check_output_dir(self.config, self.resume)

    def build_model(self, moe_cls: MoEFactory, from_checkpoint: bool) -> ModelWithLosses:
        """Build EVE with drawn weights, or with those of `train.init`."""
        config = self.config
        model = EVE(config.model, moe_cls=moe_cls)
        set_up_backbone(model.backbone, config.train)
        model.pack_views = config.train.pack_views
        if config.train.init is not None and not from_checkpoint:
            _start_from(model, config.train.init, config)
        return ModelWithLosses(model, partial(_losses, config=config), config.loss.weights)

    def lr_scale(self) -> Callable[[str], float] | None:
        """Return None: all parameters have one learning rate."""
        return None

    def freeze(self, model: nn.Module) -> None:
        """Freeze nothing."""

    def open(self, loading: Loading) -> Loader:
        """Open the loader of the mixture; also read held-out pairs, so that their errors show before training."""
        if self.held_out is None and self.config.data.validation is not None:
            self.held_out = load_held_out(self.config, self.tokenizer, loading.topology, loading.group)
        return build_loader(
            self.config,
            self.tokenizer,
            objectives_of(self.config.model),
            rank=loading.topology.data_rank,
            world_size=loading.topology.data_size,
            micro_batch_size=loading.micro_batch_size,
            state=loading.positions,
            group=loading.group,
            pin_memory=loading.pin_memory,
        )

    def counts(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Return the denominators of the losses and the number of caption tokens."""
        batches = micro_batches or [Batch(keys=[])]  # a rank without data needs the same names
        model = self.config.model
        return summed_counts(count(batch, model) | {CAPTION_TOKENS: caption_tokens(batch)} for batch in batches)

    def check_step(self, totals: Mapping[str, float], samples: int) -> None:
        """Do nothing: the loader itself refuses too many unusable samples."""

    def check_inputs(self, batch: Batch) -> Batch | None:
        """Return the first samples of a batch; None if some field in `more` is not indexed by sample."""
        by_sample = all(tensor.shape[:1] == (len(batch),) for tensor in batch.more.values())
        return batch.first(CHECK_SAMPLES) if by_sample else None

    def forward_flops(self, totals: Mapping[str, float], samples: int) -> float:
        """Return the FLOPs of one pair's forward in all views, at the mean caption length."""
        return pretraining_flops(self.config.model, self.config.masking, totals[CAPTION_TOKENS] / max(samples, 1))

    def evaluate(self, trainer: Trainer) -> Evaluation | None:
        """Evaluate on scenes if the run trains on them, and on held-out pairs if `data.validation` has any."""
        numbers: dict[str, Any] = {}
        if self._evaluates_scenes:
            numbers |= self._evaluate_scenes(trainer)
        if self.held_out is not None:
            numbers["held_out"] = evaluate_held_out(EngineModel(trainer.engine), self.config.model, self.held_out)
        if not numbers:
            return None
        shown = numbers | {f"held-out {name}": value for name, value in numbers.get("held_out", {}).items()}
        gaps = [f"{key} {value['right']:.3f}/{value['wrong']:.3f}" for key, value in shown.items() if "right" in value]
        return Evaluation(numbers, f"right/wrong: {', '.join(gaps)}")

    def _evaluate_scenes(self, trainer: Trainer) -> dict[str, Any]:
        topology = trainer.topology
        share = 2 * topology.data_size
        return evaluate_scenes(
            EngineModel(trainer.engine),
            self.config,
            self.tokenizer,
            num_scenes=math.ceil(EVALUATED_SCENES / share) * share,
            rank=topology.data_rank,
            world_size=topology.data_size,
        )

    def finish(self) -> None:
        """Keep the checkpoints."""


def _losses(output: EVEOutput, batch: Batch, counts: Mapping[str, float], *, config: Config) -> dict[str, Tensor]:
    gather = partial(gather_rows, tp_size=config.parallel.tp_size)
    return pretraining_losses(output, batch.targets(), counts, config.model, gather)


def _exchanged_views(config: Config) -> tuple[str, ...]:
    """Views whose tokens the ranks tell each other; those that a batch lacks have none."""
    if config.parallel.ep_size == 1 or is_dropless(config.model, training=True):
        return ()
    return view_names(config.model)


def _start_from(model: EVE, source: Path, config: Config) -> None:
    """Copy this rank's share of the weights from `train.init`."""
    try:
        read = weight_reader(source, model_shapes(config.model))
        load_plain_state_dict(model, read)
    except CheckpointError as error:
        raise ConfigError(f"train.init: {error}") from None
    get_logger().info("starting from the weights of %s", source)
