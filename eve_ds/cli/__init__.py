"""Command lines of the launchers, one module each with a function `main`.

Modules import third parties only when a command runs, so that help and errors in arguments are immediate.
"""
