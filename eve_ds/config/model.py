"""Configuration of the model architecture and its pre-training objectives."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from eve_ds.config.section import Fraction, PositiveInt, Section, ShareBelowOne, renamed, require

Objective = Literal["mim", "mlm", "itc", "itm", "joint"]

FORMER_OBJECTIVES: dict[str, list[Objective]] = {
    "msm": ["joint"],
    "itc_itm": ["itc", "itm"],
    "itc_itm_mlm": ["mlm", "itc", "itm"],
}
"""Values of `model.objective`, the key of earlier versions, which named one of three sets of objectives."""

FORMER_PIXEL_TARGET = "normalized"
"""Value of `model.pixel_target` in versions that did not have this key yet."""


class MoEConfig(Section):
    """Mixture of experts in the deep layers (EVE eq. 4 to 7; upstream DeepSpeed MoE and GShard top-2 gating)."""

    num_experts: PositiveInt = 32
    """Experts of each MoE layer over all ranks; must be divisible by `parallel.ep_size`. Default: EVE-Base."""
    top_k: PositiveInt = 2
    """Experts that process each token; at most `num_experts`. Default: EVE-Base."""
    routing: Literal["capacity", "dropless"] = "dropless"
    """`capacity`: each expert has a fixed number of slots; tokens beyond them are dropped, as in the released code.
    `dropless`: every route is computed."""
    capacity_factor: Annotated[float, Field(gt=0)] = 1.0
    """Scale of the capacity with `routing: capacity`: slots per expert = ceil(top_k * capacity_factor * tokens /
    num_experts)."""
    min_capacity: PositiveInt = 4
    """Smallest number of slots per expert with `routing: capacity`."""
    modality_embedding: bool = True
    """True: the router input is the token plus the embedding of its modality (EVE eq. 4). False: the token alone
    (EVE Table 8)."""
    router_jitter: Fraction = 0.0
    """Half width of the multiplicative noise on the router input during training; factors are uniform in [1 - jitter,
    1 + jitter]. 0 turns the noise off."""
    second_choice_noise: bool = False
    """True: add Gumbel noise to the router logits for every choice after the first (GShard's random second expert)
    during training, with `profile: official` also in evaluation."""
    balance_over: Literal["rank", "data_parallel"] = "data_parallel"
    """Tokens that the load-balancing statistics cover: those of this rank, or those of all data-parallel ranks."""


class PixelDecoderConfig(Section):
    """Light decoder that predicts masked patches. Released files do not contain it, so depth and width are free."""

    kind: Literal["cross", "self"] = "self"
    """`self`: mask tokens are appended to the encoded tokens and all attend to each other. `cross`: mask tokens attend
    to the encoded tokens only, not to each other (CrossMAE)."""
    num_layers: PositiveInt = 4
    """Blocks of the decoder."""
    hidden_size: PositiveInt = 384
    """Width of the decoder; must be divisible by `num_attention_heads`."""
    num_attention_heads: PositiveInt = 6
    """Attention heads of each decoder block."""


class ModelConfig(Section):
    """Architecture and objectives. Defaults: EVE-Base at 224 pixels (475,197,696 backbone parameters)."""

    profile: Literal["default", "official"] = "default"
    """`official` reproduces the forward pass of the released code, quirks included; see `eve_ds/model/moe.py`."""
    objectives: Annotated[list[Objective], Field(min_length=1)] = ["mim", "mlm"]
    """Pre-training objectives; determine which views of a sample and which heads are built.

    `mim`: predict pixels of a masked image, given the whole caption. `mlm`: predict words of a masked caption, given
    the whole image. `mim` and `mlm` together are the objective of the paper (EVE eq. 8 to 10). `itc`: image-text
    contrastive loss. `itm`: image-text matching on the hard negatives of `itc` (ALBEF), so it requires `itc`; the
    paper compares with both. `joint`: `mim` and `mlm` in one pass over a masked image and a masked caption; several
    times cheaper, but EVE Table 5 advises against it, and it excludes `mim` and `mlm`."""
    hidden_size: PositiveInt = 768
    """Width of the encoder; must be divisible by `num_attention_heads`."""
    num_hidden_layers: PositiveInt = 12
    """Blocks of the encoder."""
    num_attention_heads: PositiveInt = 12
    """Attention heads of each encoder block."""
    intermediate_size: PositiveInt = 3072
    """Hidden width of each feed-forward network, experts included."""
    moe_layers: list[Annotated[int, Field(ge=0)]] = [10, 11]
    """Deep layers, counted from 0, whose feed-forward part is chosen by `deep_ffn`. Default: the last two, as in
    EVE-Base."""
    deep_ffn: Literal["soft_router", "hard_router", "shared"] = "soft_router"
    """Feed-forward part of the layers in `moe_layers` (EVE Table 7). `soft_router`: experts chosen by a learned router.
    `hard_router`: one network per modality, as in the shallow layers. `shared`: one network for all tokens."""
    moe: MoEConfig = MoEConfig()
    """Mixture of experts, used with `deep_ffn: soft_router`."""
    image_size: PositiveInt = 224
    """Height and width of the input image, in pixels; must be divisible by `patch_size`."""
    patch_size: PositiveInt = 16
    """Height and width of a patch, in pixels."""
    vocab_size: PositiveInt = 64000
    """Rows of the word embedding; every token ID of `data.tokenizer` must be smaller. Default: EVE-Base."""
    text_positions: PositiveInt = 196
    """Rows of the text position table; at least `text_length`. Default: EVE-Base."""
    text_length: PositiveInt = 40
    """Maximum tokens of a caption, [CLS] and [SEP] included; longer captions are truncated."""
    layer_scale_init: float = 0.1
    """Initial value of LayerScale, the learned factor of each residual branch."""
    drop_path_rate: ShareBelowOne = 0.1
    """Stochastic depth: drop probability of the last block; it grows linearly from 0 at the first block."""
    text_dropout: ShareBelowOne = 0.1
    """Dropout probability after the LayerNorm of the word embeddings."""
    layer_norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the normal distribution that initial weights are drawn from, truncated at one standard
    deviation."""
    position_init: Literal["normal", "sincos"] = "normal"
    """Initial values of the position tables, which are trained in both cases. `normal`: random, as in the released
    model. `sincos`: sines and cosines (2-D for patches); a small model learns where objects are several times
    sooner."""
    position_initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Scale of the initial position embeddings, class tokens and mask tokens: standard deviation of the normal
    distribution, or amplitude of the sines."""
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    """Decoder that predicts masked patches; built for `mim` and `joint`."""
    pixel_target: Literal["raw", "normalized"] = "raw"
    """Target of the pixel prediction. `raw`: pixels as the encoder receives them, as the paper describes. `normalized`:
    pixels normalized by the mean and variance of their patch (MAE's `norm_pix_loss`). On scenes, captions reduce the
    error of raw pixels several times as much, and shapes are learned sooner; see docs/results.md."""

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
            "both visible and predicted: make patch_size smaller, or leave mim and joint out of objectives",
        )
        require(
            self.text_length <= self.text_positions,
            f"text_length ({self.text_length}) must not exceed text_positions ({self.text_positions})",
        )
        return self

    def _check_objectives(self) -> None:
        names = ", ".join(self.objectives)
        twice = sorted({name for name in self.objectives if self.objectives.count(name) > 1})
        require(not twice, f"objectives ({names}) names {', '.join(twice)} twice: name each objective once")
        require(
            "itm" not in self.objectives or "itc" in self.objectives,
            f"objectives ({names}) has itm without itc, whose similarities choose the hard negatives: add itc",
        )
        require(
            "joint" not in self.objectives or not {"mim", "mlm"} & set(self.objectives),
            f"objectives ({names}) has joint beside mim or mlm, which are the two halves of joint: leave out one side",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the section as plain data; peft reads the configuration of a model by a method of this name."""
        return self.model_dump(mode="json")

    @property
    def num_patches(self) -> int:
        """Number of patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def keeps_padding(self) -> bool:
        """Whether padding is computed and routed like words, as in the released code."""
        return self.profile == "official"

    def padded_length(self, longest: int) -> int:
        """Length to which a batch pads its texts: that of the longest, or `text_length` where padding is routed.

        The released code pads every text to its maximum, and padding takes capacity.
        """
        return self.text_length if self.keeps_padding else longest

    @property
    def expert_layers(self) -> list[int]:
        """Layers with experts behind a learned router, counted from 0, in ascending order."""
        return sorted(set(self.moe_layers)) if self.deep_ffn == "soft_router" else []

    @property
    def predicts_pixels(self) -> bool:
        """Whether an objective predicts masked patches."""
        return bool({"mim", "joint"} & set(self.objectives))

    @property
    def normalizes_pixels(self) -> bool:
        """Whether the pixel target is normalized per patch."""
        return self.pixel_target == "normalized"

    @property
    def predicts_words(self) -> bool:
        """Whether an objective predicts masked words."""
        return bool({"mlm", "joint"} & set(self.objectives))

    @property
    def matches_pairs(self) -> bool:
        """Whether an objective decides if an image and a text match."""
        return "itm" in self.objectives
