"""Section `masking`: hidden parts of the views of a sample."""

from __future__ import annotations

from pydantic import model_validator

from eve_ds.config.section import Fraction, Section, Share, require


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
