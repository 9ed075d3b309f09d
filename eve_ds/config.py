"""One typed configuration tree: a YAML preset, then a file or dotted overrides, then validation.

Unknown keys are refused with the nearest known name. What DeepSpeed owns (ZeRO stage, precision, bucket sizes) stays in
the DeepSpeed JSON; where both speak of one thing see :func:`eve_ds.parallel.settings.resolve_deepspeed_config`.
"""

from __future__ import annotations

import difflib
import functools
import logging
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its value and the rule."""


class Section(BaseModel):
    """Base of every section: immutable, and a key that is not a field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _renamed(tree: Any, old: str, new: str, value: Any = None) -> Any:
    """The tree with the key `new` for `old`, which earlier versions wrote; raises ValueError where it has both.

    `value` stands in for the one under `old`; None: it stays. One line of the log says what was read as what.
    """
    if not isinstance(tree, dict) or old not in tree:
        return tree
    if new in tree:
        raise ValueError(f"{old} ({tree[old]!r}) is the former name of {new} ({tree[new]!r}): write {new} in its place")
    rest = {key: item for key, item in tree.items() if key != old}
    rest[new] = tree[old] if value is None else value
    _say_once(f"{old} ({tree[old]!r}) is read as {new} ({rest[new]!r})")
    return rest


@functools.cache
def _say_once(line: str) -> None:
    """A run reads its own configuration several times."""
    logging.getLogger("eve_ds").info(line)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Objective = Literal["mim", "mlm", "itc", "itm", "joint"]
FORMER_OBJECTIVES: dict[str, list[Objective]] = {
    "msm": ["joint"],
    "itc_itm": ["itc", "itm"],
    "itc_itm_mlm": ["mlm", "itc", "itm"],
}
"""What earlier versions wrote as `model.objective`, which named one of three sets of tasks."""
FORMER_PIXEL_TARGET = "normalized"
"""What earlier versions had before `model.pixel_target` could be set."""


class MoEConfig(Section):
    """Experts of the deep layers (EVE eq. 4 to 7; upstream `DeepSpeed MoE` and GShard top-2)."""

    num_experts: PositiveInt = 32
    top_k: PositiveInt = 2
    routing: Literal["capacity", "dropless"] = "dropless"
    """`capacity`: fixed slots per expert, tokens beyond them are dropped. `dropless`: every route is computed."""
    capacity_factor: Annotated[float, Field(gt=0)] = 1.0
    """Slots per expert = ceil(top_k * capacity_factor * tokens / num_experts)."""
    min_capacity: PositiveInt = 4
    modality_embedding: bool = True
    """The router sees each token plus the embedding of its modality (EVE eq. 4); False: the token alone (Table 8)."""
    router_jitter: Fraction = 0.0
    """Multiplicative uniform noise of the router's input in training, in [1 - jitter, 1 + jitter]."""
    second_choice_noise: bool = False
    """Draw every choice after the first with Gumbel noise in training (GShard's random second expert)."""
    balance_over: Literal["rank", "data_parallel"] = "data_parallel"
    """Tokens over which the load-balancing statistics are taken: this rank's, or all data-parallel ranks'."""


class PixelDecoderConfig(Section):
    """Light decoder that predicts masked patches; not in the released files, so depth and width are free."""

    kind: Literal["cross", "self"] = "self"
    """`self`: mask tokens join the encoded stream. `cross`: mask tokens query it and never see each other."""
    num_layers: PositiveInt = 4
    hidden_size: PositiveInt = 384
    num_attention_heads: PositiveInt = 6


class ModelConfig(Section):
    """Architecture. Defaults are EVE-Base at 224 pixels (475,197,696 backbone parameters)."""

    profile: Literal["default", "official"] = "default"
    """`official` reproduces the released forward, quirks included; see `eve_ds/model/moe.py`."""
    objectives: Annotated[list[Objective], Field(min_length=1)] = ["mim", "mlm"]
    """The tasks of pre-training, which decide its views of a sample and the model's heads.

    `mim`: pixels of a masked image beside the whole caption. `mlm`: words of a masked caption beside the whole image.
    Together they are the paper's objective (EVE eq. 8 to 10). `itc`, `itm`: image-text contrast, and matching on its
    hard negatives (ALBEF), which the paper compares with. `joint`: `mim` and `mlm` in one pass over a masked image
    beside a masked caption, which its Table 5 advises against; several times cheaper."""
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    moe_layers: list[Annotated[int, Field(ge=0)]] = [10, 11]
    deep_ffn: Literal["soft_router", "hard_router", "shared"] = "soft_router"
    """Feed-forward part of the layers `moe_layers` (EVE Table 7): experts chosen by a learnt router; one network per
    modality, as in the layers below; one network for all tokens."""
    moe: MoEConfig = MoEConfig()
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    vocab_size: PositiveInt = 64000
    text_positions: PositiveInt = 196
    """Rows of the text position table."""
    text_length: PositiveInt = 40
    """Most tokens of a caption, [CLS] and [SEP] included; longer ones are truncated."""
    layer_scale_init: float = 0.1
    drop_path_rate: Fraction = 0.1
    """Of the last block; earlier blocks grow to it linearly from 0."""
    text_dropout: Fraction = 0.1
    layer_norm_eps: float = 1e-6
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the normal that weights are drawn from, truncated at one standard deviation."""
    position_init: Literal["normal", "sincos"] = "normal"
    """`sincos`: position tables start as sines and cosines (2-D for patches) and are learnt from there. A small model
    learns where things are several times sooner; the released one drew them from the normal."""
    position_initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Scale of position embeddings, class and mask tokens: standard deviation, or amplitude of the sines."""
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    pixel_target: Literal["raw", "normalized"] = "raw"
    """What pixel predictions are compared with: pixels as the encoder gets them (the paper's words), or normalized by
    mean and variance of their patch (MAE's `norm_pix_loss`). On scenes captions lower the error of raw pixels several
    times as much, and shapes are learnt sooner; see the README."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_objective(cls, tree: Any) -> Any:
        former = tree.get("objective") if isinstance(tree, dict) else None
        if former is not None and (not isinstance(former, str) or former not in FORMER_OBJECTIVES):
            raise ValueError(
                f"objective ({former!r}) is the former name of objectives and must be one of "
                f"{', '.join(FORMER_OBJECTIVES)}; use objectives"
            )
        if former is not None:
            tree = {"pixel_target": FORMER_PIXEL_TARGET} | tree
        return _renamed(tree, "objective", "objectives", FORMER_OBJECTIVES.get(former or ""))

    @field_validator("objectives")
    @classmethod
    def _in_one_order(cls, names: list[Objective]) -> list[Objective]:
        return sorted(names, key=get_args(Objective).index)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        self._check_objectives()
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size ({self.image_size}) must be divisible by patch_size ({self.patch_size})",
        )
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads ({self.num_attention_heads})",
        )
        decoder = self.pixel_decoder
        _require(
            decoder.hidden_size % decoder.num_attention_heads == 0,
            f"pixel_decoder.hidden_size ({decoder.hidden_size}) must be divisible by "
            f"pixel_decoder.num_attention_heads ({decoder.num_attention_heads})",
        )
        _require(
            all(layer < self.num_hidden_layers for layer in self.moe_layers),
            f"moe_layers ({self.moe_layers}) must be below num_hidden_layers ({self.num_hidden_layers}); "
            "layers are counted from 0",
        )
        _require(
            self.moe.top_k <= self.moe.num_experts,
            f"moe.top_k ({self.moe.top_k}) must not exceed moe.num_experts ({self.moe.num_experts})",
        )
        _require(
            self.text_length >= 3,
            f"text_length ({self.text_length}) must be at least 3: [CLS], a word and [SEP]",
        )
        _require(
            not self.predicts_pixels or self.num_patches > 1,
            f"image_size ({self.image_size}) and patch_size ({self.patch_size}) make a single patch, which cannot be "
            "seen and predicted: make patch_size smaller, or leave mim and joint out of objectives",
        )
        _require(
            self.text_length <= self.text_positions,
            f"text_length ({self.text_length}) must not exceed text_positions ({self.text_positions})",
        )
        return self

    def _check_objectives(self) -> None:
        names = ", ".join(self.objectives)
        twice = sorted({name for name in self.objectives if self.objectives.count(name) > 1})
        _require(not twice, f"objectives ({names}) names {', '.join(twice)} twice: name every task once")
        _require(
            "itm" not in self.objectives or "itc" in self.objectives,
            f"objectives ({names}) has itm without itc, whose similarities choose the hard negatives: add itc",
        )
        _require(
            "joint" not in self.objectives or not {"mim", "mlm"} & set(self.objectives),
            f"objectives ({names}) has joint beside mim or mlm, which are the two halves of joint: leave out one side",
        )

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def expert_layers(self) -> list[int]:
        """Layers with experts behind a learnt router, counted from 0, ascending."""
        return sorted(set(self.moe_layers)) if self.deep_ffn == "soft_router" else []

    @property
    def predicts_pixels(self) -> bool:
        """Whether some task predicts masked patches."""
        return bool({"mim", "joint"} & set(self.objectives))

    @property
    def normalizes_pixels(self) -> bool:
        """Whether the target of pixels is normalized by patch."""
        return self.pixel_target == "normalized"

    @property
    def predicts_words(self) -> bool:
        """Whether some task predicts masked words."""
        return bool({"mlm", "joint"} & set(self.objectives))


class MaskingConfig(Section):
    """What is hidden in the views of a sample; masks derive from (seed, epoch, sample key, view).

    The image view (`mim`) is a masked image beside the whole caption, the language view (`mlm`) the whole image beside
    a masked caption. `joint` masks both in its only view, to which the settings of neither apply.
    """

    patch_mask_ratio: Fraction = 0.75
    """Share of the patches that is hidden, `mim` and `joint`; at 1 the image view sees the caption alone."""
    predicted_patch_share: Share = 1.0
    """Share of the masked patches that is predicted, drawn anew for each sample (CrossMAE); the rest costs nothing."""
    text_mask_ratio: Fraction = 0.5
    """Share of the words that is hidden, `mlm` and `joint`. A caption without an image keeps a word if it has two."""
    max_text_mask_ratio: Fraction | None = None
    """If set, each sample draws its ratio uniformly between `text_mask_ratio` and this."""
    text_to_image_share: Fraction = 0.0
    """`mim` and `joint`: share of pairs of which even more of the image is hidden, beside a whole caption, so that
    words decide pixels."""
    text_to_image_mask_ratio: Share = 1.0
    """Of those, each hides a share of its patches drawn uniformly between this and 1."""
    image_view_share: Share = 1.0
    """Share of the samples with an image, drawn anew in every epoch, that have an image view."""
    image_view_word_share: Share = 1.0
    """Share of a caption's words that the image view sees, drawn at random; the others are left out of it."""
    language_view_patch_share: Share = 1.0
    """Share of an image's patches that the language view sees, drawn at random (FLIP, Li et al. 2023)."""
    random_token_share: Fraction = 0.0
    """Share of chosen tokens replaced by a random token instead of [MASK] (BERT: 0.1)."""
    keep_token_share: Fraction = 0.0
    """Share of chosen tokens left as they are, and still predicted (BERT: 0.1)."""

    @property
    def most_words_masked(self) -> float:
        """The highest share of words that is hidden of a caption."""
        return self.text_mask_ratio if self.max_text_mask_ratio is None else self.max_text_mask_ratio

    @model_validator(mode="after")
    def _check(self) -> MaskingConfig:
        _require(
            self.random_token_share + self.keep_token_share <= 1,
            f"random_token_share ({self.random_token_share}) and keep_token_share ({self.keep_token_share}) "
            "must not exceed 1 together",
        )
        _require(
            self.max_text_mask_ratio is None or self.max_text_mask_ratio >= self.text_mask_ratio,
            f"max_text_mask_ratio ({self.max_text_mask_ratio}) must not be below text_mask_ratio "
            f"({self.text_mask_ratio})",
        )
        _require(
            self.text_to_image_mask_ratio >= self.patch_mask_ratio,
            f"text_to_image_mask_ratio ({self.text_to_image_mask_ratio}) must not be below patch_mask_ratio "
            f"({self.patch_mask_ratio})",
        )
        return self


class SourceConfig(Section):
    """One source of the training mixture."""

    kind: Literal["scenes", "boxes", "shards"]
    """Generated scenes, generated pictures of three boxes in the style of NLVR, or files."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the mixture, relative to the other sources' weights."""
    modalities: Literal["pair", "image", "text", "any"] = "pair"
    """What a sample must hold and gives: image and caption, the image alone, the caption alone, or whatever it has."""
    shards: str | list[str] | None = None
    """`kind: shards`: paths, brace lists such as `cc3m-{00000..00331}.tar`, or a folder that holds an index.json."""
    level: Literal["easy", "hard"] = "easy"
    """`kind: scenes`: difficulty."""
    num_samples: PositiveInt = 1_000_000
    """Generated: samples of one epoch."""
    seed: int = 0
    """Generated: which world."""
    reading_order_share: Fraction = 0.0
    """`kind: scenes`: share of captions whose phrases stand in reading order (row, then column, of the image before a
    flip) at the start of the run; the other captions keep random order."""
    reading_order_samples: PositiveInt | None = None
    """`kind: scenes`: samples of the run over which that share falls linearly to 0; None: it never falls. All samples
    count: of every source of the mixture, on every rank, those that cannot be used included."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        _require(self.kind != "shards" or bool(self.shards), "a source of kind 'shards' needs `shards`")
        for name in ("reading_order_share", "reading_order_samples"):
            value = getattr(self, name)
            _require(
                self.kind == "scenes" or not value,
                f"{name} ({value}) is for sources of kind 'scenes', not '{self.kind}'; leave it out",
            )
        return self


class DataConfig(Section):
    """Where samples come from and how they reach the model."""

    sources: list[SourceConfig] = [SourceConfig(kind="scenes")]
    tokenizer: str = "scenes"
    """`scenes` or `boxes` (shipped), or a path or name of a Hugging Face fast tokenizer."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank."""
    shuffle_buffer: PositiveInt = 1000
    """Samples that are shuffled among themselves, on top of the shuffled shard order; none is held in memory."""
    crop_scale: tuple[Fraction, Fraction] = (1.0, 1.0)
    """Area range of RandomResizedCrop; (1, 1) only resizes."""
    horizontal_flip: Fraction = 0.0
    """Probability of a flip, for captions without left/right words only."""
    max_bad_share: Fraction = 0.01
    """Above this share of unusable samples on a rank, counted over at least 1,000, the run stops."""


class LossConfig(Section):
    """Weights of the loss terms; those of tasks that `model.objectives` does not name count for nothing."""

    mim_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of masked pixels, in `mim` and in `joint`."""
    mlm_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of masked words, in `mlm` and in `joint`."""
    itc_weight: Annotated[float, Field(ge=0)] = 1.0
    itm_weight: Annotated[float, Field(ge=0)] = 1.0
    load_balancing_weight: Annotated[float, Field(ge=0)] = 0.001
    router_z_weight: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _read_former_names(cls, tree: Any) -> Any:
        return _renamed(_renamed(tree, "pixel_weight", "mim_weight"), "text_weight", "mlm_weight")


class OptimizerConfig(Section):
    """AdamW and its schedule: linear warm-up, then decay to `final_lr_share` of the peak."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_steps: Annotated[int, Field(ge=0)] = 10_000
    decay: Literal["linear", "cosine", "constant"] = "linear"
    decay_by: Literal["steps", "seconds"] = "steps"
    """`seconds`: the decay follows training time against `train.max_seconds`, for runs with a time budget."""
    final_lr_share: Fraction = 0.0
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """0 turns clipping off."""


class ParallelConfig(Section):
    """How experts are spread."""

    ep_size: Annotated[int, Field(ge=0)] = 1
    """Ranks that share one full set of experts; 0 takes the most that divide both the ranks and the experts."""


class TrainConfig(Section):
    """The loop: how long, how large, what is written when."""

    seed: int = 0
    max_steps: PositiveInt = 480_000
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Stop after this much training time, without evaluation and saving: of the wall's clock on an accelerator, of the
    training thread of rank 0 on CPUs (:func:`eve_ds.metrics.training_clock`)."""
    train_batch_size: PositiveInt = 2048
    """Samples of one optimiser step over all ranks and micro-steps."""
    micro_batch_size: PositiveInt | None = None
    """Samples of one forward on one rank; None: what the other two sides of the triangle leave."""
    gradient_accumulation_steps: PositiveInt | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    pack_views: bool = True
    """Encode the views of a step that do not wait for each other in one pass over packed tokens; False: in a pass
    each, which needs less memory at a time."""
    compile: Literal["none", "blocks"] = "none"
    """`blocks`: let `torch.compile` make one graph of every kind of block, at the first step; that takes minutes unless
    an earlier run has left them in a cache. MoE layers stay as they are where `parallel.ep_size` is above 1, and so
    does evaluation."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite_skips: PositiveInt = 10
    log_every: PositiveInt = 50
    """Steps between plain log lines (not on a terminal)."""
    metrics_every: PositiveInt = 10
    eval_every: PositiveInt | None = None
    save_every_steps: PositiveInt | None = None
    save_every_minutes: Annotated[float, Field(gt=0)] | None = None
    keep_last: PositiveInt | None = None
    """Checkpoints to keep, the newest ones; None keeps all."""
    keep_every_steps: PositiveInt | None = None
    """Keep those of every so many steps for good."""
    async_save: bool = False
    """Copy the state to the host's memory and write it while training goes on."""
    max_failed_saves: Annotated[int, Field(ge=0)] = 3
    """Failed saves in a row (disk full, no permission) that a run survives."""
    output_dir: Path = Path("runs/pretrain")
    init: Path | None = None
    """Weights to start a new run from: an exported folder, a checkpoint or a run of the same model."""


class ExamplesConfig(Section):
    """Where the examples of a task come from."""

    format: Literal["auto", "scenes", "boxes", "json", "vqav2", "nlvr2", "nlvr", "karpathy"] = "scenes"
    """`scenes`: generated. `boxes`: generated statements about one picture in the style of NLVR. `json`: the released
    code's form. `vqav2`: a file of questions and one of annotations.
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

    name: Literal["vqa", "nlvr", "retrieval"]
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
    `retrieval` multiplies (:mod:`eve_ds.tasks.words`) and `nlvr` compares with the statement's own words
    (:mod:`eve_ds.tasks.agreement`)."""
    hidden_words: PositiveInt = 13
    """`nlvr`, features `words`: of the hidden caption; as many as long captions of the pre-training have."""
    word_passes: Annotated[int, Field(ge=0)] = 0
    """`nlvr`, features `words`: forwards of each image beside the statement itself, each hiding one in so many words; 0
    where captions of the pre-training were no statements."""
    read_states: bool = False
    """`nlvr`, features `words`: the head also reads the states at the hidden words, where a caption of that length
    describes a picture place by place."""
    freeze_backbone: bool = False
    """Keep the pre-trained backbone as it is and train the head alone; weights that are drawn are always trained."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """`retrieval`: of the contrastive loss, where it starts."""
    itc_weight: Annotated[float, Field(ge=0)] = 1.0
    itm_weight: Annotated[float, Field(ge=0)] = 1.0
    rerank: Annotated[int, Field(ge=0)] = 128
    """`retrieval`: candidates of a query that image-text matching orders again; 0 leaves the dot product's order."""

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        _require(
            self.itm_weight > 0 or self.rerank == 0 or self.features == "words",
            f"task.rerank ({self.rerank}) needs image-text matching: set it to 0, or task.itm_weight "
            f"({self.itm_weight:g}) above 0",
        )
        _require(
            self.itm_weight == 0 or self.features == "class_token" or self.name != "retrieval",
            f"task.features ('words') has no matching loss: set task.itm_weight ({self.itm_weight:g}) to 0",
        )
        _require(
            self.features == "class_token" or self.name != "vqa",
            "task.features ('words') is for the tasks nlvr and retrieval: leave it out",
        )
        return self


class Config(Section):
    """The whole tree; `model_dump_json` of it travels with every checkpoint and export."""

    name: str = "eve"
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    task: TaskConfig | None = None
    """Of fine-tuning and of a fine-tuned model; None in pre-training."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        _require(
            self.parallel.ep_size == 0 or self.model.moe.num_experts % self.parallel.ep_size == 0,
            f"model.moe.num_experts ({self.model.moe.num_experts}) must be divisible by "
            f"parallel.ep_size ({self.parallel.ep_size})",
        )
        _require(
            self.optimizer.decay_by == "steps" or self.train.max_seconds is not None,
            "optimizer.decay_by ('seconds') needs train.max_seconds",
        )
        if self.task is not None and self.task.name == "nlvr" and self.task.features == "words":
            _require(
                self.task.hidden_words + 2 <= self.model.text_positions,
                f"task.hidden_words ({self.task.hidden_words}) and two special tokens must not exceed "
                f"model.text_positions ({self.model.text_positions})",
            )
        self._check_views()
        return self

    def _check_views(self) -> None:
        """Every source serves some task, every task can be served, and every view hides and sees something."""
        objectives, masking = self.model.objectives, self.masking
        weights = {name: getattr(self.loss, f"{name}_weight") for name in objectives if name != "joint"}
        if "joint" in objectives:
            weights |= {"mim": self.loss.mim_weight, "mlm": self.loss.mlm_weight}
        _require(
            any(weights.values()),
            f"loss weights of {', '.join(objectives)} ({', '.join(f'{name}_weight' for name in weights)}) are all 0: "
            "raise one of them",
        )
        for task, key, ratio in (
            ("mim", "patch_mask_ratio", masking.patch_mask_ratio),
            ("mlm", "text_mask_ratio", masking.most_words_masked),
        ):
            _require(
                task not in objectives or ratio > 0,
                f"masking.{key} ({ratio:g}) leaves nothing to predict for {task}: raise it, or leave {task} out of "
                "model.objectives",
            )
        both = f"masking.patch_mask_ratio ({masking.patch_mask_ratio:g}) and text_mask_ratio"
        _require(
            "joint" not in objectives or masking.patch_mask_ratio < 1 or masking.text_mask_ratio < 1,
            f"{both} ({masking.text_mask_ratio:g}) leave nothing to see for joint: lower one of them",
        )
        for number, source in enumerate(self.data.sources):
            _check_source(objectives, masking, source, f"data.sources[{number}]")

    @property
    def tasks_without_source(self) -> list[str]:
        """Tasks that no source has a picture or a caption for; what only they train stays as it was drawn."""
        kinds = {source.modalities for source in self.data.sources}
        lacking = {"mim": {"text"}, "mlm": {"image"}}
        return [task for task in self.model.objectives if kinds <= lacking.get(task, set())]


def _check_source(objectives: list[Objective], masking: MaskingConfig, source: SourceConfig, where: str) -> None:
    """Raise ValueError where a source serves no task, a task lacks what it compares, or a view sees nothing."""
    kind, names = source.modalities, ", ".join(objectives)
    _require(
        kind == "pair" or not {"itc", "itm"} & set(objectives),
        f"model.objectives ({names}) compares images with texts and needs pairs: {where}.modalities is '{kind}'",
    )
    for only, task in (("text", "mim"), ("image", "mlm")):
        _require(
            kind != only or objectives != [task],
            f"{where}.modalities ('{kind}') has nothing that model.objectives ({names}) could predict: leave the "
            f"source out, or add {'mlm' if task == 'mim' else 'mim'}",
        )
    if "joint" in objectives:
        most, share = masking.most_words_masked, masking.text_to_image_share
        words = kind != "image" and most > 0 and (kind != "pair" or share < 1)
        _require(
            words or (kind != "text" and masking.patch_mask_ratio > 0),
            f"masking.patch_mask_ratio ({masking.patch_mask_ratio:g}), text_mask_ratio ({most:g}) and "
            f"text_to_image_share ({share:g}) leave nothing to predict of {where} ('{kind}') for joint: raise a ratio",
        )
    for alone, key, ratio in (
        ("image", "patch_mask_ratio", masking.patch_mask_ratio),
        ("text", "text_mask_ratio", masking.text_mask_ratio),
    ):
        _require(
            kind not in (alone, "any") or ratio < 1,
            f"masking.{key} ({ratio:g}) leaves nothing to see of {where}, whose modalities are '{kind}': lower it",
        )


def presets() -> list[str]:
    """Names of the presets shipped in `eve_ds/configs`, recipes of tasks as `tasks/NAME`."""
    folder = resources.files("eve_ds") / "configs"
    found = [("", item) for item in folder.iterdir()] + [("tasks/", item) for item in (folder / "tasks").iterdir()]
    return sorted(prefix + item.name.removesuffix(".yaml") for prefix, item in found if item.name.endswith(".yaml"))


def load_config(preset_or_path: str, overrides: list[str] | None = None, under: dict[str, Any] | None = None) -> Config:
    """Read a preset by name or a YAML file by path, apply `section.key=value` overrides, validate.

    A file may name a preset to start from under the key `base`. Values of overrides are parsed as YAML. What neither
    says is taken from the tree `under`.

    Raises:
        ConfigError: unknown preset, unreadable file, unknown key (with the nearest name), or a value against a rule.
    """
    tree = _merge(under or {}, _read_tree(preset_or_path))
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree, preset_or_path)


def parse_config(tree: dict[str, Any], where: str = "config") -> Config:
    """Validate a nested dictionary; raises :class:`ConfigError` with one line per problem."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_problem(item, where) for item in error.errors())) from None


def parse_written_config(tree: dict[str, Any], where: str) -> Config:
    """As :func:`parse_config`, for a tree that a run has written, of this version or an earlier one."""
    model = tree.get("model") if isinstance(tree, dict) else None
    if isinstance(model, dict):
        former: dict[str, Any] = {"pixel_target": FORMER_PIXEL_TARGET}
        if "objectives" not in model:
            former["objective"] = "msm"  # the only one before the field existed
        tree = tree | {"model": former | model}
    return parse_config(tree, where)


def _read_tree(preset_or_path: str) -> dict[str, Any]:
    path = Path(preset_or_path)
    if path.suffix in {".yaml", ".yml", ".json"} or path.is_file():
        if not path.is_file():
            raise ConfigError(f"config file {preset_or_path} does not exist")
        text = _read_text(path)
    elif preset_or_path in presets():
        text = (resources.files("eve_ds") / "configs" / f"{preset_or_path}.yaml").read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"config '{preset_or_path}' is neither a file nor a preset{_nearest(preset_or_path, presets())}; "
            f"presets: {', '.join(presets())}"
        )
    tree = _parse_yaml(text, f"config {preset_or_path}") or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config {preset_or_path} must be a mapping of sections, not a {type(tree).__name__}")
    base = tree.pop("base", None)
    return tree if base is None else _merge(_read_tree(base), tree)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def _merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override '{override}' must have the form section.key=value")
    *sections, key = path.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override '{override}': '{section}' is a value, not a section")
    tree[key] = _parse_yaml(text, f"override '{override}'")


def _problem(error: Any, where: str) -> str:
    location = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        return f"{where}: unknown key '{'.'.join(location)}'{_nearest(location[-1], known)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {'.'.join(location)} ({error['input']!r}): {message}"


def _known_keys(location: list[str]) -> list[str]:
    section: Any = Config
    for part in location:
        if part.isdigit():
            continue
        field = section.model_fields[part].annotation
        section = {"sources": SourceConfig, "task": TaskConfig}.get(part, field)
    return list(section.model_fields)


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else f"; known: {', '.join(sorted(known))}"
