"""Statements about two images (NLVR2) or one (NLVR): true or false; accuracy and consistency."""

from eve_ds.tasks.nlvr.task import NLVR, write_published_csv

__all__ = ["NLVR", "write_published_csv"]
