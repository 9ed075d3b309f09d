"""Configuration of the training data and of masking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from eve_ds.config.section import Fraction, PositiveInt, Section, Share, require


class MaskingConfig(Section):
    """Masking of the views of a sample. Masks are a function of (seed, epoch, sample key, view).

    Defaults are the paper's. The image view, used by `mim`, pairs a masked image with the whole caption. The language
    view, used by `mlm`, pairs the whole image with a masked caption. The only view of `joint` masks both; keys that
    begin with `image_view` or `language_view` do not apply to it.
    """

    patch_mask_ratio: Fraction = 0.75
    """Fraction of the patches that is masked in `mim` and `joint`. At 1 the image view consists of the caption only."""
    predicted_patch_share: Share = 1.0
    """Fraction of the masked patches that is predicted, drawn for each sample (CrossMAE); the decoder does not compute
    the others."""
    text_mask_ratio: Fraction = 0.5
    """Fraction of the words that is masked in `mlm` and `joint`. A caption of two or more words without an image keeps
    at least one word visible."""
    max_text_mask_ratio: Fraction | None = None
    """If set, each sample draws its ratio uniformly between `text_mask_ratio` and this value; None: every sample uses
    `text_mask_ratio`."""
    text_to_image_share: Fraction = 0.0
    """Fraction of the pairs in `mim` and `joint` that mask more of the image (`text_to_image_mask_ratio`) and nothing
    of the caption, so that the model must read pixels off the words."""
    text_to_image_mask_ratio: Share = 1.0
    """Lower limit of the mask ratio of the pairs chosen by `text_to_image_share`; each draws its ratio uniformly
    between this value and 1. At least `patch_mask_ratio`."""
    image_view_share: Share = 1.0
    """Fraction of the samples with an image that get an image view, drawn in every epoch."""
    image_view_word_share: Share = 1.0
    """Fraction of a caption's words that the image view contains, drawn at random; the other words are removed."""
    language_view_patch_share: Share = 1.0
    """Fraction of an image's patches that the language view contains, drawn at random (FLIP, Li et al. 2023)."""
    random_token_share: Fraction = 0.0
    """Fraction of the chosen tokens that is replaced by a random token instead of [MASK] (BERT: 0.1)."""
    keep_token_share: Fraction = 0.0
    """Fraction of the chosen tokens that stays unchanged but is predicted (BERT: 0.1)."""

    @property
    def most_words_masked(self) -> float:
        """Highest fraction of a caption's words that can be masked."""
        return self.text_mask_ratio if self.max_text_mask_ratio is None else self.max_text_mask_ratio

    @model_validator(mode="after")
    def _check(self) -> MaskingConfig:
        require(
            self.random_token_share + self.keep_token_share <= 1,
            f"random_token_share ({self.random_token_share}) and keep_token_share ({self.keep_token_share}) "
            "must not exceed 1 together",
        )
        require(
            self.max_text_mask_ratio is None or self.max_text_mask_ratio >= self.text_mask_ratio,
            f"max_text_mask_ratio ({self.max_text_mask_ratio}) must not be below text_mask_ratio "
            f"({self.text_mask_ratio})",
        )
        require(
            self.text_to_image_mask_ratio >= self.patch_mask_ratio,
            f"text_to_image_mask_ratio ({self.text_to_image_mask_ratio}) must not be below patch_mask_ratio "
            f"({self.patch_mask_ratio})",
        )
        return self


class SourceConfig(Section):
    """One source of the training mixture."""

    kind: Literal["scenes", "shards"]
    """`scenes`: generated scenes. `shards`: files."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight in the mixture, relative to the weights of the other sources."""
    modalities: Literal["pair", "image", "text", "any"] = "pair"
    """Content of the samples. `pair`: image and caption, both required. `image`, `text`: only the image or the caption;
    the other is ignored. `any`: the content of each sample."""
    shards: str | list[str] | None = None
    """`kind: shards`: paths, brace lists such as `cc3m-{00000..00331}.tar`, or a folder with an index.json."""
    level: Literal["easy", "hard"] = "easy"
    """`kind: scenes`: difficulty."""
    num_samples: PositiveInt = 1_000_000
    """`kind: scenes`: samples of one epoch."""
    seed: int = 0
    """`kind: scenes`: seed of the generator."""
    reading_order_share: Fraction = 0.0
    """`kind: scenes`: fraction of captions whose phrases are in reading order (row, then column, of the image before a
    flip) at the start of the run; phrases of other captions are in random order."""
    reading_order_samples: PositiveInt | None = None
    """`kind: scenes`: number of samples of the run over which `reading_order_share` falls linearly to 0; None: it stays
    constant. The count covers all sources, all ranks and unusable samples."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        require(self.kind != "shards" or bool(self.shards), "a source of kind 'shards' needs `shards`")
        for name in ("reading_order_share", "reading_order_samples"):
            value = getattr(self, name)
            require(
                self.kind == "scenes" or not value,
                f"{name} ({value}) is for sources of kind 'scenes', not '{self.kind}'; leave it out",
            )
        return self


class ValidationConfig(Section):
    """Held-out pairs; the losses on them are measured every `train.eval_every` steps and at the end of the run."""

    sources: list[SourceConfig] = []
    """Separate sources of pairs; their shards must not be in `data.sources`. Exclusive with `share`."""
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the samples of `data.sources` to hold out. The choice depends on a hash of the key, so it is the same
    in every run with this value. Exclusive with `sources`."""
    num_samples: Annotated[int, Field(ge=2)] = 1024
    """Maximum number of pairs of an evaluation, over all ranks."""

    @model_validator(mode="after")
    def _check(self) -> ValidationConfig:
        require(
            bool(self.sources) != (self.share > 0),
            f"data.validation needs either sources ({len(self.sources)}) or a share ({self.share:g}): set one of them",
        )
        for source in self.sources:
            require(
                source.modalities == "pair",
                f"data.validation.sources must hold pairs, not modalities '{source.modalities}'",
            )
        return self


class DataConfig(Section):
    """Training mixture, tokenizer, loading and augmentation."""

    sources: list[SourceConfig] = [SourceConfig(kind="scenes")]
    """Sources of the training mixture."""
    tokenizer: str = "scenes"
    """`scenes` (shipped), or a path or name of a Hugging Face fast tokenizer."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Data loader processes per rank; 0: the training process loads."""
    shuffle_buffer: PositiveInt = 1000
    """Number of consecutive samples that are shuffled together, in addition to the order of shards. Shuffling permutes
    indices, so no sample is held in memory."""
    crop_scale: tuple[Fraction, Fraction] = (1.0, 1.0)
    """Range of the area of RandomResizedCrop, as fractions of the image; (1, 1) only resizes."""
    horizontal_flip: Fraction = 0.0
    """Probability of a horizontal flip. Images whose caption contains left or right are never flipped."""
    validation: ValidationConfig | None = None
    """Pairs for held-out losses; None: no held-out losses."""
    max_bad_share: Fraction = 0.01
    """Largest fraction of unusable samples on a rank, of at least 1,000 samples; above it the run stops."""
