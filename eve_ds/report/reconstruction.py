"""Predictions of a model for masked pairs: reconstructed images and predicted words, and their figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eve_ds import ops
from eve_ds.config import ModelConfig
from eve_ds.data.batch import Batch
from eve_ds.evaluation.scenes import predict_masked, with_whole_caption, with_whole_image
from eve_ds.printable import printable
from eve_ds.report.style import FAINT, INK, RIGHT_COLOR, WRONG_COLOR, save

MASKED_GRAY = 0.62
"""Value of masked patches in figures, in [0, 1]."""
ROW_HEIGHT, PICTURE, GAP, TEXT_WIDTH = 1.3, 1.18, 0.12, 5.0
"""Sizes of the figure, in inches."""
FONT_SIZE = 9.5
"""Font size of captions, in points."""
CHARACTER = 0.602 * FONT_SIZE / 72
"""Width of a character of DejaVu Sans Mono, the monospace font of matplotlib, in inches."""
LINE = 0.235
"""Distance of text lines, in inches."""


class Word(NamedTuple):
    """One token of a caption."""

    text: str
    """Token in the caption."""
    prediction: str | None
    """Prediction of the model; None: the token was visible."""


class Example(NamedTuple):
    """One sample; images are (H, W, 3) fp32 in [0, 1]."""

    original: Tensor
    """Image before masking."""
    masked: Tensor
    """Image with masked patches in gray."""
    reconstructed: Tensor
    """Image with masked patches as predicted."""
    words: tuple[Word, ...]
    """Tokens of the caption without special tokens; empty without a caption."""


@torch.no_grad()
def reconstruct(
    model: nn.Module, batch: Batch, tokenizer: PreTrainedTokenizerFast, config: ModelConfig, eps: float = 1e-6
) -> list[Example]:
    """Predict the masked patches and words of a batch in the views that the model was trained on.

    With `mim` and `mlm`, patches are predicted given the whole caption, and words given the whole image. With `joint`,
    both are predicted at once from the visible parts. Normalized pixel predictions are converted back with the mean and
    standard deviation of the true patch, as in the figures of masked autoencoders (He et al. 2022): the average color
    and contrast of a patch are given, its content is predicted.

    Args:
        model: an EVE in evaluation mode.
        batch: batch with images, in which every masked patch is to be predicted.
        tokenizer: tokenizer of the batch.
        config: configuration of the model.
        eps: value that the training loss adds to the variance.

    Returns:
        One example for each sample with an image.

    Raises:
        ValueError: some masked patches are not to be predicted; the figure would show them as visible.
    """
    pixel_values = batch.normalized_pixels
    assert pixel_values is not None
    assert batch.visible_patch_ids is not None
    assert batch.masked_patch_ids is not None
    true = ops.patchify(pixel_values, config.patch_size)  # (B, N, P * P * 3)
    unseen = true.shape[1] - batch.visible_patch_ids.shape[1]
    if batch.masked_patch_ids.shape[1] != unseen:
        raise ValueError(
            f"patches to predict ({batch.masked_patch_ids.shape[1]}) must be all masked patches ({unseen}): "
            "collate with masking.predicted_patch_share 1"
        )
    is_joint = "joint" in config.objectives
    pixels = predict_masked(model, batch if is_joint else with_whole_caption(batch)).pixel_predictions
    words = predict_masked(model, batch if is_joint else with_whole_image(batch))
    index = batch.masked_patch_ids.unsqueeze(-1).expand(-1, -1, true.shape[-1])
    hidden = true.gather(1, index)
    assert pixels is not None
    predicted = pixels.float()
    if config.normalizes_pixels:
        mean, variance = hidden.mean(dim=-1, keepdim=True), hidden.var(dim=-1, keepdim=True)
        predicted = predicted * (variance + eps).sqrt() + mean
    gray = torch.full_like(hidden, 2 * MASKED_GRAY - 1)
    versions = [true, true.scatter(1, index, gray), true.scatter(1, index, predicted)]
    side = pixel_values.shape[-1]
    original, masked, filled = (
        (unpatchify(patches, config.patch_size, side).permute(0, 2, 3, 1) * 0.5 + 0.5).clamp(0, 1).cpu()
        for patches in versions
    )
    guessed = words.token_logits().argmax(dim=-1) if words.token_hidden is not None else None
    shown = _words(batch, guessed, tokenizer)
    present = range(len(batch)) if batch.image_mask is None else batch.image_mask.nonzero().flatten().tolist()
    return [Example(original[i], masked[i], filled[i], shown[i]) for i in present]


def unpatchify(patches: Tensor, patch_size: int, image_size: int) -> Tensor:
    """Inverse of :func:`eve_ds.ops.patchify`: (B, N, P * P * C) -> (B, C, S, S)."""
    cells = image_size // patch_size
    grid = patches.view(patches.shape[0], cells, cells, patch_size, patch_size, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, image_size, image_size)


def note_on(config: ModelConfig) -> str:
    """Return the note of the figure: masked parts, visible parts, and display of predictions."""
    shown = (
        "both were predicted at once from the visible parts."
        if "joint" in config.objectives
        else "patches were predicted given the whole caption, words given the whole image."
    )
    shade = "\nPredicted patches are shown with the true patch's mean and deviation."
    return f"Patches and words in boxes were masked; {shown}{shade if config.normalizes_pixels else ''}"


def plot_reconstructions(examples: list[Example], path: Path, title: str, note: str) -> Path:
    """Draw one row per example (original, masked, reconstructed, caption), with the note below; returns the path."""
    top, bottom = 0.95, 0.5
    width = 3 * PICTURE + 4 * GAP + TEXT_WIDTH
    height = top + ROW_HEIGHT * len(examples) + bottom
    figure = Figure(figsize=(width, height))
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set_axis_off()
    canvas.set_xlim(0, width)
    canvas.set_ylim(0, height)
    canvas.text(GAP, height - 0.28, title, fontsize=11, color=INK, va="center")
    for i, heading in enumerate(("original", "masked", "reconstructed")):
        canvas.text(GAP + i * (PICTURE + GAP), height - 0.75, heading, fontsize=9, color=FAINT, va="center")
    left = 3 * (PICTURE + GAP) + 2 * GAP
    key = (
        Word("visible word", None),
        Word("predicted correctly", "predicted correctly"),
        Word("truth", "wrong prediction"),
    )
    _draw_words(canvas, key, left, height - 0.75)
    for row, example in enumerate(examples):
        base = height - top - (row + 1) * ROW_HEIGHT + (ROW_HEIGHT - PICTURE) / 2
        for i, image in enumerate(example[:3]):
            x = GAP + i * (PICTURE + GAP)
            canvas.imshow(image.numpy(), extent=(x, x + PICTURE, base, base + PICTURE), interpolation="nearest")
        _draw_words(canvas, example.words or (Word("(no caption)", None),), left, base + PICTURE - 0.22)
    canvas.set_xlim(0, width)  # imshow changed the limits
    canvas.set_ylim(0, height)
    canvas.set_aspect("auto")
    canvas.text(GAP, bottom / 2, note, fontsize=7.5, color=FAINT, va="center")
    return save(figure, path)


def _words(batch: Batch, predictions: Tensor | None, tokenizer: PreTrainedTokenizerFast) -> list[tuple[Word, ...]]:
    if batch.input_ids is None or batch.attention_mask is None:
        return [()] * len(batch)
    truth = batch.input_ids.flatten()
    guesses: dict[int, int] = {}
    if batch.masked_token_ids is not None and predictions is not None:
        guesses = dict(zip(batch.masked_token_ids.tolist(), predictions.tolist(), strict=True))
    special = set(tokenizer.all_special_ids)
    length = batch.input_ids.shape[1]
    rows = []
    for row, seen in enumerate(batch.attention_mask.tolist()):
        words = []
        for place in (row * length + column for column, real in enumerate(seen) if real):
            guess = _shown(tokenizer, guesses[place]) if place in guesses else None
            if guess is not None or int(truth[place]) not in special:
                words.append(Word(_shown(tokenizer, int(truth[place])), guess))
        rows.append(tuple(words))
    return rows


def _shown(tokenizer: PreTrainedTokenizerFast, token_id: int) -> str:
    return str(tokenizer.decode([token_id])).strip() or str(tokenizer.convert_ids_to_tokens(token_id))


def _draw_words(canvas: Axes, words: tuple[Word, ...], left: float, y: float) -> None:
    """Draw words from left to right, wrapped at the width of the text column, on at most five lines."""
    x, right, lowest = left, left + TEXT_WIDTH - 2 * GAP, y - 4 * LINE
    for word in words:
        right_guess = word.prediction == word.text
        text = printable(word.text if word.prediction is None or right_guess else f"{word.prediction} ({word.text})")
        span = len(text) * CHARACTER
        if x + span > right and x > left:
            x, y = left, y - LINE
        if y < lowest:
            canvas.text(x, y + LINE, "...", fontsize=FONT_SIZE, color=FAINT, va="center", family="monospace")
            return
        color = INK if word.prediction is None else RIGHT_COLOR if right_guess else WRONG_COLOR
        if word.prediction is not None:
            box = (x - 0.03, y - 0.095)
            canvas.add_patch(Rectangle(box, span + 0.06, 0.19, facecolor=color, alpha=0.13, linewidth=0))
        style: dict[str, Any] = {"fontsize": FONT_SIZE, "color": color, "va": "center", "family": "monospace"}
        canvas.text(x, y - 0.01, text, parse_math=False, **style)  # a "$" in a caption is no formula
        x += span + 1.4 * CHARACTER
