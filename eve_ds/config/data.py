"""Where samples come from, and what is hidden in them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from eve_ds.config.section import Fraction, PositiveInt, Section, Share, require


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
    """Generated scenes, or files."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the mixture, relative to the other sources' weights."""
    modalities: Literal["pair", "image", "text", "any"] = "pair"
    """What a sample must hold and gives: image and caption, the image alone, the caption alone, or whatever it has."""
    shards: str | list[str] | None = None
    """`kind: shards`: paths, brace lists such as `cc3m-{00000..00331}.tar`, or a folder that holds an index.json."""
    level: Literal["easy", "hard"] = "easy"
    """`kind: scenes`: difficulty."""
    num_samples: PositiveInt = 1_000_000
    """`kind: scenes`: samples of one epoch."""
    seed: int = 0
    """`kind: scenes`: seed of the generated world."""
    reading_order_share: Fraction = 0.0
    """`kind: scenes`: share of captions whose phrases stand in reading order (row, then column, of the image before a
    flip) at the start of the run; the other captions keep random order."""
    reading_order_samples: PositiveInt | None = None
    """`kind: scenes`: samples of the run over which that share falls linearly to 0; None: it never falls. All samples
    count: of every source of the mixture, on every rank, those that cannot be used included."""

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
    """Pairs that a run never trains on; `train.eval_every` and the end of the run measure losses on them."""

    sources: list[SourceConfig] = []
    """Sources of their own, of pairs; their shards may not be among those of `data.sources`."""
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the samples of `data.sources` that is held out instead, chosen by a hash of the key: the same samples in
    every run with this share."""
    num_samples: Annotated[int, Field(ge=2)] = 1024
    """Most pairs of an evaluation, over all ranks."""

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
    """Where samples come from and how they reach the model."""

    sources: list[SourceConfig] = [SourceConfig(kind="scenes")]
    tokenizer: str = "scenes"
    """`scenes` (shipped), or a path or name of a Hugging Face fast tokenizer."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank."""
    shuffle_buffer: PositiveInt = 1000
    """Samples that are shuffled among themselves, on top of the shuffled shard order; none is held in memory."""
    crop_scale: tuple[Fraction, Fraction] = (1.0, 1.0)
    """Area range of RandomResizedCrop; (1, 1) only resizes."""
    horizontal_flip: Fraction = 0.0
    """Probability of a flip, for captions without left/right words only."""
    validation: ValidationConfig | None = None
    """Pairs for held-out losses; None: none."""
    max_bad_share: Fraction = 0.01
    """Above this share of unusable samples on a rank, counted over at least 1,000, the run stops."""
