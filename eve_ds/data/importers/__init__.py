"""Readers of published data sets, each a stream of image-caption candidates for shards."""

from eve_ds.data.errors import BadSample, SourceError
from eve_ds.data.importers.address_list import Addresses
from eve_ds.data.importers.annotated_images import ImagePaths
from eve_ds.data.importers.annotations import CaptionJson, Coco, Karpathy, Table, VisualGenome
from eve_ds.data.importers.candidate import Candidate, FileSlice, InlineBytes, Skip, Source
from eve_ds.data.importers.generated import GeneratedScenes
from eve_ds.data.importers.img2dataset import Img2dataset
from eve_ds.data.importers.metadata_folder import MetadataFolder
from eve_ds.data.importers.nlvr import Nlvr

__all__ = [
    "Addresses",
    "BadSample",
    "Candidate",
    "CaptionJson",
    "Coco",
    "FileSlice",
    "GeneratedScenes",
    "ImagePaths",
    "Img2dataset",
    "InlineBytes",
    "Karpathy",
    "MetadataFolder",
    "Nlvr",
    "Skip",
    "Source",
    "SourceError",
    "Table",
    "VisualGenome",
]
