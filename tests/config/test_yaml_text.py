"""YAML of unknown origin: the values of PyYAML, or one line about what is wrong, quickly and in little memory."""

import json
import re
from importlib import resources

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from eve_ds import limits
from eve_ds.config import ConfigError, load_config
from eve_ds.config.yaml_text import parse_yaml

leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
trees = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner), max_leaves=8)


@settings(max_examples=40)
@given(trees)
def test_plain_documents_are_those_of_pyyaml(tree):
    for text in (yaml.safe_dump(tree), yaml.safe_dump(tree, default_flow_style=True, allow_unicode=True)):
        assert repr(parse_yaml(text)) == repr(yaml.safe_load(text))


@pytest.mark.parametrize("file", sorted((resources.files("eve_ds") / "configs").rglob("*.yaml")), ids=lambda f: f.stem)
def test_presets_are_those_of_pyyaml(file):
    assert parse_yaml(file.read_text(encoding="utf-8")) == yaml.safe_load(file.read_text(encoding="utf-8"))


def test_aliases_and_merge_keys_work():
    assert parse_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\ne: [*x, *x]") == {
        "a": {"b": 1, "c": 2},
        "d": {"b": 1, "c": 3},
        "e": [{"b": 1, "c": 2}] * 2,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-01-31", "2024-01-31"),
        ("2024-99-99", "2024-99-99"),
        ("0", 0),
        ("-0", 0),
        ("0x1f", 31),
        ("0b11", 3),
        ("1_000", 1000),
        ("0.5", 0.5),
        ("1e-3", "1e-3"),  # text in YAML 1.1; the settings take it as a number
        ("'010'", "010"),
        ("no", False),
    ],
)
def test_scalars(text, value):
    assert parse_yaml(text) == value


def bomb(levels, width=9):
    lines = ["a0: &a0 [1]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]" for level in range(1, levels)]
    return "\n".join(lines)


def merge_bomb(levels):
    lines = ["a0: &a0 {" + ", ".join(f"k{number}: 1" for number in range(50)) + "}"]
    return "\n".join(lines + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)])


TOO_DEEP, TOO_LARGE = "nested deeper than 100 levels", "more than 10,000 values, aliases expanded"
HOSTILE = {
    "aliases that multiply": (bomb(12), TOO_LARGE),
    "a hundred levels of aliases": (bomb(100), TOO_LARGE),
    "merge keys that multiply": (merge_bomb(8), TOO_LARGE),
    "a list that contains itself": ("&a [1, *a]", TOO_DEEP),
    "two lists that contain themselves": ("&a [*a, *a]", TOO_LARGE),
    "a mapping that contains itself": ("&a {b: *a}", TOO_DEEP),
    "deep lists": ("[" * 100_000, TOO_DEEP),
    "deep mappings": ("{a: " * 101 + "1" + "}" * 101, TOO_DEEP),
    "deep blocks": ("\n".join(" " * level + "a:" for level in range(150)), TOO_DEEP),
    "a key of 100 levels": ("? " * 2000 + "a", "."),
    "many values before a mistake": ("[" + "1, " * 20_000 + "}", TOO_LARGE),
    "many values": ("a: [" + "1, " * 20_000 + "1]", TOO_LARGE),
    "a long number": ("9" * 301, "has 301 digits, more than 300"),
    "a long hexadecimal number": ("0x" + "9" * 5000, "has 5,002 digits"),
    "an octal number": ("a: [1, 0_17]", r"0_17 would be octal, write 17, or text in quotes \(line 1, column 8\)"),
    "a key twice": ("a: 1\nb: 2\na: 3", r"the key 'a' stands twice \(line 3, column 1\)"),
    "a nested key twice": ("x: [{a: 1, 'a': 2}]", "the key 'a' stands twice"),
    "a key that is a number": ("{1: x}", "the key '1' is no text but a number: write it in quotes"),
    "a key that is a truth value": ("on: 1", "the key 'on' is no text but a truth value"),
    "a key that is a date": ("2024-01-01: 1", "is no text but a date"),
    "a key that is a list": ("? [a]\n: 1", "the key in brackets is no text but a list"),
    "a program": ("!!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
    "a Python name": ("!!python/name:os.system", "could not determine a constructor for the tag"),
    "a tag of its own": ("!x 1", "could not determine a constructor for the tag '!x'"),
    "bytes": ("!!binary aGVsbG8=", "could not determine a constructor for the tag"),
    "a number that is none": ("!!int x", "."),
    "an empty number": ("!!int ''", "does not fit its tag"),
    "a truth value that is none": ("!!bool x", "does not fit its tag"),
    "a missing anchor": ("*a", "found undefined alias"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "a null character": ("a: \0", "unacceptable character"),
    "an open bracket": ("a: [1", r"\(line 1, column"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_documents_are_one_line(kind):
    text, expected = HOSTILE[kind]
    with pytest.raises(ValueError, match=expected) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("levels", [1, 99, 100])
def test_depth_up_to_the_cap_is_read(levels):
    assert parse_yaml("[" * levels + "]" * levels) == json.loads("[" * levels + "]" * levels)


def test_a_value_may_not_exceed_the_cap_by_one():
    assert len(parse_yaml("[" + "1," * (limits.CONFIG_VALUES - 1) + "]")) == limits.CONFIG_VALUES - 1
    with pytest.raises(ValueError, match=TOO_LARGE):
        parse_yaml("[" + "1," * limits.CONFIG_VALUES + "]")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_bases_in_a_circle_are_one_line(tmp_path, length, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(length):
        (tmp_path / f"{number}.yaml").write_text(f"base: {(number + 1) % length}.yaml\n")
    with pytest.raises(ConfigError, match=re.escape("config 0.yaml: base leads in a circle, or too far: 0.yaml -> ")):
        load_config("0.yaml")


def test_a_long_chain_of_bases_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    (tmp_path / "30.yaml").write_text("base: eve_tiny\n")
    assert load_config("20.yaml") == load_config("eve_tiny")
    with pytest.raises(ConfigError, match="leads in a circle, or too far"):
        load_config("0.yaml")


@pytest.mark.parametrize("base", ["[a]", "{a: 1}", "7", "true"])
def test_a_base_is_a_name(tmp_path, base):
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match=r"base \(.+\) must be the name of a preset or file"):
        load_config(str(tmp_path / "a.yaml"))


def test_an_override_does_not_change_the_tree_under_it(tmp_path):
    (tmp_path / "a.yaml").write_text("optimizer: {lr: 0.1}\n")
    under = {"train": {"seed": 3}}
    assert load_config(str(tmp_path / "a.yaml"), ["train.seed=5"], under).train.seed == 5
    assert under == {"train": {"seed": 3}}
