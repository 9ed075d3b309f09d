"""Downstream tasks and their examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from eve_ds.config.section import Fraction, PositiveInt, Section


class ExamplesConfig(Section):
    """Where the examples of a task come from."""

    format: str = "scenes"
    """`scenes`: generated. `json`: the released code's form. `vqav2`: a file of questions and one of annotations.
    `nlvr2`: JSON lines. `nlvr`: NLVR 1.0 as published, a folder or a tar archive. `karpathy`: COCO or Flickr30K with
    Karpathy's splits. `auto`: whichever of them the first file is."""
    annotations: list[Path] = []
    """Files, or for `nlvr` the folder or archive."""
    images: Path | None = None
    """Folder that image names are relative to; None: that of the first annotation file."""
    split: str | None = None
    """Which split of a file that holds several, or of the scenes; None: the one of the section's name."""
    level: Literal["easy", "hard"] = "easy"
    """`scenes`: difficulty."""
    seed: int = 0
    """Generated: which world."""
    question_types: list[Literal["color", "shape", "count", "existence", "relation"]] = []
    """`scenes`, `vqa`: what is asked; none means all."""
    num_examples: PositiveInt | None = None
    """Generated: examples of an epoch or of the evaluation (None: 1,000,000 and 1,000); otherwise the first so many."""
    unseen_texts: bool = False
    """`task.val`: leave out examples whose text is one of the training examples' too."""


class TaskConfig(Section):
    """A downstream task: its examples, its head, and what its fine-tuning adds to the other sections."""

    name: str
    """Name of a task in :mod:`eve_ds.tasks.registry`."""
    train: ExamplesConfig = ExamplesConfig()
    val: ExamplesConfig = ExamplesConfig()
    epochs: PositiveInt | None = None
    """Sets `train.max_steps` from the number of examples; None leaves it."""
    warmup_share: Fraction | None = None
    """Share of the steps that warm up; None leaves `optimizer.warmup_steps`."""
    head_lr_multiple: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the new head over that of the backbone's last block."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a block over that of the next one (BEiT; Clark et al. 2020); embeddings come before block 0."""
    rand_augment_ops: Annotated[int, Field(ge=0)] = 0
    """Operations that RandAugment applies to an image."""
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    color_jitter: Fraction = 0.0
    """Largest change of brightness, contrast and saturation, and four times that of hue."""
    blind: bool = False
    """Grey images in training and evaluation: the control that reads the texts alone."""
    visible_patch_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of an image's patches, in training, drawn anew at every step (FLIP, Li et al. 2023); evaluation sees all."""
    min_answer_count: PositiveInt = 9
    """`vqa`: an answer enters the vocabulary if so many annotators gave it (9 leaves 3,129 answers of VQAv2)."""
    answer_loss: Literal["sigmoid", "softmax"] = "sigmoid"
    """`vqa`: every answer judged by itself (official), or one against the others, where only one can be right."""
    num_images: Literal[1, 2] = 2
    """`nlvr`: images of an example; 1 for NLVR 1.0."""
    features: Literal["class_token", "words"] = "class_token"
    """What the head reads: states of class tokens, or the likelihood of masked words by pre-training's text head, which
    `retrieval` multiplies (:mod:`eve_ds.tasks.features.words`) and `nlvr` compares with the statement's own words
    (:mod:`eve_ds.tasks.nlvr.agreement`)."""
    hidden_words: PositiveInt = 13
    """`nlvr`, features `words`: of the hidden caption; as many as long captions of the pre-training have."""
    freeze_backbone: bool = False
    """Keep the pre-trained backbone as it is and train the head alone; weights that are drawn are always trained."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """`retrieval`: of the contrastive loss, where it starts."""
    itc_weight: Annotated[float, Field(ge=0)] = 1.0
    itm_weight: Annotated[float, Field(ge=0)] = 1.0
    rerank: Annotated[int, Field(ge=0)] = 128
    """`retrieval`: candidates of a query that image-text matching orders again; 0 leaves the dot product's order."""
