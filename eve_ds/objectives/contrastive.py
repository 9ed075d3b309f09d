"""Image-text contrast `itc` and matching `itm` (ALBEF, Li et al., 2021, without its momentum encoder).

EVE compares masked signal modeling with them (Table 5); the retrieval task trains with the same losses. EVE's one
encoder encodes single modalities and pairs alike: the fusion of a pair cannot reuse a pass over images or texts alone,
so a hard negative is encoded again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.config import MaskingConfig, ModelConfig
from eve_ds.objectives import flops
from eve_ds.objectives.objective import Counts, Gather, Objective, only_this_rank
from eve_ds.objectives.pairs import Pairs, layout_of_negatives
from eve_ds.views import View

if TYPE_CHECKING:
    from eve_ds.model.eve import EVE, BackboneOutput, EVEOutput

INITIAL_TEMPERATURE, LOWEST_TEMPERATURE = 0.07, 0.01
"""Temperatures of CLIP (Radford et al., 2021, section 2.5), which multiplies similarities by at most 100."""


IGNORED = -100
"""Label of a pair that no loss counts."""


class MatchingOutput(NamedTuple):
    """Predictions of `itc` and `itm` for B pairs."""

    image_features: Tensor
    """(B, D) fp32, each row of norm 1."""
    text_features: Tensor
    """(B, D) fp32, each row of norm 1."""
    temperature: Tensor
    """() fp32, divisor of similarities."""
    logits: Tensor | None
    """(3 * B, 2) fp32 logits of no match and match: B pairs, B texts beside a hard negative image, B images beside a
    hard negative text. None without the objective `itm`."""


class MatchingHeads(nn.Module):
    """Projections of the class token and of [CLS] (bias-free, D to D), a temperature, and for `itm` a classifier."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.image_projection = nn.Linear(width, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        # The logarithm is trained, so that an update changes the temperature by a share of its value. Its shape is (1,)
        # because DeepSpeed sends no scalars.
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(INITIAL_TEMPERATURE)))
        self.classifier = nn.Linear(width, 2) if config.matches_pairs else None

    def forward(
        self, class_states: Tensor | None, cls_states: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """States (B, D) of class tokens and of [CLS], or None -> features (B, D) of both, or None, and temperature."""
        images = None if class_states is None else self.image_features(class_states)
        texts = None if cls_states is None else self.text_features(cls_states)
        return images, texts, self.temperature()

    def temperature(self) -> Tensor:
        """Return the temperature, () fp32, at least `LOWEST_TEMPERATURE`."""
        return self.log_temperature.float().clamp(min=math.log(LOWEST_TEMPERATURE)).exp().squeeze(0)

    def image_features(self, class_states: Tensor) -> Tensor:
        """Map states (B, D) of class tokens to features (B, D), fp32, of norm 1."""
        return F.normalize(self.image_projection(class_states).float(), dim=-1)

    def text_features(self, cls_states: Tensor) -> Tensor:
        """Map states (B, D) of [CLS] to features (B, D), fp32, of norm 1."""
        return F.normalize(self.text_projection(cls_states).float(), dim=-1)


class Contrast(Objective):
    """`itc`: contrastive loss between features of images alone and of texts alone."""

    name = "itc"

    def heads(self, config: ModelConfig) -> dict[str, Callable[[], nn.Module]]:
        """Return the projections and the temperature, in `matching`."""
        return {"matching": lambda: MatchingHeads(config)}

    def views(self, inputs: Mapping[str, Any]) -> dict[str, View]:
        """Return `itc_image` and `itc_text`; raises ValueError for images without texts, or texts without images."""
        pairs = Pairs.of(inputs)
        return {
            "itc_image": View(pairs.pixel_values, image_mask=inputs.get("image_mask")),
            "itc_text": View(input_ids=pairs.input_ids, attention_mask=inputs.get("attention_mask")),
        }

    def predict(
        self, model: EVE, encoded: dict[str, BackboneOutput], inputs: Mapping[str, Any], made: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return `matching` without logits."""
        assert model.matching is not None
        image_states, text_states = (encoded[view].stream.padded()[:, 0] for view in ("itc_image", "itc_text"))
        images, texts, temperature = model.matching(image_states, text_states)
        return {"matching": MatchingOutput(images, texts, temperature, None)}

    def losses(
        self, output: EVEOutput, targets: Mapping[str, Any], counts: Counts, config: ModelConfig, gather: Gather
    ) -> dict[str, Tensor]:
        """Return `itc`; see :func:`pair_contrastive_loss`."""
        return {} if output.matching is None else {"itc": pair_contrastive_loss(output.matching, gather)}

    def forward_macs(self, config: ModelConfig, masking: MaskingConfig, text_tokens: float) -> float:
        """Multiply-adds of the encoder on the image alone and on the text alone."""
        return flops.pair_macs(config, config.num_patches, 0.0) + flops.encoder_macs(config, text_tokens)


class Matching(Objective):
    """`itm`: whether an image and a text belong together, on hard negatives that `itc` ranks."""

    name = "itm"
    min_pairs = 2

    def views(self, inputs: Mapping[str, Any]) -> dict[str, View]:
        """Return no view: :meth:`predict` encodes one, since the features of `itc` decide the negatives."""
        return {}

    def predict(
        self, model: EVE, encoded: dict[str, BackboneOutput], inputs: Mapping[str, Any], made: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return `matching` with logits; encodes the view `itm`. Raises ValueError for a single pair."""
        matching: MatchingOutput = made["matching"]
        heads = model.matching
        assert heads is not None
        assert heads.classifier is not None
        images, texts, temperature, _ = matching
        similarity = images.detach() @ texts.detach().t() / temperature.detach()
        mixed = Pairs.of(inputs).with_negatives(*draw_hard_negatives(similarity))
        view = View(mixed.pixel_values, mixed.input_ids, mixed.attention_mask, mixed.image_mask)
        layout = layout_of_negatives(
            mixed, encoded["itc_text"].stream.layout, encoded["itc_image"].num_image_tokens, model.backbone.keep_padding
        )
        encoded["itm"] = model.backbone.encode([view._replace(layout=layout)])[0]
        states = encoded["itm"].stream.padded()[:, encoded["itm"].num_image_tokens]
        return {"matching": matching._replace(logits=heads.classifier(states).float())}

    def late_tokens(self, view_tokens: Mapping[str, float]) -> dict[str, float]:
        """Count the tokens of three fusions per pair; a negative, not drawn yet, counts as the caption it replaces."""
        return {"itm": 3 * sum(view_tokens.get(view, 0.0) for view in ("itc_image", "itc_text"))}

    def losses(
        self, output: EVEOutput, targets: Mapping[str, Any], counts: Counts, config: ModelConfig, gather: Gather
    ) -> dict[str, Tensor]:
        """Return `itm`; see :func:`matching_loss`."""
        if output.matching is None or output.matching.logits is None:
            return {}
        return {"itm": matching_loss(output.matching.logits)}

    def forward_macs(self, config: ModelConfig, masking: MaskingConfig, text_tokens: float) -> float:
        """Multiply-adds of three fusions per pair."""
        return 3 * flops.pair_macs(config, config.num_patches, text_tokens)


class GlobalPairs(NamedTuple):
    """Features of the pairs of all ranks, and the place of this rank's pairs among them."""

    images: Tensor
    """(G, D) image features of all ranks."""
    texts: Tensor
    """(G, D) text features of all ranks."""
    first: int
    """Row of this rank's first pair."""

    @classmethod
    def of(cls, images: Tensor, texts: Tensor, gather: Gather) -> GlobalPairs:
        """Gather features (B, D) of this rank with `gather`; if that is a collective, B is the same on all ranks."""
        everyone, first = gather(torch.cat([images, texts], dim=1))
        all_images, all_texts = everyone.split(images.shape[1], dim=1)
        return cls(all_images, all_texts, first)


def pair_contrastive_loss(matching: MatchingOutput, gather: Gather = only_this_rank) -> Tensor:
    """Mean of image-to-text and text-to-image cross entropy over this rank's pairs, () fp32 (CLIP section 2.3).

    A pair's negatives are all other pairs of the global micro-batch, which is the micro-batches of one micro-step on
    all ranks. Its split over ranks does not change the loss. Gradient accumulation makes the global micro-batch smaller
    and thus the objective easier.
    """
    everyone = GlobalPairs.of(matching.image_features, matching.text_features, gather)
    count = len(matching.image_features)
    own = torch.arange(everyone.first, everyone.first + count, device=everyone.images.device)
    image_logits = matching.image_features @ everyone.texts.t() / matching.temperature
    text_logits = matching.text_features @ everyone.images.t() / matching.temperature
    return contrastive_loss(image_logits, text_logits, own)


def contrastive_loss(image_logits: Tensor, text_logits: Tensor, right: Tensor) -> Tensor:
    """Mean of image-to-text and text-to-image cross entropy, () fp32.

    Args:
        image_logits: (B, G) similarity of this rank's images to all texts, divided by the temperature.
        text_logits: (B, G) similarity of this rank's texts to all images, divided by the temperature.
        right: (B,) int64 column of each row's only partner, or (B, G) bool where a row has one or more partners, which
            share its target evenly.
    """
    return (_cross_entropy(image_logits, right) + _cross_entropy(text_logits, right)) / 2


def _cross_entropy(logits: Tensor, right: Tensor) -> Tensor:
    if right.dtype != torch.bool:
        return F.cross_entropy(logits, right)
    target = right.float() / right.sum(dim=1, keepdim=True)
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def matching_loss(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean cross entropy of match or no match over pairs and two hard negatives each, () fp32 (ALBEF section 3.2).

    Args:
        logits: (3 * B, 2), see :class:`MatchingOutput`. Negatives come from this rank's micro-batch, so they depend on
            the split over ranks and micro-steps.
        labels: (3 * B,) int64, 1 = match; None: the first third matches. A row labeled IGNORED does not count.
    """
    if labels is None:
        labels = (torch.arange(len(logits), device=logits.device) < len(logits) // 3).long()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


@torch.no_grad()
def draw_hard_negatives(similarity: Tensor, same: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw a wrong partner for every image and every text; similar ones are more likely.

    Probabilities are the softmax of the similarities to wrong partners (ALBEF section 3.2). Random numbers come from
    torch's default generator of the device.

    Args:
        similarity: (B, B) of images (rows) to texts (columns), divided by the temperature; row i belongs to column i.
        same: (B, B) bool, symmetric, True = right pair, diagonal included; None: only the diagonal is right.

    Returns:
        image_ids (B,) int64, an image for every text, and text_ids (B,) int64, a text for every image. Where `same`
        leaves no wrong partner, the id is that of a right partner.

    Raises:
        ValueError: a single pair without `same`, which has no negative.
    """
    if same is None:
        if len(similarity) < 2:
            raise ValueError(f"hard negatives need at least 2 pairs, not {len(similarity)}: raise the micro-batch size")
        logits = similarity.clone().fill_diagonal_(-math.inf)
    else:
        logits = similarity.masked_fill(same & ~same.all(dim=1, keepdim=True), -math.inf)
    text_ids = _draw(logits.softmax(dim=1))
    image_ids = _draw(logits.softmax(dim=0).t())
    return image_ids, text_ids


def _draw(probabilities: Tensor) -> Tensor:
    """Draw one of N columns per row, (B, N) -> (B,) int64, as `torch.multinomial` does, but without a host sync."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=1)
