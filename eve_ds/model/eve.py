"""EVE (Chen et al., AAAI 2024): block, backbone, and the pre-training model on top of it.

Reading order: `EVE.forward` makes the views of a batch that its objectives need, such as a masked image beside a whole
caption. `Backbone.encode` embeds each view, joins its image and text tokens into one stream, packs the streams and runs
the blocks over them. Heads then predict the hidden parts of each view.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
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
from eve_ds.model.moe import MoE, MoEOutput, Peers, plain_named_tensors
from eve_ds.model.stream import TokenStream, join
from eve_ds.model.view_check import check_view
from eve_ds.model.vocabulary import Vocabulary, Words
from eve_ds.objectives.contrastive import MatchingHeads, MatchingOutput
from eve_ds.objectives.objective import Objective
from eve_ds.objectives.registry import OBJECTIVES, objectives_of
from eve_ds.views import Layout, Packing, View, joined, views_of

CHECKPOINT = partial(checkpoint, use_reentrant=False)
"""Activation checkpointing of torch, which recomputes what it did not keep."""
MoEFactory = Callable[[ModelConfig], nn.Module]
"""Makes the MoE of one layer; its forward has the signature of :meth:`eve_ds.model.moe.MoE.forward`."""


class BackboneOutput(NamedTuple):
    """Encoded stream of one view and the outputs of its MoE layers."""

    stream: TokenStream
    """Token states after the final LayerNorm; `stream.padded()` lays them out by sample."""
    moe: tuple[MoEOutput, ...]
    """One output per MoE layer, shallow to deep, for this view; their `hidden_states` are internal."""
    block_states: tuple[Tensor, ...] = ()
    """(N, D) tokens before the first block and after each block, if they were asked for."""

    @property
    def num_image_tokens(self) -> int:
        """Number of positions that a sample has for image tokens, class token included; 0 without images."""
        return self.stream.layout.num_image_positions


class EVEOutput(NamedTuple):
    """Predictions of one pre-training forward."""

    vocabulary: Words
    """Vocabulary for `token_hidden`."""
    moe: dict[str, tuple[MoEOutput, ...]]
    """View name -> one output per MoE layer, shallow to deep."""
    pixel_predictions: Tensor | None = None
    """(B_i, N_masked, P * P * 3) pixels for the B_i samples of the image view, raw or normalized as `pixel_target` of
    the config says."""
    token_hidden: Tensor | None = None
    """(M, D) states of the M masked tokens; logits are `token_hidden @ vocabulary.weight.T + vocabulary.bias`."""
    matching: MatchingOutput | None = None
    """Predictions of `itc` and `itm`; None without the objective `itc`."""
    more: Mapping[str, Any] = MappingProxyType({})
    """Predictions that only one objective has, by name."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the predictions that this batch has, by name, to check whether two copies of a model agree."""
        named = {"pixel_predictions": self.pixel_predictions}
        if self.token_hidden is not None:
            named["token_logits"] = self.token_logits()
        if self.matching is not None:
            # The logits of hard negatives are left out: their draws are random.
            pairs = len(self.matching.image_features)
            named |= {"image_features": self.matching.image_features, "text_features": self.matching.text_features}
            named["matching_logits"] = None if self.matching.logits is None else self.matching.logits[:pairs]
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def token_logits(self) -> Tensor:
        """Return the logits (M, V) of the masked tokens; raises ValueError for a batch without text."""
        if self.token_hidden is None:
            raise ValueError("no token logits: this batch had no text")
        return self.vocabulary.logits(self.token_hidden)


class Block(nn.Module):
    """x + gamma_1 * attention(norm x), then x + gamma_2 * ffn(norm x); in deep layers ffn is the MoE."""

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
        self.checkpoint: Callable[..., Any] | None = None
        """Function that runs the block in training without keeping its activations; None: they are kept."""
        self.compiled: Callable[..., tuple[Tensor, ...]] | None = None
        """Compiled :meth:`compute`, set by :meth:`Backbone.compile_blocks` and used in training only."""

    def forward(
        self, hidden_states: Tensor, packing: Packing, kept: Tensor | None = None, peers: Peers | None = None
    ) -> tuple[Tensor, ...]:
        """Map tokens (N, D) of one or several views to (N, D) and, in a deep layer, the other results of the MoE.

        Those are what :meth:`eve_ds.model.moe.MoE.outputs` takes beside the tokens. `kept` comes from
        :meth:`draw_kept`.
        """
        compute = self.compiled if self.training and self.compiled is not None else self.compute
        return compute(hidden_states, packing, kept, peers)

    def compute(
        self, hidden_states: Tensor, packing: Packing, kept: Tensor | None, peers: Peers | None
    ) -> tuple[Tensor, ...]:
        """The whole :meth:`forward`, which can be compiled.

        It returns tensors only, and reads nothing that differs between layers of one kind, such as the drop-path rate,
        so these layers share one compiled graph.
        """
        x = hidden_states
        branch = self.gamma_1 * self.attention(self.norm1(x), packing.layouts)
        x = x + (branch if kept is None else branch * kept[0])
        if self.is_moe:
            view_sizes = None if len(packing.layouts) == 1 else packing.view_sizes
            branch, *moe = cast(MoE, self.moe).mix(self.norm2(x), packing.modality_ids, packing.real, view_sizes, peers)
        else:
            branch, moe = self.ffn(x, packing), []
        branch = self.gamma_2 * branch
        return x + (branch if kept is None else branch * kept[1]), *moe

    def draw_kept(self, packing: Packing, dtype: torch.dtype) -> Tensor | None:
        """Draw which residual branches are dropped for which samples of a view (stochastic depth).

        Returns:
            (2, N, 1) factors of a token's attention branch and feed-forward branch: 0 where the branch is dropped, else
            the factor that keeps the mean; None if no branch is dropped.
        """
        if not self.training or self.drop_path_rate == 0.0:
            return None
        keep = 1.0 - self.drop_path_rate
        device = packing.modality_ids.device
        sizes = 2 * [layout.mask.shape[0] for layout in packing.layouts]
        drawn = [torch.empty(size, 1, dtype=dtype, device=device).bernoulli_(keep) / keep for size in sizes]
        return torch.cat(drawn).unflatten(0, (2, -1))[:, packing.sample_ids]


class Backbone(nn.Module):
    """Embeddings, blocks and final LayerNorm, the modules that the released weights cover."""

    def __init__(self, config: ModelConfig, moe_cls: MoEFactory = MoE) -> None:
        super().__init__()
        self.keep_padding = config.keeps_padding
        """Whether padding is computed too, as the released model routes it; other results are the same, but slower."""
        self.image_size, self.num_patches = config.image_size, config.num_patches
        self.image_embedding = ImageEmbedding(config)
        self.text_embedding = TextEmbedding(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config, layer, moe_cls) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        visible_patch_ids: Tensor | None = None,
        visible_patch_mask: Tensor | None = None,
        keep_states: bool = False,
    ) -> BackboneOutput:
        """Encode one view of images (B, 3, H, W), texts (B, L) or pairs.

        The arguments are the fields of :class:`View`, and `keep_states` of :meth:`encode`. Raises ValueError for a
        tensor of another shape or dtype.
        """
        view = View(pixel_values, input_ids, attention_mask, image_mask, visible_patch_ids, visible_patch_mask)
        return self.encode([view], keep_states)[0]

    def encode(self, views: Sequence[View], keep_states: bool = False) -> list[BackboneOutput]:
        """Encode views in one pass; except for rounding and random draws, no view's result depends on the other views.

        Matrix products run once over the tokens of all views. Attention and router statistics keep the views apart, and
        where experts have a capacity, each view has its own. With `keep_states`, the result has the tokens between the
        blocks.
        """
        streams = [self._embed(view) for view in views]
        packing = Packing.of([stream.layout for stream in streams])
        x = joined([stream.hidden_states for stream in streams])
        mixed: list[tuple[Tensor, ...]] = []
        kept = [x]
        for block in cast(Iterable[Block], self.blocks):
            x, *moe = self._run(block, x, packing)
            if keep_states:
                kept.append(x)
            if block.is_moe:
                mixed.append((x, *moe))
        moe_outputs = self._moe_outputs(mixed, len(views))
        states = self.norm(x).split(packing.view_sizes)
        between = (
            list(zip(*(x.split(packing.view_sizes) for x in kept), strict=True)) if keep_states else [()] * len(views)
        )
        return [
            BackboneOutput(TokenStream(own, layout), tuple(moe), block_states)
            for own, layout, moe, block_states in zip(states, packing.layouts, moe_outputs, between, strict=True)
        ]

    def checkpoint_blocks(self, function: Callable[..., Any] | None = CHECKPOINT, every: int = 1) -> None:
        """Keep no activations of every `every`-th block in training, and compute them again in the backward.

        `function` runs a block with its arguments; None turns this off.
        """
        for number, block in enumerate(cast(Iterable[Block], self.blocks)):
            block.checkpoint = function if number % every == 0 else None

    def compile_blocks(self, backend: str | Callable[..., object] = "inductor") -> None:
        """Compile one graph for every kind of block, for any number of tokens; training uses it, evaluation does not.

        Call it before DeepSpeed wraps the model. MoE layers whose experts are spread over ranks are not compiled: only
        the host knows how many rows they exchange.
        """
        for block in cast(Iterable[Block], self.blocks):
            if not block.is_moe or cast(MoE, block.moe).is_compilable:
                block.compiled = torch.compile(block.compute, dynamic=True, fullgraph=True, backend=backend)

    def _embed(self, view: View) -> TokenStream:
        check_view(view, self.image_size)
        layout = view.layout
        if layout is None:
            layout = view.layout_of(self.num_patches, self.keep_padding)
        image = None if view.pixel_values is None else self.image_embedding(view.pixel_values, view.visible_patch_ids)
        text = None if view.input_ids is None else self.text_embedding(view.input_ids)
        stream = join(image, text, layout)
        return stream._replace(hidden_states=self.pre_norm(stream.hidden_states))

    def _run(self, block: Block, x: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        kept = block.draw_kept(packing, x.dtype)
        if block.checkpoint is not None and self.training:
            return block.checkpoint(block, x, packing, kept, _peers(block, packing, recomputed=True))
        return block(x, packing, kept, _peers(block, packing, recomputed=False))

    def _moe_outputs(self, mixed: list[tuple[Tensor, ...]], num_views: int) -> list[list[MoEOutput]]:
        """Outputs by view and layer from the results of all layers, which may ask the other ranks once."""
        if not mixed:
            return [[] for _ in range(num_views)]
        first = next(block for block in cast(Iterable[Block], self.blocks) if block.is_moe)
        layers = cast(MoE, first.moe).outputs(mixed)
        by_view = [[layer] if num_views == 1 else layer.by_view() for layer in layers]
        return [list(of_view) for of_view in zip(*by_view, strict=True)]


def _peers(block: Block, packing: Packing, recomputed: bool) -> Peers | None:
    """What an MoE layer knows of other ranks; None where it has no use for it."""
    if not block.is_moe or cast(MoE, block.moe).is_compilable:
        return None
    return Peers(tuple(layout.tokens_of_group for layout in packing.layouts), {} if recomputed else None)


class EVE(nn.Module):
    """Backbone and the heads of the pre-training objectives in `config.objectives`; other heads are None."""

    def __init__(self, config: ModelConfig, moe_cls: MoEFactory = MoE) -> None:
        super().__init__()
        self.config = config
        self.objectives = objectives_of(config)
        self.pack_views = True
        """Whether views that do not depend on each other are encoded in one pass; False: in one pass each."""
        self.vocabulary_of: Callable[[nn.Module, Tensor | None], Words] = Vocabulary.of
        """Makes the vocabulary of the word embedding and the bias of the text head."""
        # Drawn before the modules are made: the number of draws for those depends on the experts of this rank.
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
        """Predict the hidden parts of each view; an objective without data in the batch is skipped.

        Args:
            pixel_values: (B, 3, H, W) normalized to mean = std = 0.5, or None for text alone.
            image_mask: (B,) bool, False = this sample has no image; None = all have one.
            visible_patch_ids: (B_i, N_visible) int64 patches that the image view shows.
            visible_patch_mask: (B_i, N_visible) bool, False = hide this one too; None = hide none of them.
            masked_patch_ids: (B_i, N_masked) int64 patches to predict; None = predict none.
            input_ids: (B, L) int64 whole captions, or None for images alone.
            attention_mask: (B, L) bool, True = real token; None = all are.
            masked_token_ids: (M,) int64 flat indices into B * L of the real tokens to predict; None = predict none.
            masked_input_ids: (B, L) int64 captions with those tokens replaced; None: nothing is replaced;
                the view shows `input_ids`.
            image_view_ids: (B_i,) int64 samples of the image view, all with an image; None = all samples.
            image_view_text_mask: (B_i, L) bool tokens that the image view shows; None: the tokens of
                `attention_mask`.
            language_patch_ids: (B, N) int64 patches that the language view shows; None = all.
            layouts: token layout of each view, as the collator counted it; a view without one is laid out by its
                masks, for which the host waits for the accelerator.
            more: batch fields that only one objective uses.

        With the objective `joint`, the only view is an image view of all samples that shows the masked captions.

        Raises:
            ValueError: no objective has anything to predict, a text is longer than the position table, `itc` gets
                samples that are not pairs, or `itm` gets a single pair.
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
        """Predict patches and words of one view, whatever the objectives; see :meth:`forward` for the arguments.

        The model sees `input_ids` as passed, masked or not. A missing head predicts nothing.
        """
        view = View(pixel_values, input_ids, attention_mask, image_mask, visible_patch_ids, visible_patch_mask)
        inputs = {
            "visible_patch_ids": visible_patch_ids,
            "masked_patch_ids": masked_patch_ids,
            "masked_token_ids": masked_token_ids,
        }
        return self._predict([OBJECTIVES["joint"]], self.encode({"joint": view}), inputs)

    def encode(self, views: dict[str, View]) -> dict[str, BackboneOutput]:
        """Encode views by name, in one pass or in one pass each; raises ValueError if `views` is empty."""
        if not views:
            names = ", ".join(self.config.objectives)
            raise ValueError(f"the batch holds neither images nor texts that objectives ({names}) could use")
        if self.pack_views:
            return dict(zip(views, self.backbone.encode(list(views.values())), strict=True))
        return {name: self.backbone.encode([view])[0] for name, view in views.items()}

    def parameters_of_output(self) -> list[nn.Parameter]:
        """Parameters in the vocabulary of an output, which losses read after the forward has ended."""
        biases = [] if self.text_head is None else [self.text_head.bias]
        return [cast(nn.Parameter, self.backbone.text_embedding.word.weight), *biases]

    def _predict(
        self, objectives: Iterable[Objective], encoded: dict[str, BackboneOutput], inputs: Mapping[str, Any]
    ) -> EVEOutput:
        made: dict[str, Any] = {}
        for objective in objectives:
            made |= objective.predict(self, encoded, inputs, made)
        more = {name: made.pop(name) for name in made.keys() - EVEOutput._field_defaults.keys()}
        return EVEOutput(
            vocabulary=self.vocabulary_of(
                self.backbone.text_embedding.word, None if self.text_head is None else self.text_head.bias
            ),
            moe={name: view.moe for name, view in encoded.items()},
            more=more,
            **made,
        )


def model_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return names and shapes of the plain model's tensors, without allocating them."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in EVE(config).state_dict().items()}


SCALED_LIKE_POSITIONS = {"position", "class_token", "mask_token"}
"""Last name parts of the parameters that are drawn with `position_initializer_range`."""


@torch.no_grad()
def initialize_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw matrices, embeddings and routers from a normal truncated at one standard deviation; biases 0, norms 1.

    A tensor's values depend on (seed, plain name) only: a process that holds some of the experts gets the same values
    as a process with the whole model. Every expert is drawn separately. Position embeddings and class tokens use
    `position_initializer_range`. A parameter's plain name decides how it is drawn; other vectors, such as LayerScale,
    and tensors on the meta device stay as they are.

    Args:
        model: model whose parameter names follow either convention of :mod:`eve_ds.model.naming`.
        config: scales and the kind of position embeddings.
        seed: seed of all draws.
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
            parameter.copy_(_drawn(name, config, seed, parameter))


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

    Wavelengths along an axis of patches range from 4 to 4 * `side` patches: the customary wavelengths, up to 60,000,
    hardly vary over a grid. Wavelengths of texts range from 6 to about 600 tokens. If the table has a row for the class
    token, before the rows of the patches, that row stays 0.
    """
    rows, width = position.shape
    if side is None:
        return _sines(rows, width, 2 * math.pi, 200 * math.pi)
    line = _sines(side, width // 2, 4.0, 4.0 * side)
    row, column = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    grid = torch.cat([row, column], dim=-1).flatten(0, 1)
    return F.pad(grid, (0, 0, rows - side**2, 0))


def _sines(places: int, width: int, shortest: float, longest: float) -> Tensor:
    """Return (places, width): sines, then cosines, of `width` / 2 wavelengths in geometric steps."""
    steps = torch.linspace(0, 1, width // 2)
    angles = torch.arange(places)[:, None] * 2 * math.pi / (shortest * (longest / shortest) ** steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
