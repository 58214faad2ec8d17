"""A published set: checked bins with their splits, as webdataset tar shards and one parquet index.

    index.parquet            a row a bin: the manifest's columns, and `shard` and `shard_sha256`
    train-000000.tar ...     <id>.jpg and <id>.json, by id

The same bins give the same shards, byte for byte. The index is written last: a set with an index is complete. A
set is untrusted input: names, ids, sizes and checksums are verified before anything is written, and none of its text
becomes a path before it is checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from filelock import FileLock
from tqdm import tqdm

from stocktake.config.data import SplitConfig
from stocktake.config.parser import read_settings
from stocktake.data.images import LARGEST_FILE
from stocktake.data.record import LARGEST_RECORD
from stocktake.data.s3_client import Bucket
from stocktake.data.sources import ID, PublishedSplits, Source, source_key
from stocktake.data.splits import SPLITS
from stocktake.data.task import parse_task
from stocktake.errors import StocktakeError
from stocktake.files import atomic_write

if TYPE_CHECKING:
    from stocktake.config.data import DataConfig
    from stocktake.data.manifest import Manifest

INDEX = "index.parquet"
LARGEST_INDEX = 500_000_000
_LARGEST_INDEX_IN_MEMORY = 4_000_000_000
_LARGEST_SHARD = 1_100_000_000
_FORMAT = 2
_METADATA = b"stocktake"
_PATTERNS = {
    "id": ID,
    "group": ID,
    "split": re.compile("train|val|test"),
    "shard": re.compile(r"(train|val|test)-\d{6}\.tar"),
    "shard_sha256": re.compile("[0-9a-f]{64}"),
}
"""What a column of the index may hold."""
_BYTES_PER_MB = 1_000_000
_AT_A_TIME = 2
"""Shards that are sent or fetched at a time."""
_TAR_OVERHEAD = 2 * 1024
"""Bytes that a tar adds to a bin's two files, at most."""


class PublishedSource(Source):
    """The unpacked bins of a published set, with the publisher's splits."""

    def __init__(self, folder: Path, root: str, index: pd.DataFrame, split: SplitConfig) -> None:
        super().__init__(folder, root)
        self._index = index
        self._split = split

    def ids(self) -> list[str]:
        """Every published id, sorted."""
        return [str(bin_id) for bin_id in self._index["id"]]

    def published_splits(self) -> PublishedSplits:
        """Groups and splits as published."""
        return PublishedSplits(self._index[["id", "group", "split"]], self._split)


# Publishing -----------------------------------------------------------------------------------------------------------


def publish(manifest: Manifest, bucket: Bucket, config: DataConfig) -> tuple[int, int, int]:
    """Upload the bins of a manifest; shards that are in the bucket already are not sent again.

    Returns:
        How many shards there are, their bytes, and how many of them had to be sent.

    Raises:
        StocktakeError: the bucket cannot be written.
    """
    shards: list[tuple[str, pd.DataFrame]] = []
    for split in SPLITS:
        rows = manifest.split(split)
        parts = cut((rows["bytes"] + _TAR_OVERHEAD).tolist(), config.shard_mb * _BYTES_PER_MB)
        shards += [(f"{split}-{number:06d}.tar", rows.iloc[list(part)]) for number, part in enumerate(parts)]

    def upload(shard: tuple[str, pd.DataFrame]) -> tuple[pd.DataFrame, int, bool]:
        name, rows = shard
        try:
            data = pack(manifest.source, rows["id"])
        except OSError as error:
            raise StocktakeError(f"{manifest.source.root} cannot be read: {error}") from None
        is_new = not bucket.holds(name, data)
        if is_new:
            bucket.put(name, data)
        return rows.assign(shard=name, shard_sha256=hashlib.sha256(data).hexdigest()), len(data), is_new

    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        uploads = threads.map(upload, shards)
        uploaded = list(tqdm(uploads, desc="publishing shards", total=len(shards), disable=None))
    index = pd.concat([rows for rows, _, _ in uploaded]).sort_values("id", ignore_index=True)
    about = {
        "format": _FORMAT,
        "task": config.task,
        "fingerprint": manifest.fingerprint,
        "source": manifest.source.root,
        "split": vars(dataclasses.replace(manifest.split_config, like=None)),  # a file or run of the publisher's
    }
    bucket.put(INDEX, _to_parquet(index, about))
    return len(shards), sum(size for _, size, _ in uploaded), sum(is_new for _, _, is_new in uploaded)


def cut(sizes: Sequence[int], limit: int) -> list[range]:
    """Rows of each shard: in order, together at most so many bytes, though always one row at least."""
    shards: list[range] = []
    begin = total = 0
    for row, size in enumerate(sizes):
        if row > begin and total + size > limit:
            shards.append(range(begin, row))
            begin, total = row, 0
        total += size
    return [*shards, range(begin, len(sizes))] if sizes else []


def pack(source: Source, ids: Iterable[str]) -> bytes:
    """A tar of photos and records in this order, without times and owners."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for bin_id in ids:
            for suffix, data in (("jpg", source.photo(bin_id)), ("json", source.record(bin_id))):
                member = tarfile.TarInfo(f"{bin_id}.{suffix}")
                member.size, member.mode = len(data), 0o444
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _to_parquet(table: pd.DataFrame, about: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = pa.Table.from_pandas(table, preserve_index=False)
    file = io.BytesIO()
    pq.write_table(columns.replace_schema_metadata({_METADATA: json.dumps(about, sort_keys=True)}), file)
    return file.getvalue()


# Reading --------------------------------------------------------------------------------------------------------------


def is_published(folder: Path) -> bool:
    """Whether the folder is a published set, and not a folder of photos."""
    try:
        return (folder / INDEX).is_file() and not (folder / "bin-images").is_dir()
    except OSError:  # a name that no folder can have
        return False


def open_published_folder(folder: Path, workspace: Path, labels: Sequence[int]) -> PublishedSource:
    """The published set in a folder, unpacked once into the workspace.

    Raises:
        StocktakeError: it is not as published, or does not hold the quantities of the task.
    """

    def read(name: str, limit: int) -> bytes:
        path = folder / name
        if not path.is_file() or path.stat().st_size > limit:
            raise StocktakeError(f"--root {folder}: {name} of the published set is missing, or larger than any")
        return path.read_bytes()

    target = workspace / "mirrors" / source_key(str(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        return _open(read(INDEX, LARGEST_INDEX), str(folder), target, labels, read)


def open_published_prefix(bucket: Bucket, index: bytes, folder: Path, labels: Sequence[int]) -> PublishedSource:
    """The set published at a bucket's address, downloaded and unpacked once into a folder; the caller holds its lock.

    Raises:
        StocktakeError: as `open_published_folder`, or the bucket cannot be read.
    """
    root = str(bucket.address)

    def read(name: str, limit: int) -> bytes:
        try:
            fetched = bucket.get(name, limit=limit)
        except FileNotFoundError:
            fetched = None
        if fetched is None:
            raise StocktakeError(f"--root {root}: {name} of the published set is missing: publish it again")
        return fetched[0]

    return _open(index, root, folder, labels, read)


def _open(
    index_data: bytes, root: str, folder: Path, labels: Sequence[int], read: Callable[[str, int], bytes]
) -> PublishedSource:
    """Unpack the shards that are not unpacked yet.

    Args:
        index_data: content of the index.
        root: the set's folder or address, as a user would write it.
        folder: unpacked below it, in a folder named after the index's content.
        labels: of the task.
        read: the content of a shard by its name, refused when it is larger than a limit in bytes.
    """
    index, task, split = read_index(index_data, root)
    if not set(labels) <= set(parse_task(task)):
        raise StocktakeError(
            f"--task {labels[0]}-{labels[-1]}: {root} was published with --task {task}, and holds no other bins"
        )
    target = folder / f"published-{hashlib.sha256(index_data).hexdigest()[:16]}"
    for part in ("bin-images", "metadata", "unpacked"):
        (target / part).mkdir(parents=True, exist_ok=True)

    def unpack_shard(name: str, sha256: str) -> None:
        data = read(name, _LARGEST_SHARD)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StocktakeError(f"--root {root}: {name} is not as it was published: publish or copy it again")
        try:
            unpack(data, target, set(index.loc[index["shard"] == name, "id"]))
        except (StocktakeError, tarfile.TarError) as error:
            raise StocktakeError(f"--root {root}: {name} {error}") from None
        (target / "unpacked" / name).touch()

    shards = index[["shard", "shard_sha256"]].drop_duplicates()
    shards = shards[[not (target / "unpacked" / name).exists() for name in shards["shard"]]]
    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        unpacked = threads.map(unpack_shard, shards["shard"], shards["shard_sha256"])
        list(tqdm(unpacked, desc="unpacking shards", total=len(shards), disable=None))
    return PublishedSource(target, root, index, split)


def read_index(data: bytes, root: str) -> tuple[pd.DataFrame, str, SplitConfig]:
    """The rows of a published set's index (id, group, split, shard, shard_sha256; sorted by id), its task, its splits.

    Raises:
        StocktakeError: it is no such index, or a name in it is not as `publish` writes it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refused(reason: str) -> StocktakeError:
        return StocktakeError(f"--root {root}: {INDEX} {reason}")

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > _LARGEST_INDEX_IN_MEMORY:
            raise refused("is larger than any index")
        about = json.loads(file.schema_arrow.metadata[_METADATA])
        if about["format"] != _FORMAT:
            raise refused(f"has format {about['format']!r}: publish the set again")
        index, task = file.read(list(_PATTERNS)).to_pandas(), str(about["task"])
        split = read_settings(SplitConfig, about["split"], f"--root {root}: {INDEX}")
        for column, pattern in _PATTERNS.items():
            for value in index[column].unique():
                if not isinstance(value, str) or not pattern.fullmatch(value):
                    raise refused(f"holds {value!r}, which is no {column}")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise refused(f"is no index of a published set ({str(error).splitlines()[0][:200]})") from None
    if index.empty or index["id"].duplicated().any():
        raise refused("holds no bin, or a bin twice")
    if (index["shard"].str.partition("-")[0] != index["split"]).any():
        raise refused("holds a bin in a shard of another split")
    if index.groupby("shard")["shard_sha256"].nunique().gt(1).any():
        raise refused("has two checksums for one shard")
    try:
        parse_task(task)
    except StocktakeError as error:
        raise refused(f"is of no task: {error}") from None
    return index.sort_values("id", ignore_index=True), task, split


def unpack(shard: bytes, folder: Path, ids: Iterable[str]) -> None:
    """Write the photos and records of an uncompressed tar to bin-images/ and metadata/.

    Raises:
        TarError: it is no such tar.
        StocktakeError: it holds anything but one regular file of a bounded size as <id>.jpg and one as <id>.json for
            each of the ids.
    """
    targets = {f"{bin_id}.jpg": (folder / "bin-images", LARGEST_FILE) for bin_id in ids}
    targets |= {f"{bin_id}.json": (folder / "metadata", LARGEST_RECORD) for bin_id in ids}
    with tarfile.open(fileobj=io.BytesIO(shard), mode="r:") as tar:
        for member in tar:
            target, limit = targets.pop(member.name, (None, 0))
            content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
            if target is None or content is None or member.size > limit:
                raise StocktakeError(f"holds {member.name!r}, which is no photo or record of its bins")
            atomic_write(target / member.name, content.read())
    if targets:
        raise StocktakeError(f"lacks {min(targets)}: publish the set again")
