"""EVE (Chen et al., AAAI 2024): parts, block, backbone, and the pre-training model on top of it.

Reading order: `EVE.forward` makes the views of a batch that its objectives need, such as a masked image beside a whole
caption; `Backbone.encode` embeds each, joins its image and text tokens into one stream, packs the streams and runs the
blocks over them; heads then predict from each view what is hidden in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eve_ds.config import ModelConfig
from eve_ds.model.attention import SelfAttention
from eve_ds.model.decoders import PixelDecoder, TextHead
from eve_ds.model.embeddings import ImageEmbedding, TextEmbedding
from eve_ds.model.feed_forward import ModalityFeedForward, SharedFeedForward
from eve_ds.model.moe import MoE, MoEOutput, plain_named_tensors
from eve_ds.model.stream import TokenStream, join
from eve_ds.objectives.contrastive import MatchingHeads, MatchingOutput
from eve_ds.objectives.objective import Objective
from eve_ds.objectives.registry import OBJECTIVES, objectives_of
from eve_ds.views import Layout, Packing, View, joined, views_of

MoEFactory = Callable[[ModelConfig], nn.Module]
"""Makes the MoE of one layer; its forward has the signature of :meth:`eve_ds.model.moe.MoE.forward`."""


class BackboneOutput(NamedTuple):
    """Encoded stream and what the MoE layers said."""

    stream: TokenStream
    """After the final LayerNorm; `stream.padded()` lays it out by sample."""
    moe: tuple[MoEOutput, ...]
    """One per MoE layer, shallow to deep, of this view; their `hidden_states` are internal."""

    @property
    def num_image_tokens(self) -> int:
        """Positions of a sample that image tokens may take, class token included; 0 without images."""
        return self.stream.layout.num_image_positions


class EVEOutput(NamedTuple):
    """Predictions of one pre-training forward."""

    vocabulary_weight: Tensor
    """(V, D), the word embedding."""
    vocabulary_bias: Tensor | None
    """(V,); None where the objectives have no words to predict."""
    moe: dict[str, tuple[MoEOutput, ...]]
    """View -> one per MoE layer, shallow to deep."""
    pixel_predictions: Tensor | None = None
    """(B_i, N_masked, P * P * 3) of the B_i samples of the image view, as `pixel_target` of the config says."""
    token_hidden: Tensor | None = None
    """(M, D) states of the masked tokens; logits are `token_hidden @ vocabulary_weight.T + vocabulary_bias`."""
    matching: MatchingOutput | None = None
    """None without the objective `itc`."""
    more: Mapping[str, Any] = MappingProxyType({})
    """Predictions that a single objective has for itself."""

    def tensors(self) -> dict[str, Tensor]:
        """Predictions by name, those that there are: by them two copies of a model can be told to be the same."""
        named = {"pixel_predictions": self.pixel_predictions}
        if self.token_hidden is not None:
            named["token_logits"] = self.token_logits()
        if self.matching is not None:
            # Not the negatives, which are drawn.
            pairs = len(self.matching.image_features)
            named |= {"image_features": self.matching.image_features, "text_features": self.matching.text_features}
            named["matching_logits"] = None if self.matching.logits is None else self.matching.logits[:pairs]
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
        self.is_moe = layer in config.expert_layers
        if self.is_moe:
            self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.moe = moe_cls(config)
        else:
            is_shared = layer in config.moe_layers and config.deep_ffn == "shared"
            self.ffn = SharedFeedForward(config) if is_shared else ModalityFeedForward(config)
        self.compiled: Callable[..., tuple[Tensor, ...]] | None = None
        """:meth:`compute` as training runs it after :meth:`Backbone.compile_blocks`; evaluation stays as it is."""

    def forward(
        self, hidden_states: Tensor, packing: Packing, kept: Tensor | None = None
    ) -> tuple[Tensor, MoEOutput | None]:
        """Tokens (N, D) of one or several views -> (N, D) and, in a deep layer, the MoE's output.

        Of several views that output has a dimension of views. `kept` is what :meth:`draw_kept` gives.
        """
        compute = self.compiled if self.training and self.compiled is not None else self.compute
        x, *moe = compute(hidden_states, packing, kept)
        return x, cast(MoE, self.moe).output(x, *moe) if self.is_moe else None

    def compute(self, hidden_states: Tensor, packing: Packing, kept: Tensor | None) -> tuple[Tensor, ...]:
        """As :meth:`forward`, with the MoE's output taken apart: what can be compiled.

        It returns tensors only, and nothing in it tells the layers of a kind apart, such as their rate of dropped
        paths: so they share one compiled graph.
        """
        x = hidden_states
        branch = self.gamma_1 * self.attention(self.norm1(x), packing.layouts)
        x = x + (branch if kept is None else branch * kept[0])
        if self.is_moe:
            view_sizes = None if len(packing.layouts) == 1 else packing.view_sizes
            branch, *moe = cast(MoE, self.moe).mix(self.norm2(x), packing.modality_ids, packing.real, view_sizes)
        else:
            branch, moe = self.ffn(x, packing), []
        branch = self.gamma_2 * branch
        return x + (branch if kept is None else branch * kept[1]), *moe

    def draw_kept(self, packing: Packing, dtype: torch.dtype) -> Tensor | None:
        """Draw which residual branches are dropped for which samples of a view (stochastic depth).

        Returns:
            (2, N, 1): 0 where a token's branch, attention or feed-forward, is dropped, else the factor that keeps the
            mean; None: none is dropped.
        """
        if not self.training or self.drop_path_rate == 0.0:
            return None
        keep = 1.0 - self.drop_path_rate
        device = packing.modality_ids.device
        sizes = 2 * [layout.mask.shape[0] for layout in packing.layouts]
        drawn = [torch.empty(size, 1, dtype=dtype, device=device).bernoulli_(keep) / keep for size in sizes]
        return torch.cat(drawn).unflatten(0, (2, -1))[:, packing.sample_ids]


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
        """Encode one view: images (B, 3, H, W), text (B, L), or pairs; arguments are the fields of :class:`View`."""
        view = View(pixel_values, input_ids, attention_mask, image_mask, visible_patch_ids, visible_patch_mask)
        return self.encode([view])[0]

    def encode(self, views: Sequence[View]) -> list[BackboneOutput]:
        """Encode views in one pass: but for rounding and random draws, what a view gives does not depend on the others.

        Matrix products run once over the tokens of all views; attention and the statistics of routers keep the views
        apart, and where experts have a capacity each view has its own.
        """
        streams = [self._embed(view) for view in views]
        packing = Packing.of([stream.layout for stream in streams])
        x = joined([stream.hidden_states for stream in streams])
        moe_outputs: list[list[MoEOutput]] = [[] for _ in views]
        for block in self.blocks:
            x, moe = self._run(cast(Block, block), x, packing)
            if moe is not None:
                for own, output in zip(moe_outputs, [moe] if len(views) == 1 else moe.by_view(), strict=True):
                    own.append(output)
        states = self.norm(x).split(packing.view_sizes)
        return [
            BackboneOutput(TokenStream(own, layout), tuple(moe))
            for own, layout, moe in zip(states, packing.layouts, moe_outputs, strict=True)
        ]

    def compile_blocks(self, backend: str | Callable[..., object] = "inductor") -> None:
        """Let `torch.compile` make one graph of every kind of block, for any number of tokens, to be used in training.

        Call it before DeepSpeed takes the model. MoE layers whose experts are spread over ranks stay as they are: how
        many rows they exchange is known to the host alone.
        """
        for block in cast(Iterable[Block], self.blocks):
            if not block.is_moe or cast(MoE, block.moe).is_compilable:
                block.compiled = torch.compile(block.compute, dynamic=True, fullgraph=True, backend=backend)

    def _embed(self, view: View) -> TokenStream:
        layout = view.layout
        if layout is None:
            layout = view.layout_of(len(self.image_embedding.position) - 1, self.keep_padding)
        image = None if view.pixel_values is None else self.image_embedding(view.pixel_values, view.visible_patch_ids)
        text = None if view.input_ids is None else self.text_embedding(view.input_ids)
        stream = join(image, text, layout)
        return stream._replace(hidden_states=self.pre_norm(stream.hidden_states))

    def _run(self, block: Block, x: Tensor, packing: Packing) -> tuple[Tensor, MoEOutput | None]:
        kept = block.draw_kept(packing, x.dtype)
        if self.activation_checkpointing and self.training:
            return checkpoint(block, x, packing, kept, use_reentrant=False)
        return block(x, packing, kept)


class EVE(nn.Module):
    """Backbone and the heads of the pre-training objectives `config.objectives`; other heads are None."""

    def __init__(self, config: ModelConfig, moe_cls: MoEFactory = MoE) -> None:
        super().__init__()
        self.config = config
        self.objectives = objectives_of(config)
        self.pack_views = True
        """Encode the views that do not wait for each other in one pass; False: in one pass each."""
        # Drawn before the modules are made, since what torch draws for those depends on how many experts are here.
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.backbone = Backbone(config, moe_cls)
        self.pixel_decoder: PixelDecoder | None = None
        self.text_head: TextHead | None = None
        self.matching: MatchingHeads | None = None
        heads = {name: make for objective in self.objectives for name, make in objective.heads(config).items()}
        for name, make in heads.items():
            setattr(self, name, make())
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
        image_view_ids: Tensor | None = None,
        image_view_text_mask: Tensor | None = None,
        language_patch_ids: Tensor | None = None,
        layouts: Mapping[str, Layout] | None = None,
        **more: Tensor,
    ) -> EVEOutput:
        """Predict the hidden parts of each view; an objective for which the batch has nothing is passed over.

        Args:
            pixel_values: (B, 3, H, W) normalized to mean = std = 0.5, or None for text alone.
            image_mask: (B,) bool, False = this sample has no image; None = all have one.
            visible_patch_ids: (B_i, N_visible) int64 patches that the image view shows.
            visible_patch_mask: (B_i, N_visible) bool, False = hide this one too; None = hide none of them.
            masked_patch_ids: (B_i, N_masked) int64 patches to predict; None = predict none.
            input_ids: (B, L) int64 whole captions, or None for images alone.
            attention_mask: (B, L) bool, True = real token; None = all are.
            masked_token_ids: (M,) int64 flat indices into B * L of the real tokens to predict; None = predict none.
            masked_input_ids: (B, L) int64 captions with those tokens replaced; None = `input_ids` are.
            image_view_ids: (B_i,) int64 samples of the image view, all with an image; None = all samples.
            image_view_text_mask: (B_i, L) bool tokens that the image view shows; None = `attention_mask`'s.
            language_patch_ids: (B, N) int64 patches that the language view shows; None = all.
            layouts: token layout of each view, as the collator counted them; a view without one is laid out by its
                masks, for which the host waits for an accelerator.
            more: batch fields that a single objective has for itself.

        With the objective `joint` the image view is the only one, of all samples, and shows the masked captions.

        Raises:
            ValueError: no objective has anything to predict, a text longer than the position table, for `itc` anything
                but pairs, or for `itm` a single pair.
        """
        inputs: dict[str, Any] = {
            "pixel_values": pixel_values,
            "image_mask": image_mask,
            "visible_patch_ids": visible_patch_ids,
            "visible_patch_mask": visible_patch_mask,
            "masked_patch_ids": masked_patch_ids,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "masked_token_ids": masked_token_ids,
            "masked_input_ids": masked_input_ids,
            "image_view_ids": image_view_ids,
            "image_view_text_mask": image_view_text_mask,
            "language_patch_ids": language_patch_ids,
            "layouts": layouts,
            **more,
        }
        return self._predict(self.objectives, self.encode(views_of(self.objectives, inputs)), inputs)

    def predict(
        self,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        visible_patch_ids: Tensor | None = None,
        visible_patch_mask: Tensor | None = None,
        masked_patch_ids: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        masked_token_ids: Tensor | None = None,
    ) -> EVEOutput:
        """Predict patches and words of one view, whatever the objectives; arguments as those of :meth:`forward`.

        `input_ids` are shown as they are, masked or not. A missing head predicts nothing.
        """
        view = View(pixel_values, input_ids, attention_mask, image_mask, visible_patch_ids, visible_patch_mask)
        inputs = {
            "visible_patch_ids": visible_patch_ids,
            "masked_patch_ids": masked_patch_ids,
            "masked_token_ids": masked_token_ids,
        }
        return self._predict([OBJECTIVES["joint"]], self.encode({"joint": view}), inputs)

    def encode(self, views: dict[str, View]) -> dict[str, BackboneOutput]:
        """Encode views by name, in one pass or in one each; raises ValueError without any view."""
        if not views:
            names = ", ".join(self.config.objectives)
            raise ValueError(f"the batch holds neither images nor texts that objectives ({names}) could use")
        if self.pack_views:
            return dict(zip(views, self.backbone.encode(list(views.values())), strict=True))
        return {name: self.backbone.encode([view])[0] for name, view in views.items()}

    def _predict(
        self, objectives: Iterable[Objective], encoded: dict[str, BackboneOutput], inputs: Mapping[str, Any]
    ) -> EVEOutput:
        made: dict[str, Any] = {}
        for objective in objectives:
            made |= objective.predict(self, encoded, inputs, made)
        more = {name: made.pop(name) for name in made.keys() - EVEOutput._field_defaults.keys()}
        return EVEOutput(
            vocabulary_weight=self.backbone.text_embedding.word.weight,
            vocabulary_bias=None if self.text_head is None else self.text_head.bias,
            moe={name: view.moe for name, view in encoded.items()},
            more=more,
            **made,
        )


def model_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of the plain model's tensors; nothing is allocated."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in EVE(config).state_dict().items()}


SCALED_LIKE_POSITIONS = {"position", "class_token", "mask_token"}
"""Last parts of the names of parameters that are drawn at `position_initializer_range`."""


class Shard(NamedTuple):
    """Part of a tensor that this process holds."""

    shape: torch.Size
    """Shape of the whole tensor."""
    cut: Callable[[Tensor], Tensor]
    """Takes the part out of the whole tensor."""


@torch.no_grad()
def initialize_weights(
    model: nn.Module, config: ModelConfig, seed: int, shards: Mapping[str, Shard] = MappingProxyType({})
) -> None:
    """Draw matrices, embeddings and routers from a normal truncated at one standard deviation; biases 0, norms 1.

    A tensor's values depend on (seed, plain name) only, and the whole tensor is drawn before it is cut: a process that
    holds some of the experts, or a shard of a matrix, holds what the process with the whole model would. Every expert
    is drawn separately. Position embeddings and class tokens have a scale of their own. A parameter's plain name
    decides which of these it is; other vectors, such as LayerScale, and tensors on the meta device stay as they are.

    Args:
        model: names its parameters in either way of :mod:`eve_ds.model.naming`.
        config: scales and the kind of position embeddings.
        seed: seed of all draws.
        shards: plain name -> part held here; a tensor that is not named is held whole.
    """
    for name, parameter in plain_named_tensors(model):
        kind = name.rpartition(".")[2]
        if parameter.is_meta:
            continue
        if kind.endswith("bias"):
            parameter.zero_()
        elif kind == "weight" and parameter.ndim == 1:  # LayerNorm
            parameter.fill_(1.0)
        elif kind in SCALED_LIKE_POSITIONS or parameter.ndim >= 2 or kind == "modality":
            shard = shards.get(name)
            whole = parameter if shard is None else parameter.new_empty(shard.shape)
            drawn = _drawn(name, config, seed, whole)
            parameter.copy_(drawn if shard is None else shard.cut(drawn))


def _drawn(name: str, config: ModelConfig, seed: int, like: Tensor) -> Tensor:
    """Initial value of a tensor with the shape, dtype and device of `like`."""
    kind = name.rpartition(".")[2]
    if kind == "position" and config.position_init == "sincos":
        side = None if "text_embedding" in name else config.image_size // config.patch_size
        return config.position_initializer_range * _sincos_table(like, side)
    std = config.position_initializer_range if kind in SCALED_LIKE_POSITIONS else config.initializer_range
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:8], "little"))
    return nn.init.trunc_normal_(torch.empty_like(like), std=std, a=-std, b=std, generator=generator)


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
