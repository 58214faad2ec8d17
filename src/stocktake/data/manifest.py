"""The manifest: the table of bins with their splits and checks, and what was set aside and why."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stocktake.config import BinsConfig, SplitConfig
from stocktake.data.grouping import group_duplicates
from stocktake.data.images import PhotoError, examine, photo_key
from stocktake.data.record import RecordError, parse_record
from stocktake.data.roots import first_of_task, open_root
from stocktake.data.source import Source, read_id_list, source_key
from stocktake.data.splits import SPLITS, Split, assign_split, check_fractions
from stocktake.data.task import parse_task
from stocktake.errors import StocktakeError
from stocktake.progress import progress

CHECKS_VERSION = 1
"""Raised when the checks below change, so that remembered ones are not trusted."""
_THREADS = 4
_CHUNK = 512
_COLUMNS = {
    "id": "str",
    "stamp": "str",
    "quantity": "Int64",
    "width": "int64",
    "height": "int64",
    "bytes": "int64",
    "hash": "str",
    "phash": "str",
    "items": "object",
    "flags": "object",
    "file": "str",
    "reason": "str",
}


@dataclass(frozen=True)
class Manifest:
    """The bins of one task over one root."""

    bins: pd.DataFrame
    """A row a bin of the task, sorted by id: id, quantity, split, width, height (pixels, upright), bytes, hash (of
    the photo's bytes), phash (16 hex digits), group, items, flags (tuples)."""
    rejected: pd.DataFrame
    """A row a bin that cannot be used: id, file, reason."""
    outside: int
    """Usable bins whose quantity is not of the task."""
    labels: tuple[int, ...]
    """The quantities of the task, ascending."""
    source: Source
    fingerprint: str
    """Same ids, photos, quantities and splits: same fingerprint."""
    folder: Path
    """Where manifest.parquet and set-aside.csv lie."""

    def split(self, name: Split) -> pd.DataFrame:
        """The bins of one split, rows renumbered from 0."""
        return self.bins[self.bins["split"] == name].reset_index(drop=True)

    def counts(self) -> pd.DataFrame:
        """Bins by quantity (rows) and split (columns)."""
        table = pd.crosstab(self.bins["quantity"], self.bins["split"])
        return table.reindex(index=list(self.labels), columns=list(SPLITS), fill_value=0)

    def counted(self) -> list[tuple[Split, int, int]]:
        """The same as (split, quantity, bins), one for each cell."""
        counts = self.counts()
        return [(split, label, int(n)) for split in SPLITS for label, n in zip(self.labels, counts[split], strict=True)]

    def require_train_classes(self) -> None:
        """Raises StocktakeError when a quantity has no bin to learn from, or a split has no bin at all."""
        counts = self.counts()
        unseen = [label for label in self.labels if counts.loc[label, "train"] == 0]
        if unseen:
            raise StocktakeError(
                f"quantity {', '.join(map(str, unseen))} has no bin in the train split of {self.source.root}: "
                "add bins, narrow --task, or change --split.seed"
            )
        empty = [name for name in SPLITS if counts[name].sum() == 0]
        if empty:
            raise StocktakeError(
                f"the {empty[0]} split of {self.source.root} is empty ({len(self.bins)} bins in all): "
                "add bins, or change --split.fractions or --split.seed"
            )


def build_manifest(config: BinsConfig) -> Manifest:
    """Check every photo and record, group the looks, assign splits; a second call looks at what changed only.

    With no root, the synthetic one is made first.

    Raises:
        StocktakeError: root or list unusable, a task that matches nothing, an unwritable workspace.
    """
    labels = parse_task(config.task)
    check_fractions(config.split.fractions)
    if config.root == "":  # an unset variable of a script's must not end in training on rendered bins
        raise StocktakeError("--root is empty: give a folder, or leave the option out for a synthetic root")
    root = config.root or str(synthetic_root(config))
    wanted = read_id_list(Path(config.list)) if config.list else None
    size = f"-short{config.s3.resize}" if config.s3.resize and root.startswith("s3://") else ""
    folder = Path(config.workspace) / "manifests" / f"{source_key(root)}{size}"
    with _writing_to(config.workspace):
        source = open_root(root, config, labels, wanted)
        if config.limit is not None:
            wanted = first_of_task(source, wanted, labels, config.limit)
        folder.mkdir(parents=True, exist_ok=True)
        checked = _check_bins(source, wanted, folder / "checked.parquet")

    rejected = checked.loc[checked["reason"] != "", ["id", "file", "reason"]].reset_index(drop=True)
    usable = checked[checked["reason"] == ""].drop(columns=["file", "reason", "stamp"]).reset_index(drop=True)
    if usable.empty:
        first = rejected.iloc[0]
        raise StocktakeError(
            f"--root {root} holds nothing usable: all {len(rejected)} bins were set aside, "
            f"the first because of {first['file']}: {first['reason']}"
        )
    usable["quantity"] = usable["quantity"].astype("int64")
    if (decided := source.decided()) is None:
        _decide(usable, config.split)
    else:
        by_id = decided.set_index("id").reindex(usable["id"])
        usable["group"], usable["split"] = by_id["group"].to_numpy(), by_id["split"].to_numpy()

    bins = usable[usable["quantity"].isin(labels)].reset_index(drop=True)
    if bins.empty:
        raise StocktakeError(
            f"--task {config.task} matches no bin of {root}: its quantities are "
            f"{usable['quantity'].min()} to {usable['quantity'].max()}"
        )
    manifest = Manifest(
        bins=bins[["id", "quantity", "split", "width", "height", "bytes", "hash", "phash", "group", "items", "flags"]],
        rejected=rejected,
        outside=len(usable) - len(bins),
        labels=labels,
        source=source,
        fingerprint=_fingerprint(bins, labels),
        folder=folder,
    )
    with _writing_to(config.workspace):
        _write(manifest.bins, folder / "manifest.parquet")
        _write(manifest.rejected, folder / "set-aside.csv")
    return manifest


def _decide(usable: pd.DataFrame, config: SplitConfig) -> None:
    """Add the columns group and split."""
    hashes = np.array([int(text, 16) for text in usable["phash"]], dtype=np.uint64)
    usable["group"] = group_duplicates(usable["id"].tolist(), usable["items"].tolist(), hashes, config.twin_distance)
    keys = usable["group"] if config.by == "group" else usable["id"]
    split_of = {key: assign_split(key, config.fractions, config.seed) for key in keys.unique()}
    usable["split"] = keys.map(split_of)


@contextmanager
def _writing_to(workspace: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise StocktakeError(f"--workspace {workspace} cannot be written ({why}): give another folder") from None


def synthetic_root(config: BinsConfig) -> Path:
    """The synthetic root of these settings, made if it is not there yet."""
    from stocktake.data.synthetic import make_synthetic_root

    wanted = config.synthetic
    folder = Path(config.workspace) / f"synthetic-{wanted.count}-{wanted.size}px-seed{wanted.seed}"
    with _writing_to(config.workspace), progress("rendering synthetic bins", wanted.count) as advance:
        return make_synthetic_root(folder, wanted, progress=advance)


def _check_bins(source: Source, wanted: list[str] | None, memory: Path) -> pd.DataFrame:
    """A row a wanted bin, from memory where nothing changed since; remembers the rest."""
    present = source.ids()
    ids = present if wanted is None else sorted(set(wanted) & set(present))
    if wanted is not None and not ids:
        raise StocktakeError(f"--list names {len(wanted)} bins, and none of them is in {source.root}")
    stamps = {bin_id: f"v{CHECKS_VERSION} {source.stamp(bin_id)}" for bin_id in ids}
    known = _read_memory(memory)
    same = known[known["id"].map(stamps) == known["stamp"]]
    new = sorted(stamps.keys() - set(same["id"]))
    fresh: list[pd.DataFrame] = []
    with progress("checking bins", len(new)) as advance, ThreadPoolExecutor(_THREADS) as threads:
        for chunk in _chunks(new, _CHUNK):  # bounded: a chunk's photos at a time, not the root's
            rows = []
            for row in threads.map(lambda bin_id: _check_bin(source, bin_id), chunk):
                rows.append(row | {"stamp": stamps[str(row["id"])]})
                advance(1)
            fresh.append(pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS))
    checked = pd.concat([same, *fresh], ignore_index=True).sort_values("id", ignore_index=True) if fresh else same
    if fresh:
        elsewhere = known[~known["id"].isin(stamps)]
        del known, same, fresh
        table = pd.concat([elsewhere, checked]).sort_values("id", ignore_index=True) if len(elsewhere) else checked
        _write(table, memory)
    unknown = sorted(set(wanted or ()) - set(present))
    missing = pd.DataFrame({"id": unknown, "file": "", "reason": "named by --list, but not in the root"})
    absent = missing.reindex(columns=list(_COLUMNS)).fillna({"width": 0, "height": 0, "bytes": 0})
    return pd.concat([checked, absent.astype(_COLUMNS)], ignore_index=True) if unknown else checked


def _check_bin(source: Source, bin_id: str) -> dict[str, object]:
    """What is known of one bin, or why it is set aside."""
    import imagehash

    row: dict[str, object] = dict.fromkeys(_COLUMNS, "") | {"id": bin_id, "width": 0, "height": 0, "bytes": 0}
    row |= {"quantity": None, "items": (), "flags": ()}
    file = f"metadata/{bin_id}.json"
    try:
        record = parse_record(source.record(bin_id))
        row |= {"quantity": record.quantity, "items": _shared(record.items)}
        file = f"bin-images/{bin_id}.jpg"
        data = source.photo(bin_id)
        row["bytes"] = len(data)
        photo, unusual = examine(data)
    except FileNotFoundError:
        return row | {"file": file, "reason": "file is missing"}
    except (RecordError, PhotoError) as error:
        return row | {"file": file, "reason": str(error)}
    except OSError as error:
        return row | {"file": file, "reason": f"file cannot be read: {error.strerror}"}
    return row | {
        "width": photo.width,
        "height": photo.height,
        "hash": photo_key(data),
        "phash": str(imagehash.phash(photo)),
        "flags": _shared([*record.flags, *unusual]),
    }


def _read_memory(memory: Path) -> pd.DataFrame:
    """What earlier runs found; a damaged or older file is no memory."""
    empty = pd.DataFrame(columns=list(_COLUMNS)).astype(_COLUMNS)
    if not memory.exists():
        return empty
    try:
        known = pd.read_parquet(memory)[list(_COLUMNS)].astype(_COLUMNS)
        return known.assign(items=known["items"].map(_shared), flags=known["flags"].map(_shared))
    except (OSError, ValueError, KeyError, TypeError):
        return empty


def _shared(names: Iterable[str]) -> tuple[str, ...]:
    """One object for equal names: half a million bins hold their items and flags many times over."""
    return tuple(map(sys.intern, names))


def _fingerprint(bins: pd.DataFrame, labels: tuple[int, ...]) -> str:
    digest = hashlib.blake2b(repr(labels).encode(), digest_size=8)
    for row in bins[["id", "hash", "quantity", "split"]].itertuples(index=False):
        digest.update(f"{row.id} {row.hash} {row.quantity} {row.split}\n".encode())
    return digest.hexdigest()


def _write(table: pd.DataFrame, path: Path) -> None:
    """Beside, then renamed: a reader never sees half a table."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        if path.suffix == ".parquet":
            table.to_parquet(beside, index=False)
        else:
            table.to_csv(beside, index=False)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _chunks(values: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
