"""What a model has learnt from scenes: masked words and pixels, with the right and with a wrong other modality.

A model that looks at the image predicts a masked word better with the right image than with another scene's; the gap is
the number to watch. Words are asked beside the whole image and pixels beside the whole caption, as the paper trains
them; words also beside a masked image, as `joint` does. The binding probe asks more: in a scene of two objects, which
attribute belongs to which object?
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eve_ds import ops
from eve_ds.config import Config, ConfigError, ModelConfig
from eve_ds.data.batch import Batch, Sample
from eve_ds.data.collate import Collator
from eve_ds.data.synthetic.scene_tasks import BindingProbe, ProbeType, binding_probes
from eve_ds.data.synthetic.scenes import IMAGE_SIZE, LevelName, Scene, Scenes, word_class
from eve_ds.distributed import all_reduce_sum
from eve_ds.model.eve import EVE, EVEOutput
from eve_ds.objectives.registry import objectives_of

WORD_CLASSES = ("color", "shape", "size", "position")
"""Word classes of :func:`eve_ds.data.synthetic.scenes.word_class`; keys of the result."""
SIDES = ("right", "wrong")
MASKED = "masked_image."
"""Before the names of what is asked beside a masked image."""
SCENES_SEED = 0
"""World of the evaluation scenes; their descriptions occur in no training scene of any seed."""


class Tally:
    """Sums by name that several ranks can add up."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, values: Tensor) -> None:
        """Add values of any shape to the mean of `name`."""
        self.sums[name][0] += float(values.sum())
        self.sums[name][1] += values.numel()

    def means(self, names: Sequence[str]) -> dict[str, float]:
        """Mean of each name over all ranks; `names` must be the same on every rank."""
        total = all_reduce_sum(torch.tensor([self.sums[name] for name in names], dtype=torch.float64))
        return {name: float(total[i, 0] / total[i, 1].clamp(min=1)) for i, name in enumerate(names)}


def trains_on_scenes(config: Config) -> bool:
    """Whether the run is one that :func:`evaluate_scenes` says something about.

    It is where masked words or pixels of scenes at their own size are predicted in pairs.
    """
    pairs = any(source.kind == "scenes" and source.modalities in ("pair", "any") for source in config.data.sources)
    predicts = config.model.predicts_words or config.model.predicts_pixels
    return pairs and config.model.image_size == IMAGE_SIZE and predicts


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
    """Masked words, foreground pixels and binding on validation scenes of the level that the model was trained on.

    Every rank takes each `world_size`-th scene and runs the same number of forwards, as expert parallelism needs.

    Args:
        model: an EVE; put into evaluation mode and back.
        config: of the run; its share of masked patches is used, its seed is not.
        tokenizer: one token per word of the captions.
        num_scenes: scenes over all ranks, a multiple of 2 * `world_size`; half as many are used for each probe.
        batch_size: scenes of one forward.
        rank, world_size: which share this process takes.

    Returns:
        Of a model that predicts words: `color`, `shape`, `size`, `position` -> {right, wrong} accuracy of masked words
        beside the whole image, half of the caption being masked; `hidden_words` -> {right, wrong} accuracy of all words
        of captions that are hidden whole; for level `easy` `binding` -> probe -> {target, distractor}, shares of
        answers beside the whole image, phrases in random order; `masked_image` -> the word classes and `binding` again
        beside an image with masked patches. Of a model that predicts pixels: `pixel_loss` -> {right, wrong} squared
        error of masked foreground patches beside the whole caption, in the terms of `model.pixel_target`.

    Raises:
        ConfigError: no task of the pre-training predicts words or pixels.
    """
    if not (config.model.predicts_words or config.model.predicts_pixels):
        names = ", ".join(config.model.objectives)
        raise ConfigError(f"model.objectives ({names}) must hold mim, mlm or joint for masked signals of scenes")
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    fixed = evaluation_config(config)
    collate = Collator(fixed, tokenizer, objectives_of(fixed.model), has_images=True, has_captions=True)
    scenes = Scenes(_level(config), SCENES_SEED, "val")
    mine = [scenes[index] for index in range(rank, num_scenes, world_size)]
    tally = Tally()
    for chunk in _chunks(mine, batch_size):
        batch = collate(samples_of(chunk)).to(device)
        if config.model.predicts_words:
            _tally_words(tally, model, batch, tokenizer)
        if config.model.predicts_pixels:
            _tally_pixels(tally, model, batch, chunk, config.model)
    has_probes = scenes.level.name == "easy"  # captions of the other level give no positions to name an object by
    if config.model.predicts_words and has_probes:
        probes = list(binding_probes(scenes, num_scenes // 2))[rank::world_size]
        _tally_binding(tally, model, probes, collate, tokenizer, batch_size)
    result = nest(tally.means(_names(config.model, has_probes)))
    model.train(training)
    return result


def _names(config: ModelConfig, has_probes: bool) -> list[str]:
    """Every name that is tallied, the same on every rank."""
    words = [f"{key}.{side}" for key in WORD_CLASSES for side in SIDES]
    if has_probes:
        words += [f"binding.{kind}.{answer}" for kind in get_args(ProbeType) for answer in ("target", "distractor")]
    names = [f"pixel_loss.{side}" for side in SIDES] if config.predicts_pixels else []
    if config.predicts_words:
        names += [*words, *(f"hidden_words.{side}" for side in SIDES), *(MASKED + name for name in words)]
    return names


def samples_of(scenes: Sequence[Scene]) -> list[Sample]:
    """Scenes as decoded samples; keys count from 0, so masks are the same at every call."""
    return [Sample(f"eval-{i}", 0, scene.image, scene.caption) for i, scene in enumerate(scenes)]


def ask(model: nn.Module, batch: Batch) -> EVEOutput:
    """What an EVE predicts from one view: the patches and words that the batch shows, whatever its objectives."""
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
    """The batch with every patch to be seen and none to be predicted."""
    return replace(batch, visible_patch_ids=None, visible_patch_mask=None, masked_patch_ids=None)


def with_whole_caption(batch: Batch) -> Batch:
    """The batch with every word to be seen and none to be predicted."""
    return replace(batch, masked_input_ids=None, masked_token_ids=None, token_labels=None)


def with_hidden_caption(batch: Batch, mask_token_id: int) -> Batch:
    """The batch with every word hidden and to be predicted."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    place = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    words = (place > 0) & (place < batch.attention_mask.sum(dim=1, keepdim=True) - 1)  # neither [CLS] nor [SEP]
    return replace(
        batch,
        masked_input_ids=batch.input_ids.masked_fill(words, mask_token_id),
        masked_token_ids=words.flatten().nonzero().squeeze(1),
        token_labels=batch.input_ids[words],
    )


def with_another_image(batch: Batch) -> Batch:
    """Every caption beside the image of the next sample."""
    assert batch.pixel_values is not None
    return replace(batch, pixel_values=batch.pixel_values.roll(1, dims=0))


def with_another_caption(batch: Batch) -> Batch:
    """Every image beside the whole caption of the next sample."""
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
    """(M,) fp32, 1 = this masked word is predicted right, beside the right image and beside another."""
    shown = {"right": batch, "wrong": with_another_image(batch)}
    return {
        side: (ask(model, batch).token_logits().argmax(dim=-1) == _labels(batch)).float()
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
        predictions = ask(model, shown).pixel_predictions
        assert predictions is not None
        loss = ops.masked_pixel_loss(
            pixels,
            predictions,
            whole.masked_patch_ids,
            config.patch_size,
            normalize=config.pixel_target == "normalized",
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
    for chunk in _chunks(probes, batch_size):
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
    """The word that the model puts at the asked place of each probe, beside the whole image or a masked one."""
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
    output = ask(model, (with_whole_image(batch) if whole_image else batch).to(next(model.parameters()).device))
    return list(tokenizer.convert_ids_to_tokens(output.token_logits().argmax(dim=-1).tolist()))


def _level(config: Config) -> LevelName:
    """Level of the scenes that the run was trained on; `easy` where it was trained on other data."""
    return next((source.level for source in config.data.sources if source.kind == "scenes"), "easy")


def evaluation_config(config: Config) -> Config:
    """The run's configuration with a fixed seed and fixed masks, so that every run is asked the same.

    Batches made with it mask images and captions at once, half of the words, and predict every masked patch.
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


def _chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


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
