"""EVE (Chen et al., AAAI 2024): parts, block, backbone, and the pre-training model on top of it.

Reading order: `EVE.forward` removes masked patches, embeds what is left, joins image and text into one stream, runs
the blocks, and decodes pixels and words that were hidden. For the objectives that masked signal modelling is compared
with, it runs the backbone over images, texts and pairs of both instead.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eve_ds.config import ModelConfig
from eve_ds.model.attention import SelfAttention
from eve_ds.model.decoders import PixelDecoder, TextHead
from eve_ds.model.embeddings import ImageEmbedding, TextEmbedding
from eve_ds.model.experts import StackedLinear
from eve_ds.model.feed_forward import ModalityFeedForward
from eve_ds.model.matching import MatchingHeads, MatchingOutput, Pairs, draw_hard_negatives
from eve_ds.model.moe import MoE, MoEOutput, merge_outputs, plain_named_tensors
from eve_ds.model.stream import Layout, TokenStream, join

MoEFactory = Callable[[ModelConfig], nn.Module]
"""Makes the MoE of one layer; its forward has the signature of :meth:`eve_ds.model.moe.MoE.forward`."""


class BackboneOutput(NamedTuple):
    """Encoded stream and what the MoE layers said."""

    stream: TokenStream
    """After the final LayerNorm; `stream.padded()` lays it out by sample."""
    num_image_tokens: int
    """Positions of a sample that image tokens may take, class token included; 0 without images."""
    moe: tuple[MoEOutput, ...]
    """One per MoE layer, shallow to deep; their `hidden_states` are internal."""


class EVEOutput(NamedTuple):
    """Predictions of one pre-training forward."""

    pixel_predictions: Tensor | None
    """(B, N_masked, P * P * 3), per-patch-normalised."""
    token_hidden: Tensor | None
    """(M, D) states of the masked tokens; logits are `token_hidden @ vocabulary_weight.T + vocabulary_bias`."""
    vocabulary_weight: Tensor
    """(V, D), the word embedding."""
    vocabulary_bias: Tensor | None
    """(V,); None where the objective has no words to predict."""
    moe: tuple[MoEOutput, ...]
    """One per MoE layer, shallow to deep, over all passes of the backbone."""
    matching: MatchingOutput | None = None
    """None for masked signal modelling."""

    def tensors(self) -> dict[str, Tensor]:
        """Predictions by name, those that there are: by them two copies of a model can be told to be the same."""
        named = {"pixel_predictions": self.pixel_predictions}
        if self.token_hidden is not None:
            named["token_logits"] = self.token_logits()
        if self.matching is not None:
            # Not the negatives, which are drawn.
            pairs = len(self.matching.image_features)
            named |= {"image_features": self.matching.image_features, "text_features": self.matching.text_features}
            named["matching_logits"] = self.matching.logits[:pairs]
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def token_logits(self) -> Tensor:
        """(M, V) logits of the masked tokens."""
        if self.token_hidden is None:
            raise ValueError("this batch had no text, so there are no token logits")
        return F.linear(self.token_hidden, self.vocabulary_weight, self.vocabulary_bias)


class Block(nn.Module):
    """x + gamma_1 * attention(norm x), then x + gamma_2 * ffn(norm x); deep layers have the MoE as ffn."""

    def __init__(self, config: ModelConfig, layer: int, moe_cls: MoEFactory) -> None:
        super().__init__()
        width = config.hidden_size
        self.drop_path_rate = config.drop_path_rate * layer / max(config.num_hidden_layers - 1, 1)
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = SelfAttention(width, config.num_attention_heads)
        self.gamma_1 = nn.Parameter(torch.full((width,), config.layer_scale_init))
        self.gamma_2 = nn.Parameter(torch.full((width,), config.layer_scale_init))
        self.is_moe = layer in config.moe_layers
        if self.is_moe:
            self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.moe = moe_cls(config)
        else:
            self.ffn = ModalityFeedForward(config)

    def forward(self, stream: TokenStream) -> tuple[Tensor, MoEOutput | None]:
        """Tokens (N, D) of a stream -> (N, D) and, in a deep layer, the MoE's output."""
        layout = stream.layout
        x = stream.hidden_states
        x = x + self._drop_path(self.gamma_1 * self.attention(self.norm1(x), layout), layout)
        if not self.is_moe:
            return x + self._drop_path(self.gamma_2 * self.ffn(x, stream.by_modality), layout), None
        moe: MoEOutput = self.moe(self.norm2(x), stream.modality_ids, layout.real)
        return x + self._drop_path(self.gamma_2 * moe.hidden_states, layout), moe

    def _drop_path(self, branch: Tensor, layout: Layout) -> Tensor:
        """Drop a residual branch for whole samples (stochastic depth)."""
        if not self.training or self.drop_path_rate == 0.0:
            return branch
        keep = 1.0 - self.drop_path_rate
        kept = branch.new_empty(layout.mask.shape[0], 1).bernoulli_(keep) / keep
        return branch * kept[layout.sample_ids()]


class Backbone(nn.Module):
    """Embeddings, blocks and final LayerNorm: what the released weights hold."""

    def __init__(self, config: ModelConfig, moe_cls: MoEFactory = MoE) -> None:
        super().__init__()
        self.keep_padding = config.profile == "official"
        """Compute padding too, which the released model routes; otherwise the same results, slower."""
        self.image_embedding = ImageEmbedding(config)
        self.text_embedding = TextEmbedding(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config, layer, moe_cls) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation_checkpointing = False

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        visible_patch_ids: Tensor | None = None,
        visible_patch_mask: Tensor | None = None,
    ) -> BackboneOutput:
        """Encode images (B, 3, H, W), text (B, L), or pairs; see :class:`eve_ds.model.eve.EVE` for the arguments."""
        image = None if pixel_values is None else self.image_embedding(pixel_values, visible_patch_ids)
        text = None if input_ids is None else self.text_embedding(input_ids)
        image_token_mask = _image_token_mask(image_mask, visible_patch_mask)
        stream = join(image, text, image_token_mask, attention_mask, self.keep_padding)
        stream = stream._replace(hidden_states=self.pre_norm(stream.hidden_states))
        moe_outputs = []
        for block in self.blocks:
            hidden_states, moe = self._run(block, stream)
            stream = stream._replace(hidden_states=hidden_states)
            if moe is not None:
                moe_outputs.append(moe)
        stream = stream._replace(hidden_states=self.norm(stream.hidden_states))
        return BackboneOutput(stream, 0 if image is None else image.shape[1], tuple(moe_outputs))

    def _run(self, block: nn.Module, stream: TokenStream) -> tuple[Tensor, MoEOutput | None]:
        if self.activation_checkpointing and self.training:
            return checkpoint(block, stream, use_reentrant=False)
        return block(stream)


class EVE(nn.Module):
    """The backbone, and the heads of `config.objective`; those of the others are None.

    `msm`: masked signal modelling on image-text pairs, images alone, or text alone. `itc_itm`, `itc_itm_mlm`: pairs.
    """

    def __init__(self, config: ModelConfig, moe_cls: MoEFactory = MoE) -> None:
        super().__init__()
        self.config = config
        # Drawn before the modules are made, since what torch draws for those depends on how many experts are here.
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.backbone = Backbone(config, moe_cls)
        self.pixel_decoder = PixelDecoder(config) if config.objective == "msm" else None
        self.text_head = TextHead(config) if config.objective != "itc_itm" else None
        self.matching = MatchingHeads(config) if config.objective != "msm" else None
        initialize_weights(self, config, seed)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        visible_patch_ids: Tensor | None = None,
        visible_patch_mask: Tensor | None = None,
        masked_patch_ids: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        masked_token_ids: Tensor | None = None,
        masked_input_ids: Tensor | None = None,
    ) -> EVEOutput:
        """Predict what was masked, or who belongs to whom.

        Args:
            pixel_values: (B, 3, H, W) normalised to mean = std = 0.5, or None for text alone.
            image_mask: (B,) bool, False = this sample has no image; None = all have one.
            visible_patch_ids: (B, N_visible) int64 patches that the encoder sees; None = all.
            visible_patch_mask: (B, N_visible) bool, False = hide this one too; None = hide none of them.
            masked_patch_ids: (B, N_masked) int64 patches to predict; None = predict none.
            input_ids: (B, L) int64 with masked tokens replaced, or None for images alone. For the objectives other
                than `msm`: whole captions.
            attention_mask: (B, L) bool, True = real token; None = all are.
            masked_token_ids: (M,) int64 flat indices into B * L of the real tokens to predict; None = predict none.
            masked_input_ids: (B, L) int64 captions with masked tokens replaced, where `input_ids` are whole.

        Raises:
            ValueError: neither images nor text, or a text longer than the position table; for the objectives other
                than `msm`, anything else than at least two pairs.
        """
        if self.matching is not None:
            pairs = Pairs.of(pixel_values, image_mask, input_ids, attention_mask)
            return self._match(self.matching, pairs, masked_input_ids, masked_token_ids)
        encoded = self.backbone(
            pixel_values, input_ids, attention_mask, image_mask, visible_patch_ids, visible_patch_mask
        )
        pixels = None
        if self.pixel_decoder is not None and masked_patch_ids is not None and visible_patch_ids is not None:
            pixels = self.pixel_decoder(encoded.stream, visible_patch_ids, masked_patch_ids)
        return EVEOutput(pixels, *self._predict_words(encoded, masked_token_ids), encoded.moe)

    def _predict_words(
        self, encoded: BackboneOutput, masked_token_ids: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """States of the tokens to predict, and weight and bias of the vocabulary."""
        words = self.backbone.text_embedding.word.weight
        if self.text_head is None:
            return None, words, None
        if masked_token_ids is None:
            return None, words, self.text_head.bias
        return self.text_head(_text_tokens(encoded, masked_token_ids)), words, self.text_head.bias

    def _match(
        self, heads: MatchingHeads, pairs: Pairs, masked_input_ids: Tensor | None, masked_token_ids: Tensor | None
    ) -> EVEOutput:
        """Images alone and texts alone; then as one batch pairs, pairs with hard negatives, and masked texts."""
        images = self.backbone(pairs.pixel_values, image_mask=pairs.image_mask)
        texts = self.backbone(input_ids=pairs.input_ids, attention_mask=pairs.attention_mask)
        image_features = heads.image_features(images.stream.padded()[:, 0])
        text_features = heads.text_features(texts.stream.padded()[:, 0])
        temperature = heads.temperature()
        joint = pairs.with_negatives(*draw_hard_negatives(image_features, text_features, temperature))
        num_matched = len(joint.input_ids)
        if masked_input_ids is not None and masked_token_ids is not None:
            joint = joint.and_then(pairs._replace(input_ids=masked_input_ids))
            masked_token_ids = masked_token_ids + num_matched * masked_input_ids.shape[1]
        fused = self.backbone(joint.pixel_values, joint.input_ids, joint.attention_mask, joint.image_mask)
        logits = heads.classifier(fused.stream.padded()[:num_matched, fused.num_image_tokens]).float()
        moe = merge_outputs(images.moe, texts.moe, fused.moe)
        matching = MatchingOutput(image_features, text_features, temperature, logits)
        return EVEOutput(None, *self._predict_words(fused, masked_token_ids), moe, matching)


def _image_token_mask(image_mask: Tensor | None, visible_patch_mask: Tensor | None) -> Tensor | None:
    """(B,), (B, N_visible) -> (B, 1 + N_visible) with the class token first, or (B,) or None where that says it all."""
    if visible_patch_mask is None:
        return image_mask
    mask = F.pad(visible_patch_mask, (1, 0), value=True)
    return mask if image_mask is None else mask & image_mask.unsqueeze(1)


def _text_tokens(encoded: BackboneOutput, ids: Tensor) -> Tensor:
    """(M, D) states of the text tokens with the flat indices `ids` (M,) into B * L."""
    layout = encoded.stream.layout
    length = layout.mask.shape[1]
    text_length = length - encoded.num_image_tokens
    positions = ids // text_length * length + encoded.num_image_tokens + ids % text_length
    return encoded.stream.hidden_states.index_select(0, layout.places[positions])


def model_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of the plain model's tensors; nothing is allocated."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in EVE(config).state_dict().items()}


@torch.no_grad()
def initialize_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw matrices, embeddings and routers from a normal truncated at one standard deviation; biases 0, norms 1.

    Every expert is drawn separately. Position embeddings and class tokens have a scale of their own. A parameter's
    values depend on (seed, plain name) only, so a process that holds some of the experts draws what the process that
    holds all of them would. `model` may name its parameters in either way of :mod:`eve_ds.model.naming`.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Conv2d | StackedLinear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, parameter in plain_named_tensors(model):
        kind = name.rpartition(".")[2]
        if kind == "position" and config.position_init == "sincos" and not parameter.is_meta:
            side = None if "text_embedding" in name else config.image_size // config.patch_size
            parameter.copy_(config.position_initializer_range * _sincos_table(parameter, side))
        elif kind in {"position", "class_token", "mask_token"}:
            _truncated_normal(parameter, config.position_initializer_range, seed, name)
        elif parameter.ndim >= 2 or kind == "modality":
            _truncated_normal(parameter, config.initializer_range, seed, name)


def _sincos_table(position: Tensor, side: int | None) -> Tensor:
    """Sines and cosines in the shape of a position table (rows, D): 2-D for `side` x `side` patches, else 1-D.

    Wavelengths along an axis of patches run from 4 patches to 4 * `side`: the customary ones, up to 60,000, hardly
    change over a grid. Texts have up to 600 tokens. The row of the class token, if there is one before those of the
    patches, stays 0.
    """
    rows, width = position.shape
    if side is None:
        return _sines(rows, width, 2 * math.pi, 200 * math.pi)
    line = _sines(side, width // 2, 4.0, 4.0 * side)
    row, column = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    grid = torch.cat([row, column], dim=-1).flatten(0, 1)
    return F.pad(grid, (0, 0, rows - side**2, 0))


def _sines(places: int, width: int, shortest: float, longest: float) -> Tensor:
    """(places, width): `width` / 2 wavelengths in geometric steps, their sines and then their cosines."""
    steps = torch.linspace(0, 1, width // 2)
    angles = torch.arange(places)[:, None] * 2 * math.pi / (shortest * (longest / shortest) ** steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _truncated_normal(tensor: Tensor, std: float, seed: int, name: str) -> None:
    if tensor.is_meta:
        return
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(tensor.device).manual_seed(int.from_bytes(digest[:8], "little"))
    nn.init.trunc_normal_(tensor, std=std, a=-std, b=std, generator=generator)
