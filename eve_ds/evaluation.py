"""What a model has learnt from scenes: masked words and pixels, with the right and with a wrong other modality.

A model that looks at the image predicts a masked word better with the right image than with another scene's; the gap is
the number to watch. The binding probe asks more: in a scene of two objects, which attribute belongs to which object?
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eve_ds import ops
from eve_ds.config import Config, ConfigError
from eve_ds.data.batch import Batch, Sample
from eve_ds.data.collate import Collator
from eve_ds.data.scene_tasks import BindingProbe, ProbeType, binding_probes
from eve_ds.data.scenes import IMAGE_SIZE, LevelName, Scene, Scenes, word_class
from eve_ds.distributed import all_reduce_sum

WORD_CLASSES = {"color": "colour", "shape": "shape", "size": "size", "position": "position"}
"""Word class of :func:`eve_ds.data.scenes.word_class` -> key of the result."""
SCENES_SEED = 0
"""World of the evaluation scenes; their descriptions occur in no training scene of any seed."""


class _Tally:
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

    It is where masked signals of scenes at their own size are modelled in pairs.
    """
    pairs = any(source.kind == "scenes" and source.modalities in ("pair", "any") for source in config.data.sources)
    return pairs and config.model.image_size == IMAGE_SIZE and config.model.objective == "msm"


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
        config: of the run; its masking ratios are used, its seed is not.
        tokenizer: one token per word of the captions.
        num_scenes: scenes over all ranks, a multiple of 2 * `world_size`; half as many are used for each probe.
        batch_size: scenes of one forward.
        rank, world_size: which share this process takes.

    Returns:
        `colour`, `shape`, `size`, `position` -> {right, wrong} accuracy of masked words, the image having masked
        patches as in training, `pixel_loss` -> {right, wrong} per-patch-normalised squared error of masked foreground
        patches given the whole caption, and for level `easy` `binding` -> probe -> {target, distractor}, shares of
        answers.

    Raises:
        ConfigError: the model was pre-trained by another objective, and has not learnt what is asked for here.
    """
    if config.model.objective != "msm":
        raise ConfigError(f"model.objective ('{config.model.objective}') must be 'msm' for masked signals of scenes")
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    collate = Collator(evaluation_config(config), tokenizer, has_images=True, has_captions=True)
    scenes = Scenes(_level(config), SCENES_SEED, "val")
    mine = [scenes[index] for index in range(rank, num_scenes, world_size)]
    tally = _Tally()
    for chunk in _chunks(mine, batch_size):
        batch = collate(samples_of(chunk)).to(device)
        _tally_words(tally, model, batch, tokenizer)
        _tally_pixels(tally, model, batch, chunk, config.model.patch_size)
    names = [f"{key}.{side}" for key in (*WORD_CLASSES.values(), "pixel_loss") for side in ("right", "wrong")]
    if scenes.level.name == "easy":  # captions of the other level give no positions to name an object by
        probes = list(binding_probes(scenes, num_scenes // 2))[rank::world_size]
        _tally_binding(tally, model, probes, collate, tokenizer, batch_size)
        kinds = [_british(kind) for kind in get_args(ProbeType)]
        names += [f"binding.{kind}.{answer}" for kind in kinds for answer in ("target", "distractor")]
    result = _nest(tally.means(names))
    model.train(training)
    return result


def samples_of(scenes: Sequence[Scene], captions: Sequence[str] | None = None) -> list[Sample]:
    """Scenes as decoded samples; keys count from 0, so masks are the same at every call."""
    texts = captions or [scene.caption for scene in scenes]
    return [
        Sample(key=f"eval-{i}", epoch=0, image=scene.image, caption=text)
        for i, (scene, text) in enumerate(zip(scenes, texts, strict=True))
    ]


def with_another_image(batch: Batch) -> Batch:
    """Every caption beside the image of the next sample."""
    assert batch.pixel_values is not None
    return replace(batch, pixel_values=batch.pixel_values.roll(1, dims=0))


def unmask_text(batch: Batch) -> Batch:
    """The batch with its captions whole and no token to predict."""
    assert batch.input_ids is not None
    assert batch.masked_token_ids is not None
    assert batch.token_labels is not None
    input_ids = batch.input_ids.flatten().scatter(0, batch.masked_token_ids, batch.token_labels)
    return replace(batch, input_ids=input_ids.view_as(batch.input_ids), masked_token_ids=None, token_labels=None)


def with_another_caption(batch: Batch) -> Batch:
    """Every image beside the caption of the next sample."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    return replace(
        batch, input_ids=batch.input_ids.roll(1, dims=0), attention_mask=batch.attention_mask.roll(1, dims=0)
    )


def _tally_words(tally: _Tally, model: nn.Module, batch: Batch, tokenizer: PreTrainedTokenizerFast) -> None:
    assert batch.token_labels is not None
    words = tokenizer.convert_ids_to_tokens(batch.token_labels.tolist())
    classes = [word_class(word) for word in words]
    for side, shown in (("right", batch), ("wrong", with_another_image(batch))):
        output = model(**shown.model_inputs())
        hits = (output.token_logits().argmax(dim=-1) == batch.token_labels).float()
        for kind, key in WORD_CLASSES.items():
            chosen = torch.tensor([item == kind for item in classes], device=hits.device)
            tally.add(f"{key}.{side}", hits[chosen])


def _tally_pixels(tally: _Tally, model: nn.Module, batch: Batch, scenes: Sequence[Scene], patch_size: int) -> None:
    whole = unmask_text(batch)
    assert whole.pixel_values is not None
    assert whole.masked_patch_ids is not None
    foreground = torch.stack([torch.from_numpy(scene.foreground) for scene in scenes]).unsqueeze(1)
    patches = ops.patchify(foreground.float(), patch_size).amax(dim=-1).to(whole.pixel_values.device) > 0  # (B, N)
    chosen = patches.gather(1, whole.masked_patch_ids)
    for side, shown in (("right", whole), ("wrong", with_another_caption(whole))):
        predictions = model(**shown.model_inputs()).pixel_predictions
        loss = ops.masked_pixel_loss(whole.pixel_values, predictions, whole.masked_patch_ids, patch_size)
        tally.add(f"pixel_loss.{side}", loss[chosen])


def _tally_binding(
    tally: _Tally,
    model: nn.Module,
    probes: Sequence[BindingProbe],
    collate: Collator,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
) -> None:
    for chunk in _chunks(probes, batch_size):
        answers = answer_probes(model, chunk, collate, tokenizer)
        for probe, given in zip(chunk, answers, strict=True):
            name = f"binding.{_british(probe.probe_type)}"
            tally.add(f"{name}.target", torch.tensor(float(given == probe.target)))
            tally.add(f"{name}.distractor", torch.tensor(float(given == probe.distractor)))


def answer_probes(
    model: nn.Module, probes: Sequence[BindingProbe], collate: Collator, tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    """The word that the model puts at the asked place of each probe, the image having masked patches as in training."""
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
    batch = replace(batch, input_ids=input_ids, masked_token_ids=torch.tensor(asked), token_labels=None)
    output = model(**batch.to(next(model.parameters()).device).model_inputs())
    return list(tokenizer.convert_ids_to_tokens(output.token_logits().argmax(dim=-1).tolist()))


def _level(config: Config) -> LevelName:
    """Level of the scenes that the run was trained on; `easy` where it was trained on other data."""
    return next((source.level for source in config.data.sources if source.kind == "scenes"), "easy")


def evaluation_config(config: Config) -> Config:
    """The run's configuration with a fixed seed and half of the words masked, so that every run is asked the same."""
    fixed = {
        "text_mask_ratio": 0.5,
        "max_text_mask_ratio": None,
        "text_to_image_share": 0.0,
        "random_token_share": 0.0,
        "keep_token_share": 0.0,
    }
    masking = config.masking.model_copy(update={**fixed, "predicted_patch_share": 1.0})
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": 0}), "masking": masking})


def _british(probe_type: ProbeType) -> str:
    return probe_type.replace("color", "colour")


def _chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _nest(flat: dict[str, float]) -> dict[str, Any]:
    """`{"a.b": 1}` -> `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        level = nested
        for part in path:
            level = level.setdefault(part, {})
        level[last] = value
    return nested
