"""Readers of published data sets, each a stream of image-caption candidates for shards."""

from eve_ds.data.errors import BadSample, SourceError
from eve_ds.data.importers.annotations import CaptionJson, Karpathy, Table
from eve_ds.data.importers.candidate import Candidate, FileSlice, InlineBytes, Skip, Source
from eve_ds.data.importers.generated import GeneratedScenes
from eve_ds.data.importers.img2dataset import Img2dataset
from eve_ds.data.importers.nlvr import Nlvr

__all__ = [
    "BadSample",
    "Candidate",
    "CaptionJson",
    "FileSlice",
    "GeneratedScenes",
    "Img2dataset",
    "InlineBytes",
    "Karpathy",
    "Nlvr",
    "Skip",
    "Source",
    "SourceError",
    "Table",
]
