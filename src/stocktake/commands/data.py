"""`stocktake data`: check every photo and record, group the looks, assign splits, write the manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from stocktake.config import DataConfig
from stocktake.data.manifest import Manifest, build_manifest
from stocktake.data.s3_source import S3Address
from stocktake.data.splits import SPLITS
from stocktake.errors import StocktakeError
from stocktake.progress import progress

_SHOWN = 10


def data(config: DataConfig) -> dict[str, float]:
    """Build the manifest and tell what is in it.

    Returns:
        Counts: bins, rejected, outside, and one a split.
    """
    if config.plan:
        return _tell_plan(config)
    if config.publish is not None:
        S3Address.parse(config.publish, "--publish")  # a wrong one is told before the work
    manifest = build_manifest(config)
    counts = manifest.counts()
    table = counts.assign(all=counts.sum(axis=1))
    table.loc["all"] = table.sum()
    print(f"bins of task {config.task} in {manifest.source.root}, by quantity and split ({config.split.by}):\n")
    print(table.rename_axis(columns=None).to_string())
    groups = manifest.bins["group"].nunique()
    seen_again = manifest.bins["group"].duplicated(keep=False).mean()
    print(f"\n{groups} groups of looks; {seen_again:.0%} of the bins are seen again")
    print(f"{manifest.outside} bins have another quantity and are left out")
    for split, label, n in manifest.counted():
        if n == 0:
            print(f"warning: no bin with quantity {label} in {split}")
    flagged = manifest.bins["flags"].explode().value_counts()
    if len(flagged):
        print("flags: " + ", ".join(f"{name!s} {n}" for name, n in flagged.items()))
    if len(manifest.rejected):
        print(f"{len(manifest.rejected)} bins set aside, listed in {manifest.folder / 'set-aside.csv'}:")
        shown = manifest.rejected.head(_SHOWN)
        for bin_id, file, reason in zip(shown["id"], shown["file"], shown["reason"], strict=True):
            print(f"  {file or bin_id}: {reason}")
        if len(manifest.rejected) > _SHOWN:
            print(f"  ... and {len(manifest.rejected) - _SHOWN} more")
    if manifest.source.decided() is not None:
        print("splits are the publisher's, whatever --split says")
    print(f"manifest: {manifest.folder / 'manifest.parquet'} (data fingerprint {manifest.fingerprint})")
    if config.export:
        export_image_folder(manifest, Path(config.export))
        print(f"ImageFolder tree: {config.export}")
    if config.publish is not None:
        _publish(manifest, config, config.publish)
    return {
        "bins": float(len(manifest.bins)),
        "rejected": float(len(manifest.rejected)),
        "outside": float(manifest.outside),
        **{str(split): float(n) for split, n in counts.sum().items()},
    }


def _publish(manifest: Manifest, config: DataConfig, address: str) -> None:
    from stocktake.data.s3_source import Bucket
    from stocktake.data.shards import publish

    place = S3Address.parse(address, "--publish")
    if str(place) == manifest.source.root:
        raise StocktakeError(f"--publish {address} is the root itself: give another prefix")
    index, sent = publish(manifest, Bucket(place, config.s3, "--publish"), config)
    size = sum(shard.bytes for shard in index.shards) / 1e6
    print(f"published: {address}, {len(index.shards)} shards ({size:.1f} MB), of which {sent} had to be sent")


def _tell_plan(config: DataConfig) -> dict[str, float]:
    from stocktake.data.ingest_plan import PRICES_OF, make_plan

    plan = make_plan(config)
    payer = "paid by the bucket's owner" if plan.is_free else f"at the list prices of {PRICES_OF}"
    print(f"all of {config.root}{f' that {config.list} names' if config.list else ''}:")
    print(
        f"  {plan.objects} objects, {plan.bins} bins, {plan.bytes / 1e9:.2f} GB; {plan.disk_bytes / 1e9:.2f} GB on disk"
    )
    measured = f", at {plan.rate:.0f} objects a second as just measured" if plan.rate else ""
    print(f"  {plan.hours:.2f} hours for the {plan.absent} bins that are not here yet{measured}")
    print(f"  ${plan.requests_dollars:.2f} for requests, ${plan.egress_dollars:.2f} out to the internet, {payer}")
    held, building = plan.manifest_bytes / 1e6, plan.building_bytes / 1e6
    print(f"  {held:.0f} MB of memory for the manifest, {building:.0f} MB while it is built")
    return {
        "objects": float(plan.objects),
        "bytes": plan.bytes,
        "hours": plan.hours,
        "dollars": plan.requests_dollars + plan.egress_dollars,
        "manifest_mb": plan.manifest_bytes / 1e6,
    }


def export_image_folder(manifest: Manifest, folder: Path) -> None:
    """Write `train/1/<id>.jpg`, ... as hard links where the root is on the same disk, else as copies.

    Photos of an earlier export that are no longer in their place are removed; other files are not touched.

    Raises:
        StocktakeError: the folder cannot be written, or holds something else.
    """
    columns = (manifest.bins[name].astype(str) for name in ("split", "quantity", "id"))
    wanted = {
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
                _remove_others(old, wanted.keys())
        for parent in {path.parent for path in wanted}:
            parent.mkdir(parents=True, exist_ok=True)
        with progress("exporting", len(wanted)) as advance:
            for path, bin_id in wanted.items():
                _place(manifest.source.folder / "bin-images" / f"{bin_id}.jpg", path)
                advance(1)
    except OSError as error:
        raise StocktakeError(f"--export {folder} cannot be written: {error.strerror} ({error.filename})") from None


def _remove_others(folder: Path, wanted: Collection[Path]) -> None:
    """Remove an earlier export's photos of a class, and a class that is left empty: ImageFolder wants none."""
    for old in [*folder.glob("*.jpg"), *folder.glob("*.part")]:
        if old not in wanted:
            old.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _place(original: Path, path: Path) -> None:
    if path.exists() and path.samefile(original):
        return
    beside = path.with_suffix(".part")
    beside.unlink(missing_ok=True)
    try:
        os.link(original.resolve(), beside)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(original, beside)
    beside.replace(path)
