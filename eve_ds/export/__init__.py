"""Plain PyTorch weights: out of a run, from released files and image Transformers, and back into a model."""

from eve_ds.checkpoint.files import CheckpointError
from eve_ds.export.importing import import_weights
from eve_ds.export.plain import ExportError, export, load
from eve_ds.export.provenance import ExportReport, OutputCheck
from eve_ds.export.start import StartReport
from eve_ds.export.upcycle import upcycle, write_upcycled
from eve_ds.export.weight_files import WeightFileError

__all__ = [
    "CheckpointError",
    "ExportError",
    "ExportReport",
    "OutputCheck",
    "StartReport",
    "WeightFileError",
    "export",
    "import_weights",
    "load",
    "upcycle",
    "write_upcycled",
]
