"""Evaluation on scenes: masked words and pixels, given the right or a wrong other modality, and binding.

A model that uses the image predicts a masked word better with the right image than with that of another scene; the gap
is the number to watch. As in the training of the paper, words are predicted given the whole image, and pixels given
the whole caption. Words are also predicted given a masked image, as in `joint`. The binding probe tests whether the
model knows which attribute belongs to which object in a scene of two objects.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eve_ds import ops
from eve_ds.config import Config, ConfigError, ModelConfig
from eve_ds.data.batch import Batch, Sample
from eve_ds.data.collate import Collator
from eve_ds.data.synthetic.probes import BindingProbe, ProbeType, binding_probes
from eve_ds.data.synthetic.scenes import (
    IMAGE_SIZE,
    WORD_CLASSES,
    LevelName,
    Scene,
    Scenes,
    word_class,
)
from eve_ds.distributed import all_reduce_sum
from eve_ds.model.eve import EVE, EVEOutput
from eve_ds.objectives.registry import objectives_of
from eve_ds.tasks.batches import chunks
from eve_ds.tasks.features.words import inner_words

SIDES = ("right", "wrong")
"""The other modality: of the same scene, or of another scene."""
MASKED = "masked_image."
"""Prefix of results with a masked image."""
SCENES_SEED = 0
"""Seed of the evaluation scenes; their descriptions occur in no training scene of any seed."""

SCENES_WITH_ALL_WORDS = 200
"""First scenes of each level that together have all words of its captions."""


class Tally:
    """Sums and counts by name, for means over several ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, values: Tensor) -> None:
        """Add values of any shape to the mean of `name`."""
        self.sums[name][0] += float(values.sum())
        self.sums[name][1] += values.numel()

    def means(self, names: Sequence[str]) -> dict[str, float]:
        """Return the mean of each name over all ranks; `names` must be the same on every rank."""
        total = all_reduce_sum(torch.tensor([self.sums[name] for name in names], dtype=torch.float64))
        return {name: float(total[i, 0] / total[i, 1].clamp(min=1)) for i, name in enumerate(names)}


def trains_on_scenes(config: Config) -> bool:
    """Whether :func:`evaluate_scenes` applies to the run.

    It applies if the run predicts masked words or pixels, and a source has pairs of scenes at their original size.
    """
    pairs = any(source.kind == "scenes" and source.modalities in ("pair", "any") for source in config.data.sources)
    predicts = config.model.predicts_words or config.model.predicts_pixels
    return pairs and config.model.image_size == IMAGE_SIZE and predicts


def word_without_token(tokenizer: PreTrainedTokenizerFast, config: Config) -> str | None:
    """Return a word of the evaluated captions that the tokenizer splits; None if each word is one token."""
    scenes = Scenes(_level(config), SCENES_SEED, "val")
    words = {word for index in range(SCENES_WITH_ALL_WORDS) for word in scenes[index].caption.split()}
    return min(words - tokenizer.get_vocab().keys(), default=None)


@torch.no_grad()
def evaluate_scenes(
    model: nn.Module,
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_scenes: int = 1024,
    batch_size: int = 128,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Evaluate masked words, foreground pixels and binding on validation scenes of the level of the training.

    Rank r evaluates every `world_size`-th scene, starting with scene r. All ranks run the same number of forward
    passes, as expert parallelism requires.

    Args:
        model: an EVE; in evaluation mode during the call.
        config: configuration of the run; its ratio of masked patches is used, its seed is not.
        tokenizer: tokenizer with one token per word of the captions.
        num_scenes: number of scenes over all ranks, a multiple of 2 * `world_size`; binding uses half as many.
        batch_size: scenes per forward pass.
        rank: rank of this process.
        world_size: number of ranks.

    Returns:
        For a model that predicts words:

        - `color`, `shape`, `size`, `position` -> {right, wrong}: accuracy of masked words, given the whole image; half
          of the words are masked.
        - `hidden_words` -> {right, wrong}: accuracy of all words, given the whole image; all words are masked.
        - `binding` (level `easy` only) -> probe -> {target, distractor}: fractions of the answers, given the whole
          image; phrases are in random order.
        - `masked_image`: the word classes and `binding` again, given an image with masked patches.

        For a model that predicts pixels:

        - `pixel_loss` -> {right, wrong}: squared error of masked foreground patches, given the whole caption, with the
          target of `model.pixel_target`.

    Raises:
        ConfigError: no objective predicts words or pixels, the model takes images of another size, or its tokenizer
            splits words of the captions.
    """
    if not (config.model.predicts_words or config.model.predicts_pixels):
        names = ", ".join(config.model.objectives)
        raise ConfigError(
            f"model.objectives ({names}) must include mim, mlm or joint to evaluate masked signals of scenes"
        )
    if config.model.image_size != IMAGE_SIZE:
        raise ConfigError(
            f"model.image_size ({config.model.image_size}) must be {IMAGE_SIZE} to evaluate on scenes: they are drawn "
            "at that size only; name a model that was pre-trained on them"
        )
    split_word = word_without_token(tokenizer, config)
    if split_word is not None:
        raise ConfigError(
            f"the tokenizer of the model splits words of scenes, such as '{split_word}', which are evaluated as one "
            "token each: name a model whose tokenizer was trained on captions of scenes too (data.tokenizer)"
        )
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    fixed = evaluation_config(config)
    collate = Collator(fixed, tokenizer, objectives_of(fixed.model), has_images=True, has_captions=True)
    scenes = Scenes(_level(config), SCENES_SEED, "val")
    mine = [scenes[index] for index in range(rank, num_scenes, world_size)]
    tally = Tally()
    for chunk in chunks(mine, batch_size):
        batch = collate(samples_of(chunk)).to(device)
        if config.model.predicts_words:
            _tally_words(tally, model, batch, tokenizer)
        if config.model.predicts_pixels:
            _tally_pixels(tally, model, batch, chunk, config.model)
    has_probes = scenes.level.name == "easy"  # captions of the other level have no positions, which probes need
    if config.model.predicts_words and has_probes:
        probes = list(binding_probes(scenes, num_scenes // 2))[rank::world_size]
        _tally_binding(tally, model, probes, collate, tokenizer, batch_size)
    result = nest(tally.means(_names(config.model, has_probes)))
    model.train(training)
    return result


def _names(config: ModelConfig, has_probes: bool) -> list[str]:
    """Return all names of the tally; they are the same on every rank."""
    words = [f"{key}.{side}" for key in WORD_CLASSES for side in SIDES]
    if has_probes:
        words += [f"binding.{kind}.{answer}" for kind in get_args(ProbeType) for answer in ("target", "distractor")]
    names = [f"pixel_loss.{side}" for side in SIDES] if config.predicts_pixels else []
    if config.predicts_words:
        names += [*words, *(f"hidden_words.{side}" for side in SIDES), *(MASKED + name for name in words)]
    return names


def samples_of(scenes: Sequence[Scene]) -> list[Sample]:
    """Convert scenes to decoded samples; keys count from 0, so masks are the same in every call."""
    return [Sample(f"eval-{i}", 0, scene.image, scene.caption) for i, scene in enumerate(scenes)]


def predict_masked(model: nn.Module, batch: Batch) -> EVEOutput:
    """Predict masked patches and words of one view, the visible parts of the batch, whatever the objectives are."""
    return cast(EVE, model).predict(
        pixel_values=batch.normalized_pixels,
        image_mask=batch.image_mask,
        visible_patch_ids=batch.visible_patch_ids,
        visible_patch_mask=batch.visible_patch_mask,
        masked_patch_ids=batch.masked_patch_ids,
        input_ids=batch.input_ids if batch.masked_input_ids is None else batch.masked_input_ids,
        attention_mask=batch.attention_mask,
        masked_token_ids=batch.masked_token_ids,
    )


def with_whole_image(batch: Batch) -> Batch:
    """Return the batch with all patches visible and none to predict."""
    return replace(batch, visible_patch_ids=None, visible_patch_mask=None, masked_patch_ids=None)


def with_whole_caption(batch: Batch) -> Batch:
    """Return the batch with all words visible and none to predict."""
    return replace(batch, masked_input_ids=None, masked_token_ids=None, token_labels=None)


def with_hidden_caption(batch: Batch, mask_token_id: int) -> Batch:
    """Return the batch with all words masked and to be predicted."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    words = inner_words(batch.input_ids, batch.attention_mask)
    return replace(
        batch,
        masked_input_ids=batch.input_ids.masked_fill(words, mask_token_id),
        masked_token_ids=words.flatten().nonzero().squeeze(1),
        token_labels=batch.input_ids[words],
    )


def with_another_image(batch: Batch) -> Batch:
    """Return the batch in which each caption has the image of another sample."""
    assert batch.pixel_values is not None
    return replace(batch, pixel_values=batch.pixel_values.roll(1, dims=0))


def with_another_caption(batch: Batch) -> Batch:
    """Return the batch in which each image has the whole caption of another sample."""
    whole = with_whole_caption(batch)
    assert whole.input_ids is not None
    assert whole.attention_mask is not None
    return replace(
        whole, input_ids=whole.input_ids.roll(1, dims=0), attention_mask=whole.attention_mask.roll(1, dims=0)
    )


def _tally_words(tally: Tally, model: nn.Module, batch: Batch, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = with_whole_image(batch)
    classes = [word_class(word) for word in tokenizer.convert_ids_to_tokens(_labels(batch).tolist())]
    chosen = {
        kind: torch.tensor([item == kind for item in classes], device=_labels(batch).device) for kind in WORD_CLASSES
    }
    for prefix, asked in (("", whole), (MASKED, batch)):
        for side, hits in _hits(model, asked).items():
            for kind, of_class in chosen.items():
                tally.add(f"{prefix}{kind}.{side}", hits[of_class])
    for side, hits in _hits(model, with_hidden_caption(whole, int(tokenizer.mask_token_id))).items():
        tally.add(f"hidden_words.{side}", hits)


def _hits(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return whether each masked word is predicted correctly, (M,) fp32, for the right and for a wrong image."""
    shown = {"right": batch, "wrong": with_another_image(batch)}
    return {
        side: (predict_masked(model, batch).token_logits().argmax(dim=-1) == _labels(batch)).float()
        for side, batch in shown.items()
    }


def _labels(batch: Batch) -> Tensor:
    assert batch.token_labels is not None
    return batch.token_labels


def _tally_pixels(tally: Tally, model: nn.Module, batch: Batch, scenes: Sequence[Scene], config: ModelConfig) -> None:
    whole = with_whole_caption(batch)
    pixels = whole.normalized_pixels
    assert pixels is not None
    assert whole.masked_patch_ids is not None
    foreground = torch.stack([torch.from_numpy(scene.foreground) for scene in scenes]).unsqueeze(1)
    patches = ops.patchify(foreground.float(), config.patch_size).amax(dim=-1).to(pixels.device) > 0  # (B, N)
    chosen = patches.gather(1, whole.masked_patch_ids)
    for side, shown in (("right", whole), ("wrong", with_another_caption(whole))):
        predictions = predict_masked(model, shown).pixel_predictions
        assert predictions is not None
        loss = ops.masked_pixel_loss(
            pixels,
            predictions,
            whole.masked_patch_ids,
            config.patch_size,
            normalize=config.normalizes_pixels,
        )
        tally.add(f"pixel_loss.{side}", loss[chosen])


def _tally_binding(
    tally: Tally,
    model: nn.Module,
    probes: Sequence[BindingProbe],
    collate: Collator,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
) -> None:
    for chunk in chunks(probes, batch_size):
        for prefix, whole_image in (("", True), (MASKED, False)):
            answers = answer_probes(model, chunk, collate, tokenizer, whole_image=whole_image)
            for probe, given in zip(chunk, answers, strict=True):
                name = f"{prefix}binding.{probe.probe_type}"
                tally.add(f"{name}.target", torch.tensor(float(given == probe.target)))
                tally.add(f"{name}.distractor", torch.tensor(float(given == probe.distractor)))


def answer_probes(
    model: nn.Module,
    probes: Sequence[BindingProbe],
    collate: Collator,
    tokenizer: PreTrainedTokenizerFast,
    *,
    whole_image: bool = True,
) -> list[str]:
    """Return the predicted word of each probe, given the whole image or a masked one."""
    batch = collate(samples_of([probe.scene for probe in probes]))
    assert batch.attention_mask is not None
    input_ids = torch.full(batch.attention_mask.shape, tokenizer.pad_token_id)
    vocabulary = tokenizer.get_vocab()
    asked = []
    for row, probe in enumerate(probes):
        words = [tokenizer.mask_token if i in probe.masked else word for i, word in enumerate(probe.words)]
        ids = [vocabulary[word] for word in (tokenizer.cls_token, *words, tokenizer.sep_token)]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        asked.append(row * input_ids.shape[1] + 1 + probe.asked)  # [CLS] comes first
    batch = replace(batch, masked_input_ids=input_ids, masked_token_ids=torch.tensor(asked), token_labels=None)
    shown = with_whole_image(batch) if whole_image else batch
    output = predict_masked(model, shown.to(next(model.parameters()).device))
    return list(tokenizer.convert_ids_to_tokens(output.token_logits().argmax(dim=-1).tolist()))


def _level(config: Config) -> LevelName:
    """Level of the scenes that the run was trained on; `easy` if it was trained on other data."""
    return next((source.level for source in config.data.sources if source.kind == "scenes"), "easy")


def evaluation_config(config: Config) -> Config:
    """Return the configuration with a fixed seed and fixed masks, so that all runs are evaluated alike.

    With it, batches mask the image and half of the words at once, and every masked patch is predicted.
    """
    fixed = {
        "text_mask_ratio": 0.5,
        "max_text_mask_ratio": None,
        "text_to_image_share": 0.0,
        "random_token_share": 0.0,
        "keep_token_share": 0.0,
        "predicted_patch_share": 1.0,
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"objectives": ["joint"]}),
            "masking": config.masking.model_copy(update=fixed),
            "train": config.train.model_copy(update={"seed": 0}),
        }
    )


def nest(flat: dict[str, float]) -> dict[str, Any]:
    """`{"a.b": 1}` -> `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        level = nested
        for part in path:
            level = level.setdefault(part, {})
        level[last] = value
    return nested
