"""`stocktake eda`: explore the bins in a tracked run, with figures and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from stocktake.config import EdaConfig
from stocktake.data.images import PhotoError, decode, prepare
from stocktake.data.manifest import Manifest, build_manifest
from stocktake.data.source import Source
from stocktake.evaluation import eda as exploration
from stocktake.evaluation.figures import save
from stocktake.files import atomic_write
from stocktake.progress import progress
from stocktake.tracking.local_store import DatasetRecord
from stocktake.tracking.runs import start_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLE = 2_000
"""Photos measured at most, and photos whose nearest other one is looked for."""
SHEET = 12
"""Photos on the sheet of one quantity."""
_SIDE = 224  # pixels: one size for all, or sharpness would not compare
_ROWS = 20  # of a table on the page
_THREADS = 4

Pixels = NDArray[np.uint8]


def eda(config: EdaConfig) -> dict[str, float]:
    """Explore the bins of a task and log what was found as a run.

    Returns:
        The run's metrics, `eda/...`.

    Raises:
        StocktakeError: root, list, task or workspace cannot be used.
    """
    manifest = build_manifest(config)
    tags = {
        "stage": "eda",
        "task": config.task,
        "data.root": manifest.source.root,
        "data.fingerprint": manifest.fingerprint,
    }
    with start_run(config.tracking, workspace=Path(config.workspace), name="eda", tags=tags) as run:
        run.log_params({"task": config.task, "seed": config.seed, "split.by": config.split.by})
        run.log_dataset(_dataset(manifest), context="eda")
        metrics = explore(
            manifest, run.artifacts, task=config.task, seed=config.seed, twin_distance=config.split.twin_distance
        )
        run.log_metrics(metrics, step=0)
        page = run.artifacts / "eda.html"
    again, ratio = metrics["eda/twins_share"], metrics["eda/imbalance_ratio"]
    print(f"{len(manifest.bins)} bins of task {config.task} in {manifest.source.root}: {again:.0%} seen again,")
    print(f"{ratio:.1f} times as many of the most frequent quantity as of the least frequent\npage: {page}")
    return metrics


def _dataset(manifest: Manifest) -> DatasetRecord:
    counts = manifest.counts().sum()
    return DatasetRecord(
        name="bins",
        digest=manifest.fingerprint,
        source=manifest.source.root,
        rows=len(manifest.bins),
        profile={str(split): int(count) for split, count in counts.items()},
    )


def explore(manifest: Manifest, folder: Path, *, task: str, seed: int, twin_distance: int) -> dict[str, float]:
    """Write `eda.html` and its figures as PNG into `folder`.

    Args:
        manifest: the bins.
        folder: made when it is not there.
        task: as the user wrote it, for the page.
        seed: chooses the photos that are shown and measured.
        twin_distance: hashes that differ in at most this many bits are near-identical photos.

    Returns:
        `eda/...` metrics.
    """
    bins = manifest.bins
    rng = np.random.default_rng(seed)
    page = _Page(folder, title=f"Bins of {manifest.source.root}", task=task, fingerprint=manifest.fingerprint)
    metrics = {
        "eda/bins": len(bins),
        "eda/rejected": len(manifest.rejected),
        "eda/outside": manifest.outside,
        "eda/flagged_share": float((bins["flags"].str.len() > 0).mean()),
    }
    metrics |= _classes(page, bins, manifest.labels)
    metrics |= _sheets(page, manifest, rng)
    metrics |= _photos(page, manifest, rng)
    metrics |= _twins(page, bins)
    metrics |= _near_duplicates(page, bins, rng, twin_distance)
    _records(page, manifest)
    page.write(metrics)
    return {name: float(value) for name, value in metrics.items()}


def _classes(page: _Page, bins: pd.DataFrame, labels: Sequence[int]) -> dict[str, float]:
    table = exploration.class_table(bins, labels)
    ratio = exploration.imbalance_ratio(table["all"].to_numpy())
    page.section("Quantities")
    page.text(
        f"The most frequent quantity has {ratio:.1f} times as many bins as the least frequent. A model that always "
        f"answers the most frequent is right for {table['all'].max() / len(bins):.1%} of the bins: that is the "
        "accuracy to beat."
    )
    page.figure("classes", exploration.classes_figure(table), "Bins by quantity and split")
    page.table(table.rename_axis("quantity").reset_index())
    counts = {f"eda/bins_{label}": float(n) for label, n in zip(labels, table["all"], strict=True)}
    return {"eda/imbalance_ratio": ratio, "eda/empty_classes": float((table["all"] == 0).sum()), **counts}


def _sheets(page: _Page, manifest: Manifest, rng: np.random.Generator) -> dict[str, float]:
    page.section("What the photos show")
    page.text(
        f"Up to {SHEET} photos of each quantity, drawn at random, each under its id and stretched to a square. "
        "Could you count them? Where a person cannot, no model is to be trusted alone."
    )
    for label in manifest.labels:
        ids = manifest.bins.loc[manifest.bins["quantity"] == label, "id"].to_numpy()
        chosen = sorted(rng.choice(ids, min(SHEET, len(ids)), replace=False)) if len(ids) else []
        shown = [(bin_id, pixels) for bin_id, pixels in _read(manifest.source, chosen) if pixels is not None]
        if shown:
            title = f"Recorded quantity {label}"
            page.figure(f"samples_{label}", exploration.sheet_figure({"": shown}, title), title, photos=True)
    return {}


def _photos(page: _Page, manifest: Manifest, rng: np.random.Generator) -> dict[str, float]:
    bins = manifest.bins
    page.section("Photos")
    page.text(
        "A photo is resized to a square before it is counted, so the further from square, the more it is stretched."
    )
    page.figure("sizes", exploration.sizes_figure(bins), "Photo and file sizes")
    page.table(exploration.size_table(bins))

    chosen = bins["id"].iloc[np.sort(rng.permutation(len(bins))[:SAMPLE])].tolist()
    measured: dict[str, tuple[float, float]] = {}
    with progress("measuring photos", len(chosen)) as advance:
        for bin_id, pixels in _read(manifest.source, chosen):
            if pixels is not None:
                measured[bin_id] = exploration.photo_measures(pixels)
            advance(1)
    metrics = {
        "eda/width_median": float(bins["width"].median()),
        "eda/height_median": float(bins["height"].median()),
        "eda/square_share": float((bins["width"] == bins["height"]).mean()),
        "eda/photos_measured": float(len(measured)),
    }
    if not measured:
        return metrics
    ids = np.array(list(measured))
    brightness, sharpness = np.array(list(measured.values())).T
    which = "all photos" if len(chosen) == len(bins) else f"a random sample of {len(chosen):,} of {len(bins):,} photos"
    lost = f" {len(chosen) - len(measured)} of them could not be read again." if len(measured) < len(chosen) else ""
    page.text(
        f"Brightness and sharpness, measured on {which} at {_SIDE} by {_SIDE} pixels.{lost} Sharpness is the variance "
        "of the Laplacian: edges make it high, blur makes it low. The orange line is the median."
    )
    page.figure("light", exploration.light_figure(brightness, sharpness), "Brightness and sharpness")
    ends = {
        "darkest": np.argsort(brightness)[:6],
        "brightest": np.argsort(-brightness)[:6],
        "most blurred": np.argsort(sharpness)[:6],
        "sharpest": np.argsort(-sharpness)[:6],
    }
    rows = {
        name: [(bin_id, pixels) for bin_id, pixels in _read(manifest.source, ids[at].tolist()) if pixels is not None]
        for name, at in ends.items()
    }
    page.text("The ends of both measures: photos that are worth a look before a model learns from them.")
    page.figure(
        "extremes", exploration.sheet_figure(rows, "The ends of brightness and sharpness"), "Extremes", photos=True
    )
    return metrics | {
        "eda/brightness_median": float(np.median(brightness)),
        "eda/sharpness_median": float(np.median(sharpness)),
    }


def _twins(page: _Page, bins: pd.DataFrame) -> dict[str, float]:
    sizes = exploration.group_sizes(bins)
    changes = exploration.neighbour_changes(bins)
    across = exploration.groups_across_splits(bins)
    single = int(sizes.get(1, 0))
    share = 1 - single / len(bins)
    page.section("Twins")
    page.text(
        f"{share:.1%} of the bins are seen again: another look at the same bin, mostly before or after an item was "
        f"picked or stowed. The {len(bins):,} bins are {int(sizes.sum()):,} groups of looks. "
        + (
            f"{across:,} groups have looks in more than one split, so scores on val and test flatter the model."
            if across
            else "Every group is in one split, so a model is never tested on a bin that it learned from."
        )
    )
    page.text(
        "Left, bins seen once are grey. Right, looks with neighbouring ids: how the quantity goes from one to the next."
    )
    page.figure("twins", exploration.twins_figure(sizes, changes), "Looks at the same bin")
    equal = int(changes.get(0, 0)) / max(1, int(changes.sum()))
    return {
        "eda/groups": float(sizes.sum()),
        "eda/twins_share": share,
        "eda/largest_group": float(sizes.index.max()),
        "eda/groups_across_splits": float(across),
        "eda/neighbours": float(changes.sum()),
        "eda/neighbours_equal_share": equal,
    }


def _near_duplicates(page: _Page, bins: pd.DataFrame, rng: np.random.Generator, twin_distance: int) -> dict[str, float]:
    page.section("Near-identical photos")
    same_bytes = float(bins["hash"].duplicated(keep=False).mean())
    hashes = np.array([int(text, 16) for text in bins["phash"]], dtype=np.uint64)
    asked = np.sort(rng.permutation(len(bins))[:SAMPLE])
    distance, position = exploration.nearest_photos(hashes, asked)
    metrics = {"eda/same_photo_share": same_bytes}
    if not distance.size:
        page.text("There is one photo only.")
        return metrics
    group, split = bins["group"].to_numpy(), bins["split"].to_numpy()
    near = distance <= twin_distance
    leaks = float((near & (split[asked] != split[position])).mean())
    which = "each photo" if len(asked) == len(bins) else f"each of {len(asked):,} photos drawn at random"
    page.text(
        f"For {which}, the most similar of all others, by a perceptual hash of 64 bits. {same_bytes:.1%} of the "
        f"photos are there twice, byte by byte; {leaks:.1%} have a near-identical photo in another split."
    )
    same_group = group[asked] == group[position]
    page.figure("near_duplicates", exploration.nearest_figure(distance, same_group, twin_distance), "Nearest photos")
    return metrics | {
        "eda/near_duplicates_share": float(near.mean()),
        "eda/near_duplicates_across_splits": leaks,
    }


def _records(page: _Page, manifest: Manifest) -> None:
    page.section("Records")
    flags = exploration.flag_table(manifest.bins)
    page.text(
        "What is unusual about a record or a file; these bins are used all the same."
        if len(flags)
        else "No record and no file is unusual."
    )
    page.table(flags)
    if len(manifest.rejected):
        more = f", the first {_ROWS} here" if len(manifest.rejected) > _ROWS else ""
        page.text(f"{len(manifest.rejected):,} bins cannot be used and are set aside{more}.")
        page.table(manifest.rejected.head(_ROWS))


def _read(source: Source, ids: Sequence[str]) -> Iterator[tuple[str, Pixels | None]]:
    """The photos, as squares, in the order of the ids; None for one that went away since the manifest was built."""

    def one(bin_id: str) -> tuple[str, Pixels | None]:
        try:
            return bin_id, prepare(decode(source.photo(bin_id)), _SIDE)
        except (OSError, PhotoError):
            return bin_id, None

    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(ids), 64):  # bounded: this many photos in memory, not the sample
            yield from threads.map(one, ids[start : start + 64])


@dataclass
class _Page:
    """The HTML page as it grows; figures are written beside it as PNG and inlined."""

    folder: Path
    title: str
    task: str
    fingerprint: str
    parts: list[str] = field(default_factory=list)

    def section(self, title: str) -> None:
        self.parts.append(f"<h2>{html.escape(title)}</h2>")

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def figure(self, name: str, figure: Figure, alt: str, *, photos: bool = False) -> None:
        save(figure, self.folder / f"{name}.png")
        kind, data = "png", (self.folder / f"{name}.png").read_bytes()
        if photos:  # as JPEG a sixth of the size: a page of many photos stays light
            buffer = io.BytesIO()
            with Image.open(io.BytesIO(data)) as image:
                image.convert("RGB").save(buffer, "JPEG", quality=85)
            kind, data = "jpeg", buffer.getvalue()
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        self.parts.append(f'<figure><img alt="{html.escape(alt)}" src="{source}"></figure>')

    def table(self, table: pd.DataFrame) -> None:
        if table.empty:
            return
        words = "words" if "reason" in table else None
        shown = table.rename_axis(columns=None)
        for column in shown.columns:
            if column == "share":
                shown[column] = shown[column].map("{:.1%}".format)
            elif column != "quantity" and pd.api.types.is_numeric_dtype(shown[column]):
                shown[column] = shown[column].map("{:,.0f}".format)
        markup = shown.to_html(index=False, border=0, escape=True, justify="inherit", classes=words)
        self.parts.append(f'<div class="table">{markup}</div>')

    def write(self, metrics: dict[str, Any]) -> None:
        tiles = {
            "bins": f"{metrics['eda/bins']:,}",
            "groups of looks": f"{metrics['eda/groups']:,.0f}",
            "seen again": f"{metrics['eda/twins_share']:.0%}",
            "imbalance": f"{metrics['eda/imbalance_ratio']:.1f} : 1",
            "flagged": f"{metrics['eda/flagged_share']:.1%}",
            "set aside": f"{metrics['eda/rejected']:,}",
            "outside task": f"{metrics['eda/outside']:,}",
        }
        cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items())
        content = _TEMPLATE.format(
            title=html.escape(self.title),
            task=html.escape(self.task),
            fingerprint=html.escape(self.fingerprint),
            tiles=cells,
            body="\n".join(self.parts),
        )
        atomic_write(self.folder / "eda.html", content)


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --paper: #fff; --tile: #f5f6f7; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e6e6; --soft: #a0a0a0; --line: #3a3a3a; --paper: #17181a; --tile: #222427; }}
}}
body {{ margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2.8rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--line); }}
p {{ max-width: 44rem; }}
.about {{ color: var(--soft); margin: .3rem 0 1.4rem; overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: .6rem; margin: 0; }}
dl div {{ background: var(--tile); border-radius: 6px; padding: .6rem .8rem; }}
dt {{ color: var(--soft); font-size: .82rem; }}
dd {{ margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }}
figure {{ margin: 1.2rem 0; background: #fff; border-radius: 6px; padding: .6rem;
  overflow-x: auto; }}
img {{ display: block; max-width: 100%; min-width: 36rem; height: auto; margin: 0 auto; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }}
th, td {{ padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; }}
th {{ color: var(--soft); font-weight: 600; }}
.words th, .words td {{ text-align: left; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="about">Task {task} · data fingerprint {fingerprint}</p>
<dl>{tiles}</dl>
{body}
</body>
</html>
"""
