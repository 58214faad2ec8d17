"""`stocktake data`: check every photo and record, group the snapshots, assign splits, write the manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from tqdm import tqdm

from stocktake.config.data import DataConfig
from stocktake.data.manifest import Manifest, build_manifest
from stocktake.data.publish import publish
from stocktake.data.s3_client import Bucket, S3Address
from stocktake.data.splits import SPLITS
from stocktake.errors import StocktakeError
from stocktake.files import atomic_path
from stocktake.tables import show_table

_SHOWN = 10


def data(config: DataConfig) -> dict[str, float]:
    """Build the manifest and print what is in it.

    Returns:
        Counts: bins, rejected, out_of_range, largest_group, conflicts (groups), and one a split.
    """
    publish_to = S3Address.parse(config.publish, "--publish") if config.publish is not None else None
    manifest = build_manifest(config)
    if publish_to is not None and str(publish_to) == manifest.source.root:
        raise StocktakeError(f"--publish {config.publish} is the root itself: give another prefix")
    _print_summary(manifest, config)
    if config.export:
        export_image_folder(manifest, Path(config.export))
        print(f"ImageFolder tree: {config.export}")
    if publish_to is not None:
        bucket = Bucket(publish_to, config.s3, "--publish")
        shards, size, sent = publish(manifest, bucket, config)
        print(f"published: {config.publish}, {shards} shards ({size / 1e6:.1f} MB), of which {sent} had to be sent")
    return {
        "bins": float(len(manifest.bins)),
        "rejected": float(len(manifest.rejected)),
        "out_of_range": float(manifest.out_of_range),
        "largest_group": float(manifest.largest_group),
        "conflicts": float(manifest.conflicts.groups),
        **{str(split): float(n) for split, n in manifest.counts().sum().items()},
    }


def _print_summary(manifest: Manifest, config: DataConfig) -> None:
    counts = manifest.counts()
    table = counts.assign(all=counts.sum(axis=1))
    table.loc["all"] = table.sum()
    print(
        f"bins of task {config.task} in {manifest.source.root}, by quantity and split ({manifest.split_config.by}):\n"
    )
    rows = [
        {"quantity": str(label), **dict(zip(map(str, table), row.tolist(), strict=True))}
        for label, row in table.iterrows()
    ]
    show_table(rows)
    snapshots = manifest.bins["group"].duplicated(keep=False).mean()
    print(
        f"\n{manifest.bins['group'].nunique()} groups of snapshots; {snapshots:.0%} of the bins are seen again; "
        f"the largest group has {manifest.largest_group} bins of any quantity"
    )
    print(f"{manifest.out_of_range} bins have another quantity and are left out")
    for split, label, n in manifest.counted():
        if n == 0:
            print(f"warning: no bin with quantity {label} in {split}")
    flags = manifest.bins["flags"].explode().value_counts()
    if len(flags):
        print("flags: " + ", ".join(f"{name!s} {n}" for name, n in flags.items()))
    if len(manifest.rejected):
        print(f"{len(manifest.rejected)} bins rejected, listed in {manifest.folder / 'rejected.csv'}:")
        first = manifest.rejected.head(_SHOWN)
        for bin_id, file, reason in zip(first["id"], first["file"], first["reason"], strict=True):
            print(f"  {file or bin_id}: {reason}")
        if len(manifest.rejected) > _SHOWN:
            print(f"  ... and {len(manifest.rejected) - _SHOWN} more")
    if manifest.source.published_splits() is not None:
        print("splits are the publisher's")
    if manifest.conflicts.groups:
        print(f"warning: {manifest.conflicts}")
    print(f"manifest: {manifest.folder / 'manifest.parquet'} (data fingerprint {manifest.fingerprint})")


def export_image_folder(manifest: Manifest, folder: Path) -> None:
    """Write `train/1/<id>.jpg`, ... as hard links where the root is on the same disk, else as copies.

    Photos of an earlier export that are no longer in their place are removed; other files are not touched.

    Raises:
        StocktakeError: the folder cannot be written, or holds something else.
    """
    columns = (manifest.bins[name].astype(str) for name in ("split", "quantity", "id"))
    paths = {
        folder / split / quantity / f"{bin_id}.jpg": bin_id for split, quantity, bin_id in zip(*columns, strict=True)
    }
    marker = folder / ".stocktake-export"
    try:
        if folder.exists() and any(folder.iterdir()) and not marker.exists():
            raise StocktakeError(f"--export {folder} holds other files: give an empty or a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
        for split in SPLITS:
            for old in folder.glob(f"{split}/[0-9]*"):
                _remove_others(old, paths.keys())
        for parent in {path.parent for path in paths}:
            parent.mkdir(parents=True, exist_ok=True)
        for path, bin_id in tqdm(paths.items(), desc="exporting", disable=None):
            _place(manifest.source.folder / "bin-images" / f"{bin_id}.jpg", path)
    except OSError as error:
        raise StocktakeError(f"--export {folder} cannot be written: {error.strerror} ({error.filename})") from None


def _remove_others(folder: Path, kept: Collection[Path]) -> None:
    """Remove an earlier export's photos of a class, and a class that is left empty: ImageFolder wants none."""
    for old in [*folder.glob("*.jpg"), *folder.glob(".*.jpg")]:
        if old not in kept:
            old.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _place(original: Path, path: Path) -> None:
    if path.exists() and path.samefile(original):
        return
    with atomic_path(path) as temporary:
        try:
            os.link(original.resolve(), temporary)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(original, temporary)
