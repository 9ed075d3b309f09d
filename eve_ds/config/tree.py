"""Root of the configuration tree, and the rules that involve several sections."""

from __future__ import annotations

from pydantic import model_validator

from eve_ds.config.data import DataConfig, SourceConfig
from eve_ds.config.loss import LossConfig
from eve_ds.config.masking import MaskingConfig
from eve_ds.config.model import ModelConfig, Objective
from eve_ds.config.optimizer import OptimizerConfig
from eve_ds.config.parallel import ParallelConfig, check_experts_per_rank
from eve_ds.config.section import Section, require
from eve_ds.config.task import TaskConfig
from eve_ds.config.train import TrainConfig


class Config(Section):
    """Root of the configuration tree; every checkpoint and every export contains it as JSON."""

    name: str = "eve"
    """Name of the configuration; title of reports and model cards."""
    model: ModelConfig = ModelConfig()
    """Architecture and pre-training objectives."""
    masking: MaskingConfig = MaskingConfig()
    """Masking of images and captions in pre-training."""
    data: DataConfig = DataConfig()
    """Training data of pre-training; fine-tuning uses its tokenizer, loader and augmentation settings."""
    loss: LossConfig = LossConfig()
    """Weights of the loss terms."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate schedule."""
    parallel: ParallelConfig = ParallelConfig()
    """Expert and tensor parallelism."""
    train: TrainConfig = TrainConfig()
    """Training loop, precision, evaluation and checkpoints."""
    task: TaskConfig | None = None
    """Downstream task of fine-tuning and of a fine-tuned model; None in pre-training."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.parallel.ep_size > 0:  # 0 becomes a size that divides the experts
            check_experts_per_rank(self.model.moe.num_experts, self.parallel.ep_size)
        require(
            self.optimizer.decay_by == "steps" or self.train.max_seconds is not None,
            "optimizer.decay_by ('seconds') needs train.max_seconds: set it, or decay_by=steps",
        )
        self._check_views()
        return self

    def _check_views(self) -> None:
        """Check that each source serves an objective, and that each view has masked and visible content."""
        objectives, masking = self.model.objectives, self.masking
        own = {name: getattr(self.loss, f"{name}_weight", None) for name in objectives}
        weights = {name: weight for name, weight in own.items() if weight is not None}
        if "joint" in objectives:
            weights |= {"mim": self.loss.mim_weight, "mlm": self.loss.mlm_weight}
        require(
            any(weights.values()) or not weights,
            f"loss weights of {', '.join(objectives)} ({', '.join(f'{name}_weight' for name in weights)}) are all 0: "
            "raise one of them",
        )
        for task, key, ratio in (
            ("mim", "patch_mask_ratio", masking.patch_mask_ratio),
            ("mlm", "text_mask_ratio", masking.most_words_masked),
        ):
            require(
                task not in objectives or ratio > 0,
                f"masking.{key} ({ratio:g}) leaves nothing to predict for {task}: raise it, or leave {task} out of "
                "model.objectives",
            )
        both = f"masking.patch_mask_ratio ({masking.patch_mask_ratio:g}) and text_mask_ratio"
        require(
            "joint" not in objectives or masking.patch_mask_ratio < 1 or masking.text_mask_ratio < 1,
            f"{both} ({masking.text_mask_ratio:g}) leave nothing to see for joint: lower one of them",
        )
        for number, source in enumerate(self.data.sources):
            _check_source(objectives, masking, source, f"data.sources[{number}]")

    @property
    def objectives_without_source(self) -> dict[Objective, str]:
        """Objective -> content that it needs and no source has; its own parameters keep their initial values."""
        kinds = {source.modalities for source in self.data.sources}
        lacking: dict[Objective, str] = {}
        if kinds <= {"text"}:
            lacking["mim"] = "images"
        if kinds <= {"image"}:
            lacking["mlm"] = "captions"
        return {name: content for name, content in lacking.items() if name in self.model.objectives}


def _check_source(objectives: list[Objective], masking: MaskingConfig, source: SourceConfig, where: str) -> None:
    """Raise ValueError if a source serves no objective, if `itc` or `itm` lacks pairs, or if a view shows nothing."""
    kind, names = source.modalities, ", ".join(objectives)
    require(
        kind == "pair" or not {"itc", "itm"} & set(objectives),
        f"model.objectives ({names}) compares images with texts and needs pairs: {where}.modalities is '{kind}'",
    )
    for only, task in (("text", "mim"), ("image", "mlm")):
        require(
            kind != only or objectives != [task],
            f"{where}.modalities ('{kind}') has nothing that model.objectives ({names}) could predict: leave the "
            f"source out, or add {'mlm' if task == 'mim' else 'mim'}",
        )
    if "joint" in objectives:
        most, share = masking.most_words_masked, masking.text_to_image_share
        words = kind != "image" and most > 0 and (kind != "pair" or share < 1)
        require(
            words or (kind != "text" and masking.patch_mask_ratio > 0),
            f"masking.patch_mask_ratio ({masking.patch_mask_ratio:g}), text_mask_ratio ({most:g}) and "
            f"text_to_image_share ({share:g}) leave nothing to predict of {where} ('{kind}') for joint: raise a ratio",
        )
    for alone, key, ratio in (
        ("image", "patch_mask_ratio", masking.patch_mask_ratio),
        ("text", "text_mask_ratio", masking.text_mask_ratio),
    ):
        require(
            kind not in (alone, "any") or ratio < 1,
            f"masking.{key} ({ratio:g}) leaves nothing to see of {where}, whose modalities are '{kind}': lower it",
        )
