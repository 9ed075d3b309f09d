"""Views of a batch that the encoder sees, and the layout of their tokens.

A view is the part of the samples that one objective shows to the encoder, such as a masked image with a whole caption.
Its tokens form a stream without padding. Collation adds the layout of every view to the batch, because only the host
can count tokens without waiting for an accelerator. Code without layouts derives equal ones from the masks. This module
depends on torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE, TEXT = 0, 1
"""Modality ids."""


class Layout(NamedTuple):
    """Positions of N tokens among B samples of S positions each; image positions come first in a sample."""

    mask: Tensor
    """(B, S) bool, True = a real token."""
    token_ids: Tensor
    """(N,) int64, ascending: position of each token among the B * S."""
    places: Tensor
    """(B * S,) int64: token at each position, -1 = none."""
    modality_ids: Tensor
    """(N,) int64, IMAGE or TEXT."""
    by_modality: Tensor
    """(N,) int64: image tokens, then text tokens, each ascending."""
    ends: Tensor
    """(B + 1,) int32: first token of each sample, then N; the offsets that attention over packed samples takes."""
    sizes: tuple[int, int]
    """Number of image tokens and of text tokens."""
    num_image_positions: int
    """Number of positions per sample that image tokens may take."""
    longest: int
    """Number of tokens of the longest sample, or an upper bound of it."""
    keeps_padding: bool
    """Whether some or all positions that `mask` marks as padding are tokens too."""
    tokens_of_group: tuple[int, ...] | None = None
    """Number of tokens of this view on each rank that shares the experts, by place in their group; None = not known."""

    @classmethod
    def of(
        cls,
        mask: Tensor,
        num_image_positions: int = 0,
        *,
        keep_padding: bool = False,
        present: Tensor | None = None,
        sizes: tuple[int, int] | None = None,
        longest: int | None = None,
    ) -> Layout:
        """Layout of the tokens that (B, S) bool `mask` marks as real, optionally with padding kept as tokens.

        Args:
            mask: True = a real token.
            num_image_positions: number of leading positions that belong to images.
            keep_padding: keep every position outside the mask as a token, which attention ignores.
            present: (B, S) bool, True = keep this position; must include all real tokens, and may include others.
            sizes: numbers of image and text tokens. None counts them, and the host waits if the mask is on an
                accelerator.
            longest: see the field of this name. None means S, unless the tokens are counted here.
        """
        batch, length = mask.shape
        if keep_padding:
            present = torch.ones_like(mask)
            sizes = (batch * num_image_positions, batch * (length - num_image_positions))
        keeps_padding, present = present is not None, mask if present is None else present
        is_image = torch.arange(length, device=mask.device) < num_image_positions
        starts = F.pad(present.sum(1).cumsum(0), (1, 0))
        if sizes is None:
            in_image, in_all, longest = torch.stack(
                [(present & is_image).sum(), starts[-1], F.pad(starts.diff(), (1, 0)).max()]
            ).tolist()
            sizes = (in_image, in_all - in_image)
        kept = present.flatten()
        places = torch.where(kept, kept.cumsum(0) - 1, -1)
        token_ids = _inverse(places, sum(sizes))
        modality_ids = torch.where(is_image, IMAGE, TEXT)[token_ids % length] if length else token_ids
        is_text = modality_ids == TEXT
        rank = torch.where(is_text, sizes[IMAGE] + is_text.cumsum(0) - 1, (~is_text).cumsum(0) - 1)
        return cls(
            mask=mask,
            token_ids=token_ids,
            places=places,
            modality_ids=modality_ids,
            by_modality=_inverse(rank, sum(sizes)),
            ends=starts.to(torch.int32),
            sizes=sizes,
            num_image_positions=num_image_positions,
            longest=length if longest is None else longest,
            keeps_padding=keeps_padding,
        )

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.token_ids.shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether every position holds a token."""
        return self.num_tokens == self.places.shape[0]

    @property
    def modalities(self) -> tuple[int, ...]:
        """Modalities that can occur among the tokens, ascending."""
        have = (self.num_image_positions > 0, self.num_image_positions < self.mask.shape[1])
        return tuple(modality for modality in (IMAGE, TEXT) if have[modality])

    @property
    def real(self) -> Tensor | None:
        """(N,) bool, False = padding kept as a token; None if no padding is kept."""
        return self.mask.flatten().index_select(0, self.token_ids) if self.keeps_padding else None

    @property
    def key_mask(self) -> Tensor | None:
        """`mask`, or None if every position may be attended to: attention without a mask has faster kernels."""
        return None if self.is_whole and not self.keeps_padding else self.mask

    def sample_ids(self) -> Tensor:
        """(N,) int64 sample of each token."""
        return self.token_ids // self.mask.shape[1]

    def behind(self, count: int) -> Layout:
        """Layout of the same samples with `count` tokens prepended to each; the new tokens count as image tokens."""
        added = self.mask.new_ones(self.mask.shape[0], count)
        kept = (self.places >= 0).view_as(self.mask)
        return Layout.of(
            torch.cat([added, self.mask], dim=1),
            count + self.num_image_positions,
            present=torch.cat([added, kept], dim=1) if self.keeps_padding else None,
            sizes=(self.sizes[IMAGE] + added.numel(), self.sizes[TEXT]),
            longest=count + self.longest,
        )

    def with_each(self, change: Callable[[Tensor], Tensor]) -> Layout:
        """Layout with `change` applied to every tensor, such as a move to a device."""
        changed: dict[str, Any] = {
            name: change(value) for name, value in self._asdict().items() if isinstance(value, Tensor)
        }
        return self._replace(**changed)


def _inverse(places: Tensor, count: int) -> Tensor:
    """Invert an index: (count,) int64 index in (P,) `places` of each of 0 .. count - 1; entries of -1 are ignored."""
    positions = torch.arange(places.shape[0], device=places.device)
    spare = places.new_empty(count + 1)  # the last element takes the entries of -1
    return spare.scatter_(0, torch.where(places < 0, count, places), positions)[:count]


class View(NamedTuple):
    """Encoder input from B samples: images, texts, or both, whole or in part."""

    pixel_values: Tensor | None = None
    """(B, 3, H, W) normalized to mean = std = 0.5."""
    input_ids: Tensor | None = None
    """(B, L) int64."""
    attention_mask: Tensor | None = None
    """(B, L) bool, True = the token is in the view; None = all tokens are."""
    image_mask: Tensor | None = None
    """(B,) bool, False = the view has no image token of this sample; None = all samples have an image."""
    visible_patch_ids: Tensor | None = None
    """(B, N_visible) int64 ids of the patches in the view; None = all patches."""
    visible_patch_mask: Tensor | None = None
    """(B, N_visible) bool, False = this entry of `visible_patch_ids` is not in the view; None = all are."""
    layout: Layout | None = None
    """Layout of the tokens; None = derive it from the masks."""

    def layout_of(self, num_patches: int, keep_padding: bool = False) -> Layout:
        """Layout of the view; an image has `num_patches`, not counting the class token.

        Raises:
            ValueError: the view has neither images nor texts.
        """
        images = self._image_token_mask(num_patches)
        texts = None
        if self.input_ids is not None:
            everything = torch.ones_like(self.input_ids, dtype=torch.bool)
            texts = everything if self.attention_mask is None else self.attention_mask.bool()
        masks = [mask for mask in (images, texts) if mask is not None]
        if not masks:
            raise ValueError("a batch needs pixel_values or input_ids; both are None")
        num_image_positions = 0 if images is None else images.shape[1]
        sizes = None
        if self.image_mask is self.visible_patch_mask is self.attention_mask is None:  # shapes alone give the sizes
            sizes = (0 if images is None else images.numel(), 0 if texts is None else texts.numel())
        return Layout.of(torch.cat(masks, dim=1), num_image_positions, keep_padding=keep_padding, sizes=sizes)

    def _image_token_mask(self, num_patches: int) -> Tensor | None:
        """(B, 1 + N) bool with the class token first; None without images."""
        if self.pixel_values is None:
            return None
        shown = num_patches if self.visible_patch_ids is None else self.visible_patch_ids.shape[1]
        shape = (self.pixel_values.shape[0], 1 + shown)
        if self.visible_patch_mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=self.pixel_values.device)
        else:
            mask = F.pad(self.visible_patch_mask.bool(), (1, 0), value=True)
        return mask if self.image_mask is None else mask & self.image_mask.bool().unsqueeze(1)


class HasViews(Protocol):
    """Part of a pre-training objective that says which views it needs."""

    def views(self, inputs: Mapping[str, Any]) -> dict[str, View]:
        """Views by name; `inputs` are keyword arguments of `eve_ds.model.eve.EVE.forward`."""


def views_of(objectives: Iterable[HasViews], inputs: Mapping[str, Any]) -> dict[str, View]:
    """Views of a batch that the objectives need, by name, each with its layout if `inputs["layouts"]` has one."""
    layouts = inputs.get("layouts") or {}
    views = {name: view for objective in objectives for name, view in objective.views(inputs).items()}
    return {name: view._replace(layout=layouts.get(name)) for name, view in views.items()}


def layouts_of(
    objectives: Iterable[HasViews],
    fields: Mapping[str, Tensor | None],
    num_patches: int,
    keep_padding: bool = False,
) -> dict[str, Layout]:
    """Layout of each view of a batch, by view name.

    Args:
        objectives: objectives whose views are needed.
        fields: keyword arguments of `eve_ds.model.eve.EVE.forward`; further ones are ignored.
        num_patches: number of patches of a whole image.
        keep_padding: see :meth:`Layout.of`.
    """
    inputs: dict[str, Any] = dict(fields)
    inputs["masked_input_ids"] = None  # replaced words do not change the number of tokens
    if (pixel_values := fields.get("pixel_values")) is not None:
        inputs["pixel_values"] = pixel_values[:, :0]  # a view of some samples copies their pixels
    views = views_of(objectives, inputs)
    return {name: view.layout_of(num_patches, keep_padding) for name, view in views.items()}


def whole_view(inputs: Mapping[str, Any]) -> View:
    """View with all images and the whole captions."""
    return View(*(inputs.get(name) for name in ("pixel_values", "input_ids", "attention_mask", "image_mask")))


def chosen_samples(view: View, rows: Tensor | None) -> View:
    """Samples `rows` (B_i,) int64 of a view; None keeps all."""
    if rows is None:
        return view
    chosen: dict[str, Any] = {name: value[rows] for name, value in view._asdict().items() if isinstance(value, Tensor)}
    return View(**chosen)


def only_captioned_images(view: View) -> View:
    """View without images that have no caption, because no prediction would use them."""
    if view.pixel_values is None or view.attention_mask is None:
        return view
    captioned = view.attention_mask.any(dim=1)
    return view._replace(image_mask=captioned if view.image_mask is None else captioned & view.image_mask)


class Packing(NamedTuple):
    """Concatenation of the tokens of several views, and their order by modality."""

    layouts: tuple[Layout, ...]
    """One layout per view; each counts its own tokens from 0."""
    modality_ids: Tensor
    """(N,) int64, IMAGE or TEXT."""
    sample_ids: Tensor
    """(N,) int64 sample of each token, counted over all views."""
    order: Tensor | None
    """(N,) int64 tokens, image tokens first; None if all tokens have one modality."""
    places: Tensor | None
    """(N,) int64 place of each token in `order`; None if `order` is."""
    sizes: dict[int, int]
    """Number of tokens by modality; a modality that the views cannot have is absent."""

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> Packing:
        """Packing of at least one layout; the host never waits for the accelerator."""
        present = sorted({modality for layout in layouts for modality in layout.modalities})
        sizes = {modality: sum(layout.sizes[modality] for layout in layouts) for modality in present}
        samples = [layout.sample_ids() for layout in layouts]
        for number in range(1, len(layouts)):
            samples[number] = samples[number] + sum(layout.mask.shape[0] for layout in layouts[:number])
        order = _order_by_modality(layouts) if len(present) > 1 else None
        return cls(
            layouts=tuple(layouts),
            modality_ids=joined([layout.modality_ids for layout in layouts]),
            sample_ids=joined(samples),
            order=order,
            places=None if order is None else _inverse(order, order.shape[0]),
            sizes=sizes,
        )

    @property
    def view_sizes(self) -> list[int]:
        """Number of tokens of each view."""
        return [layout.num_tokens for layout in self.layouts]

    @property
    def real(self) -> Tensor | None:
        """(N,) bool, False = padding kept as a token; None if no padding is kept."""
        if not any(layout.keeps_padding for layout in self.layouts):
            return None
        return joined(
            [
                layout.token_ids.new_ones(layout.num_tokens, dtype=torch.bool) if layout.real is None else layout.real
                for layout in self.layouts
            ]
        )


def _order_by_modality(layouts: Sequence[Layout]) -> Tensor:
    """(N,) int64: image tokens of all views, then their text tokens."""
    images, texts, before = [], [], 0
    for layout in layouts:
        tokens = layout.by_modality + before if before else layout.by_modality
        images.append(tokens[: layout.sizes[IMAGE]])
        texts.append(tokens[layout.sizes[IMAGE] :])
        before += layout.num_tokens
    return torch.cat([*images, *texts])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenated parts; a single part is returned without a copy."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
