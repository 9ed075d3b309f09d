"""Plain PyTorch weights: export them from a run, convert released files and image Transformers, and load them."""

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
