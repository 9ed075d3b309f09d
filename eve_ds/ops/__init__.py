"""Routing and masked-loss operations; `reference.py` defines what is correct."""
