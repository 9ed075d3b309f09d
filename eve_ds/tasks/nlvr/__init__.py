"""Statements about two images (NLVR2) or one (NLVR): true or false; accuracy and consistency."""

from eve_ds.tasks.nlvr.task import NLVR

__all__ = ["NLVR"]
