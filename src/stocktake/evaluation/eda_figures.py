"""Figures of a manifest: quantities, photos, snapshots of the same bin, near-duplicates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stocktake.data.splits import SPLITS
from stocktake.evaluation.figures import BLUE, GREEN, GREY, INK, ORANGE, PALE, headline, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPLIT_COLORS = dict(zip(SPLITS, (BLUE, ORANGE, GREEN), strict=True))


def classes_figure(table: pd.DataFrame) -> Figure:
    """Bins by quantity, and the share of each quantity in each split, from `Manifest.counts` with a column `all`."""
    labels = [str(label) for label in table.index]
    counts = {int(label): int(count) for label, count in zip(table.index, table["all"], strict=True) if count}
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    figure = new_figure(9.6, 3.8)
    left, right = figure.subplots(1, 2)
    below = np.zeros(len(table))
    for split, color in _SPLIT_COLORS.items():
        left.bar(labels, table[split], bottom=below, color=color, width=0.72, label=split)
        below += table[split].to_numpy()
    if len(labels) <= 12:
        for x, total in enumerate(below):
            left.annotate(f"{total:,.0f}", (x, total), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    _legend_below(left)
    plain(left, "Bins of each quantity", "Recorded quantity", "Bins", "y")
    _whole_numbers(left)
    share = table[list(SPLITS)] / table[list(SPLITS)].sum().clip(lower=1)
    for (split, color), offset, mark in zip(_SPLIT_COLORS.items(), (-0.16, 0, 0.16), "osD", strict=True):
        right.plot(np.arange(len(labels)) + offset, 100 * share[split], mark, color=color, ms=7, label=split)
    right.set_xticks(range(len(labels)), labels)
    right.set_ylim(bottom=0)
    _legend_below(right)
    plain(right, "Mix of quantities in each split", "Recorded quantity", "Share of the split's bins (%)", "y")
    times = f", {counts[most] / counts[least]:.1f} times quantity {least}" if most != least else ""
    headline(figure, f"Quantity {most} is the most frequent{times}")
    return figure


def sheet_figure(rows: dict[str, list[tuple[str, NDArray[np.uint8]]]], title: str, columns: int = 6) -> Figure:
    """Photos in a grid, each row under its name, each photo with its caption.

    Args:
        rows: name -> (caption, pixels (H, W, 3)) of each photo; a row longer than `columns` is broken.
        title: heads the sheet.
        columns: photos side by side.
    """
    broken = [
        (name if start == 0 else "", photos[start : start + columns])
        for name, photos in rows.items()
        for start in range(0, len(photos), columns)
    ]
    figure = new_figure(1.55 * columns, 1.74 * max(1, len(broken)) + 0.4)
    grid = figure.subplots(max(1, len(broken)), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_xticks([])  # or the layout measures invisible labels
        axes.set_yticks([])
    for axes_row, (name, photos) in zip(grid, broken, strict=False):
        for axes, (caption, pixels) in zip(axes_row, photos, strict=False):
            axes.imshow(pixels, interpolation="antialiased")
            axes.set_title(caption, fontsize=8, color=GREY, pad=3, parse_math=False)
        if name:
            style: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 9, "color": INK}
            axes_row[0].annotate(name, (-0.06, 0.5), xycoords="axes fraction", **style)
    headline(figure, title)
    return figure


def sizes_figure(bins: pd.DataFrame) -> Figure:
    """Width against height of the photos, and the sizes of their files."""
    table = bins.groupby(["width", "height"]).size().rename("bins").reset_index()
    ratio = bins["width"] / bins["height"]
    others = ratio[ratio != 1]
    figure = new_figure(9.6, 3.9)
    left, right = figure.subplots(1, 2)
    area = 900 * table["bins"] / table["bins"].max()
    left.scatter(table["width"], table["height"], s=area.clip(lower=14), color=BLUE, alpha=0.5, linewidths=0)
    plain(left, "Sizes (area: number of photos)", "Width (pixels)", "Height (pixels)", "both")
    left.set_aspect("equal", adjustable="datalim")
    left.margins(0.15)
    _histogram(right, bins["bytes"].to_numpy() / 1000, BLUE)
    plain(right, "File sizes", "File size (kB)", "Photos", "y")
    rest = ""
    if len(others):
        low, high = (f"{value:.1f}" for value in others.quantile([0.05, 0.95]))
        rest = f"; most others are {low if low == high else f'{low} to {high}'} times as wide as high"
    headline(figure, f"{1 - len(others) / len(bins):.0%} of the photos are square{rest}")
    return figure


def light_figure(brightness: NDArray[np.float64], sharpness: NDArray[np.float64]) -> Figure:
    """Histograms of brightness (0 to 255) and sharpness (variance of the Laplacian, on a log axis)."""
    figure = new_figure(9.6, 3.6)
    left, right = figure.subplots(1, 2)
    _histogram(left, brightness, BLUE)
    plain(left, f"Brightness: median {np.median(brightness):.0f}", "Mean luma (0 black, 255 white)", "Photos", "y")
    _histogram(right, np.maximum(sharpness, 1e-3), BLUE, log=True)
    title = f"Sharpness: median {np.median(sharpness):,.0f}"
    plain(right, title, "Variance of the Laplacian (left is blurred)", "Photos", "y")
    headline(figure, f"Brightness and sharpness of {len(brightness):,} photos")
    return figure


def snapshots_figure(sizes: pd.Series[int], changes: pd.Series[int]) -> Figure:
    """Bins by the size of their group (`eda.group_sizes`), and `eda.neighbour_changes` of the quantity."""
    bins = sizes * sizes.index.to_numpy()
    repeated = float(bins[bins.index > 1].sum() / bins.sum())
    figure = new_figure(9.6, 3.6)
    left, right = figure.subplots(1, 2)
    colors = [PALE if size == 1 else BLUE for size in bins.index]
    left.bar(bins.index.to_numpy(), bins.to_numpy(), color=colors, edgecolor=GREY, linewidth=0.4, width=0.8)
    left.set_xlim(0.3, max(3, int(bins.index.max())) + 0.7)
    left.locator_params(axis="x", integer=True)
    plain(left, "Bins by number of snapshots", "Snapshots of the same bin", "Bins", "y")
    _whole_numbers(left)
    if changes.sum():
        near = range(max(-5, min(-2, *changes.index)), min(5, max(2, *changes.index)) + 1)
        heights = 100 * changes.reindex(near, fill_value=0).to_numpy() / changes.sum()
        right.bar(near, heights, color=BLUE, width=0.75)
        for x, height in zip(near, heights, strict=True):
            text = "<1%" if 0 < height < 0.5 else f"{height:.0f}%"
            right.annotate(text, (x, height), (0, 3), textcoords="offset points", ha="center", fontsize=9, color=INK)
        right.set_xticks(near, [f"{x:+d}" if x else "0" for x in near])
    else:
        right.text(0.5, 0.5, "no neighbouring snapshots", ha="center", color=GREY, transform=right.transAxes)
    plain(right, f"Change in {changes.sum():,} neighbouring pairs", "Change of the quantity (items)", "Pairs (%)", "y")
    headline(figure, f"{repeated:.0%} of the bins are seen again")
    return figure


def nearest_figure(distance: NDArray[np.int64], same_group: NDArray[np.bool_], near: int) -> Figure:
    """How far the most similar other photo is, in bits, where it is of the same group and where it is not."""
    figure = new_figure(9.6, 3.4)
    axes = figure.add_subplot()
    bits = np.arange(0, max(16, int(distance.max(initial=0))) + 1)
    same = np.bincount(distance[same_group], minlength=bits.size)
    other = np.bincount(distance[~same_group], minlength=bits.size)
    axes.bar(bits, same, color=BLUE, width=0.8, label="it shows the same bin")
    axes.bar(bits, other, bottom=same, color=ORANGE, width=0.8, label="it shows another bin")
    axes.axvline(near + 0.5, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"near-identical: up to {near} bits",
        (near + 0.5, 1),
        (6, -4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        fontsize=9,
        color=GREY,
        backgroundcolor="white",
    )
    _legend_below(axes)
    plain(axes, "", "Distance to the most similar other photo (differing bits of 64)", "Photos", "y")
    _whole_numbers(axes)
    share = float((distance <= near).mean()) if distance.size else 0.0
    headline(figure, f"{share:.1%} of the photos have a near-identical one")
    return figure


def _histogram(axes: Axes, values: NDArray[Any], color: str, *, log: bool = False) -> None:
    """40 bins between the 0.5 and 99.5 percentiles; what lies outside is counted in the outermost bins."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    low, high = np.quantile(values, [0.005, 0.995])
    if not high > low:
        low, high = (low * 0.9, high * 1.1) if log else (low - 0.5, high + 0.5)
    edges = np.geomspace(low, high, 41) if log else np.linspace(low, high, 41)
    axes.hist(np.clip(values, low, high), bins=list(edges), color=color, edgecolor="white", linewidth=0.4)
    axes.axvline(float(np.median(values)), color=ORANGE, linewidth=1.5)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    _whole_numbers(axes)


def _legend_below(axes: Axes) -> None:
    """Under the axis label, where it covers no mark."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.17), "borderaxespad": 0}
    axes.legend(frameon=False, fontsize=9, ncols=3, labelcolor=INK, **place)


def _whole_numbers(axes: Axes) -> None:
    """Counts have no halves, and thousands a comma."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
