"""The data that the stages of one ladder share: a manifest and its prepared photos."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from stocktake import distributed
from stocktake.config.runs import ImageConfig
from stocktake.data.array_cache import ArrayCache
from stocktake.data.manifest import Manifest, build_manifest
from stocktake.data.photos import prepare_photos
from stocktake.errors import StocktakeError


@dataclass(frozen=True)
class PreparedData:
    """What the stages of one ladder share."""

    manifest: Manifest
    photos: ArrayCache
    """Every photo of the manifest, at the config's size."""


def prepare_data(config: ImageConfig) -> PreparedData:
    """The manifest and its prepared photos; tells what the bins are.

    Raises:
        StocktakeError: bins, task or workspace cannot be used, or a quantity has no bin to learn from.
    """
    with distributed.local_rank_zero_first():
        manifest = build_manifest(config, photo_size=config.image_size)
        manifest.require_train_classes()
        if distributed.is_rank_zero() and distributed.LAUNCHER not in os.environ:  # which has printed it
            _tell(manifest, config.task)
        photos = prepare_photos(manifest.source, manifest.bins, config.image_size, Path(config.workspace))
    fingerprints = distributed.gather(manifest.fingerprint)
    if len(set(fingerprints)) > 1:
        other = next(rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0])
        raise StocktakeError(
            f"--root {config.root} holds other bins for rank {other} (fingerprint {fingerprints[other]}) than for "
            f"rank 0 ({fingerprints[0]}): give every machine the same bins, --task, --list and --split, and the splits "
            "of one run with --split.like"
        )
    return PreparedData(manifest, photos)


def _tell(manifest: Manifest, task: str) -> None:
    counts = manifest.counts().sum()
    rejected = f", {len(manifest.rejected)} rejected" if len(manifest.rejected) else ""
    print(
        f"{len(manifest.bins)} bins of task {task} in {manifest.source.root}: "
        f"{counts['train']} train, {counts['val']} val, {counts['test']} test{rejected} "
        f"(data fingerprint {manifest.fingerprint})",
        flush=True,
    )
    if manifest.conflicts.groups:
        print(f"warning: {manifest.conflicts}", flush=True)
    bare = [f"{split} {label}" for split, label, n in manifest.counted() if n == 0]
    if bare:
        print(f"warning: no bin in {', '.join(bare)}; such a class counts 0 in macro-F1", flush=True)
