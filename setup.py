"""Thin on purpose: metadata lives in pyproject.toml, and nothing is compiled at installation."""

from setuptools import setup

setup()
