"""Statements about two scenes.

Each statement appears once true and once false, and only then are the scenes built. No function of the text alone
therefore beats chance, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from eve_ds.data.synthetic.requirements import (
    Description,
    Requirement,
    draw_attribute,
    draw_kind,
    draw_relation,
    draw_two_kinds,
    scene_with,
)
from eve_ds.data.synthetic.scenes import (
    OPPOSITES,
    STATEMENT_SCENE_STREAM,
    STATEMENT_TEXT_STREAM,
    LevelName,
    Scene,
    Scenes,
    Split,
    SplitMix64,
)


@dataclass(frozen=True, eq=False)
class Statement:
    """A sentence about two images and whether it is true of them."""

    left: Scene
    right: Scene
    text: str
    label: bool


class Statements:
    """Endless map-style data set of statements; items 2k and 2k + 1 share a text, and exactly one of them is true.

    Args:
        level: `easy` or `hard`.
        seed: seed of the generated world.
        split: `train`, `val` or `test`; both images belong to the split.

    Raises:
        ConfigError: unknown level or split.
    """

    def __init__(self, level: LevelName, seed: int = 0, split: Split = "train") -> None:
        self.scenes = Scenes(level, seed, split)

    def __getitem__(self, index: int) -> Statement:
        """Return statement number `index`."""
        group, turn = divmod(index, 2)
        text_rng = self.scenes.rng(group, STATEMENT_TEXT_STREAM)
        label = bool(text_rng.below(2)) == bool(turn)
        claim = _CLAIMS[text_rng.below(len(_CLAIMS))](self.scenes, text_rng)
        rng = self.scenes.rng(index, STATEMENT_SCENE_STREAM)
        pairs = claim.true_pairs if label else claim.false_pairs
        left, right = (scene_with(self.scenes, requirement, rng) for requirement in pairs[rng.below(len(pairs))])
        return Statement(left, right, claim.text, label)


_Pairs = tuple[tuple[Requirement, Requirement], ...]
"""Alternatives for what the left and the right image must show."""


class _Claim(NamedTuple):
    text: str
    true_pairs: _Pairs
    false_pairs: _Pairs


def _with(*said: Description, but: tuple[Description, ...] = ()) -> Requirement:
    return Requirement(said, no_other=but)


def _on_side(pairs: _Pairs, side: int) -> _Pairs:
    """Return pairs that are given for the left image, or mirrored for the right image (`side` 1)."""
    return tuple((second, first) for first, second in pairs) if side else pairs


def _claim_one_side(scenes: Scenes, rng: SplitMix64) -> _Claim:
    """Claim that one image shows an object; the other image shows it in half of the pairs, true or false."""
    said = draw_kind(scenes.level, rng)
    shown, absent = _with(said), _with(but=(said,))
    side = rng.below(2)
    true, false = ((shown, shown), (shown, absent)), ((absent, shown), (absent, absent))
    text = f"the {('left', 'right')[side]} image contains a {said}"
    return _Claim(text, _on_side(true, side), _on_side(false, side))


def _claim_both(scenes: Scenes, rng: SplitMix64) -> _Claim:
    said = draw_attribute(scenes.level, rng)
    shown, absent = _with(said), _with(but=(said,))
    false = ((shown, absent), (absent, shown), (absent, absent))
    return _Claim(f"both images contain a {said}", ((shown, shown),), false)


def _claim_exactly_one(scenes: Scenes, rng: SplitMix64) -> _Claim:
    said = draw_attribute(scenes.level, rng)
    shown, absent = _with(said), _with(but=(said,))
    text = f"exactly one image contains a {said}"
    return _Claim(text, ((shown, absent), (absent, shown)), ((shown, shown), (absent, absent)))


def _claim_one_and_other(scenes: Scenes, rng: SplitMix64) -> _Claim:
    first, second = draw_two_kinds(scenes, rng)
    only_first, only_second = _with(first, but=(second,)), _with(second, but=(first,))
    both, neither = _with(first, second), _with(but=(first, second))
    text = f"one image contains a {first} and the other a {second}"
    true = ((only_first, only_second), (only_second, only_first))
    false = ((only_first, only_first), (only_second, only_second), (both, neither), (neither, both))
    return _Claim(text, true, false)


def _claim_relation(scenes: Scenes, rng: SplitMix64) -> _Claim:
    first, relation, second = draw_relation(scenes, rng)
    holds = Requirement((first, second), (first, second), relation)
    fails = holds._replace(relation=OPPOSITES[relation])
    side = rng.below(2)
    text = f"the {('left', 'right')[side]} image contains a {first} {relation} a {second}"
    return _Claim(
        text, _on_side(((holds, holds), (holds, fails)), side), _on_side(((fails, holds), (fails, fails)), side)
    )


def _claim_number(scenes: Scenes, rng: SplitMix64) -> _Claim:
    fewest, most = (Requirement(num_objects=count) for count in scenes.level.num_objects)
    side = rng.below(2)
    text = f"the {('left', 'right')[side]} image contains more objects than the {('right', 'left')[side]} image"
    false = ((fewest, most), (fewest, fewest), (most, most))
    return _Claim(text, _on_side(((most, fewest),), side), _on_side(false, side))


_CLAIMS = (_claim_one_side, _claim_both, _claim_exactly_one, _claim_one_and_other, _claim_relation, _claim_number)
