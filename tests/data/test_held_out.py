"""Held-out pairs are the same in every run, are never trained on, and are divided among ranks without overlap."""

import dataclasses
import tarfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from tars import write_index, write_tar

from eve_ds.config import ConfigError, parse_config
from eve_ds.data.errors import UnusableData
from eve_ds.data.held_out import held_out_pairs, is_held_out
from eve_ds.data.importers.generated import GeneratedScenes
from eve_ds.data.pipeline import build_loader
from eve_ds.data.sample_names import image_key, written_key
from eve_ds.data.shard_writer import WriterOptions, write_shards
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.objectives.registry import objectives_of


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two folders of shards: `train` with 60 scenes, `val` with 20 other scenes."""
    root = tmp_path_factory.mktemp("shards")
    for name, count, split in (("train", 60, "train"), ("val", 20, "val")):
        write_shards(GeneratedScenes(count, split=split), root / name, WriterOptions())
    return root


def config_of(shards, seed=0, **validation):
    data = {"sources": [{"kind": "shards", "shards": str(shards / "train")}], "validation": validation}
    model = {"image_size": 32, "patch_size": 8, "vocab_size": 256}
    return parse_config({"model": model, "data": data, "train": {"train_batch_size": 8, "seed": seed}})


def trained_keys(config, batches, rank=0, world_size=1, batch=4, state=None):
    loader = build_loader(
        config,
        load_tokenizer("scenes"),
        objectives_of(config.model),
        rank=rank,
        world_size=world_size,
        micro_batch_size=batch,
        state=state,
    )
    keys = [key for batch in islice(loader, batches) for key in batch.keys]
    position = loader.state_dict()
    loader.close()
    return keys, position


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_other_numbers_of_ranks_lose_and_repeat_no_trained_sample(shards, share):
    """Ranks run past held-out samples by themselves, so at a stop one is further than another."""
    config, counts, states = config_of(shards, share=share), Counter(), None
    for world_size, batches in ((2, 9), (1, 4), (8, 11), (4, 3), (8, 5), (1, 40)):
        ranks = [
            trained_keys(config, batches, rank, world_size, batch=8 // world_size, state=states)
            for rank in range(world_size)
        ]
        states = [position for _, position in ranks]
        counts.update(key for keys, _ in ranks for key in keys)
    epochs, rest = divmod(counts.total(), len(counts))
    assert sorted(counts.values()) == [epochs] * (len(counts) - rest) + [epochs + 1] * rest


def test_a_share_of_the_training_samples_is_held_out_by_key(shards):
    config = config_of(shards, share=0.3)
    held = {sample.key for sample in held_out_pairs(config, 0, 1)}
    trained, _ = trained_keys(config, 40)
    assert held
    assert not held & set(trained)
    assert len(held | set(trained)) == 60, "all other samples must be trained on"
    assert held == {key for key in held | set(trained) if is_held_out(key, 0.3)}
    assert held == {sample.key for sample in held_out_pairs(config_of(shards, seed=5, share=0.3), 0, 1)}


def test_a_share_that_leaves_no_sample_to_train_on_ends_the_run(shards):
    text = r"data\.validation\.share leaves no sample to train on \(121 in a row are held out\): lower it"
    with pytest.raises(UnusableData, match=text):
        trained_keys(config_of(shards, share=1 - 1e-12), 1)


def test_a_single_sample_is_left_to_train_on(shards):
    keys = sorted({sample.key for sample in held_out_pairs(config_of(shards, share=1 - 1e-12), 0, 1)})
    last = max(keys, key=lambda key: next(share for share in np.linspace(0, 1, 4097) if is_held_out(key, share)))
    share = min(share for share in np.linspace(0, 1, 4097) if is_held_out(last, share)) - 1 / 4096
    trained, _ = trained_keys(config_of(shards, share=float(share)), 5)
    assert last in trained
    assert len(trained) == 20


def test_a_smaller_share_holds_out_fewer_of_the_same_samples():
    keys = [f"{number:08d}" for number in range(4000)]
    small, large = ({key for key in keys if is_held_out(key, share)} for share in (0.05, 0.2))
    assert small < large
    assert abs(len(large) / len(keys) - 0.2) < 0.03


class SeveralCaptions:
    """Source of scenes, each with five captions that name its number."""

    total = 30

    def __init__(self):
        self.description = {"format": "several"}

    def __iter__(self):
        for number, scene in enumerate(GeneratedScenes(self.total)):
            captions = tuple(f"caption {caption} of {number}" for caption in range(5))
            yield dataclasses.replace(scene.resolve(), captions=captions)


def of_image(caption):
    return caption.rpartition(" ")[2]


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("own_shards", [True, False])
def test_an_image_with_several_captions_is_measured_once_and_never_trained(tmp_path, world_size, own_shards):
    """The next pair has the wrong image: if it had the same one, a model that sees would look blind."""
    write_shards(SeveralCaptions(), tmp_path / "train", WriterOptions(samples_per_shard=20))
    write_shards(SeveralCaptions(), tmp_path / "val", WriterOptions(samples_per_shard=20))
    own = [{"kind": "shards", "shards": str(tmp_path / "val")}]
    config = config_of(tmp_path, **({"sources": own} if own_shards else {"share": 0.3}))
    pairs = [pair for rank in range(world_size) for pair in held_out_pairs(config, rank, world_size)]
    images = [of_image(pair.caption) for pair in pairs]
    assert len(set(images)) == len(images)
    assert all(pair.caption.startswith("caption 0 ") for pair in pairs)
    if own_shards:
        assert len(images) == 30
        return
    trained = {image_key(key) for key in trained_keys(config, 60)[0]}
    assert not trained & {image_key(pair.key) for pair in pairs}
    assert len(trained) + len(images) == 30, "all captions of the other images are trained on"


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("name", ["{:09d}", "photo {}", "a/b-{}", "12-{}", "día{}"])
def test_captions_that_share_an_image_are_on_one_side(tmp_path, name, index):
    """For keys of any form: `prepare` numbers its images, other tools do not."""
    (tmp_path / "train").mkdir()
    scenes, members = [scene.resolve() for scene in GeneratedScenes(20)], []
    for number, scene in enumerate(scenes):
        key = name.format(number)
        members.append((f"{key}.png", scene.image.read()))
        members += [(f"{key}.{caption}.txt", f"caption {caption} of {number}".encode()) for caption in range(5)]
    write_tar(tmp_path / "train" / "a.tar", members, tarfile.PAX_FORMAT)
    if index:
        write_index(tmp_path / "train")
    config = config_of(tmp_path, share=0.3)
    pairs = held_out_pairs(config, 0, 1)
    held = {of_image(pair.caption) for pair in pairs}
    assert 1 < len(held) == len(pairs) < 12
    assert all(pair.caption.startswith("caption 0 ") for pair in pairs)
    trained, _ = trained_keys(config, 40)
    left = {name.format(number) for number in range(20) if str(number) not in held}
    assert {key.rpartition("-")[0] for key in trained} == left
    assert len(set(trained)) == 5 * len(left), "all captions of the other images are trained on"


@pytest.mark.parametrize("caption", [None, 0, 4, 12])
@pytest.mark.parametrize("image", [0, 7, 10**9 + 1])
def test_captions_of_an_image_have_one_image_key(image, caption):
    assert image_key(written_key(image, caption)) == written_key(image, None)
    assert image_key(f"a/b-1/{written_key(image, caption)}") == f"a/b-1/{written_key(image, None)}"


@pytest.mark.parametrize(
    "key", ["", "photo-1", "12-1", "000000001", "2020-01-02", "scenes-easy-0-00000012", "a-000000001-x"]
)
def test_keys_of_other_programs_are_their_own_images(key):
    assert image_key(key) == key


def test_ranks_share_the_held_out_pairs(shards):
    config = config_of(shards, share=0.3)
    whole = [sample.key for sample in held_out_pairs(config, 0, 1)]
    shares = [[sample.key for sample in held_out_pairs(config, rank, 3)] for rank in range(3)]
    assert sorted(key for share in shares for key in share) == sorted(whole)


def test_separate_validation_sources_do_not_change_training(shards):
    own = config_of(shards, sources=[{"kind": "shards", "shards": str(shards / "val")}], num_samples=12)
    pairs = held_out_pairs(own, 0, 1)
    assert len(pairs) == 12
    assert all(sample.image.shape == (32, 32, 3) and sample.caption for sample in pairs)
    plain = own.model_copy(update={"data": own.data.model_copy(update={"validation": None})})
    assert trained_keys(own, 10)[0] == trained_keys(plain, 10)[0]


def test_validation_shards_used_in_training_are_refused(shards):
    config = config_of(shards, sources=[{"kind": "shards", "shards": str(shards / "train")}])
    with pytest.raises(ConfigError, match=r"data.validation.sources names shard .*, which data.sources trains on"):
        held_out_pairs(config, 0, 1)


def test_a_share_that_holds_out_nothing_is_refused(shards):
    with pytest.raises(ConfigError, match=r"data.validation.share \(1e-12\) holds out no sample of data.sources"):
        held_out_pairs(config_of(shards, share=1e-12), 0, 1)


def test_a_saved_position_with_another_share_is_refused(shards):
    _, position = trained_keys(config_of(shards, share=0.3), 2)
    config = config_of(shards, share=0.2)
    with pytest.raises(
        ConfigError, match=r"data.validation.share \(0.2\) differs from the saved data position's \(0.3\)"
    ):
        build_loader(
            config,
            load_tokenizer("scenes"),
            objectives_of(config.model),
            rank=0,
            world_size=1,
            micro_batch_size=4,
            state=position,
        )


@pytest.mark.parametrize(
    ("validation", "text"),
    [
        ({}, r"data\.validation: needs either sources \(0\) or a share \(0\): set one of them"),
        ({"share": 0.1, "sources": [{"kind": "scenes"}]}, r"either sources \(1\) or a share \(0.1\)"),
        (
            {"sources": [{"kind": "scenes", "modalities": "text"}]},
            r"data\.validation: sources must hold pairs, not modalities 'text': leave the source out",
        ),
    ],
)
def test_validation_needs_either_sources_or_a_share(shards, validation, text):
    with pytest.raises(ConfigError, match=text):
        config_of(shards, **validation)
