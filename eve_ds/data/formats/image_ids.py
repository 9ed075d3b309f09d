"""Names by which lists of ids call the same photograph in several data sets, so that a test set can be left out.

COCO's images are numbered. Half of Visual Genome's are images of COCO. Those of Flickr30K and SBU come from Flickr, as
do all of COCO and Visual Genome, and their addresses hold the number of the photograph.
"""

from __future__ import annotations

import re

_SUBSETS = ("train2014", "val2014", "test2014", "test2015")
_FLICKR = re.compile(r"https?://[^/?#]*flickr\.com/(?:[^/?#]+/)*(?P<number>[0-9]+)_[0-9a-f]+[^/]*", re.IGNORECASE)


def coco_names(number: str) -> tuple[str, ...]:
    """Names of an image of COCO: its number, and the names of files of 2014 to 2017; empty for what is no number."""
    if not (number.isascii() and number.isdecimal() and len(number) <= 12):
        return ()
    long = number.zfill(12)
    return (str(int(number)), long, *(f"COCO_{subset}_{long}" for subset in _SUBSETS))


def flickr_names(address: str) -> tuple[str, ...]:
    """Number of a photograph at Flickr, the name of its file in Flickr30K; empty for another address."""
    found = _FLICKR.fullmatch(address)
    return (found["number"],) if found else ()
