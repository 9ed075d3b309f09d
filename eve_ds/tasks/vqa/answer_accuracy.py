"""Official VQA accuracy (Antol et al. 2015; `vqaEval.py` of VQAv2): normalize answers, leave one annotator out.

The official table of contractions restores one missing apostrophe of a word. It matches whole words in lower case, so
its keys with a capital I have no effect. Its oddities are kept, since accuracies are compared with published ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
ODD_CONTRACTIONS = {"somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}
"""Entries of the official table that do not restore one missing apostrophe of a contraction of words."""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place in range(len(word))
    if word[place] == "'"
} | ODD_CONTRACTIONS
MAX_PERIODS = 32
"""Number of periods that the official code removes; it passes a flag of 32 where `re.sub` expects a count."""
ENOUGH = 3
"""Number of annotators whose agreement gives an answer full accuracy."""


def normalize_answer(answer: str) -> str:
    """The answer in lower case, without punctuation and articles, numbers up to ten as digits, apostrophes restored."""
    words = _without_punctuation(answer).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    kept = (word for word in words if word not in ARTICLES)
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def _without_punctuation(text: str) -> str:
    """Text without punctuation: a mark beside a space, or in a text with a number like 1,000, vanishes; others become a
    space.
    """
    has_number_comma = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        vanishes = f"{mark} " in text or f" {mark}" in text or has_number_comma
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    return re.sub(r"\.(?!\d)", "", cleaned, count=MAX_PERIODS)


def vqa_accuracy(answer: str, annotations: Sequence[str]) -> float:
    """Mean over annotators of min(1, agreeing others / 3); with a single annotator, 1.0 for the same answer, else 0.0.

    Like the official code, it normalizes no answer if all annotators agree.
    """
    said = [_one_line(text) for text in annotations]
    answer = _one_line(answer)
    if len(said) == 1:
        return float(normalize_answer(answer) == normalize_answer(said[0]))
    if len(set(said)) > 1:
        said, answer = [normalize_answer(text) for text in said], normalize_answer(answer)
    agreeing = said.count(answer)
    in_full = min(1.0, agreeing / ENOUGH)
    left_out = min(1.0, (agreeing - 1) / ENOUGH)
    return ((len(said) - agreeing) * in_full + agreeing * left_out) / len(said)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Target of an answer that 0, 1, 2, 3, or at least 4 of ten annotators gave (EVE)."""


def soft_targets(annotations: Sequence[str]) -> dict[str, float]:
    """Normalized answer -> target; counts of another number of annotators are scaled to ten."""
    counts = Counter(normalize_answer(text) for text in annotations)
    share = {answer: round(10 * count / len(annotations)) for answer, count in counts.items()}
    return {answer: SOFT_SCORES[min(count, len(SOFT_SCORES) - 1)] for answer, count in share.items()}
