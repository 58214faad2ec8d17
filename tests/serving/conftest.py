"""The tiny root is shared with the other rooms that train on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stocktake.models.export import export_model
from tiny_bins import few_bins, tiny_bench, tiny_model, tiny_root, tiny_settings

__all__ = ["few_bins", "tiny_bench", "tiny_root", "tiny_settings"]


@pytest.fixture(scope="session")
def exported_model(few_bins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of the tiny root: read only."""
    folder = tmp_path_factory.mktemp("counter") / "exported"
    export_model(tiny_model("pca_svm", few_bins), folder)
    return folder
