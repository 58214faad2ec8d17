"""Figures of any size show something, and touch no state of matplotlib's."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stocktake.evaluation.figures import confusion_figure, plot_curves, save


def shades(path: Path) -> int:
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("L"))))


@pytest.mark.parametrize("k", [1, 6, 30])
def test_confusion_figure_of_any_size(tmp_path: Path, k: int) -> None:
    counts = np.random.default_rng(0).integers(0, 400, (k, k))
    counts[0] = 0
    before = dict(mpl.rcParams)
    title = "A title that costs $1 and $2 and is far too long to fit into the width of a narrow figure"
    save(confusion_figure(counts, range(k), title), tmp_path / "c.png", dpi=60)
    assert shades(tmp_path / "c.png") > 20
    assert dict(mpl.rcParams) == before


def test_curves(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {
            "epoch": [1, 2, 3, 3],
            "train/loss": [1.5, 1.4, 1.3, 1.2],
            "train/accuracy": [0.2, 0.3, 0.4, 0.5],
            "val/loss": [1.6, np.nan, 1.4, 1.4],
            "val/accuracy": [0.2, 0.3, 0.25, 0.25],
            "val/macro_f1": [0.1, 0.3, 0.2, 0.2],
        }
    )
    for name, frame in {"all": rows, "one": rows.head(1), "losses": rows[["epoch", "train/loss"]]}.items():
        plot_curves(frame, tmp_path / name / "curves.png")
        assert shades(tmp_path / name / "curves.png") > 50
    with pytest.raises(ValueError, match="at least one row"):
        plot_curves(rows.head(0), tmp_path / "none.png")
