"""Rules that hold for every field of its type: numbers are no truth values, and paths are expanded and not empty."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BeforeValidator, ValidationError

from eve_ds.config import Config, ConfigError, Section, load_config
from eve_ds.config.section import expand_path


def types(annotation):
    """The annotation and everything that it names."""
    yield annotation
    for part in get_args(annotation):
        yield from types(part)


def fields(section=Config, seen=None):
    """Every (section, name, field) of the tree, each section once."""
    seen = set() if seen is None else seen
    if section in seen:
        return
    seen.add(section)
    for name, field in section.model_fields.items():
        yield section, name, field
        for kind in types(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from fields(kind, seen)


def is_path(field):
    """Whether the input of a field is expanded, in itself or in its items."""
    item = next(iter(get_args(field.annotation)), None)
    inner = [rule for kind in (item, *get_args(item)) for rule in getattr(kind, "__metadata__", ())]
    return any(isinstance(rule, BeforeValidator) and rule.func is expand_path for rule in (*field.metadata, *inner))


NUMBERS = [
    (section, name)
    for section, name, field in fields()
    if {int, float} & set(types(field.annotation)) and bool not in types(field.annotation)
]
PATHS = {f"{section.__name__}.{name}": (section, name) for section, name, field in fields() if is_path(field)}


def problems(section, **values):
    """Field -> message of each problem of a section."""
    with pytest.raises(ValidationError) as caught:
        section.model_validate(values)
    return {error["loc"][0]: error["msg"] for error in caught.value.errors()}


@pytest.mark.parametrize(("section", "name"), NUMBERS)
@pytest.mark.parametrize("value", [True, False, [True, 0.5]])
def test_a_truth_value_is_no_number(section, name, value):
    assert problems(section, **{name: value})[name] == "Input should be a number, not true or false"


def test_fields_of_every_section_are_tried():
    assert {section.__name__ for section, _ in NUMBERS} >= {"TrainConfig", "DataConfig", "MoEConfig", "TaskConfig"}
    assert PATHS.keys() >= {
        *("TrainConfig.output_dir", "TrainConfig.init", "DataConfig.tokenizer", "SourceConfig.shards"),
        *("ExamplesConfig.annotations", "ExamplesConfig.images"),
    }
    paths = {f"{section.__name__}.{name}" for section, name, field in fields() if Path in types(field.annotation)}
    assert paths <= PATHS.keys()


def test_yaml_words_for_truth_values_are_no_numbers():
    with pytest.raises(ConfigError) as caught:
        load_config("eve_tiny", ["data.horizontal_flip=yes"])
    assert str(caught.value) == "eve_tiny: data.horizontal_flip (True): Input should be a number, not true or false"


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("value", ["", " ", "a\0b", "$EVE_DS_NOT_SET/a", "a/${EVE_DS_NOT_SET}"])
def test_a_path_is_not_empty_and_names_no_unset_variable(name, value):
    section, field = PATHS[name]
    for given in {"annotations": ([value],), "shards": (value, [value])}.get(field, (value,)):
        text = problems(section, **{field: given})[field]
        assert text.startswith("Input should be a path")
        assert ("EVE_DS_NOT_SET" in text) == ("$" in value)


@pytest.mark.parametrize("text", ["~/a b", "$HOME/a b", "${HOME}/a b"])
def test_paths_are_expanded_as_by_a_shell(text, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(
        "eve_tiny",
        [
            *(f"{key}={text}" for key in ("train.output_dir", "train.init", "data.tokenizer")),
            f"data.sources=[{{kind: shards, shards: ['{text}']}}, {{kind: shards, shards: '{text}'}}]",
            f"task={{name: vqa, train: {{annotations: ['{text}'], images: '{text}'}}}}",
        ],
    )
    train, path = config.task.train, "/home/me/a b"
    assert [config.train.output_dir, config.train.init, *train.annotations, train.images] == [Path(path)] * 4
    assert [config.data.tokenizer, config.data.sources[0].shards, config.data.sources[1].shards] == [path, [path], path]


def test_names_and_brace_lists_are_no_variables():
    for text in ("scenes", "bert-base-uncased", "cc3m-{00000..00331}.tar", "a$", "price-5$.tar", "a~b"):
        assert expand_path(text) == text


@pytest.mark.parametrize("value", [1e9 + 1, 1e300])
def test_a_wait_that_no_clock_counts_is_refused(value):
    with pytest.raises(ConfigError, match=r"train\.timeout_seconds \(.*\): Input should be less than or equal to 1000"):
        load_config("eve_tiny", [f"train.timeout_seconds={value}"])


def test_an_override_by_a_mapping_keeps_the_other_keys_of_the_section():
    preset = load_config("eve_tiny")
    whole = load_config("eve_tiny", ["train={max_steps: 7}", "optimizer={lr: 0.5}", "model.moe={top_k: 1}"])
    single = load_config("eve_tiny", ["train.max_steps=7", "optimizer.lr=0.5", "model.moe.top_k=1"])
    assert whole == single != preset
    assert load_config("eve_tiny", ["train.seed=1", "train={max_steps: 7}"]).train.seed == 1
