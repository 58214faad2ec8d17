"""Figures of an evaluated model: the confusion matrix and the training curves.

Drawn on figures of their own, without pyplot: no window system, no state shared between threads or runs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stocktake.evaluation.metrics import scores
from stocktake.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart with every common colour blindness: Okabe & Ito, Color Universal Design (2008).
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#6B6B6B", "#E3E3E3"


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, width by height in inches, whose parts are laid out without overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, *, dpi: int = 150) -> None:
    """Write a figure as PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def plain(axes: Axes, title: str, xlabel: str, ylabel: str, grid: Literal["x", "y", "both"] | None = None) -> None:
    """Title on the left, labelled axes, no frame, grid lines across these axes: the marks carry the figure."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.set_xlabel(xlabel, fontsize=10, color=INK)
    axes.set_ylabel(ylabel, fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, which="major", color=PALE, linewidth=0.8)


def headline(figure: Figure, text: str) -> None:
    """Head a figure with bold text on the left, broken into lines that fit its width."""
    lines = textwrap.wrap(text, width=max(12, int(figure.get_figwidth() * 8.5))) or [""]
    title = figure.suptitle("\n".join(lines), x=0.015, ha="left", fontsize=13, color=INK, fontweight="bold")
    title.set_parse_math(False)  # a name may hold a dollar sign


def confusion_figure(confusion: NDArray[Any], labels: Sequence[int], title: str) -> Figure:
    """Heat map of one (K, K) matrix: colour and percentage by row, the count above them.

    Rows are recorded, columns counted quantities; the exact counts lie on the outlined diagonal. Above 12
    labels the percentages are left out, above 24 the counts too.
    """
    from matplotlib.patches import Rectangle

    counts = np.asarray(confusion)
    k, total = len(labels), int(counts.sum())
    recorded = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, recorded, out=np.zeros(counts.shape), where=recorded > 0)
    side = min(max(3.4, 0.78 * k), 11.0)
    figure = new_figure(side + 2.0, 0.94 * side + 1.3)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)

    if k <= 24:
        for row, column in np.ndindex(k, k):
            text = f"{counts[row, column]:,}"
            if k <= 12:
                text += f"\n{share[row, column]:.0%}"
            ink = "white" if share[row, column] > 0.55 else (INK if counts[row, column] else GREY)
            size = 10 if k <= 8 else 8 if k <= 12 else 7
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink, linespacing=1.4)
    outline: dict[str, Any] = {"fill": False, "edgecolor": ORANGE, "linewidth": 1.4, "zorder": 3, "clip_on": False}
    for i in range(k):
        axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, **outline))

    summary = "no bins"
    if total:
        metrics = {name: float(value) for name, value in scores(counts, labels).items()}
        summary = (
            f"{total:,} bins · exact {metrics['accuracy']:.1%} · within one {metrics['within_1']:.1%} · "
            f"macro-F1 {metrics['macro_f1']:.3f}"
        )
    plain(axes, summary, "Counted quantity", "Recorded quantity (bins)")
    axes.set_title(summary, loc="left", fontsize=9.5, color=GREY)
    headline(figure, title)
    axes.set_xticks(range(k), [str(label) for label in labels])
    axes.set_yticks(range(k), [f"{label}  ({n:,})" for label, n in zip(labels, recorded[:, 0], strict=True)])
    axes.set_xticks(np.arange(k - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(k - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=24, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0%", "25%", "50%", "75%", "100%"], fontsize=8, color=GREY)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    bar.set_label("Share of the row", fontsize=9, color=GREY)
    return figure


def reliability_figure(tables: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Accuracy against confidence, a panel a table of `calibration.reliability`; a perfect model is the diagonal."""
    from stocktake.evaluation.calibration import expected_calibration_error

    figure = new_figure(4.6 * len(tables), 4.6)
    for axes, (name, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        filled = table[table["n"] > 0]
        width = float((table["high"] - table["low"]).iloc[0])
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
        axes.bar(filled["low"], filled["accuracy"], width, align="edge", color=SKY, edgecolor="white", zorder=1)
        axes.plot(filled["confidence"], filled["accuracy"], ".-", color=BLUE, linewidth=1.4, zorder=3)
        for low, n in zip(filled["low"], filled["n"], strict=True):
            axes.annotate(f"{n:,}", (low + width / 2, 0.01), ha="center", fontsize=6.5, color=GREY)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        plain(axes, f"{name}: ECE {expected_calibration_error(table):.3f}", "Confidence", "Share counted exactly")
    headline(figure, title)
    return figure


def curves_figure(rows: pd.DataFrame) -> Figure:
    """Loss on the left, accuracy and macro-F1 on the right, by epoch; the best epoch is marked.

    Args:
        rows: one row an epoch with columns epoch, train/loss, train/accuracy, val/loss, val/accuracy,
            val/macro_f1; of an epoch that is there twice (a resumed run) the last row counts. A column that
            is missing, or nan, is not drawn. The best epoch is that of the highest val/macro_f1.

    Raises:
        ValueError: no rows, or no column epoch.
    """
    if "epoch" not in rows or rows.empty:
        raise ValueError("training curves need a column epoch and at least one row")
    rows = rows.drop_duplicates("epoch", keep="last").sort_values("epoch")
    best = None
    if "val/macro_f1" in rows and rows["val/macro_f1"].notna().any():
        best = rows.iloc[int(rows["val/macro_f1"].argmax())]
    figure = new_figure(9.6, 4.0)
    left, right = figure.subplots(1, 2)
    _lines(left, rows, {"train/loss": ("train", ORANGE), "val/loss": ("val", BLUE)})
    plain(left, "Loss", "Epoch", "Cross-entropy (nats)", "y")
    scored = {
        "train/accuracy": ("train accuracy", ORANGE),
        "val/accuracy": ("val accuracy", SKY),
        "val/macro_f1": ("val macro-F1", BLUE),
    }
    _lines(right, rows, scored)
    plain(right, "Accuracy and macro-F1", "Epoch", "Share (0 to 1)", "y")
    for axes in (left, right):
        axes.locator_params(axis="x", integer=True)
        if best is not None:
            axes.axvline(best["epoch"], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    title = "Training curves"
    if best is not None:
        title = f"Best val macro-F1 {best['val/macro_f1']:.3f}, at epoch {best['epoch']:.0f}"
        right.plot(best["epoch"], best["val/macro_f1"], "o", ms=8, mfc="white", mec=BLUE, mew=2, zorder=4)
    headline(figure, title)
    return figure


def _lines(axes: Axes, rows: pd.DataFrame, columns: dict[str, tuple[str, str]]) -> None:
    for column, (name, color) in columns.items():
        if column not in rows:
            continue
        line = rows[["epoch", column]].dropna()
        if not line.empty:
            style = "--" if column.startswith("train/") else "-"
            axes.plot(line["epoch"], line[column], style, color=color, linewidth=1.8, marker=".", label=name)


def plot_curves(metrics_csv_rows: pd.DataFrame, path: Path) -> None:
    """Write the training curves of `curves_figure` as PNG."""
    save(curves_figure(metrics_csv_rows), path)
