"""Exploration of a manifest before any model: metrics, tables, figures, and one page with all of them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from stocktake.data.images import PhotoError, decode, resize_to_square
from stocktake.data.manifest import Manifest
from stocktake.data.sources import Source
from stocktake.evaluation import eda_figures as figures
from stocktake.evaluation.figures import save
from stocktake.evaluation.pages import data_uri, render
from stocktake.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLE = 2_000
"""Photos that are measured at most, and photos whose nearest neighbour is searched."""
SHEET = 12
"""Photos on the sheet of one quantity."""
_SIDE = 224  # pixels: one size for all, or sharpness would not compare
_ROWS = 20  # rejected bins on the page
_SIZES = 8  # photo sizes on the page
_THREADS = 4
_BLOCK = 64  # photos in memory at once

Pixels = NDArray[np.uint8]


@dataclass
class Exploration:
    """What a manifest's bins are like."""

    metrics: dict[str, float] = field(default_factory=dict)
    """`eda/...`"""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """classes, sizes, flags, rejected."""
    plots: dict[str, Figure] = field(default_factory=dict)
    """classes, samples_<label>, sizes, light, extremes, snapshots, near_duplicates."""

    def save(self, folder: Path, *, root: str, task: str, fingerprint: str) -> Path:
        """Write the plots as PNG and `eda.html`, which holds all of it; return the page.

        Args:
            folder: created if it is missing.
            root: for the page's title.
            task: as the user wrote it.
            fingerprint: of the manifest.
        """
        images = {}
        for name, figure in self.plots.items():
            path = folder / f"{name}.png"
            save(figure, path)
            is_photos = name.startswith(("samples_", "extremes"))  # as JPEG a sixth of the size
            images[name] = data_uri(_as_jpeg(path), "jpeg") if is_photos else data_uri(path.read_bytes())
        page = render(
            "eda.html",
            root=root,
            task=task,
            fingerprint=fingerprint,
            metrics={name.removeprefix("eda/"): value for name, value in self.metrics.items()},
            tables={name: table.to_dict("split") for name, table in self.tables.items()},
            images=images,
            sample=SAMPLE,
            sheet=SHEET,
            side=_SIDE,
            rows=_ROWS,
        )
        atomic_write(folder / "eda.html", page)
        return folder / "eda.html"


def explore(manifest: Manifest, *, seed: int, near: int) -> Exploration:
    """Explore the bins of a manifest; photos are read again.

    Args:
        manifest: with at least one bin.
        seed: chooses the photos that are shown and measured.
        near: hashes that differ in at most this many bits are of near-identical photos.
    """
    bins, rng = manifest.bins, np.random.default_rng(seed)
    result = Exploration()
    result.metrics = {
        "eda/bins": len(bins),
        "eda/rejected": len(manifest.rejected),
        "eda/out_of_range": manifest.out_of_range,
        "eda/flagged_share": (bins["flags"].str.len() > 0).mean(),
    }
    result.tables["flags"], result.tables["rejected"] = flag_table(bins), manifest.rejected.head(_ROWS)
    _add_classes(result, manifest)
    _add_samples(result, manifest, rng)
    _add_photos(result, manifest, rng)
    _add_snapshots(result, bins)
    _add_near_duplicates(result, bins, rng, near)
    result.metrics = {name: float(value) for name, value in result.metrics.items()}
    return result


def imbalance_ratio(counts: NDArray[Any]) -> float:
    """The most frequent class over the least frequent one that has a bin at all; 1 is balance."""
    present = np.asarray(counts)[np.asarray(counts) > 0]
    return float(present.max() / present.min()) if present.size else float("nan")


def group_sizes(bins: pd.DataFrame) -> pd.Series[int]:
    """Number of bin groups (values) by how many snapshots are in them (index, ascending)."""
    return bins["group"].value_counts().value_counts().sort_index()


def neighbour_changes(bins: pd.DataFrame) -> pd.Series[int]:
    """Pairs of snapshots (values) by how the quantity changes from the first to the second (index, ascending).

    A pair is two snapshots of one group whose ids are n and n + 1, taken one after the other. Ids that are no
    numbers have no neighbours.
    """
    numbers = pd.to_numeric(bins["id"], errors="coerce")
    snapshots = bins.assign(number=numbers).dropna(subset="number").sort_values(["group", "number"])
    step = snapshots.groupby("group")[["number", "quantity"]].diff()
    changes = step.loc[step["number"] == 1, "quantity"].astype(int)
    return changes.value_counts().sort_index()


def groups_across_splits(bins: pd.DataFrame) -> int:
    """How many bin groups have snapshots in more than one split; each of them leaks."""
    return int(bins[["group", "split"]].drop_duplicates()["group"].value_counts().gt(1).sum())


def nearest_photos(
    hashes: NDArray[np.uint64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The most similar other photo of some of the photos, in bounded memory.

    Args:
        hashes: (N,) 64-bit perceptual hashes.
        chosen: (M,) positions of the photos to look at.

    Returns:
        (M,) differing bits and (M,) position of the nearest photo; both empty when there is one photo only.
    """
    distance = np.zeros(len(chosen) if len(hashes) > 1 else 0, dtype=np.int64)
    position = np.zeros_like(distance)
    step = max(1, 4_000_000 // max(1, len(hashes)))
    for start in range(0, len(distance), step):
        part = chosen[start : start + step]
        bits = np.bitwise_count(hashes[part, None] ^ hashes[None, :])
        bits[np.arange(len(part)), part] = 255  # not itself
        position[start : start + step] = nearest = bits.argmin(axis=1)
        distance[start : start + step] = bits[np.arange(len(part)), nearest]
    return distance, position


def photo_measures(pixels: Pixels) -> tuple[float, float]:
    """Brightness and sharpness of an RGB photo (H, W, 3).

    Brightness is the mean luma (ITU-R BT.601), 0 to 255. Sharpness is the variance of the Laplacian of the
    luma, low for a blurred photo (Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR
    2000); it compares only between photos of one size.
    """
    from scipy import ndimage

    luma = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return float(luma.mean()), float(ndimage.laplace(luma).var())


def size_table(bins: pd.DataFrame) -> pd.DataFrame:
    """The most frequent photo sizes: width, height (pixels), bins, share."""
    table = bins.groupby(["width", "height"]).size().rename("bins").reset_index()
    table = table.sort_values(["bins", "width", "height"], ascending=[False, True, True]).head(_SIZES)
    return table.assign(share=table["bins"] / len(bins)).reset_index(drop=True)


def flag_table(bins: pd.DataFrame) -> pd.DataFrame:
    """How many bins carry each flag: flag, bins, share; most frequent first."""
    counts = bins["flags"].explode().dropna().value_counts()
    table = pd.DataFrame({"flag": counts.index.astype(str), "bins": counts.to_numpy()})
    return table.assign(share=table["bins"] / len(bins)).sort_values(["bins", "flag"], ascending=[False, True])


def _add_classes(result: Exploration, manifest: Manifest) -> None:
    table = manifest.counts()
    table = table.assign(all=table.sum(axis=1))
    result.tables["classes"] = table.rename_axis("quantity").reset_index()
    result.plots["classes"] = figures.classes_figure(table)
    result.metrics |= {
        "eda/imbalance_ratio": imbalance_ratio(table["all"].to_numpy()),
        "eda/majority_share": table["all"].max() / len(manifest.bins),
        "eda/empty_classes": (table["all"] == 0).sum(),
        **{f"eda/bins_{label}": n for label, n in table["all"].items()},
    }


def _add_samples(result: Exploration, manifest: Manifest, rng: np.random.Generator) -> None:
    for label in manifest.labels:
        ids = manifest.bins.loc[manifest.bins["quantity"] == label, "id"].to_numpy()
        chosen = sorted(rng.choice(ids, min(SHEET, len(ids)), replace=False)) if len(ids) else []
        if photos := list(_read(manifest.source, chosen)):
            title = f"Recorded quantity {label}"
            result.plots[f"samples_{label}"] = figures.sheet_figure({"": photos}, title)


def _add_photos(result: Exploration, manifest: Manifest, rng: np.random.Generator) -> None:
    bins = manifest.bins
    chosen = bins["id"].iloc[np.sort(rng.permutation(len(bins))[:SAMPLE])].tolist()
    photos = tqdm(_read(manifest.source, chosen), "measuring photos", len(chosen), disable=None)
    measured = {bin_id: photo_measures(pixels) for bin_id, pixels in photos}
    result.tables["sizes"], result.plots["sizes"] = size_table(bins), figures.sizes_figure(bins)
    result.metrics |= {
        "eda/width_median": bins["width"].median(),
        "eda/height_median": bins["height"].median(),
        "eda/square_share": (bins["width"] == bins["height"]).mean(),
        "eda/photos_measured": len(measured),
        "eda/photos_lost": len(chosen) - len(measured),
    }
    if not measured:
        return
    ids = np.array(list(measured))
    brightness, sharpness = np.array(list(measured.values())).T
    ends = {
        "darkest": np.argsort(brightness)[:6],
        "brightest": np.argsort(-brightness)[:6],
        "most blurred": np.argsort(sharpness)[:6],
        "sharpest": np.argsort(-sharpness)[:6],
    }
    rows = {name: list(_read(manifest.source, ids[at].tolist())) for name, at in ends.items()}
    result.plots["light"] = figures.light_figure(brightness, sharpness)
    result.plots["extremes"] = figures.sheet_figure(rows, "The ends of brightness and sharpness")
    result.metrics |= {
        "eda/brightness_median": np.median(brightness),
        "eda/sharpness_median": np.median(sharpness),
    }


def _add_snapshots(result: Exploration, bins: pd.DataFrame) -> None:
    sizes, changes = group_sizes(bins), neighbour_changes(bins)
    result.plots["snapshots"] = figures.snapshots_figure(sizes, changes)
    result.metrics |= {
        "eda/groups": sizes.sum(),
        "eda/repeated_share": 1 - sizes.get(1, 0) / len(bins),
        "eda/largest_group": sizes.index.max(),
        "eda/groups_across_splits": groups_across_splits(bins),
        "eda/neighbours": changes.sum(),
        "eda/neighbours_equal_share": changes.get(0, 0) / max(1, changes.sum()),
    }


def _add_near_duplicates(result: Exploration, bins: pd.DataFrame, rng: np.random.Generator, near: int) -> None:
    hashes = np.array([int(text, 16) for text in bins["phash"]], dtype=np.uint64)
    chosen = np.sort(rng.permutation(len(bins))[:SAMPLE])
    distance, position = nearest_photos(hashes, chosen)
    result.metrics["eda/same_photo_share"] = bins["hash"].duplicated(keep=False).mean()
    if not distance.size:
        return
    group, split = bins["group"].to_numpy(), bins["split"].to_numpy()
    is_near = distance <= near
    result.plots["near_duplicates"] = figures.nearest_figure(distance, group[chosen] == group[position], near)
    result.metrics["eda/near_duplicates_share"] = is_near.mean()
    result.metrics["eda/near_duplicates_across_splits"] = (is_near & (split[chosen] != split[position])).mean()


def _read(source: Source, ids: Sequence[str]) -> Iterator[tuple[str, Pixels]]:
    """Yield the photos as squares in the order of the ids; photos that have gone meanwhile are left out."""

    def read(bin_id: str) -> tuple[str, Pixels] | None:
        try:
            return bin_id, resize_to_square(decode(source.photo(bin_id)), _SIDE)
        except (OSError, PhotoError):
            return None

    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(ids), _BLOCK):
            yield from filter(None, threads.map(read, ids[start : start + _BLOCK]))


def _as_jpeg(path: Path) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
