"""Drawn DeepSpeed JSONs with drawn YAML settings: each trains one step and is saved, or is refused in one line.

Keys of the JSON come from the table, keys of the YAML from the configuration classes. `EVE_DS_FUZZ=1000 pytest ...`
draws that many, other ones each time.
"""

import os
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from one_step import one_step, small_config

from eve_ds.config import Config, ConfigError
from eve_ds.parallel.deepspeed_json.keys import KEYS, WHOLE, Rule

DRAWS = int(os.environ.get("EVE_DS_FUZZ", "60"))
FIXED = {"max_steps", "max_seconds", "compile", "warmup_steps", "num_workers"}
"""Keys of the YAML that keep their value: those that would train longer, compile, or start processes."""
JUNK = st.sampled_from([None, True, "auto", "true", "1", "", 0, -1, 1.5, 3, 10**12, [], ["a"], {}, {"enabled": True}])
"""Values of every type."""


def fitting(kind):
    """Values of a kind, small where a large one would only take time."""
    low = max(kind.low, 0)
    of_form = {
        "bool": st.booleans(),
        "whole": st.sampled_from([int(low) + step * kind.multiple for step in (0, 1, 2, 999)] + [200_000_000, 5e8]),
        "number": st.sampled_from([low, low + 0.5, low + 1, low + 3]),
        "text": st.sampled_from(kind.choices or ("logs", "name")),
        "texts": st.sampled_from([[], ["all_reduce"]]),
        "numbers": st.sampled_from([[], [0.9, 0.98]]),
        "mapping": st.sampled_from([{}, {"lr": "auto"}]),
        "any": JUNK,
    }[kind.form]
    return st.one_of(of_form, st.none()) if kind.null else of_form


def drawn_section(rules, most):
    """A few keys of a section with values that mostly fit."""

    def of_key(key):
        rule = rules[key]
        if not isinstance(rule, Rule):
            return drawn_section(rule, 3)
        return st.one_of(fitting(rule.kind), fitting(rule.kind), fitting(rule.kind), JUNK)

    keys = st.lists(st.sampled_from([key for key in rules if key != WHOLE]), max_size=most, unique=True)
    return keys.flatmap(lambda chosen: st.fixed_dictionaries({key: of_key(key) for key in chosen}))


def drawn_json():
    """A whole JSON: a ZeRO stage and precision that can train, so that the other keys are reached, and some keys."""
    zero = st.builds(
        lambda stage, more: {"stage": stage, **more},
        st.sampled_from([0, 1, 1, 2, 2]),
        drawn_section(KEYS["zero_optimization"], 4),
    )
    base = st.fixed_dictionaries({}, optional={"zero_optimization": zero, "bf16": drawn_section(KEYS["bf16"], 2)})
    return st.builds(lambda more, base: {**more, **base}, drawn_section(KEYS, 4), base)


def is_scalar(annotation):
    """Whether a field holds a number, a switch or a choice, not a section, a list or a path."""
    kinds = {annotation, *get_args(annotation)} - {type(None)}
    return get_origin(annotation) is Literal or (
        kinds <= {annotation, int, float, bool} and bool(kinds & {int, float, bool})
    )


def of_annotation(annotation):
    """Values of a field of the YAML."""
    if annotation is bool:
        return st.booleans()
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    kinds = {annotation, *get_args(annotation)}
    numbers = [0, 1, 2, 4] if int in kinds else [0.0, 0.25, 1.0, 1.5]
    return st.sampled_from([*numbers, None] if type(None) in kinds else numbers)


def drawn_yaml():
    """A few keys of the sections that the training step reads."""
    fields = [
        (section, name, field.annotation)
        for section in ("model", "data", "train", "optimizer", "loss", "masking", "parallel")
        for name, field in Config.model_fields[section].annotation.model_fields.items()
        if name not in FIXED and is_scalar(field.annotation)
    ]
    chosen = st.lists(st.sampled_from(fields), max_size=3, unique_by=lambda field: field[:2])
    return chosen.flatmap(lambda some: st.tuples(*(st.tuples(st.just(one[:2]), of_annotation(one[2])) for one in some)))


def outcome(dictionary, changes):
    """What came of a draw: number of steps and whether they were saved, or the text of the refusal."""
    sections = {}
    for (section, name), value in changes:
        sections.setdefault(section, {})[name] = value
    try:
        config = small_config(**sections)
    except ConfigError as error:
        return {"refused": str(error)}
    return one_step(dictionary, config)


def try_draws(rank, world_size, number):
    """Numbers of draws that trained and that were refused; a draw that did neither raises."""
    counts = {"trained": 0, "refused": 0}

    @settings(
        max_examples=number,
        derandomize="EVE_DS_FUZZ" not in os.environ,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if "EVE_DS_FUZZ" in os.environ else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn_json(), drawn_yaml())
    def check(dictionary, changes):
        result = outcome(dictionary, changes)
        if result["refused"] is None:
            assert result["steps"] == 1, (dictionary, changes)
            assert result["saved"], (dictionary, changes)
        else:
            assert "\n" not in result["refused"], (dictionary, changes)
        counts["trained" if result["refused"] is None else "refused"] += 1

    check()
    return counts


@pytest.mark.timeout(max(300, DRAWS * 3))
def test_every_drawn_configuration_trains_or_is_refused_in_one_line(run_ranks):
    (counts,) = run_ranks(try_draws, 1, DRAWS, timeout=max(240, DRAWS * 3))
    assert counts["trained"] >= DRAWS / 10, counts
    assert counts["refused"] >= DRAWS / 10, counts
