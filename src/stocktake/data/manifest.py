"""The manifest: the table of bins with their splits and checks, and what was rejected and why."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from filelock import FileLock

from stocktake.config.data import BinsConfig, SplitConfig
from stocktake.data.checks import PhotoStore, check_bins
from stocktake.data.ids_by_split import SplitMemory
from stocktake.data.photos import photo_cache
from stocktake.data.sources import Source, open_source, read_id_list, source_key
from stocktake.data.splits import (
    SPLITS,
    Conflicts,
    Split,
    assign_splits,
    check_fractions,
    group_bins,
    published_config,
)
from stocktake.data.task import parse_task
from stocktake.errors import StocktakeError
from stocktake.files import atomic_path

COLUMNS = ["id", "quantity", "split", "width", "height", "bytes", "hash", "phash", "group", "items", "flags"]


@dataclass(frozen=True)
class Manifest:
    """The bins of one task over one root."""

    bins: pd.DataFrame
    """A row a bin of the task, sorted by id: id, quantity, split, width, height (pixels, upright), bytes, hash (of
    the photo's bytes), phash (16 hex digits), group, items, flags (tuples)."""
    rejected: pd.DataFrame
    """A row a bin that cannot be used: id, file, reason."""
    out_of_range: int
    """Usable bins whose quantity is not of the task."""
    largest_group: int
    """Bins of the largest group, whatever their quantity."""
    labels: tuple[int, ...]
    """The quantities of the task, ascending."""
    source: Source
    split_config: SplitConfig
    """By which the splits were decided: the config's or, of a published set, the set's."""
    conflicts: Conflicts
    """Groups whose bins had different splits before."""
    fingerprint: str
    """Same ids, photos, quantities and splits: same fingerprint."""
    folder: Path
    """Where manifest.parquet and rejected.csv lie."""

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
        empty = [name for name in SPLITS if counts[name].sum() == 0]
        unseen = [label for label in self.labels if counts.loc[label, "train"] == 0]
        if unseen and "train" not in empty:
            raise StocktakeError(
                f"quantity {', '.join(map(str, unseen))} has no bin in the train split of {self.source.root}: "
                "add bins, narrow --task, or change --split.seed"
            )
        if empty:
            raise StocktakeError(
                f"the {empty[0]} split of {self.source.root} is empty ({len(self.bins)} bins in all): "
                "add bins, or change --split.fractions or --split.seed"
            )


def build_manifest(config: BinsConfig, photo_size: int | None = None) -> Manifest:
    """Check every photo and record, group the snapshots, assign splits; a second call looks at what changed only.

    With no root, the synthetic one is made first. All bins of the root (or of --list) are grouped before those of the
    task, and the first of --limit, are taken: a bin's split does not depend on either. The splits are remembered
    beside the manifest: a bin that has one keeps it.

    Args:
        config: which bins, and how they are split.
        photo_size: also leave photos of this side in pixels in the cache of `prepare_photos`, as they are decoded for
            their check.

    Raises:
        StocktakeError: root or list unusable, a task that matches nothing, an unwritable workspace, a damaged memory
            of the splits, or splits that a published set does not have.
    """
    labels = parse_task(config.task)
    check_fractions(config.split.fractions)
    if config.root == "":  # an unset variable of a script's must not end in training on rendered bins
        raise StocktakeError("--root is empty: give a folder, or leave the option out for a synthetic root")
    root = config.root or str(synthetic_root(config))
    listed = read_id_list(Path(config.list)) if config.list else None
    size = f"-short{config.s3.resize}" if config.s3.resize and root.startswith("s3://") else ""
    folder = Path(config.workspace) / "manifests" / f"{source_key(root)}{size}"
    photos = None
    if photo_size is not None and config.limit is None:
        photos = PhotoStore(photo_cache(Path(config.workspace), photo_size), labels)
    with _writing_to(config.workspace):
        source = open_source(root, config, labels, listed)
        folder.mkdir(parents=True, exist_ok=True)
        checked = check_bins(source, _present(source, listed), folder, photos)

    usable = checked[checked["reason"] == ""].drop(columns=["file", "reason"]).reset_index(drop=True)
    if usable.empty:
        first = checked.iloc[0]
        raise StocktakeError(
            f"--root {root} holds nothing usable: all {len(checked)} bins were rejected, "
            f"the first because of {first['file']}: {first['reason']}"
        )
    usable["quantity"] = usable["quantity"].astype("int64")
    usable, split_config, conflicts = _decide_splits(usable, config, source, folder)
    bins, rejected = usable[usable["quantity"].isin(labels)], checked.loc[checked["reason"] != ""]
    if bins.empty:
        raise StocktakeError(
            f"--task {config.task} matches no bin of {root}: its quantities are "
            f"{usable['quantity'].min()} to {usable['quantity'].max()}"
        )
    out_of_range = len(usable) - len(bins)
    if config.limit is not None:
        in_task = checked.loc[checked["quantity"].isin(labels), "id"]
        first_ids = set(sorted(in_task, key=lambda bin_id: f"{bin_id}.")[: config.limit])  # the order of a bucket
        bins, rejected = bins[bins["id"].isin(first_ids)], rejected[rejected["id"].isin(first_ids)]
    bins = bins[COLUMNS].reset_index(drop=True)
    manifest = Manifest(
        bins=bins,
        rejected=_with_unknown(rejected[["id", "file", "reason"]].reset_index(drop=True), source, listed),
        out_of_range=out_of_range,
        largest_group=int(usable["group"].value_counts().iloc[0]),
        labels=labels,
        source=source,
        split_config=split_config,
        conflicts=conflicts,
        fingerprint=_fingerprint(bins, labels),
        folder=folder,
    )
    with _writing_to(config.workspace):
        with atomic_path(folder / "manifest.parquet") as temporary:
            manifest.bins.to_parquet(temporary, index=False)
        with atomic_path(folder / "rejected.csv") as temporary:
            manifest.rejected.to_csv(temporary, index=False)
    return manifest


def _decide_splits(
    bins: pd.DataFrame, config: BinsConfig, source: Source, folder: Path
) -> tuple[pd.DataFrame, SplitConfig, Conflicts]:
    """The bins with the columns `group` and `split`, the settings that decided them, and the conflicts."""
    published = source.published_splits()
    if published is not None:
        split_config = published_config(config.split, published.config, source.root)
        return bins.merge(published.bins, on="id", how="left", validate="one_to_one"), split_config, Conflicts()
    bins = group_bins(bins, config.split)
    with _writing_to(config.workspace), FileLock(folder / "splits.lock"):
        memory = SplitMemory(folder, config.split)
        bins, conflicts = assign_splits(bins, config.split, memory.splits)
        memory.remember(bins)
    return bins, config.split, conflicts


def synthetic_root(config: BinsConfig) -> Path:
    """The synthetic root of these settings, made if it is not there yet."""
    from stocktake.data.synthetic.root import make_synthetic_root

    settings = config.synthetic
    folder = Path(config.workspace) / f"synthetic-{settings.count}-{settings.size}px-seed{settings.seed}"
    with _writing_to(config.workspace):
        return make_synthetic_root(folder, settings)


@contextmanager
def _writing_to(workspace: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise StocktakeError(f"--workspace {workspace} cannot be written ({why}): give another folder") from None


def _present(source: Source, listed: list[str] | None) -> list[str]:
    """The ids to check; raises StocktakeError when no listed one is in the root."""
    ids = source.ids()
    if listed is None:
        return ids
    present = sorted(set(listed) & set(ids))
    if not present:
        raise StocktakeError(f"--list names {len(listed)} bins, and none of them is in {source.root}")
    return present


def _with_unknown(rejected: pd.DataFrame, source: Source, listed: list[str] | None) -> pd.DataFrame:
    """The rejected bins, and those that the list names but the root does not hold."""
    unknown = sorted(set(listed or ()) - set(source.ids()))
    reason = "named by --list, but not in the root"
    return pd.concat([rejected, pd.DataFrame({"id": unknown, "file": "", "reason": reason})], ignore_index=True)


def _fingerprint(bins: pd.DataFrame, labels: tuple[int, ...]) -> str:
    digest = hashlib.blake2b(repr(labels).encode(), digest_size=8)
    for row in bins[["id", "hash", "quantity", "split"]].itertuples(index=False):
        digest.update(f"{row.id} {row.hash} {row.quantity} {row.split}\n".encode())
    return digest.hexdigest()
