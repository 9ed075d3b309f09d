"""Model card of an export: the objectives that it names."""

from dataclasses import replace

import pytest

from eve_ds.config import load_config, parse_config
from eve_ds.export.provenance import OBJECTIVES, ExportReport, model_card, trained_objectives

REPORT = ExportReport(
    checkpoint="step-00000007",
    step=7,
    dtype="float32",
    tensors=3,
    parameters=30,
    experts={"1": 4},
    bytes=120,
    sha256="c0ffee",
    check=None,
)


def card_of(config):
    return model_card(REPORT, config, {"samples": 56}, None)


@pytest.mark.parametrize("objectives", ["mim", "mlm", "joint", "mim,mlm", "itc", "itc,itm", "mim,mlm,itc,itm"])
def test_model_card_describes_exactly_the_objectives_of_the_run(objectives):
    names = objectives.split(",")
    card = card_of(load_config("eve_tiny", [f"model.objectives=[{objectives}]"]))
    assert [name for name, sentence in OBJECTIVES.items() if f"- {sentence}\n" in card] == names
    assert "masked signal modeling" not in card


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["loss.mim_weight=0"], ["mlm"]),
        (["data.sources=[{kind: scenes, modalities: text}]"], ["mlm"]),
        (["model.objectives=[joint]", "loss.mim_weight=0"], ["joint"]),
    ],
)
def test_objectives_without_a_weight_or_a_source_are_not_named(overrides, expected):
    config = load_config("eve_tiny", overrides)
    assert trained_objectives(config) == expected
    assert [name for name, sentence in OBJECTIVES.items() if sentence in card_of(config)] == expected


def test_new_objective_without_a_sentence_is_named():
    config = load_config("eve_tiny", ["model.objectives=[mlm]"])
    model = config.model.model_copy(update={"objectives": ["mlm", "count_words"]})
    card = card_of(config.model_copy(update={"model": model}))
    assert f"- {OBJECTIVES['mlm']}\n- `count_words`\n" in card


HOSTILE = "x\n## y | <script>a</script> [l](http://u) `c` \x1b[2J"
SHOWN = r"x\\n\#\# y \| \<script\>a\</script\> \[l\](http://u) \`c\` \\x1b\[2J"


def test_names_of_other_people_are_shown_as_they_are():
    source = {"kind": "shards", "shards": HOSTILE}
    tree = load_config("eve_tiny").model_dump(mode="json") | {"name": HOSTILE}
    config = parse_config(tree | {"data": tree["data"] | {"sources": [source]}})
    state = {"samples": 56, "topology": {HOSTILE: HOSTILE}}
    evaluation = {"kind": "eval", "step": 7, HOSTILE: {"a": HOSTILE}}
    lines = model_card(replace(REPORT, checkpoint=HOSTILE), config, state, evaluation).split("\n")
    assert lines[0] == f"# {SHOWN}"
    assert f"| trained on | shards {SHOWN}, weight 1 |" in lines
    assert f"| checkpoint | {SHOWN}: step 7, 56 samples |" in lines
    assert f"| {SHOWN} | a {SHOWN} |" in lines
    assert f"batch 64, {SHOWN} {SHOWN} |" in "\n".join(lines)
    assert not any(line.startswith(("## ", "<script>")) for line in lines)
