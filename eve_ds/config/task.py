"""Configuration of downstream tasks and their examples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eve_ds.config.section import FilePath, Fraction, PositiveInt, Section, Share


class ExamplesConfig(Section):
    """Source of the examples of a task, for training or for evaluation."""

    format: str = "scenes"
    """`scenes`: generated scenes. `json`: format of the released code. `vqav2`: a file of questions and a file of
    annotations. `nlvr2`: JSON lines. `nlvr`: NLVR 1.0 as published, a folder or a tar archive. `karpathy`: COCO or
    Flickr30K with Karpathy's splits. `auto`: the format of the first file."""
    annotations: list[FilePath] = []
    """Annotation files; `nlvr`: the folder or archive."""
    images: FilePath | None = None
    """Folder that image names are relative to; None: the folder of the first annotation file."""
    split: str | None = None
    """Split of a file that holds several, or of the scenes; None: the name of the section, `train` or `val`."""
    level: Literal["easy", "hard"] = "easy"
    """`scenes`: difficulty."""
    seed: int = 0
    """Generated examples: seed of the generator."""
    question_types: list[Literal["color", "shape", "count", "existence", "relation"]] = []
    """`scenes`, task `vqa`: types of the questions; an empty list means all types."""
    num_examples: PositiveInt | None = None
    """Generated examples: examples of a training epoch (None: 1,000,000) or of an evaluation (None: 1,000). Examples
    from files: use only the first `num_examples`; None: all."""
    unseen_texts: bool = False
    """`task.val`: exclude examples whose text also occurs in a training example."""


class TaskConfig(Section):
    """Downstream task: examples, head, and settings of fine-tuning that the other sections do not have."""

    name: str
    """Task, a name in :mod:`eve_ds.tasks.registry`."""
    train: ExamplesConfig = ExamplesConfig()
    """Training examples."""
    val: ExamplesConfig = ExamplesConfig()
    """Evaluation examples."""
    epochs: PositiveInt | None = None
    """Passes over the training examples, which limit `train.max_steps`; None: no such limit."""
    warmup_share: Fraction | None = None
    """Warm-up as a fraction of all steps; None: `optimizer.warmup_steps`."""
    head_lr_multiple: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the new head, as a multiple of the rate of the last backbone block."""
    layer_decay: Share = 1.0
    """Learning rate of a block, as a fraction of the rate of the block above it (BEiT; Clark et al. 2020). Embeddings
    count as the layer below block 0. 1 turns layer-wise decay off."""
    rand_augment_ops: Annotated[int, Field(ge=0)] = 0
    """Number of RandAugment operations per image; 0 turns RandAugment off."""
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of the RandAugment operations, from 0 to 30."""
    color_jitter: Fraction = 0.0
    """Largest relative change of brightness, contrast and saturation, and four times the largest change of hue; 0 turns
    color jitter off."""
    blind: bool = False
    """True: replace images by gray ones in training and evaluation, as a control that uses only the texts."""
    visible_patch_share: Share = 1.0
    """Fraction of an image's patches that the model sees in training, drawn at every step (FLIP, Li et al. 2023);
    evaluation uses all patches."""
    min_answer_count: PositiveInt = 9
    """`vqa`: number of annotators that must give an answer for it to enter the answer vocabulary (9 yields the 3,129
    answers of VQAv2)."""
    answer_loss: Literal["sigmoid", "softmax"] = "sigmoid"
    """`vqa`: loss of the answers. `sigmoid`: a binary decision per answer, as in the released code. `softmax`: one
    choice among all answers, for data with a single correct answer."""
    num_images: Literal[1, 2] = 2
    """`nlvr`: images of an example; 1 for NLVR 1.0, 2 for NLVR2."""
    features: Literal["class_token", "words"] = "class_token"
    """Input of the head. `class_token`: states of class tokens. `words`: likelihoods of masked words from the text head
    of pre-training; `retrieval` multiplies them (:mod:`eve_ds.tasks.features.words`), `nlvr` compares them with the
    words of the statement (:mod:`eve_ds.tasks.nlvr.agreement`)."""
    hidden_words: PositiveInt = 13
    """`nlvr`, `features: words`: number of words of the hidden caption. Default: the length of long pre-training
    captions."""
    freeze_backbone: bool = False
    """True: keep the pre-trained backbone fixed and train only the head. Without `train.init` the backbone is trained
    anyway."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """`retrieval`: initial temperature of the contrastive loss."""
    itc_weight: Annotated[float, Field(ge=0)] = 1.0
    """`retrieval`: weight of the image-text contrastive loss."""
    itm_weight: Annotated[float, Field(ge=0)] = 1.0
    """`retrieval`: weight of the image-text matching loss; 0 builds no matching head."""
    rerank: Annotated[int, Field(ge=0)] = 128
    """`retrieval`: number of candidates per query that image-text matching reranks; 0 keeps the order of the dot
    product."""
