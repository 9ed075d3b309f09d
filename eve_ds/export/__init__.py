"""Plain PyTorch weights, out of a run and back into a model."""

from eve_ds.checkpoint.files import CheckpointError
from eve_ds.export.plain import ExportError, ExportReport, OutputCheck, export, load

__all__ = ["CheckpointError", "ExportError", "ExportReport", "OutputCheck", "export", "load"]
