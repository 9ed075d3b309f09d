"""Evaluation on scenes with models whose answers are known in advance."""

from collections import Counter

import pytest
import torch
from tiny import tiny_config
from torch import nn

from eve_ds import ops
from eve_ds.config import ConfigError, parse_config
from eve_ds.data.collate import Collator
from eve_ds.data.synthetic.probes import binding_probes
from eve_ds.data.synthetic.scenes import LEVELS, WORD_CLASSES, Scenes, word_class
from eve_ds.data.tokenizer import load_tokenizer, train_tokenizer
from eve_ds.data.transforms import normalize
from eve_ds.evaluation.scenes import (
    SCENES_SEED,
    SCENES_WITH_ALL_WORDS,
    answer_probes,
    evaluate_scenes,
    evaluation_config,
    samples_of,
    trains_on_scenes,
    with_another_caption,
    with_another_image,
    with_hidden_caption,
    with_whole_caption,
    with_whole_image,
    word_without_token,
)
from eve_ds.model.eve import EVE, EVEOutput
from eve_ds.model.vocabulary import Vocabulary
from eve_ds.objectives.registry import OBJECTIVES
from eve_ds.training.pretrain import Pretraining

NUM_SCENES, BATCH = 24, 8
CONFIG = parse_config({"model": {"image_size": 64, "patch_size": 8, "vocab_size": 256, "text_length": 24}})


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("scenes")


@pytest.fixture(scope="module")
def scenes():
    easy = Scenes("easy", 0, "val")
    probed = [probe.scene for probe in binding_probes(easy, NUM_SCENES // 2)]
    return [easy[index] for index in range(NUM_SCENES)], probed


class Oracle(nn.Module):
    """Model that recognizes every scene by its image.

    Words: those of the image's own caption, whatever the visible text is. Pixels: correct if the visible text is the
    image's own caption, otherwise 0, so that the squared error is the mean square of the pixels.
    """

    def __init__(self, scenes, tokenizer):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.vocabulary = len(tokenizer)
        self.images = normalize([scene.image for scene in scenes])
        words = [["[CLS]", *scene.caption.split(), "[SEP]"] for scene in scenes]
        self.captions = [tokenizer.convert_tokens_to_ids(row) for row in words]
        self.grad_modes = []
        self.views = Counter()

    def predict(self, pixel_values, masked_patch_ids, input_ids, attention_mask, masked_token_ids, **patches):
        self.grad_modes.append((torch.is_grad_enabled(), self.training))
        asked = "words" if masked_token_ids is not None else "pixels"
        self.views[asked, patches["visible_patch_ids"] is None] += 1
        known = [self._look(image) for image in pixel_values]
        length = input_ids.shape[1]
        logits = None
        if masked_token_ids is not None:
            logits = torch.zeros(len(masked_token_ids), self.vocabulary)
            for row, place in enumerate(masked_token_ids.tolist()):
                caption = self.captions[known[place // length]]
                logits[row, caption[place % length] if place % length < len(caption) else 0] = 1.0
        pixels = None if masked_patch_ids is None else torch.zeros(*masked_patch_ids.shape, 192)
        for row, scene in enumerate(known if pixels is not None else ()):
            if input_ids[row][attention_mask[row]].tolist() == self.captions[scene]:
                pixels[row] = patches_of(pixel_values[row])[masked_patch_ids[row]]
        return EVEOutput(
            vocabulary=Vocabulary(torch.eye(self.vocabulary), torch.zeros(self.vocabulary)),
            moe={},
            pixel_predictions=pixels,
            token_hidden=logits,
        )

    def _look(self, image):
        return int((self.images - image).abs().flatten(1).amax(dim=1).argmin())


def patches_of(image):
    return ops.patchify(image[None], 8)[0]


@pytest.fixture(scope="module")
def result(scenes, tokenizer):
    model = Oracle([*scenes[0], *scenes[1]], tokenizer)
    found = evaluate_scenes(model, CONFIG, tokenizer, num_scenes=NUM_SCENES, batch_size=BATCH)
    return found, model


def test_a_model_of_another_image_size_is_refused_in_one_line(tokenizer):
    larger = parse_config({"model": CONFIG.model.model_dump() | {"image_size": 128}})
    message = r"^model\.image_size \(128\) must be 64 to evaluate on scenes: they are drawn at that size only; name a "
    with pytest.raises(ConfigError, match=message):
        evaluate_scenes(nn.Linear(1, 1), larger, tokenizer, num_scenes=2)


def test_oracle_predicts_words_correctly_only_with_the_right_image(result, scenes, tokenizer):
    found, _ = result
    collate = Collator(evaluation_config(CONFIG), tokenizer, [OBJECTIVES["joint"]], has_images=True, has_captions=True)
    hits, asked = Counter(), Counter()
    for start in range(0, NUM_SCENES, BATCH):  # reference count, word by word
        chunk = scenes[0][start : start + BATCH]
        batch = collate(samples_of(chunk))
        length = batch.input_ids.shape[1]
        for place in batch.masked_token_ids.tolist():
            row, column = place // length, place % length - 1
            own, other = chunk[row].caption.split(), chunk[row - 1].caption.split()
            kind = word_class(own[column])
            asked[kind] += 1
            hits[kind] += column < len(other) and own[column] == other[column]
    for kind in WORD_CLASSES:
        assert asked[kind] > 10
        for given in (found, found["masked_image"]):  # the oracle recognizes masked images, too
            assert given[kind]["right"] == 1.0
            assert given[kind]["wrong"] == pytest.approx(hits[kind] / asked[kind])
    assert found["color"]["wrong"] < 0.5


def test_oracle_predicts_words_of_hidden_captions(result, scenes, tokenizer):
    found, _ = result
    hits = asked = 0
    for start in range(0, NUM_SCENES, BATCH):
        captions = [scene.caption.split() for scene in scenes[0][start : start + BATCH]]
        for row, words in enumerate(captions):
            other = [*captions[row - 1], "[SEP]"]
            asked += len(words)
            hits += sum(column < len(other) and word == other[column] for column, word in enumerate(words))
    assert found["hidden_words"]["right"] == 1.0
    assert found["hidden_words"]["wrong"] == pytest.approx(hits / asked)


def test_words_are_predicted_from_whole_and_masked_images_and_pixels_from_masked_images(result):
    _, model = result
    chunks = NUM_SCENES // BATCH
    probes = 2 * NUM_SCENES // BATCH  # four types, with half as many scenes each
    assert model.views == {
        ("words", True): 2 * 2 * chunks + probes,
        ("words", False): 2 * chunks + probes,
        ("pixels", False): 2 * chunks,
    }


def test_pixel_loss_is_measured_on_foreground_with_right_and_wrong_caption(result, scenes, tokenizer):
    found, _ = result
    collate = Collator(evaluation_config(CONFIG), tokenizer, [OBJECTIVES["joint"]], has_images=True, has_captions=True)
    losses = []
    for start in range(0, NUM_SCENES, BATCH):
        chunk = scenes[0][start : start + BATCH]
        batch = collate(samples_of(chunk))
        for row, scene in enumerate(chunk):
            patches = patches_of(batch.normalized_pixels[row])
            for patch in batch.masked_patch_ids[row].tolist():
                top, left = 8 * (patch // 8), 8 * (patch % 8)
                if scene.foreground[top : top + 8, left : left + 8].any():
                    losses.append(float(patches[patch].square().mean()))
    assert found["pixel_loss"]["right"] == pytest.approx(0.0, abs=1e-6)
    assert found["pixel_loss"]["wrong"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_binding_counts_target_and_distractor(result, scenes, tokenizer):
    found, _ = result
    kinds = ("position_to_color", "position_to_shape", "color_to_shape", "shape_to_color")
    assert found["binding"] == {kind: {"target": 1.0, "distractor": 0.0} for kind in kinds}
    assert found["masked_image"]["binding"] == found["binding"]
    easy = Scenes("easy", 0, "val")
    probes = list(binding_probes(easy, 6))

    class Swapper(Oracle):
        """Model that answers with the word of the other object."""

        def predict(self, **inputs):
            output = super().predict(**inputs)
            logits = torch.zeros_like(output.token_hidden)
            for row, probe in enumerate(probes):
                logits[row, tokenizer.convert_tokens_to_ids(probe.distractor)] = 1.0
            return output._replace(token_hidden=logits)

    collate = Collator(evaluation_config(CONFIG), tokenizer, [OBJECTIVES["joint"]], has_images=True, has_captions=True)
    swapper = Swapper([probe.scene for probe in probes], tokenizer)
    assert answer_probes(swapper, probes, collate, tokenizer) == [probe.distractor for probe in probes]


def test_evaluation_runs_without_gradients_and_restores_the_mode(result, scenes, tokenizer):
    found, model = result
    assert set(model.grad_modes) == {(False, False)}
    assert model.training
    again = evaluate_scenes(model.eval(), CONFIG, tokenizer, num_scenes=NUM_SCENES, batch_size=BATCH)
    assert again == found
    assert not model.training
    other_seed = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"seed": 5})})
    assert evaluate_scenes(model, other_seed, tokenizer, num_scenes=NUM_SCENES, batch_size=BATCH) == found
    model.train()


def test_ranks_divide_the_scenes_without_overlap(scenes, tokenizer, monkeypatch):
    """The sums of two ranks cover the same scenes as those of one process."""
    from eve_ds.evaluation import scenes as evaluation

    seen = []
    monkeypatch.setattr(evaluation, "all_reduce_sum", lambda sums: seen.append(sums) or sums)
    model = Oracle([*scenes[0], *scenes[1]], tokenizer)
    for rank in range(2):
        evaluate_scenes(model, CONFIG, tokenizer, num_scenes=NUM_SCENES, batch_size=BATCH, rank=rank, world_size=2)
    evaluate_scenes(model, CONFIG, tokenizer, num_scenes=NUM_SCENES, batch_size=BATCH)
    first, second, whole = seen
    assert (first[:, 1] + second[:, 1])[-1] == whole[-1, 1], "every probe must be used once"
    assert abs(float((first[:, 1] + second[:, 1])[0] / whole[0, 1]) - 1) < 0.5
    right = [2, 4, 6, 8]  # words with the right image; pixels come first
    assert (first[right, 0] == first[right, 1]).all()


def test_scenes_and_probes_keep_random_order_if_training_uses_reading_order(result, scenes, tokenizer, monkeypatch):
    from eve_ds.evaluation import scenes as evaluation

    source = {"kind": "scenes", "reading_order_share": 1.0}
    config = parse_config({"model": CONFIG.model.model_dump(), "data": {"sources": [source]}})
    seen = []
    monkeypatch.setattr(evaluation, "samples_of", lambda chunk: seen.extend(chunk) or samples_of(chunk))
    model = Oracle([*scenes[0], *scenes[1]], tokenizer)
    assert evaluate_scenes(model, config, tokenizer, num_scenes=NUM_SCENES, batch_size=BATCH) == result[0]
    chunks = [scenes[1][start : start + BATCH] for start in range(0, len(scenes[1]), BATCH)]
    probed = [scene for chunk in chunks for scene in 2 * chunk]  # once with the whole image, once with a masked one
    assert [scene.caption for scene in seen] == [scene.caption for scene in (*scenes[0], *probed)]
    pairs = [scene.objects for scene in seen if len(scene.objects) == 2]
    in_order = sum((first.row, first.column) < (second.row, second.column) for first, second in pairs)
    assert 0.35 < in_order / len(pairs) < 0.65


def test_real_models_can_be_evaluated(tokenizer):
    config = tiny_config("data.sources=[{kind: scenes, level: hard}]")
    words = {*WORD_CLASSES, "hidden_words", "masked_image"}
    for objectives, asked in (
        (["mim", "mlm"], {*words, "pixel_loss"}),
        (["joint"], {*words, "pixel_loss"}),
        (["mlm"], words),
        (["mim"], {"pixel_loss"}),
    ):
        one = config.model_copy(update={"model": config.model.model_copy(update={"objectives": objectives})})
        found = evaluate_scenes(EVE(one.model), one, tokenizer, num_scenes=8, batch_size=8)
        assert set(found) == asked, "captions of level hard have no positions, so probes are impossible"
        assert "pixel_loss" not in found or 0.2 < found["pixel_loss"]["right"] < 5


def test_wrong_image_and_wrong_caption_come_from_another_sample(scenes, tokenizer):
    collate = Collator(evaluation_config(CONFIG), tokenizer, [OBJECTIVES["joint"]], has_images=True, has_captions=True)
    batch = collate(samples_of(scenes[0][:4]))
    image = with_another_image(batch)
    assert torch.equal(image.pixel_values[1], batch.pixel_values[0])
    assert image.masked_input_ids is batch.masked_input_ids
    text = with_another_caption(batch)
    assert torch.equal(text.input_ids[1], batch.input_ids[0])
    assert torch.equal(text.attention_mask[1], batch.attention_mask[0])
    assert text.pixel_values is batch.pixel_values
    assert text.masked_input_ids is text.masked_token_ids is with_whole_caption(batch).masked_token_ids is None
    assert with_whole_image(batch).visible_patch_ids is with_whole_image(batch).masked_patch_ids is None
    hidden = with_hidden_caption(batch, tokenizer.mask_token_id)
    for row, scene in enumerate(scenes[0][:4]):
        real = batch.attention_mask[row]
        words = scene.caption.split()
        assert tokenizer.convert_ids_to_tokens(batch.input_ids[row][real].tolist()) == ["[CLS]", *words, "[SEP]"]
        shown = tokenizer.convert_ids_to_tokens(hidden.masked_input_ids[row][real].tolist())
        assert shown == ["[CLS]", *["[MASK]"] * len(words), "[SEP]"]
    assert hidden.token_labels.tolist() == hidden.input_ids.flatten()[hidden.masked_token_ids].tolist()
    assert len(hidden.token_labels) == sum(len(scene.caption.split()) for scene in scenes[0][:4])


@pytest.mark.parametrize(
    ("source", "image_size", "expected"),
    [
        ({"kind": "scenes"}, 64, True),
        ({"kind": "scenes"}, 32, False),
        ({"kind": "scenes", "modalities": "image"}, 64, False),
        ({"kind": "shards", "shards": "a.tar"}, 64, False),
    ],
)
def test_only_runs_on_scenes_are_evaluated_on_scenes(source, image_size, expected):
    config = parse_config({"data": {"sources": [source]}, "model": {"image_size": image_size, "patch_size": 8}})
    assert trains_on_scenes(config) is expected


@pytest.mark.parametrize("level", LEVELS)
def test_the_first_scenes_have_all_words_of_a_level(level):
    scenes = Scenes(level, SCENES_SEED, "val")
    first, others = (
        {word for index in places for word in scenes[index].caption.split()}
        for places in (range(SCENES_WITH_ALL_WORDS), range(SCENES_WITH_ALL_WORDS, 3000))
    )
    assert others <= first


def test_a_tokenizer_of_scenes_of_one_level_is_accepted():
    captions = [Scenes("easy", 0, "train")[index].caption for index in range(500)]
    assert word_without_token(train_tokenizer(captions, 300), CONFIG) is None


def test_a_tokenizer_that_splits_words_of_scenes_is_refused(tokenizer, scenes):
    assert word_without_token(tokenizer, CONFIG) is None
    other = train_tokenizer(["a dog runs", "two cats of a man"] * 5, 200)
    with pytest.raises(ConfigError, match=r"the tokenizer of the model splits words of scenes, such as 'and', which"):
        evaluate_scenes(Oracle(scenes[0], tokenizer), CONFIG, other, num_scenes=NUM_SCENES)


def test_pretraining_on_scenes_with_such_a_tokenizer_is_not_evaluated_on_them(tmp_path, caplog):
    train_tokenizer(["a dog runs", "two cats of a man"] * 5, 200).save_pretrained(tmp_path)
    job = Pretraining(tiny_config(f"data.tokenizer={tmp_path}", "data.sources=[{kind: scenes}]"))
    assert job.evaluate(None) is None
    (message,) = caplog.messages
    assert message.startswith(f"data.tokenizer ({tmp_path}) splits words of scenes, such as 'and', so this run is not")
