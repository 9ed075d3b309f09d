"""Boxes: generated 100x400 images of three gray boxes with true statements, in the style of the NLVR corpus 1.0.

The corpus (Suhr et al., ACL 2017) shows towers of blocks or scattered items, and these images copy its pixels. A
caption describes its image or is a true statement of a small grammar. The grammar is enumerated: every family yields
all its texts, each with the predicate that decides it, so that one dictionary decides any text, also one of the corpus.

A sample is a pure function of (seed, split, index). The split of an image depends on its contents but not on the order
of the boxes, because the corpus shows each image in all six orders.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, pairwise, product
from typing import Literal, NamedTuple, get_args, overload

import numpy as np
from numpy.typing import NDArray

from eve_ds.data.synthetic.scenes import Split, SplitMix64, check_split

Kind = Literal["tower", "scatter"]

IMAGE_SHAPE = (100, 400, 3)
BOX_SIDE = 100
"""Height and width of a box in pixels; a darker bar of half the width lies between two boxes."""
BOX_COLOR = (211, 211, 211)
BAR_COLOR = (128, 128, 128)
COLORS: dict[str, tuple[int, int, int]] = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
SHAPES = ("square", "triangle", "circle")
SIZES = (10, 20, 30)
MAX_ITEMS = 8
"""Largest number of scattered items in a box."""
MAX_BLOCKS = 4
"""Largest number of blocks in a tower."""
BLOCK_SIZE, BLOCK_LEFT, BLOCK_TOPS = 20, 40, (80, 59, 38, 17)

_COLOR_CODES = {name: code for code, name in enumerate(COLORS)}
_SHAPE_CODES = {name: code for code, name in enumerate(SHAPES)}
_PITCH = 150
_SPLIT_CODES: dict[str, int] = {name: code for code, name in enumerate(get_args(Split))}
# Values of `purpose` in `Boxes.rng`.
_SCENE, _STATEMENT, _OTHER = 0, 1, 2


class Item(NamedTuple):
    """An item of a box; x and y are its left and top edges in pixels from the top left corner of the box."""

    shape: str
    color: str
    size: int
    x: int
    y: int


Box = tuple[Item, ...]
"""Items of a box; blocks of a tower from the base up."""
Picture = tuple[Box, Box, Box]


# Images


def render(boxes: Picture) -> NDArray[np.uint8]:
    """Return pixels (100, 400, 3) uint8, RGB."""
    image = _empty().copy()
    stamps = _stamps()
    for number, box in enumerate(boxes):
        left = number * _PITCH
        for shape, color, size, x, y in box:
            image[y : y + size, left + x : left + x + size] = stamps[shape, color, size]
    return image


@cache
def _empty() -> NDArray[np.uint8]:
    image = np.empty(IMAGE_SHAPE, dtype=np.uint8)
    image[:] = BAR_COLOR
    for number in range(3):
        image[:, number * _PITCH : number * _PITCH + BOX_SIDE] = BOX_COLOR
    return image


@cache
def _stamps() -> dict[tuple[str, str, int], NDArray[np.uint8]]:
    """Return images of all items on the gray of a box; items are a pixel apart, so a stamp may fill its square."""
    stamps = {}
    for shape, color, size in product(SHAPES, COLORS, SIZES):
        share = _coverage(shape, size)[..., None]
        stamp = share * np.array(COLORS[color]) + (1 - share) * np.array(BOX_COLOR)
        stamps[shape, color, size] = stamp.round().astype(np.uint8)
    return stamps


def _coverage(shape: str, size: int) -> NDArray[np.float64]:
    """Return the covered share of each pixel, (size, size), from four scan lines per pixel as in the corpus."""
    lines, points = 4, 16
    y = ((np.arange(size * lines) + 0.5) / lines)[:, None]
    x = ((np.arange(size * points) + 0.5) / points)[None, :] - size / 2
    inside = {
        "square": np.ones((size * lines, size * points), dtype=np.bool_),
        "triangle": 2 * np.abs(x) <= y,
        "circle": np.hypot(x, y - size / 2) <= size / 2,
    }[shape]
    return inside.reshape(size, lines, size, points).mean(axis=(1, 3))


def draw_boxes(kind: Kind, rng: SplitMix64) -> Picture:
    """Draw the boxes of an image; places of scattered items are distributed as in the corpus."""
    draw = draw_tower if kind == "tower" else draw_scatter
    return draw(rng), draw(rng), draw(rng)


def draw_tower(rng: SplitMix64) -> Box:
    """Draw a tower of one to four blocks of any colors."""
    towers = _towers()[rng.below(MAX_BLOCKS)]
    return towers[rng.below(len(towers))]


@cache
def _towers() -> tuple[tuple[Box, ...], ...]:
    """Return all towers, grouped by height."""
    return tuple(
        tuple(
            tuple(
                Item("square", color, BLOCK_SIZE, BLOCK_LEFT, y) for color, y in zip(colors, BLOCK_TOPS, strict=False)
            )
            for colors in product(COLORS, repeat=height)
        )
        for height in range(1, MAX_BLOCKS + 1)
    )


def draw_scatter(rng: SplitMix64) -> Box:
    """Draw one to eight items at least a pixel apart; items for which no place is found are left out."""
    return _scatter([_LOOKS[rng.below(len(_LOOKS))] for _ in range(1 + rng.below(MAX_ITEMS))], rng)


def rearrange(boxes: Picture, rng: SplitMix64) -> Picture:
    """Redistribute the items over boxes and places, so that the counts of colors and shapes in the image stay the same.

    The corpus makes the images for false sentences in this way. Towers keep one to four blocks; scattered items for
    which no place is found are left out.
    """
    items = [item for box in boxes for item in box]
    order = [items[number] for number in _shuffled(len(items), rng)]
    if kind_of(boxes) == "tower":
        heights = _heights_of(len(items))
        first, second, _ = heights[rng.below(len(heights))]
        parts = (order[:first], order[first : first + second], order[first + second :])
        one, two, three = (
            tuple(item._replace(y=y) for item, y in zip(part, BLOCK_TOPS, strict=False)) for part in parts
        )
        return one, two, three
    looks: tuple[list[_Look], ...] = ([], [], [])
    for number, item in enumerate(order):
        # The first three items go to different boxes, so that no box is empty.
        looks[number if number < 3 else rng.below(3)].append((item.shape, item.color, item.size))
    return _scatter(looks[0], rng), _scatter(looks[1], rng), _scatter(looks[2], rng)


def _shuffled(count: int, rng: SplitMix64) -> list[int]:
    numbers = list(range(count))
    for place in range(count - 1, 0, -1):
        other = rng.below(place + 1)
        numbers[place], numbers[other] = numbers[other], numbers[place]
    return numbers


@cache
def _heights_of(total: int) -> list[tuple[int, int, int]]:
    """Return the possible heights of three towers with `total` blocks."""
    each = range(1, MAX_BLOCKS + 1)
    return [(a, b, c) for a, b, c in product(each, each, each) if a + b + c == total]


_Look = tuple[str, str, int]


def _scatter(looks: Iterable[_Look], rng: SplitMix64) -> Box:
    items: list[Item] = []
    for shape, color, size in looks:
        # Shape, color and size stay while places are tried: redrawing them would favor small items.
        most = BOX_SIDE - size
        for _ in range(_PLACES_TRIED):
            # Places beyond the box move back to its edge, which puts many items at the right and the bottom.
            x, y = min(rng.below(BOX_SIDE + 1), most), min(rng.below(BOX_SIDE + 1), most)
            if all(x > o.x + o.size or o.x > x + size or y > o.y + o.size or o.y > y + size for o in items):
                items.append(Item(shape, color, size, x, y))
                break
    return tuple(items)


_PLACES_TRIED = 40
_LOOKS = tuple(product(SHAPES, COLORS, SIZES))


def split_of(boxes: Picture) -> Split:
    """Return the split of an image: a hash of its contents, independent of the order of boxes and items."""
    # The first number of a stream keyed by the codes assigns the image to a tenth of all images.
    tenth = SplitMix64(*sorted(map(_box_code, boxes))).below(10)
    return "train" if tenth < 8 else "val" if tenth == 8 else "test"


@cache
def _item_code(item: Item) -> int:
    shape, color, size, x, y = item
    look = (_SHAPE_CODES[shape] * 3 + _COLOR_CODES[color]) * 3 + SIZES.index(size)
    return SplitMix64(look, x, y).below(1 << 60)


def _box_code(box: Box) -> int:
    # A sum of hashes does not depend on the order.
    return sum(map(_item_code, box))


# Phrases with their predicates

Count = Callable[[int], bool]
"""Predicate of a number of objects."""
OfItem = Callable[[Item], bool]
OfBox = Callable[[Box], bool]
OfPicture = Callable[[Picture], bool]
ColorsAt = Callable[[Box], tuple[str, ...]]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")


class Claim(NamedTuple):
    """A text and the predicate that decides it."""

    text: str
    holds: OfPicture


class _Amount(NamedTuple):
    phrase: str
    one: bool
    """Whether the noun is singular."""
    fits: Count

    def of(self, noun: str) -> str:
        """`two boxes`, `exactly one box`."""
        if self.phrase == "a" and noun[0] in "aeiou":
            return f"an {noun}"
        return f"{self.phrase} {noun if self.one else _plural(noun)}"

    def there(self, noun: str) -> str:
        """`there are two boxes`."""
        return f"there {'is' if self.one else 'are'} {self.of(noun)}"


class _Lead(NamedTuple):
    """Beginning of a sentence, and a predicate of the number of boxes that have the trait."""

    text: str
    fits: Count


class _Trait(NamedTuple):
    """Property of a box in the words that follow `with` or `has`, such as `two blue blocks`."""

    text: str
    fits: OfBox


class _Thing(NamedTuple):
    """Property of an item, such as `blue circle`."""

    noun: str
    fits: OfItem


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("x") else f"{noun}s"


def _equal(number: int) -> Count:
    return lambda count: count == number


def _at_least(number: int) -> Count:
    return lambda count: count >= number


def _at_most(number: int) -> Count:
    return lambda count: count <= number


_BOUNDS: dict[str, Callable[[int], Count]] = {
    "": _at_least,
    "exactly": _equal,
    "only": _equal,
    "at least": _at_least,
    "at most": _at_most,
    "less than": lambda number: _at_most(number - 1),
    "more than": lambda number: _at_least(number + 1),
}
_A = _Amount("a", True, _at_least(1))
_NO = _Amount("no", True, _equal(0))


def _amounts(least: int, most: int, *bounds: str, bare: Callable[[int], Count] = _at_least) -> list[_Amount]:
    """Return `two`, `2`, `exactly two` and so on; `bare` is the meaning of a number without a bound."""
    amounts = []
    for bound, number in product(bounds, range(least, most + 1)):
        fits = _BOUNDS[bound](number) if bound else bare(number)
        for word in _words(number):
            amounts.append(_Amount(f"{bound} {word}".strip(), number == 1, fits))
    return amounts


def _words(number: int) -> tuple[str, str]:
    return NUMBERS[number], str(number)


def _usual(most: int) -> list[_Amount]:
    return [_A, _NO, *_amounts(1, most, "", "exactly", "only", "at least")]


def _things(*nouns: str) -> list[_Thing]:
    """Return `item`, `blue item`, `circle`, `blue circle`; a noun that names no shape matches every shape."""
    return [
        _Thing(f"{color} {noun}" if color else noun, _looks(color, noun if noun in SHAPES else None))
        for noun, color in product(nouns, (None, *COLORS))
    ]


def _looks(color: str | None, shape: str | None) -> OfItem:
    return lambda item: color in (None, item.color) and shape in (None, item.shape)


def _boxes(count: Count, fits: OfBox) -> OfPicture:
    return lambda boxes: count(sum(map(fits, boxes)))


def _items(count: Count, fits: OfItem) -> OfPicture:
    return lambda boxes: count(sum(1 for box in boxes for item in box if fits(item)))


def _size(count: Count) -> OfBox:
    return lambda box: count(len(box))


def _has(count: Count, fits: OfItem) -> OfBox:
    return lambda box: count(sum(map(fits, box)))


def _all(*tests: OfBox) -> OfBox:
    return lambda box: all(test(box) for test in tests)


def _colors(box: Iterable[Item]) -> set[str]:
    return {item.color for item in box}


def _only(*colors: str) -> OfBox:
    """Return the predicate that a box has all of these colors and no other."""
    wanted = set(colors)
    return lambda box: _colors(box) == wanted


def _num_colors(count: Count) -> OfBox:
    return lambda box: count(len(_colors(box)))


def _top(box: Box) -> tuple[str, ...]:
    return tuple(item.color for item in box[-1:])


def _base(box: Box) -> tuple[str, ...]:
    return tuple(item.color for item in box[:1])


def _inner(box: Box) -> tuple[str, ...]:
    return tuple(item.color for item in box[1:-1])


def _at(place: ColorsAt, color: str) -> OfBox:
    return lambda box: color in place(box)


def _steps(box: Box, lower: str, upper: str) -> int:
    """Count blocks of the color `lower` directly below blocks of the color `upper`."""
    return sum(1 for a, b in pairwise(box) if a.color == lower and b.color == upper)


def _stacked(count: Count, color: str) -> OfBox:
    """Return the predicate of the longest run of blocks of a color."""

    def fits(box: Box) -> bool:
        same = (int(item.color == color) for item in box)
        return count(max(accumulate(same, lambda run, one: (run + 1) * one), default=0))

    return fits


def _over(lower: str, upper: str) -> OfBox:
    return lambda box: _steps(box, lower, upper) > 0


_PLACES: dict[str, ColorsAt] = {
    "at the top": _top,
    "on top": _top,
    "at the base": _base,
    "at base": _base,
    "at the bottom": _base,
    "in the middle": _inner,
    "in the middle of it": _inner,
}
_ABOVE = ("above", "on", "over", "on top of")
_BELOW = ("below", "bellow", "under", "beneath")  # codespell:ignore
"""Spellings of the corpus."""
_PAIRS = tuple((a, b) for a, b in product(COLORS, COLORS) if a != b)
_HEIGHTS = ((1, "one"), (2, "two"), (3, "three"), (4, "four"))


class _Said(Sequence[Claim]):
    """Combinations of leads and traits, made on access: all of them would take seconds and much memory."""

    def __init__(self, leads: Iterable[_Lead], traits: Iterable[_Trait]) -> None:
        self.leads = tuple(leads)
        self.traits = tuple(traits)

    def __len__(self) -> int:
        return len(self.leads) * len(self.traits)

    @overload
    def __getitem__(self, index: int) -> Claim: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Claim]: ...

    def __getitem__(self, index: int | slice) -> Claim | Sequence[Claim]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"claim {index} of {len(self)}")
        (lead, count), (trait, fits) = self.leads[index % len(self.leads)], self.traits[index // len(self.leads)]
        return Claim(f"{lead} {trait}", _boxes(count, fits))


def _distinct(claims: Iterable[Claim]) -> tuple[Claim, ...]:
    return tuple({claim.text: claim for claim in claims}.values())


# Families of statements of towers


def _tower_with() -> list[_Lead]:
    return [
        *(_Lead(f"{amount.there('tower')} with", amount.fits) for amount in _usual(3)),
        _Lead("there are atleast two towers with", _at_least(2)),  # codespell:ignore
    ]


def _tower_has() -> list[_Lead]:
    """All beginnings."""
    leads = _tower_with()
    for amount, verb in product([_A, *_amounts(1, 2, "")], ("that", "which")):
        leads.append(_Lead(f"{amount.there('tower')} {verb} {'has' if amount.one else 'have'}", amount.fits))
    leads += [
        _Lead(text, _at_least(1))
        for text in ("one tower with", "one tower has", "one of the tower has", "one of the towers has")
    ]
    leads += [
        _Lead("one of the three towers has", _at_least(1)),
        _Lead("two of the three towers have", _at_least(2)),
        _Lead("there are two of the three towers that has", _at_least(2)),
        _Lead("there are two towers that has", _at_least(2)),
        _Lead("there is only one tower that has", _equal(1)),
    ]
    leads += [_Lead(text, _equal(3)) for text in ("all 3 towers have", "all three towers have", "all the towers have")]
    return leads


def _heights(*bounds: str) -> list[_Trait]:
    amounts = _amounts(1, MAX_BLOCKS, *bounds, bare=_equal)
    # `at least one block` is true of every tower.
    said = [amount for amount in amounts if not (amount.one and "at least" in amount.phrase)]
    return [_Trait(amount.of("block"), _size(amount.fits)) for amount in said]


def _is_low(height: _Trait) -> bool:
    """Return whether no tower of this height has a block in the middle."""
    return not any(height.fits(towers[0]) for towers in _towers()[2:])


def _block_at() -> Iterator[_Trait]:
    for color, (words, place) in product(COLORS, _PLACES.items()):
        for block in (f"a {color} block", f"1 {color} block", f"{color} block", f"a {color} color block"):
            yield _Trait(f"{block} {words}", _at(place, color))


def _end() -> Iterator[_Trait]:
    for color, (word, place) in product(COLORS, (("top", _top), ("base", _base))):
        yield _Trait(f"a {color} {word}", _at(place, color))
        yield _Trait(f"a {word} of {color} block", _at(place, color))
    for color in COLORS:
        yield _Trait(f"{color} block at the top and at the base", _all(_at(_top, color), _at(_base, color)))
    for base, top in _PAIRS:
        fits = _all(_at(_base, base), _at(_top, top))
        yield _Trait(f"{base} as a base and {top} as a top block", fits)
        yield _Trait(f"a {base} base and a {top} top", fits)


def _tower_height() -> Sequence[Claim]:
    return _Said(_tower_with(), _heights("", "exactly", "only", "at least"))


def _tower_block_at() -> Sequence[Claim]:
    return _Said(_tower_has(), _block_at())


def _tower_end() -> Sequence[Claim]:
    return _Said(_tower_has(), _end())


def _tower_height_and() -> Sequence[Claim]:
    traits = []
    for height, color, (words, place) in product(_heights("", "exactly", "at least"), COLORS, _PLACES.items()):
        if place is _inner and _is_low(height):
            continue
        fits = _all(height.fits, _at(place, color))
        traits += [_Trait(f"{height.text} {link} a {color} block {words}", fits) for link in ("having", "with")]
        traits.append(_Trait(f"{height.text} with a {color} color block {words}", fits))
    for height, link in product(_heights("", "exactly"), ("having", "with")):
        same, every = (_all(height.fits, _num_colors(_equal(number))) for number in (1, 3))
        traits.append(_Trait(f"{height.text} {link} all the blocks of the same color", same))
        if not _is_low(height):
            traits.append(_Trait(f"{height.text} {link} the blocks of all three colors", every))
    for height, color in product(_heights("", "exactly"), COLORS):
        some, two = (_all(height.fits, _has(count, _looks(color, None))) for count in (_at_least(1), _equal(2)))
        traits.append(_Trait(f"{height.text} where one of the block is {color}", some))
        traits.append(_Trait(f"{height.text} where one of the blocks is {color}", some))
        traits.append(_Trait(f"{height.text} and the two blocks are {color}", two))
    return _Said(_tower_with(), traits)


def _tower_blocks() -> Sequence[Claim]:
    """Return statements about the number of blocks of a color."""
    traits = []
    for amount, color in product(_amounts(1, MAX_BLOCKS, "", "exactly", "only", "at least"), COLORS):
        block = amount.of(f"{color} block")
        traits.append(_Trait(block, _has(amount.fits, _looks(color, None))))
        if not amount.one:
            traits.append(_Trait(f"{block} stacked together", _stacked(amount.fits, color)))
    for number, color in product((2, 3), COLORS):
        for word in _words(number):
            traits.append(_Trait(f"{word} {color} blocks at the base", _starts(number, color)))
            traits.append(_Trait(f"{word} {color} blocks at the top", _ends(number, color)))
    return _Said(_tower_has(), traits)


def _starts(number: int, color: str) -> OfBox:
    return lambda box: len(box) >= number and all(item.color == color for item in box[:number])


def _ends(number: int, color: str) -> OfBox:
    return lambda box: len(box) >= number and all(item.color == color for item in box[-number:])


def _tower_colors() -> Sequence[Claim]:
    traits = [
        _Trait("only same blocks in color", _num_colors(_equal(1))),
        _Trait("blocks of the same color", _num_colors(_equal(1))),
        _Trait("blocks of all three colors", _num_colors(_equal(3))),
    ]
    for color in COLORS:
        traits.append(_Trait(f"blocks of {color} color only", _only(color)))
        traits.append(_Trait(f"only {color} blocks", _only(color)))
        one = _all(_size(_equal(1)), _only(color))
        for block in ("block", "object"):
            traits.append(_Trait(f"only one {block} which is {color}", one))
            traits.append(_Trait(f"exactly one {block} which is {color} in color", one))
            traits.append(_Trait(f"exactly one {color} {block} only", one))
    for first, second in _PAIRS:
        traits.append(_Trait(f"only {first} and {second} blocks", _only(first, second)))
        both = (_has(_at_least(1), _looks(color, None)) for color in (first, second))
        traits.append(_Trait(f"{first} and {second} blocks", _all(*both)))
    return _Said(_tower_with(), traits)


def _stacks() -> Iterator[_Trait]:
    for first, second in product(COLORS, COLORS):
        for words in _ABOVE:
            yield _Trait(f"a {first} block {words} a {second} block", _over(second, first))
        for words in _BELOW:
            yield _Trait(f"a {first} block {words} a {second} block", _over(first, second))


def _tower_stack() -> Sequence[Claim]:
    return _Said(_tower_has(), _stacks())


def _between(inner: str, outer: str) -> OfBox:
    return lambda box: any(
        (a.color, b.color, c.color) == (outer, inner, outer) for a, b, c in zip(box, box[1:], box[2:], strict=False)
    )


def _the_tower() -> Iterator[Claim]:
    """Yield `the tower with four blocks has a blue block above a black block` and the like."""
    traits = [*_block_at(), *_end(), *_stacks()]
    for first, second in _PAIRS:
        traits.append(_Trait(f"a {first} block in between two {second} blocks", _between(first, second)))
    for color in COLORS:
        for block in (f"a {color} block", f"a {color} color block"):
            traits.append(_Trait(f"{block} below the top block", _below_top(color)))
        for together in ("attached with each other", "stacked together"):
            traits.append(_Trait(f"two {color} blocks {together}", _stacked(_at_least(2), color)))
    for number, word in _HEIGHTS[1:]:
        tall = _size(_equal(number))
        leads = [
            f"{lead} with {bound}{word} blocks has"
            for lead, bound in product(("the tower", "one of the tower", "one of the towers"), ("", "exactly "))
        ]
        for lead, (trait, fits) in product([*leads, f"there is a {word} blocks tower that has"], traits):
            yield Claim(f"{lead} {trait}", _boxes(_at_least(1), _all(tall, fits)))


def _below_top(color: str) -> OfBox:
    return lambda box: len(box) > 1 and box[-2].color == color


def _block_as() -> Iterator[Claim]:
    """Yield statements about a block at the top or base of a tower."""
    of: list[_Trait] = [_Trait("a tower", lambda box: True)]
    of += [_Trait(f"a tower with {height.text}", height.fits) for height in _heights("", "exactly", "only", "at least")]
    of += [_Trait(f"tower with {height.text}", height.fits) for height in _heights("")]
    for amount, color in product(_amounts(1, MAX_BLOCKS, "", "exactly", "at least"), COLORS):
        of.append(_Trait(f"a tower with {amount.of(f'{color} block')}", _has(amount.fits, _looks(color, None))))
    for amount, color, (end, place), trait in product(_usual(3), COLORS, (("top", _top), ("base", _base)), of):
        yield Claim(
            f"{amount.there(f'{color} block')} as the {end} of {trait.text}",
            _boxes(amount.fits, _all(_at(place, color), trait.fits)),
        )
    for color, (end, place) in product(COLORS, (("top", _top), ("base", _base))):
        for amount in _amounts(2, 3, "", "exactly", "at least"):
            holds = _boxes(amount.fits, _at(place, color))
            yield Claim(f"there is a {color} block as the {end} of {amount.of('tower')}", holds)


def _block_on() -> Iterator[Claim]:
    """Yield statements about blocks on other blocks, counted over the image."""
    for amount, (first, second), article in product(_usual(3), product(COLORS, COLORS), ("a", "the")):
        lead = amount.there(f"{first} block")
        for words in _ABOVE:
            yield Claim(f"{lead} {words} {article} {second} block", _num_steps(amount.fits, second, first))
        for words in _BELOW:
            yield Claim(f"{lead} {words} {article} {second} block", _num_steps(amount.fits, first, second))
    for amount, color in product(_amounts(2, 4, ""), COLORS):
        for said in ("attached with each other", "stacked together"):
            holds = _boxes(_at_least(1), _stacked(amount.fits, color))
            yield Claim(f"{amount.there(f'{color} block')} that are {said}", holds)


def _num_steps(count: Count, lower: str, upper: str) -> OfPicture:
    return lambda boxes: count(sum(_steps(box, lower, upper) for box in boxes))


def _colored_tower() -> Iterator[Claim]:
    for amount, color in product(_usual(3), COLORS):
        lead = amount.there(f"{color} tower")
        yield Claim(lead, _boxes(amount.fits, _only(color)))
        for height in _heights("", "exactly", "only", "at least"):
            yield Claim(f"{lead} with {height.text}", _boxes(amount.fits, _all(_only(color), height.fits)))


def _num_blocks() -> Iterator[Claim]:
    for amount, color in product(_usual(6), COLORS):
        yield Claim(amount.there(f"{color} block"), _items(amount.fits, _looks(color, None)))


def _all_ends() -> Iterator[Claim]:
    for end, place in (("top", _top), ("base", _base)):
        for the in (f"the {end}", f"the {end}s", f"all the {end}", f"all the {end}s"):
            for of in ("of the three towers", "of the towers"):
                for words in ("in color", "in colors"):
                    yield Claim(f"{the} {of} are the same {words}", _num_at(place, _equal(1)))
                    yield Claim(f"{the} {of} are not the same {words}", _num_at(place, _at_least(2)))
        yield Claim(f"one tower has a different {end} color", _num_at(place, _equal(2)))
        for color in COLORS:
            some = _boxes(_at_least(1), _at(place, color))
            yield Claim(f"the {end} of a tower is {color}", some)
            yield Claim(f"the {end} of one tower is {color}", some)
            for of in ("of the three towers", "of the towers"):
                yield Claim(f"the {end}s {of} are {color}", _boxes(_equal(3), _at(place, color)))
        for two, one in _PAIRS:
            both = _all_of(_boxes(_equal(2), _at(place, two)), _boxes(_equal(1), _at(place, one)))
            for of in ("of the three towers", "of the towers"):
                yield Claim(f"the {end}s {of} are two {two} and one {one}", both)
    for (number, word), color in product(_HEIGHTS[1:], COLORS):
        fits = _all(_size(_equal(number)), _at(_top, color), _at(_base, color))
        yield Claim(f"the base and top of the {word} blocks tower are {color}", _boxes(_at_least(1), fits))


def _all_of(*tests: OfPicture) -> OfPicture:
    return lambda boxes: all(test(boxes) for test in tests)


def _num_at(place: ColorsAt, count: Count) -> OfPicture:
    return lambda boxes: count(len({place(box) for box in boxes}))


def _items_on_top() -> Iterator[Claim]:
    for color in COLORS:
        yield Claim(f"the {color} item is on top in every box", _boxes(_equal(3), _at(_top, color)))
        for amount in _amounts(1, 3, ""):
            verb = "is" if amount.one else "are"
            yield Claim(f"{amount.of(f'{color} item')} {verb} on top", _boxes(amount.fits, _at(_top, color)))


def _ordered_items() -> Sequence[Claim]:
    """Return statements that call a tower a box with items."""
    traits = []
    for color, number in product(COLORS, (2, 3, 4)):
        size = _size(_equal(number))
        places = [("on top", _top), ("at the base", _base), *([("in the middle", _inner)] if number == 3 else [])]
        for said, (where, place) in product((f"the {color}", f"the {color} item"), places):
            there = _all(size, _at(place, color))
            traits.append(_Trait(f"{number} items where {said} is {where}", there))
            if number < 4:
                different = _all(there, _num_colors(_equal(number)))
                traits.append(_Trait(f"{number} items of different colors where {said} is {where}", different))
    for color, (level, word) in product(COLORS, enumerate(("first", "second", "third", "fourth"))):
        traits.append(_Trait(f"a {color} item at the {word} place from the bottom", _at_level(level, color)))
    for first, second in product(COLORS, COLORS):
        traits.append(_Trait(f"a {first} item on top and a {second} item beneath it", _ends_with(second, first)))
        for item in (f"a {first} item", f"{first} item"):
            both = _all(_at(_base, first), _at(_top, second), _size(_at_least(2)))
            traits.append(_Trait(f"{item} touching the wall and a {second} item on top", both))
    return _Said([*_box_with(), _Lead("there is box with", _at_least(1))], traits)


def _ends_with(lower: str, upper: str) -> OfBox:
    return lambda box: len(box) > 1 and (box[-2].color, box[-1].color) == (lower, upper)


def _at_level(level: int, color: str) -> OfBox:
    return lambda box: len(box) > level and box[level].color == color


# Families of statements of boxes and items


def _box_with() -> list[_Lead]:
    leads = [_Lead(f"{amount.there('box')} with", amount.fits) for amount in _usual(3)]
    return [*leads, _Lead("there is a box that has", _at_least(1)), _Lead("there is a box which has", _at_least(1))]


def _box_has() -> list[_Lead]:
    """All beginnings."""
    leads = _box_with()
    for box, verb in product(("box", "boxes", "square", "squares"), ("has", "contains")):
        leads.append(_Lead(f"one of the grey {box} {verb}", _at_least(1)))  # codespell:ignore grey
    whole = ("each box", "every box", "each grey square")  # codespell:ignore grey
    leads += [_Lead(f"{each} has", _equal(3)) for each in whole]
    return leads


_ITEMS = ("item", "object")


def _box_number(most: int) -> Sequence[Claim]:
    # Statements that are true of no box or of every box are left out.
    amounts = [
        *_amounts(1, most, "", "exactly", "only", bare=_equal),
        *_amounts(2, most, "at least", "less than"),
        *_amounts(1, most - 1, "at most", "more than"),
    ]
    traits = [_Trait(amount.of(noun), _size(amount.fits)) for amount, noun in product(amounts, _ITEMS)]
    return _Said(_box_has(), traits)


def _box_things(nouns: Sequence[str]) -> Sequence[Claim]:
    """Return statements about the number of items of a color or shape."""
    things = [thing for thing in _things(*nouns) if thing.noun not in _ITEMS]
    amounts = [_A, *_amounts(1, 4, "", "exactly", "only", "at least")]
    return _Said(_box_has(), [_Trait(a.of(t.noun), _has(a.fits, t.fits)) for a, t in product(amounts, things)])


def _box_two_things() -> Sequence[Claim]:
    """Return `a yellow circle and two triangles` and the like."""
    amounts = [_A, *_amounts(1, 2, ""), *_amounts(2, 2, "at least")]
    things = [thing for thing in _things("item", *SHAPES) if thing.noun != "item"]
    said = [(a.of(t.noun), t.noun, _has(a.fits, t.fits)) for a, t in product(amounts, things)]
    traits = [_Trait(f"{a} and {b}", _all(c, d)) for (a, m, c), (b, n, d) in product(said, said) if m != n]
    for color, first, second in product(COLORS, SHAPES, SHAPES):
        if first != second:
            both = _all(*(_has(_at_least(1), _looks(color, shape)) for shape in (first, second)))
            traits.append(_Trait(f"a {color} {first} and {second} in it", both))
            traits.append(_Trait(f"one {first} and {second} that are {color}", both))
    leads = [lead for lead in _box_with() if lead.text.startswith(("there is a ", "there is one ", "there is 1 "))]
    return _Said([*leads, _Lead("there is a box, which has", _at_least(1))], traits)


def _sized(most: int) -> list[tuple[int, str, OfBox]]:
    """Return `3 items` and the like, which mean exactly this number, with the number."""
    return [
        (number, f"{word} {noun}s", _size(_equal(number)))
        for number in range(2, most + 1)
        for word, noun in product(_words(number), _ITEMS)
    ]


def _small(most: int) -> list[tuple[int, str]]:
    """Return the numbers two and three, at most `most`."""
    return [(number, word) for number in (2, 3) for word in _words(number) if number <= most]


def _box_colors(most: int) -> Sequence[Claim]:
    traits = []
    for number, said, fits in [*((most, f"{noun}s", _size(_at_least(1))) for noun in _ITEMS), *_sized(most)]:
        for colors, word in _small(number):
            colored = _all(fits, _num_colors(_equal(colors)))
            traits += [
                _Trait(f"{said} of {words}", colored) for words in (f"{word} different colors", f"only {word} colors")
            ]
            if colors == 3:
                every = f"{said} of all {word}"
                traits += [_Trait(f"{every} {words}", colored) for words in ("colors", "different colors")]
                for color in COLORS:
                    walled = _all(colored, _has(_at_least(1), _touches(_looks(color, None), _any_edge)))
                    traits.append(_Trait(f"{every} different colors and a {color} item touching the wall", walled))
        for link in ("of", "with"):
            traits += [_Trait(f"{said} {link} only {color} color", _all(fits, _only(color))) for color in COLORS]
            traits += [_Trait(f"{said} {link} only {a} and {b} color", _all(fits, _only(a, b))) for a, b in _PAIRS]
        traits.append(_Trait(f"{said} of the same color", _all(fits, _num_colors(_equal(1)))))
    for noun in _ITEMS:
        traits += [_Trait(f"only {color} {noun}s", _only(color)) for color in COLORS]
        traits += [_Trait(f"only {a} and {b} {noun}s", _only(a, b)) for a, b in _PAIRS]
        traits += [_Trait(f"the same number of {a} and {b} {noun}s", _same_number(a, b)) for a, b in _PAIRS]
        for amount, color in product(_amounts(2, 4, "", "at least"), COLORS):
            fits = _has(amount.fits, _looks(color, None))
            traits.append(_Trait(f"{amount.of(noun)} of {color} color", fits))
            traits.append(_Trait(f"{amount.of(noun)} of only {color} color", _all(fits, _only(color))))
    return _Said(_box_with(), traits)


def _box_shapes() -> Sequence[Claim]:
    traits = []
    for _, said, fits in _sized(4):
        same = _all(fits, _num_shapes(_equal(1)))
        traits += [_Trait(f"{only}{said} of the same shape", same) for only in ("", "only ")]
    for noun, word in product(_ITEMS, _words(2)):
        different = _all(_size(_equal(2)), _num_colors(_equal(2)), _num_shapes(_equal(2)))
        traits.append(_Trait(f"only {word} {noun}s that are different in shapes and colors", different))
    return _Said(_box_with(), traits)


def _num_shapes(count: Count) -> OfBox:
    return lambda box: count(len({item.shape for item in box}))


def _same_number(first: str, second: str) -> OfBox:
    def fits(box: Box) -> bool:
        colors = [item.color for item in box]
        return colors.count(first) == colors.count(second) > 0

    return fits


def _box_of_which(most: int) -> Sequence[Claim]:
    """Return `5 items of which at least 2 are blue` and the like."""
    counted = _sized(most)
    for number, word in _small(3):
        counted.append((most, f"items of {word} different colors", _num_colors(_equal(number))))
    traits = []
    for number, said, fits in counted:
        amounts = _amounts(1, min(number, 4), "", "exactly", "at least", "at most", bare=_equal)
        for amount, color in product(amounts, COLORS):
            which = f"of which {amount.phrase} {'is' if amount.one else 'are'} {color}"
            traits.append(_Trait(f"{said} {which}", _all(fits, _has(amount.fits, _looks(color, None)))))
    return _Said(_box_with()[:4], traits)


def _box_of_which_shape() -> Sequence[Claim]:
    """Return `only yellow items of which one is a triangle` and the like."""
    traits = []
    for color, shape, amount in product(COLORS, SHAPES, _amounts(1, 3, "", bare=_equal)):
        which = f"of which {amount.phrase} {f'is a {shape}' if amount.one else f'are {shape}s'}"
        traits.append(_Trait(f"only {color} items {which}", _all(_only(color), _has(amount.fits, _looks(None, shape)))))
    return _Said(_box_with()[:4], traits)


# Touching


def _bottom_edge(item: Item) -> bool:
    return item.y + item.size == BOX_SIDE


def _top_edge(item: Item) -> bool:
    return item.y == 0


def _left_edge(item: Item) -> bool:
    return item.x == 0


def _right_edge(item: Item) -> bool:
    return item.x + item.size == BOX_SIDE


def _any_edge(item: Item) -> bool:
    return item.x == 0 or item.y == 0 or item.x + item.size == BOX_SIDE or item.y + item.size == BOX_SIDE


def _corner(item: Item) -> bool:
    return (item.x == 0 or item.x + item.size == BOX_SIDE) and (item.y == 0 or item.y + item.size == BOX_SIDE)


_EDGES: dict[str, OfItem] = {
    **dict.fromkeys(("the edge", "an edge", "any edge", "the wall", "a wall", "the side"), _any_edge),
    **dict.fromkeys(("the base", "the bottom", "the bottom of a box"), _bottom_edge),
    **dict.fromkeys(("the bottom edge", "the bottom base"), _bottom_edge),
    **dict.fromkeys(("the corner", "a corner", "a corner of a box"), _corner),
    **dict.fromkeys(("the top", "the top of a box"), _top_edge),
    **dict.fromkeys(("left wall of a box", "the left wall"), _left_edge),
    **dict.fromkeys(("right wall of a box", "the right wall"), _right_edge),
}


def _touches(thing: OfItem, edge: OfItem, touching: bool = True) -> OfItem:
    return lambda item: thing(item) and edge(item) == touching


def _touching(nouns: Sequence[str], sides: Sequence[str]) -> Iterator[Claim]:
    for thing, side in product(_things(*nouns), sides):
        edge = _EDGES[side]
        for amount in _usual(3):
            lead = amount.there(thing.noun)
            for how in ("touching", "closely touching", "not touching"):
                holds = _items(amount.fits, _touches(thing.fits, edge, how != "not touching"))
                yield Claim(f"{lead} {how} {side}", holds)
        if thing.noun not in nouns:
            none = _items(_equal(0), _touches(thing.fits, edge))
            yield Claim(f"none of the {_plural(thing.noun)} are touching {side}", none)


def _touching_in_box() -> Sequence[Claim]:
    traits = []
    sides = ("the wall", "the edge", "the bottom edge", "the base", "the corner", "the bottom")
    for amount, thing, side in product([_A, *_amounts(1, 2, "", "at least")], _things(*_ITEMS, *SHAPES), sides):
        fits = _has(amount.fits, _touches(thing.fits, _EDGES[side]))
        traits.append(_Trait(f"{amount.of(thing.noun)} touching {side}", fits))
    for thing, side in product(_things(*_ITEMS, *SHAPES), ("the corner", "a corner")):
        traits.append(_Trait(f"{_A.of(thing.noun)} in {side}", _has(_at_least(1), _touches(thing.fits, _corner))))
    each = [lead for lead in _box_has() if lead.text.startswith(("there is a box with", "there is 1 box", "each"))]
    return _Said(each, traits)


def _touching_and_things() -> Sequence[Claim]:
    """Return `a yellow square touching the wall and two triangles` and the like."""
    traits = []
    others = [thing for thing in _things("item", *SHAPES) if thing.noun != "item"]
    for thing, side, amount, other in product(
        _things(*SHAPES), ("the wall", "the edge"), [_A, *_amounts(1, 2, "")], others
    ):
        if thing.noun != other.noun:
            fits = _all(_has(_at_least(1), _touches(thing.fits, _EDGES[side])), _has(amount.fits, other.fits))
            traits.append(_Trait(f"a {thing.noun} touching {side} and {amount.of(other.noun)}", fits))
    return _Said(_box_with()[:1], traits)


def _touching_colors() -> Iterator[Claim]:
    for noun, side in product(_ITEMS, ("the wall", "the edge", "the base")):
        edge = _EDGES[side]
        for word in ("3", "three"):
            yield Claim(f"{noun}s of all {word} colors are touching {side}", _colors_touching(edge, _equal(3)))
    for side in ("the wall", "the edge", "the base"):
        yield Claim(f"there is only one color touching {side}", _colors_touching(_EDGES[side], _equal(1)))


def _colors_touching(edge: OfItem, count: Count) -> OfPicture:
    return lambda boxes: count(len({item.color for box in boxes for item in box if edge(item)}))


# Items of the whole image


def _num_things() -> Iterator[Claim]:
    for amount, thing in product(_usual(6), _things(*_ITEMS, *SHAPES)):
        yield Claim(amount.there(thing.noun), _items(amount.fits, thing.fits))


def _num_two_things() -> Iterator[Claim]:
    said = [(a, t) for a, t in product([_A, *_amounts(1, 3, "")], _things(*SHAPES))]
    for (amount, thing), (other_amount, other) in product(said, said):
        if thing.noun != other.noun:
            yield Claim(
                f"{amount.there(thing.noun)} and {other_amount.of(other.noun)}",
                _all_of(_items(amount.fits, thing.fits), _items(other_amount.fits, other.fits)),
            )


def _in_every_box(nouns: Sequence[str]) -> Iterator[Claim]:
    for amount, thing in product([_A, *_amounts(1, 2, "at least")], _things(*nouns)):
        if thing.noun not in _ITEMS:
            yield Claim(f"{amount.there(thing.noun)} in every box", _boxes(_equal(3), _has(amount.fits, thing.fits)))


class _Family(NamedTuple):
    make: Callable[[], Iterable[Claim]]
    tower: int
    """Weight among captions of towers, near the number of sentences in the corpus; 0: not used for towers."""
    scatter: int


_FAMILIES = (
    _Family(_tower_height, 12, 0),
    _Family(_tower_block_at, 30, 0),
    _Family(_tower_end, 6, 0),
    _Family(_tower_height_and, 10, 0),
    _Family(_tower_blocks, 12, 0),
    _Family(_tower_colors, 8, 0),
    _Family(_tower_stack, 6, 0),
    _Family(_the_tower, 6, 0),
    _Family(_block_as, 32, 0),
    _Family(_block_on, 10, 0),
    _Family(_colored_tower, 6, 0),
    _Family(_num_blocks, 4, 0),
    _Family(_all_ends, 8, 0),
    _Family(_items_on_top, 2, 0),
    _Family(_ordered_items, 6, 0),
    _Family(partial(_box_number, MAX_BLOCKS), 3, 0),
    _Family(partial(_box_number, MAX_ITEMS), 0, 12),
    _Family(partial(_box_things, _ITEMS), 3, 0),
    _Family(partial(_box_things, (*_ITEMS, *SHAPES)), 0, 10),
    _Family(_box_two_things, 0, 8),
    _Family(partial(_box_colors, MAX_BLOCKS), 8, 0),
    _Family(partial(_box_colors, MAX_ITEMS), 0, 8),
    _Family(_box_shapes, 0, 2),
    _Family(partial(_box_of_which, MAX_BLOCKS), 4, 0),
    _Family(partial(_box_of_which, MAX_ITEMS), 0, 3),
    _Family(_box_of_which_shape, 0, 2),
    _Family(partial(_touching, SHAPES, tuple(_EDGES)), 0, 26),
    _Family(partial(_touching, _ITEMS, tuple(_EDGES)), 0, 14),
    _Family(partial(_touching, _ITEMS, ("the wall", "the base", "the bottom")), 2, 0),
    _Family(_touching_in_box, 0, 4),
    _Family(_touching_and_things, 0, 2),
    _Family(_touching_colors, 2, 1),
    _Family(_num_things, 0, 12),
    _Family(_num_two_things, 0, 3),
    _Family(partial(_in_every_box, _ITEMS), 1, 0),
    _Family(partial(_in_every_box, (*_ITEMS, *SHAPES)), 0, 3),
)


@cache
def _families(kind: Kind) -> tuple[tuple[int, Sequence[Claim]], ...]:
    """Return the claims of each family with the cumulative weight."""
    found: list[tuple[int, Sequence[Claim]]] = []
    total = 0
    for make, tower, scatter in _FAMILIES:
        weight = tower if kind == "tower" else scatter
        if weight:
            total += weight
            claims = make()
            found.append((total, claims if isinstance(claims, _Said) else _distinct(claims)))
    return tuple(found)


@cache
def statements(kind: Kind) -> tuple[Claim, ...]:
    """Return all statements of the grammar about images of a kind; takes seconds, and data sets do not need it."""
    return _distinct(claim for _, claims in _families(kind) for claim in claims)


@cache
def vocabulary() -> tuple[str, ...]:
    """Return every word of the grammar, sorted, without commas."""
    words: set[str] = set()
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        for _, claims in _families(kind):
            parts: Iterable[_Lead | _Trait | Claim] = claims
            if isinstance(claims, _Said):
                parts = (*claims.leads, *claims.traits)
            for part in parts:
                words.update(part.text.replace(",", "").split())
    return tuple(sorted(words))


def boxes_corpus() -> Iterator[str]:
    """Yield every word, and all characters; `train_tokenizer(boxes_corpus(), 512)` gives boxes_tokenizer.json."""
    letters = string.ascii_lowercase
    yield f"{' '.join(letters + string.digits + _MARKS)} x{letters}"  # at the start of a word, and within
    for _ in range(_REPEATS):
        yield from vocabulary()


_MARKS = ",'-."
_REPEATS = 9
"""Repetitions of words; more than those of characters, whose pairs would be merged otherwise."""

# Samples

_TRIES = 30
"""Texts tried before another family is drawn, because some families have no true text for some images."""
_NUM_OTHERS = 256
_REDRAWS = 12
"""Images tried before a text is dropped; texts that are true of less than one in twelve are mostly dropped."""


@dataclass(frozen=True, eq=False)
class BoxScene:
    """An image and its caption; `image` is (100, 400, 3) uint8, RGB."""

    image: NDArray[np.uint8]
    caption: str
    boxes: Picture


@dataclass(frozen=True, eq=False)
class BoxStatement:
    """An image, a statement and whether the statement is true of the image."""

    image: NDArray[np.uint8]
    text: str
    label: bool
    boxes: Picture


def kind_of(boxes: Picture) -> Kind:
    """Return the kind of an image, which may also be one of the corpus."""
    block = ("square", BLOCK_SIZE, BLOCK_LEFT)
    is_tower = all((item.shape, item.size, item.x) == block for box in boxes for item in box)
    return "tower" if is_tower else "scatter"


def statement(boxes: Picture, rng: SplitMix64) -> tuple[str, bool]:
    """Draw a statement that depends on the kind of the boxes only, and return it with its truth."""
    text, holds = _draw_claim(kind_of(boxes), rng)
    return text, holds(boxes)


def truth(text: str, boxes: Picture) -> bool | None:
    """Return whether a text (lower case, without a period) is true; None if the grammar does not contain it."""
    holds = _by_text(kind_of(boxes)).get(text)
    return None if holds is None else holds(boxes)


@cache
def _by_text(kind: Kind) -> dict[str, OfPicture]:
    return dict(statements(kind))


def _draw_kind(rng: SplitMix64) -> Kind:
    return "tower" if rng.below(3) < 2 else "scatter"


def _draw_claims(kind: Kind, rng: SplitMix64) -> Sequence[Claim]:
    families = _families(kind)
    place = rng.below(families[-1][0])
    return next(claims for total, claims in families if place < total)


def _draw_claim(kind: Kind, rng: SplitMix64) -> Claim:
    claims = _draw_claims(kind, rng)
    return claims[rng.below(len(claims))]


def draw_caption(kind: Kind, boxes: Picture, rng: SplitMix64) -> str:
    """Draw a true statement; half of them are false of another image, so that not all captions are truisms."""
    while True:
        # Redrawn in every round, because the two images may show the same towers.
        other = _others(kind)[rng.below(_NUM_OTHERS)] if rng.below(2) else None
        claims = _draw_claims(kind, rng)
        for _ in range(_TRIES):
            text, holds = claims[rng.below(len(claims))]
            if holds(boxes) and (other is None or not holds(other)):
                return text


def describe(kind: Kind, boxes: Picture) -> str:
    """Describe each box in five words: its side, then the colors of a tower from the base up and `none` above it.

    For scattered items the four words are the numbers of yellow, black and blue items and of all: `left 2 0 1 3`. All
    descriptions have the same length, so that a caption of hidden words (:mod:`eve_ds.tasks.words`) predicts each
    property at a fixed place.
    """
    words: list[str] = []
    for side, box in zip(("left", "middle", "right"), boxes, strict=True):
        colors = [item.color for item in box]
        if kind == "tower":
            words += [side, *colors, *["none"] * (MAX_BLOCKS - len(colors))]
        else:
            words += [side, *(str(colors.count(color)) for color in COLORS), str(len(colors))]
    return " ".join(words)


@cache
def _others(kind: Kind) -> tuple[Picture, ...]:
    """Return images for comparison, the same for all data sets; they are never shown, so splits do not matter."""
    return tuple(draw_boxes(kind, SplitMix64(_OTHER, index)) for index in range(_NUM_OTHERS))


class Boxes:
    """Endless map-style data set of images with captions: every index from 0 on has a sample.

    Args:
        seed: seed of the generated world; splits stay disjoint across seeds.
        split: `train` (80 % of all images), `val` or `test` (10 % each).

    Raises:
        ConfigError: unknown split.
    """

    def __init__(self, seed: int = 0, split: Split = "train") -> None:
        self.seed = seed
        self.split = check_split(split)

    def rng(self, index: int, purpose: int = 0) -> SplitMix64:
        """Return the generator of a sample; every `purpose` has an independent one for the same index."""
        if index < 0:
            raise IndexError(f"index ({index}) must not be negative; the data set is endless")
        return SplitMix64(self.seed, _SPLIT_CODES[self.split], purpose, index)

    def draw(self, kind: Kind, rng: SplitMix64) -> Picture:
        """Draw boxes of the split."""
        boxes = draw_boxes(kind, rng)
        while split_of(boxes) != self.split:
            boxes = draw_boxes(kind, rng)
        return boxes

    def __getitem__(self, index: int) -> BoxScene:
        """Return sample number `index`."""
        rng = self.rng(index, _SCENE)
        kind = _draw_kind(rng)
        boxes = self.draw(kind, rng)
        # Models learn images from descriptions; statements alone did not teach them, as they say little about an image.
        caption = describe(kind, boxes) if rng.below(4) else draw_caption(kind, boxes, rng)
        return BoxScene(render(boxes), caption, boxes)


class BoxStatements:
    """Endless map-style data set of labeled statements; items 2k and 2k + 1 share a text, and exactly one is true.

    The two images of a text are drawn independently or, for half of the texts, show the same items rearranged. The
    corpus has only the latter, where counting colors does not help; from those alone nothing was learned in minutes.

    Args:
        seed: seed of the generated world.
        split: `train`, `val` or `test`, the split of the images; all splits share the grammar.

    Raises:
        ConfigError: unknown split.
    """

    def __init__(self, seed: int = 0, split: Split = "train") -> None:
        self.boxes = Boxes(seed, split)

    def __getitem__(self, index: int) -> BoxStatement:
        """Return statement number `index`."""
        group, turn = divmod(index, 2)
        rng = self.boxes.rng(group, _STATEMENT)
        label = bool(rng.below(2)) == bool(turn)
        text, shown = self._pair(rng)
        return BoxStatement(render(shown[label]), text, label, shown[label])

    def _pair(self, rng: SplitMix64) -> tuple[str, dict[bool, Picture]]:
        """Draw a text and an image for each label; both items of a pair draw the same, so no text reveals its label."""
        while True:
            kind = _draw_kind(rng)
            text, holds = _draw_claim(kind, rng)
            shown: dict[bool, Picture] = {}
            boxes, same = self.boxes.draw(kind, rng), rng.below(2)
            for _ in range(_REDRAWS):
                shown.setdefault(holds(boxes), boxes)
                if len(shown) == 2:
                    return text, shown
                boxes = self._rearranged(boxes, rng) if same else self.boxes.draw(kind, rng)

    def _rearranged(self, boxes: Picture, rng: SplitMix64) -> Picture:
        """Rearrange the boxes until they fall in the split."""
        while True:
            boxes = rearrange(boxes, rng)
            if split_of(boxes) == self.boxes.split:
                return boxes
