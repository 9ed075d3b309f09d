"""Captions in reading order: their share over the run, and independence of ranks, workers and resuming."""

import json
import re
from collections import Counter
from functools import cache
from itertools import islice

import numpy as np
import pytest

from eve_ds.config import ConfigError, parse_config
from eve_ds.data.masking import sample_rng
from eve_ds.data.order import Place
from eve_ds.data.pipeline import build_loader
from eve_ds.data.sources import open_sources
from eve_ds.data.synthetic.scenes import Scenes, relations
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.objectives.registry import objectives_of

LEVELS = ["easy", "hard"]
CASES = [(level, modalities) for level in LEVELS for modalities in ("pair", "text")]
SAMPLES = 3000


def scenes_source(level="easy", **fields):
    return {"kind": "scenes", "level": level, **fields}


def make_config(*sources, batch=16, num_workers=0, seed=0):
    """Return a configuration whose batches hold whole captions in `input_ids`."""
    return parse_config(
        {
            "model": {"image_size": 64, "patch_size": 16, "vocab_size": 256},
            "data": {"sources": list(sources), "num_workers": num_workers, "shuffle_buffer": 7},
            "train": {"train_batch_size": batch, "seed": seed},
        }
    )


def read(source, slot, epoch=0, count=SAMPLES):
    """Read the first samples of an epoch, all of them as if at one slot."""
    return [
        source.read(Place(0, epoch, *divmod(number, 1000), slot))  # shards of 1,000
        for number in range(count)
    ]


@cache
def captions(level):
    """Return the captions of the first samples in random order and in reading order."""
    scenes = Scenes(level)
    numbers = range(SAMPLES)
    return [scenes[n].caption for n in numbers], [scenes.scene(n, reading_order=True).caption for n in numbers]


def moved(samples, level):
    """Return numbers of the samples whose caption was reordered, and of those whose order could change."""
    plain, in_order = captions(level)
    changed = {number for number, sample in enumerate(samples) if sample.caption != plain[number]}
    return changed, {number for number in range(SAMPLES) if plain[number] != in_order[number]}


def ordered(scene):
    return sorted(scene.objects, key=lambda item: 10 * item.row + item.column)


def is_out_of_order(scene):
    return list(scene.objects) != ordered(scene)


def described(objects):
    return [f"a {item.size} {item.color} {item.shape}" for item in objects]


def within(count, total, share):
    """Return whether a count lies within five standard deviations of a binomial distribution."""
    return abs(count - total * share) <= 5 * (total * share * (1 - share)) ** 0.5


# Contents of captions in reading order


def test_easy_captions_in_order_name_objects_row_by_row():
    places = Counter()
    for number, sample in enumerate(read(open_sources(make_config(scenes_source(reading_order_share=1.0)))[0], 0)):
        objects = ordered(Scenes("easy")[number])
        phrases = [f"{words} {item.position}" for words, item in zip(described(objects), objects, strict=True)]
        assert sample.caption == " and ".join(phrases)
        places.update([" and ".join(item.position for item in objects)] if len(objects) == 2 else [])
    assert set(places) == {
        *("top left and top right", "top left and bottom left", "top left and bottom right"),
        *("top right and bottom left", "top right and bottom right", "bottom left and bottom right"),
    }


def test_hard_captions_in_order_relate_all_objects_to_the_first_one():
    words = Counter()
    source = open_sources(make_config(scenes_source("hard", reading_order_share=1.0)))[0]
    for number, sample in enumerate(read(source, 0)):
        objects = ordered(Scenes("hard")[number])
        start, *clauses = re.split(r" (?:and )?(?=left of|right of|above|below)", sample.caption)
        assert start == described(objects)[0]
        for clause, item, phrase in zip(clauses, objects[1:], described(objects)[1:], strict=True):
            relation = clause.removesuffix(f" {phrase}")
            assert relation in relations(objects[0], item)
            words[relation] += 1
    assert set(words) == {"left of", "right of", "above"}, "no object lies above the first one"


@pytest.mark.parametrize("level", LEVELS)
def test_order_affects_the_caption_only(level):
    scenes = Scenes(level)
    for number in range(200):
        plain, other = scenes[number], scenes.scene(number, reading_order=True)
        assert plain.image.tobytes() == other.image.tobytes()
        assert sorted(plain.objects) == sorted(other.objects)
        assert list(other.objects) == ordered(plain)
        if not is_out_of_order(plain):
            assert other.caption == plain.caption


# Share of captions in reading order


@pytest.mark.parametrize(("level", "modalities"), CASES)
@pytest.mark.parametrize("samples", [None, 100])
def test_share_zero_changes_no_sample(level, modalities, samples):
    plain, scenes = scenes_source(level, modalities=modalities), Scenes(level)
    zero = plain | {"reading_order_share": 0.0, "reading_order_samples": samples}
    before, after = (open_sources(make_config(source))[0] for source in (plain, zero))
    for slot in (0, 50, 100):
        for number, (one, other) in enumerate(zip(read(before, slot, 3, 100), read(after, slot, 3, 100), strict=True)):
            assert (one.key, one.epoch, one.caption) == (other.key, other.epoch, other.caption)
            assert one.caption == scenes[number].caption
            if modalities == "pair":
                assert one.image.tobytes() == other.image.tobytes() == scenes[number].image.tobytes()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_share_falls_linearly_to_zero_and_stays_there(level, share):
    source = open_sources(make_config(scenes_source(level, reading_order_share=share, reading_order_samples=8000)))[0]
    earlier = None
    for slot, left in ((0, 1.0), (2000, 0.75), (4000, 0.5), (6000, 0.25), (8000, 0.0), (800_000, 0.0)):
        changed, could = moved(read(source, slot), level)
        assert len(could) > 0.2 * SAMPLES
        assert changed <= could
        assert within(len(changed), len(could), share * left), (slot, len(changed), len(could))
        assert earlier is None or changed <= earlier, "captions in order at a later slot are in order at earlier ones"
        earlier = changed


@pytest.mark.parametrize("level", LEVELS)
def test_share_without_num_samples_is_constant(level):
    source = open_sources(make_config(scenes_source(level, reading_order_share=0.4)))[0]
    first, could = moved(read(source, 0), level)
    assert within(len(first), len(could), 0.4)
    assert moved(read(source, 10**9), level)[0] == first


def test_choice_of_captions_depends_on_seed_epoch_and_key():
    fields = {"reading_order_share": 0.3}
    source, other_seed = (open_sources(make_config(scenes_source(**fields), seed=seed))[0] for seed in (0, 1))
    chosen = [moved(samples, "easy") for samples in (read(source, 0), read(source, 0, epoch=1), read(other_seed, 0))]
    for changed, could in chosen:
        assert within(len(changed), len(could), 0.3)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert within(len(chosen[one][0] & chosen[other][0]), len(chosen[0][1]), 0.09), "choices must be independent"
    masks = {number for number in range(SAMPLES) if sample_rng(0, 0, f"scenes-easy-0-{number:08d}").random() < 0.3}
    assert within(len(chosen[0][0] & masks), len(chosen[0][1]), 0.09), "choices must be independent of masks"
    other_world = open_sources(make_config(scenes_source(seed=5, **fields)))[0]
    keys = [sample.key for sample in read(other_world, 0, count=3)]
    assert keys == [f"scenes-easy-5-{number:08d}" for number in range(3)]
    assert moved(read(source, 0), "easy") == chosen[0], "reading again must choose the same captions"


# Schedule over ranks, workers and resuming


@pytest.fixture
def start():
    """Return the function `start(config, rank, world_size, batch, state)`; its loaders are closed after the test."""
    opened = []

    def build(config, rank=0, world_size=1, batch=16, state=None):
        opened.append(
            build_loader(
                config,
                load_tokenizer("scenes"),
                objectives_of(config.model),
                rank=rank,
                world_size=world_size,
                micro_batch_size=batch,
                state=state,
            )
        )
        return opened[-1]

    yield build
    for loader in opened:
        loader.close()


def take(loader, count):
    """Return (key, caption) of all samples, for each of the next batches."""
    tokenizer = load_tokenizer("scenes")
    batches = []
    for batch in islice(loader, count):
        rows = zip(batch.keys, batch.input_ids, batch.attention_mask, strict=True)
        batches.append([(key, " ".join(tokenizer.convert_ids_to_tokens(ids[m])[1:-1])) for key, ids, m in rows])
    return batches


def state_of(loader):
    return json.loads(json.dumps(loader.state_dict()))


MIXTURE = (
    scenes_source(num_samples=40, reading_order_share=1.0, reading_order_samples=192),
    scenes_source("hard", num_samples=60, reading_order_share=0.5, weight=2.0),
)


def is_moved(key, caption):
    _, level, seed, number = key.split("-")
    return caption != Scenes(level, int(seed))[int(number)].caption


def test_batches_of_these_tests_hold_whole_captions(start):
    for key, caption in take(start(make_config(scenes_source())), 1)[0]:
        assert caption == Scenes("easy")[int(key[-8:])].caption


def test_schedule_counts_the_samples_of_all_sources(start):
    """The source gives half of the stream; counting it alone, the share would reach 0 at slot 2,048, not 1,024."""
    scheduled = scenes_source("hard", reading_order_share=1.0, reading_order_samples=1024)
    batches = take(start(make_config(scheduled, scenes_source()), batch=16), 128)
    shares = []
    for quarter in range(4):
        samples = [pair for batch in batches[16 * quarter : 16 * (quarter + 1)] for pair in batch]
        hard = [(key, caption) for key, caption in samples if key.startswith("scenes-hard")]
        could = [key for key, _ in hard if is_out_of_order(Scenes("hard")[int(key[-8:])])]
        shares.append(sum(is_moved(*pair) for pair in hard) / len(could))
        assert len(could) > 60
        assert not any(is_moved(*pair) for pair in samples if pair not in hard), (
            "the other source must keep random order"
        )
    assert shares == pytest.approx([0.875, 0.625, 0.375, 0.125], abs=0.2)
    assert not any(is_moved(*pair) for batch in batches[64:] for pair in batch)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (2, 1), (4, 0)])
def test_captions_do_not_depend_on_ranks_and_workers(start, world_size, num_workers):
    """Compare global batches over several epochs of a mixture, beyond the end of the schedule."""
    expected = [sorted(batch) for batch in take(start(make_config(*MIXTURE)), 16)]
    config = make_config(*MIXTURE, num_workers=num_workers)
    ranks = [take(start(config, rank, world_size, 16 // world_size), 16) for rank in range(world_size)]
    assert [sorted(pair for part in parts for pair in part) for parts in zip(*ranks, strict=True)] == expected
    changed = [{key for key, caption in batch if is_moved(key, caption)} for batch in expected]
    assert any("easy" in key for batch in changed[:8] for key in batch), (
        "the compared captions must include both orders"
    )
    assert {key.split("-")[1] for batch in changed[12:] for key in batch} == {"hard"}, "192 samples are 12 batches"


@pytest.mark.parametrize(("old", "new"), [((1, 16, 0), (1, 16, 2)), ((2, 8, 0), (1, 16, 0)), ((1, 16, 0), (4, 4, 0))])
def test_resumed_run_continues_with_the_same_captions(start, old, new):
    """Stop in the middle of the schedule; `old` and `new` are (ranks, samples per batch, workers)."""
    whole = take(start(make_config(*MIXTURE)), 16)

    def ranks(shape, states=None):
        world_size, batch, num_workers = shape
        config = make_config(*MIXTURE, num_workers=num_workers)
        return [start(config, rank, world_size, batch, states) for rank in range(world_size)]

    first = ranks(old)
    head = [pair for loader in first for batch in take(loader, 5) for pair in batch]
    rest = [pair for loader in ranks(new, [state_of(one) for one in first]) for b in take(loader, 11) for pair in b]
    assert Counter(head) == Counter(pair for batch in whole[:5] for pair in batch)
    assert Counter(rest) == Counter(pair for batch in whole[5:] for pair in batch)


# Saved positions


def test_position_of_another_order_of_captions_is_refused(start):
    def config(**fields):
        return make_config(scenes_source(num_samples=30, **fields))

    setting = {"reading_order_share": 0.5, "reading_order_samples": 100}
    state = state_of(start(config(**setting)))
    start(config(**setting), state=state)
    for other in ({}, setting | {"reading_order_share": 1.0}, setting | {"reading_order_samples": 99}):
        with pytest.raises(ConfigError) as caught:
            start(config(**other), state=state)
        assert "\n" not in str(caught.value)
        assert (
            "differs from the saved data position's (['scenes-easy-0 x 30, reading_order_share 0.5 falling to 0 over "
            "100 samples']), so other samples would come, or in another order; keep it, or start without the position"
        ) in str(caught.value)
    constant = state_of(start(config(reading_order_share=0.5)))
    with pytest.raises(ConfigError, match=r"over 100 samples'\]\) differs from .*\['scenes-easy-0 x 30, [a-z_]+ 0.5'"):
        start(config(**setting), state=constant)


def test_position_saved_before_the_option_existed_means_random_order(start):
    """The expected values are those of such a position, literally."""
    plain = make_config(scenes_source(num_samples=30))
    loader = start(plain)
    take(loader, 1)
    state = state_of(loader)
    newer = ("data.validation.share", "data.sources.contents", "data.image_decoder", "data.image_resampler")
    state = {name: value for name, value in state.items() if name not in newer}
    assert state["data.sources"] == ["scenes-easy-0 x 30"]
    assert set(state) == {
        *("version", "train.seed", "data.shuffle_buffer", "data.sources.weight", "data.sources", "layout"),
        *("position", "num_samples", "skipped"),
    }
    never = make_config(scenes_source(num_samples=30, reading_order_share=0.0, reading_order_samples=7))
    assert take(start(never, state=state), 4) == take(start(plain, state=state), 4)
    with pytest.raises(ConfigError, match=r"data\.sources \(\['scenes-easy-0 x 30, reading_order_share 1\.0'\]\) diff"):
        start(make_config(scenes_source(num_samples=30, reading_order_share=1.0)), state=state)


def test_masks_do_not_depend_on_the_order_of_captions(start):
    first, second = (
        next(start(make_config(scenes_source(reading_order_share=share, num_samples=30)))) for share in (0.0, 1.0)
    )
    assert np.array_equal(first.masked_patch_ids, second.masked_patch_ids)
    assert np.array_equal(first.pixel_values, second.pixel_values)
    assert not np.array_equal(first.input_ids, second.input_ids)
