"""Which source a root is: a folder, a bucket's copy on this machine, or a published set, here or there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stocktake.config import BinsConfig
from stocktake.data.record import RecordError, parse_record
from stocktake.data.source import Source, in_order, open_source
from stocktake.data.task import parse_task
from stocktake.errors import StocktakeError

if TYPE_CHECKING:
    from stocktake.data.shards import ShardSource

_LARGEST_INDEX = 50_000_000


def open_root(root: str, config: BinsConfig, labels: Sequence[int], wanted: list[str] | None) -> Source:
    """The bins of a root; of a bucket, what the config wants is fetched first.

    Args:
        root: a folder or an address.
        config: its list, limit, workspace and S3 settings.
        labels: the quantities of the task.
        wanted: the ids of --list, sorted; None: all.

    Raises:
        StocktakeError: the root cannot be used.
    """
    if root.startswith("s3://"):
        return _open_bucket(root, config, labels, wanted)
    folder = Path(root)
    if "://" not in root and not (folder / "bin-images").is_dir():
        from stocktake.data.shards import open_folder, published_in

        if published_in(folder):
            return _with_task(open_folder(folder, Path(config.workspace)), labels)
    return open_source(root)


def _open_bucket(root: str, config: BinsConfig, labels: Sequence[int], wanted: list[str] | None) -> Source:
    from stocktake.data.ingest import Mirror, fetch_bins
    from stocktake.data.s3_source import PUBLIC, RefusedError, S3Address, UnreachableError
    from stocktake.data.shards import INDEX, open_prefix

    mirror = Mirror(S3Address.parse(root), config)
    is_plain = mirror.folder / "no-published-set"  # not asked again where only bins were found
    with mirror.lock:
        mirror.open()
        if mirror.address.bucket not in PUBLIC and (config.s3.refresh or not is_plain.exists()):
            try:
                index = mirror.bucket.get(INDEX, most=_LARGEST_INDEX)
            except (FileNotFoundError, RefusedError):  # a bucket that may not be listed answers 403 for none
                pass
            except UnreachableError as error:
                raise StocktakeError(f"--root {root} cannot be read: {error}") from None
            else:
                return _with_task(open_prefix(mirror, index.data), labels)
        bins = fetch_bins(mirror, config, labels, wanted)
        is_plain.touch()
        return bins


def _with_task(source: ShardSource, labels: Sequence[int]) -> ShardSource:
    if not set(labels) <= set(parse_task(source.index.task)):
        raise StocktakeError(
            f"--task {labels[0]}-{labels[-1]}: {source.root} was published with --task {source.index.task}, "
            "and holds no other bins"
        )
    return source


def first_of_task(source: Source, wanted: Sequence[str] | None, labels: Sequence[int], limit: int) -> list[str]:
    """The first ids whose records have a quantity of the task, sorted.

    Raises:
        StocktakeError: there is none.
    """
    present = set(source.ids())
    chosen: list[str] = []
    for bin_id in in_order(present if wanted is None else present & set(wanted)):
        try:
            if parse_record(source.record(bin_id)).quantity in labels:
                chosen.append(bin_id)
        except (OSError, RecordError):
            continue
        if len(chosen) == limit:
            break
    if not chosen:
        raise StocktakeError(f"--task {labels[0]}-{labels[-1]} matches no bin of {source.root}")
    return sorted(chosen)
