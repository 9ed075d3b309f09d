from collections import Counter

import pytest
from scene_reader import one

from eve_ds.config import ConfigError
from eve_ds.data.synthetic.probes import binding_probes
from eve_ds.data.synthetic.scenes import Scenes, word_class


def test_probe_shows_one_clue_and_no_word_of_the_other_object():
    probes = list(binding_probes(Scenes("easy", split="val"), 40))
    assert Counter(probe.probe_type for probe in probes) == dict.fromkeys(
        ["position_to_color", "position_to_shape", "color_to_shape", "shape_to_color"], 40
    )
    named_first = 0
    for probe in probes:
        clue_class, _, asked_class = probe.probe_type.partition("_to_")
        assert " ".join(probe.words) == probe.scene.caption
        visible = [word for i, word in enumerate(probe.words) if i not in probe.masked]
        clue = [word for word in visible if word not in ("a", "and")]
        assert {word_class(word) for word in clue} == {clue_class}
        assert len(clue) == (2 if clue_class == "position" else 1)
        named = one(
            [item for item in probe.scene.objects if {*clue} <= {item.color, item.shape, *item.position.split()}]
        )
        other = one([item for item in probe.scene.objects if item is not named])
        assert probe.asked in probe.masked
        assert probe.words[probe.asked] == probe.target == getattr(named, asked_class)
        assert probe.distractor == getattr(other, asked_class) != probe.target
        # The word to predict is in the phrase of the identified object, like the clue.
        first_phrase = probe.asked < probe.words.index("and")
        assert first_phrase == (named is probe.scene.objects[0])
        named_first += first_phrase
    assert 55 < named_first < 105


def test_level_without_positions_is_refused():
    with pytest.raises(ConfigError, match="binding probes need scenes of level 'easy', not 'hard'"):
        next(binding_probes(Scenes("hard"), 1))
