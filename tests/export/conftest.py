"""Fixtures of the transformers classes: one export in both forms."""

import pytest
from hf_export import write_plain


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """Folder of a plain export."""
    return write_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def exported(plain, tmp_path_factory):
    """Folder of the same export for transformers."""
    from eve_ds.export.hf import export_hf

    folder = tmp_path_factory.mktemp("hf") / "model"
    export_hf(plain, folder)
    return folder
