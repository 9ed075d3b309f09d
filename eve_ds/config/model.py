"""Architecture of the model and its pre-training objectives."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from eve_ds.config.section import Fraction, PositiveInt, Section, renamed, require

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
        return renamed(tree, "objective", "objectives", FORMER_OBJECTIVES.get(former or ""))

    @field_validator("objectives")
    @classmethod
    def _in_one_order(cls, names: list[Objective]) -> list[Objective]:
        return sorted(names, key=get_args(Objective).index)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        self._check_objectives()
        require(
            self.image_size % self.patch_size == 0,
            f"image_size ({self.image_size}) must be divisible by patch_size ({self.patch_size})",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads ({self.num_attention_heads})",
        )
        decoder = self.pixel_decoder
        require(
            decoder.hidden_size % decoder.num_attention_heads == 0,
            f"pixel_decoder.hidden_size ({decoder.hidden_size}) must be divisible by "
            f"pixel_decoder.num_attention_heads ({decoder.num_attention_heads})",
        )
        require(
            all(layer < self.num_hidden_layers for layer in self.moe_layers),
            f"moe_layers ({self.moe_layers}) must be below num_hidden_layers ({self.num_hidden_layers}); "
            "layers are counted from 0",
        )
        require(
            self.moe.top_k <= self.moe.num_experts,
            f"moe.top_k ({self.moe.top_k}) must not exceed moe.num_experts ({self.moe.num_experts})",
        )
        require(
            self.text_length >= 3,
            f"text_length ({self.text_length}) must be at least 3: [CLS], a word and [SEP]",
        )
        require(
            not self.predicts_pixels or self.num_patches > 1,
            f"image_size ({self.image_size}) and patch_size ({self.patch_size}) make a single patch, which cannot be "
            "seen and predicted: make patch_size smaller, or leave mim and joint out of objectives",
        )
        require(
            self.text_length <= self.text_positions,
            f"text_length ({self.text_length}) must not exceed text_positions ({self.text_positions})",
        )
        return self

    def _check_objectives(self) -> None:
        names = ", ".join(self.objectives)
        twice = sorted({name for name in self.objectives if self.objectives.count(name) > 1})
        require(not twice, f"objectives ({names}) names {', '.join(twice)} twice: name every task once")
        require(
            "itm" not in self.objectives or "itc" in self.objectives,
            f"objectives ({names}) has itm without itc, whose similarities choose the hard negatives: add itc",
        )
        require(
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

    @property
    def contrasts_pairs(self) -> bool:
        """Whether some objective compares features of images with features of texts."""
        return "itc" in self.objectives

    @property
    def matches_pairs(self) -> bool:
        """Whether some objective judges if an image and a text belong together."""
        return "itm" in self.objectives
