"""Presets, overrides and the texts of configuration errors."""

import pytest

from eve_ds.config import (
    Config,
    ConfigError,
    MaskingConfig,
    load_config,
    parse_config,
    parse_written_config,
    presets,
    section,
)


def problem(*overrides, preset="eve_tiny"):
    with pytest.raises(ConfigError) as caught:
        load_config(preset, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_presets_are_shipped_and_valid():
    assert {"eve_tiny", "eve_base", "eve_large"} <= set(presets())
    for name in presets():
        config = load_config(name)
        assert isinstance(config, Config)
        assert parse_config(config.model_dump(mode="json")) == config, "a written configuration can be read"


def test_file_extends_its_base_and_overrides_come_last(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: eve_tiny\nmodel: {moe: {num_experts: 4}}\ntrain: {seed: 3}\n")
    config = load_config(str(file), ["train.seed=5", "optimizer.betas=[0.8, 0.9]", "data.num_workers=1"])
    assert (config.model.moe.num_experts, config.model.moe.top_k) == (4, 2)
    assert config.train.seed == 5
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model.hidden_size == load_config("eve_tiny").model.hidden_size


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.hidden_sise=3", "eve_tiny: unknown key 'model.hidden_sise'; did you mean 'hidden_size'?"),
        ("model.moe.num_expert=3", "eve_tiny: unknown key 'model.moe.num_expert'; did you mean 'num_experts'?"),
        ("optim.lr=1", "eve_tiny: unknown key 'optim'; did you mean 'optimizer'?"),
        ("data.image_size=64", "eve_tiny: unknown key 'data.image_size'; did you mean 'model.image_size'?"),
        ("num_workers=2", "eve_tiny: unknown key 'num_workers'; did you mean 'data.num_workers'?"),
        ("train.top_k=2", "eve_tiny: unknown key 'train.top_k'; did you mean 'model.moe.top_k'?"),
        (
            "parallel.zzz=1",
            "eve_tiny: unknown key 'parallel.zzz'; known: ep_size, hierarchical, overlap, split_experts, tp_size",
        ),
        (
            "data.sources=[{kind: scenes, levels: easy}]",
            "eve_tiny: unknown key 'data.sources.0.levels'; did you mean 'level'?",
        ),
    ],
)
def test_error_for_an_unknown_key_suggests_the_nearest_one(override, text):
    assert problem(override) == text


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("parallel.ep_size=3", "eve_tiny: model.moe.num_experts (8) must be divisible by parallel.ep_size (3), since"),
        ("model.image_size=60", "eve_tiny: model: image_size (60) must be divisible by patch_size (8)"),
        ("model.num_attention_heads=3", "hidden_size (128) must be divisible by num_attention_heads (3)"),
        (
            "model.pixel_decoder.num_attention_heads=7",
            "pixel_decoder.hidden_size (96) must be divisible by pixel_decoder.num_attention_heads (7)",
        ),
        (
            "model.moe_layers=[2, 4]",
            "moe_layers ([2, 4]) must be below num_hidden_layers (4); layers are counted from 0",
        ),
        ("model.moe.top_k=9", "moe.top_k (9) must not exceed moe.num_experts (8)"),
        ("model.text_length=41", "text_length (41) must not exceed text_positions (40)"),
        ("masking={random_token_share: 0.6, keep_token_share: 0.5}", "must not exceed 1 together"),
        (
            "masking.text_to_image_mask_ratio=0.5",
            "text_to_image_mask_ratio (0.5) must not be below patch_mask_ratio (0.75)",
        ),
        (
            "data.sources=[{kind: scenes}, {kind: shards}]",
            "eve_tiny: data.sources.1: kind 'shards' needs `shards`: name its files, or take kind 'scenes'",
        ),
        (
            "data.sources=[{kind: shards, shards: a.tar, reading_order_share: 0.5}]",
            "reading_order_share (0.5) is for sources of kind 'scenes', not 'shards'; leave it out",
        ),
        (
            "data.sources=[{kind: shards, shards: a.tar, reading_order_samples: 9}]",
            "reading_order_samples (9) is for sources of kind 'scenes', not 'shards'; leave it out",
        ),
        (
            "data.sources=[{kind: scenes, reading_order_share: 1.5}]",
            "data.sources.0.reading_order_share (1.5): Input should be less than or equal to 1",
        ),
        (
            "data.sources=[{kind: scenes, reading_order_samples: 0}]",
            "data.sources.0.reading_order_samples (0): Input should be greater than or equal to 1",
        ),
        (
            "model.objectives=[mim, mml]",
            "model.objectives.1 ('mml'): Input should be 'mim', 'mlm', 'itc', 'itm' or 'joint'",
        ),
        ("model.objectives=[]", "model.objectives ([]): List should have at least 1 item"),
        ("model.objectives=[mlm, mim, mlm]", "objectives (mim, mlm, mlm) names mlm twice: name each objective once"),
        (
            "model.objectives=[mlm, itm]",
            "objectives (mlm, itm) has itm without itc, whose similarities choose the hard negatives: add itc",
        ),
        (
            "model.objectives=[joint, mlm]",
            "objectives (mlm, joint) has joint beside mim or mlm, which are the two halves of joint: leave out one",
        ),
        (
            "model={objective: msm, objectives: [mlm]}",
            "objective ('msm') is the former name of objectives (['mlm']): write objectives in its place",
        ),
        (
            "model={objective: clip}",
            "objective ('clip') is the former name of objectives and must be one of msm, itc_itm, itc_itm_mlm; use "
            "objectives",
        ),
        (
            "model={objective: [mim, mlm]}",
            "objective (['mim', 'mlm']) is the former name of objectives and must be one of msm, itc_itm,",
        ),
        (
            "loss.text_weight=2",
            "text_weight (2) is the former name of mlm_weight (4.0): write mlm_weight in its place",
        ),
        (
            "loss={mim_weight: 0, mlm_weight: 0}",
            "loss weights of mim, mlm (mim_weight, mlm_weight) are all 0: raise one of them",
        ),
        ("model.text_length=2", "text_length (2) must be at least 3: [CLS], a word and [SEP]"),
        ("model.patch_size=64", "image_size (64) and patch_size (64) make a single patch, which cannot be both"),
        (
            "masking={patch_mask_ratio: 0, text_to_image_mask_ratio: 1}",
            "masking.patch_mask_ratio (0) leaves nothing to predict for mim: raise it, or leave mim out of "
            "model.objectives",
        ),
        (
            "masking={text_mask_ratio: 0, max_text_mask_ratio: null}",
            "masking.text_mask_ratio (0) leaves nothing to predict for mlm: raise it, or leave mlm out of",
        ),
        ("masking.image_view_share=0", "masking.image_view_share (0): Input should be greater than 0"),
        (
            "masking.language_view_patch_share=0",
            "masking.language_view_patch_share (0): Input should be greater than 0",
        ),
        ("optimizer.decay_by=seconds", "eve_tiny: optimizer.decay_by ('seconds') needs train.max_seconds: set"),
        ("train.max_steps=0", "train.max_steps (0): Input should be greater than or equal to 1"),
        ("train.precision=fp8", "train.precision ('fp8'): Input should be 'fp32', 'bf16' or 'fp16'"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1 (1.0): Input should be less than 1"),
        ("optimizer.betas=[-0.1, 0.9]", "optimizer.betas.0 (-0.1): Input should be greater than or equal to 0"),
        ("model.drop_path_rate=1", "model.drop_path_rate (1): Input should be less than 1"),
        ("model.text_dropout=1.0", "model.text_dropout (1.0): Input should be less than 1"),
        ("optimizer.eps=-1", "optimizer.eps (-1): Input should be greater than or equal to 0"),
        ("data.crop_scale=[0, 1]", "data.crop_scale.0 (0): Input should be greater than 0"),
        (
            "data.crop_scale=[1, 0.5]",
            "eve_tiny: data: crop_scale ([1, 0.5]) must be in ascending order: swap its two numbers",
        ),
        ("optimizer.lr=fast", "optimizer.lr ('fast'): Input should be a valid number"),
        ("train.output_dir=s3://bucket/run", "s3:/bucket/run is an address (s3:), and only disks are written"),
    ],
)
def test_error_for_a_bad_value_gives_the_rule(override, text):
    # Independent of whether the preset sets a time budget.
    found = problem(override, "train.max_seconds=null" if "seconds" in override else "train.seed=0")
    assert found.startswith("eve_tiny: ")
    assert text in found


ONLY = "data.sources=[{{kind: scenes}}, {{kind: scenes, modalities: {}}}]"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["model.objectives=[mim]", ONLY.format("text")],
            "data.sources[1].modalities ('text') has nothing that model.objectives (mim) could predict: leave the "
            "source out, or add mlm",
        ),
        (
            ["model.objectives=[mlm]", ONLY.format("image")],
            "data.sources[1].modalities ('image') has nothing that model.objectives (mlm) could predict: leave the "
            "source out, or add mim",
        ),
        (
            ["model.objectives=[mlm, itc]", ONLY.format("any")],
            "model.objectives (mlm, itc) compares images with texts and needs pairs: data.sources[1].modalities is",
        ),
        (
            ["masking.patch_mask_ratio=1", "masking.text_to_image_mask_ratio=1", ONLY.format("image")],
            "masking.patch_mask_ratio (1) leaves nothing to see of data.sources[1], whose modalities are 'image'",
        ),
        (
            ["masking.patch_mask_ratio=1", "masking.text_to_image_mask_ratio=1", ONLY.format("any")],
            "masking.patch_mask_ratio (1) leaves nothing to see of data.sources[1], whose modalities are 'any'",
        ),
        (
            ["masking.text_mask_ratio=1", "masking.max_text_mask_ratio=null", ONLY.format("text")],
            "masking.text_mask_ratio (1) leaves nothing to see of data.sources[1], whose modalities are 'text'",
        ),
        (
            ["model.objectives=[joint]", "masking={patch_mask_ratio: 0, text_mask_ratio: 0}"],
            "masking.patch_mask_ratio (0), text_mask_ratio (0) and text_to_image_share (0.5) leave nothing to predict "
            "of data.sources[0] ('pair') for joint: raise a ratio",
        ),
        (
            ["model.objectives=[joint]", "masking={patch_mask_ratio: 0}", ONLY.format("image")],
            "leave nothing to predict of data.sources[1] ('image') for joint: raise a ratio",
        ),
        (
            ["model.objectives=[joint]", "masking.text_mask_ratio=0", ONLY.format("text")],
            "leave nothing to predict of data.sources[1] ('text') for joint: raise a ratio",
        ),
        (
            ["model.objectives=[joint]", "masking={patch_mask_ratio: 0, text_to_image_share: 1}"],
            "masking.patch_mask_ratio (0), text_mask_ratio (0.5) and text_to_image_share (1) leave nothing to predict "
            "of data.sources[0] ('pair') for joint: raise a ratio",
        ),
        (
            [
                "model.objectives=[joint]",
                "masking={patch_mask_ratio: 1, text_mask_ratio: 1, text_to_image_mask_ratio: 1}",
            ],
            "masking.patch_mask_ratio (1) and text_mask_ratio (1) leave nothing to see for joint: lower one of them",
        ),
    ],
)
def test_views_without_hidden_or_without_visible_parts_are_refused(overrides, text):
    found = problem(*overrides, "masking.max_text_mask_ratio=null" if "joint" in overrides[0] else "train.seed=0")
    assert found.startswith("eve_tiny: ")
    assert text in found


@pytest.mark.parametrize(
    "overrides",
    [
        ["masking.patch_mask_ratio=1", "masking.text_to_image_mask_ratio=1"],  # image views show the caption alone
        ["masking.text_mask_ratio=1", "masking.max_text_mask_ratio=1"],  # language views show the image alone
        ["model.objectives=[mlm]", "masking={patch_mask_ratio: 0}"],
        [ONLY.format("image")],
        [ONLY.format("text")],
        ["model.objectives=[joint]", "masking={patch_mask_ratio: 0}", "masking.text_mask_ratio=1"],
    ],
)
def test_views_with_hidden_and_visible_parts_are_accepted(overrides):
    load_config("eve_tiny", overrides)


def test_former_names_of_objectives_are_read_and_logged(caplog):
    caplog.set_level("INFO", logger="eve_ds")
    section._say_once.cache_clear()
    config = parse_config({"model": {"objective": "msm"}, "loss": {"pixel_weight": 0.5, "text_weight": 2}})
    assert config.model.objectives == ["joint"]
    assert config.model.pixel_target == "normalized", "the default of that time"
    assert (config.loss.mim_weight, config.loss.mlm_weight) == (0.5, 2.0)
    assert [record.getMessage() for record in caplog.records] == [
        "objective ('msm') is read as objectives (['joint'])",
        "pixel_weight (0.5) is read as mim_weight (0.5)",
        "text_weight (2) is read as mlm_weight (2)",
    ]
    assert parse_config({"model": {"objective": "itc_itm_mlm"}}).model.objectives == ["mlm", "itc", "itm"]
    assert parse_config({}).model.objectives == ["mim", "mlm"]
    raw = parse_config({"model": {"objective": "msm", "pixel_target": "raw"}, "loss": {}}).model.pixel_target
    assert raw == "raw", "an explicit value is kept"


@pytest.mark.parametrize(
    ("written", "objectives", "pixel_target"),
    [
        ({}, ["joint"], "normalized"),
        ({"objective": "itc_itm"}, ["itc", "itm"], "normalized"),
        ({"objectives": ["mlm"]}, ["mlm"], "normalized"),
        ({"objectives": ["mim"], "pixel_target": "raw"}, ["mim"], "raw"),
    ],
)
def test_written_configs_without_newer_fields_get_the_values_of_their_time(written, objectives, pixel_target):
    model = parse_written_config({"model": written}, "x").model
    assert (model.objectives, model.pixel_target) == (objectives, pixel_target)


def test_written_config_with_removed_keys_at_their_default_is_read():
    written = {"task": {"name": "nlvr", "word_passes": 0, "read_states": False}}
    assert parse_written_config(written, "x") == parse_config({"task": {"name": "nlvr"}})
    assert written["task"]["word_passes"] == 0, "the argument must not change"
    assert parse_written_config({"task": None}, "x") == parse_config({})


@pytest.mark.parametrize(("key", "value", "default"), [("word_passes", 2, "0"), ("read_states", True, "False")])
def test_written_config_with_a_removed_key_at_another_value_is_refused(key, value, default):
    with pytest.raises(ConfigError) as caught:
        parse_written_config({"task": {"name": "nlvr", key: value}}, "config.json")
    expected = f"config.json: task.{key} ({value}) was removed, and only {default} can still be read: "
    assert str(caught.value) == expected + "use the version that wrote it"


@pytest.mark.parametrize(
    ("objectives", "kinds", "lacking"),
    [
        ("mim, mlm", ["pair"], {}),
        ("mim, mlm", ["image"], {"mlm": "captions"}),
        ("mim, mlm", ["text"], {"mim": "images"}),
        ("mim, mlm", ["image", "text"], {}),
        ("mim, mlm", ["any"], {}),
        ("joint", ["image"], {}),
    ],
)
def test_objectives_without_source_are_listed_with_what_they_lack(objectives, kinds, lacking):
    sources = ", ".join(f"{{kind: scenes, modalities: {kind}}}" for kind in kinds)
    config = load_config("eve_tiny", [f"model.objectives=[{objectives}]", f"data.sources=[{sources}]"])
    assert config.objectives_without_source == lacking


@pytest.mark.parametrize("preset", ["eve_tiny", "eve_base", "eve_large"])
def test_presets_use_the_objectives_and_settings_of_the_paper(preset):
    config = load_config(preset)
    assert config.model.objectives == ["mim", "mlm"]
    if preset in ("eve_base", "eve_large"):
        assert config.masking == MaskingConfig(), "masks 0.75 of the patches and half of the words"
        assert config.data.crop_scale == (0.5, 1.0)
        assert config.train.max_steps == {"eve_base": 480_000, "eve_large": 280_000}[preset]
        assert config.loss.mim_weight == config.loss.mlm_weight == 1.0


def test_one_error_names_several_problems():
    text = problem("train.max_steps=0", "model.hidden_sise=1")
    assert "hidden_sise" in text
    assert "max_steps" in text


def test_malformed_overrides_are_refused():
    assert problem("train.seed") == "override 'train.seed' must have the form section.key=value"
    assert problem("name.x=1") == "override 'name.x=1': 'name' is a value, not a section"
    assert problem("train.seed=[1").startswith("override 'train.seed=[1' is not YAML: ")
    for text in ("data.sources=[{kind:", "data.sources=[{kind: shards, shards: a/{0..9}.tar}]"):
        assert problem(text).endswith(
            "; put the whole override in single quotes for the shell, and a path with {, } or ? in double quotes "
            "inside them"
        )


@pytest.mark.parametrize("override", ["data.sources=[datasets/photos]", "data.sources=[shards:a]", "data.remote=3"])
def test_a_value_in_place_of_a_section_names_its_keys(override):
    keys = "reads_ahead, timeout_seconds" if "remote" in override else "kind, weight, modalities, shards"
    assert f"): Input should be a mapping of {keys}" in problem(override)


def test_a_size_of_the_cache_without_its_folder_is_refused(tmp_path):
    text = problem(f"data.cache_bytes={2**30}")
    assert text.startswith("eve_tiny: data: cache_bytes (1073741824) is for the blocks in cache_dir, which is not set")
    config = load_config("eve_tiny", [f"data.cache_bytes={2**30}", f"data.cache_dir={tmp_path}"])
    assert config.data.cache_bytes == 2**30


def test_unknown_presets_and_unreadable_files_are_refused(tmp_path):
    text = problem(preset="eve_tinny")
    assert text.startswith("config 'eve_tinny' is neither a file nor a preset; did you mean 'eve_tiny'?; presets: ")
    assert problem(preset="nowhere.yaml") == "config file nowhere.yaml does not exist"
    for content, expected in ((b"model: [1", "is not YAML: "), (b"- 1\n", "must be a mapping of sections, not a list")):
        file = tmp_path / "broken.yaml"
        file.write_bytes(content)
        assert expected in problem(preset=str(file))
    (tmp_path / "latin.yaml").write_bytes(b"name: stra\xdfe\n")
    assert "cannot be read: " in problem(preset=str(tmp_path / "latin.yaml"))


def test_configurations_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        load_config("eve_tiny").train.seed = 1
