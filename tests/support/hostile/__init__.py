"""Corpus of hostile files, a module per kind with `CASES`; `case.py` describes a case, `contained.py` runs one."""
