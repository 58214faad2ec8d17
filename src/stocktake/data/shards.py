"""A prepared set as training jobs read it: per split a channel of tar shards, and what its publisher decided.

    index.json  manifest.parquet                    the whole set
    train/index.json  train/manifest.parquet        the same index, and the channel's part of the manifest
    train/train-000000.tar ...                      <id>.jpg and <id>.json, by id (webdataset's layout)

The same bins give the same shards, byte for byte.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pandas as pd

from stocktake.data.ingest import Mirror
from stocktake.data.s3_source import Bucket, RefusedError, UnreachableError
from stocktake.data.source import ID, FolderSource, Source, source_key
from stocktake.data.splits import SPLITS, Split
from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.progress import progress

if TYPE_CHECKING:
    from stocktake.config import DataConfig
    from stocktake.data.manifest import Manifest

INDEX, MANIFEST = "index.json", "manifest.parquet"
_FORMAT = 1
_BYTES_PER_MB = 1_000_000
_LARGEST_SHARD = 4_000_000_000
_AT_A_TIME = 2
"""Shards in memory at a time."""
_TAR_OVERHEAD = 2 * 1024
"""Bytes that a tar adds to a bin's two files, at most."""


@dataclass(frozen=True)
class Shard:
    """One tar of a channel."""

    split: Split
    name: str
    """Below the published set: train/train-000000.tar."""
    bins: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What is in a published set."""

    format: int
    task: str
    fingerprint: str
    """Of the data: a run over the published set has the one of a run over the original."""
    source: str
    split: dict[str, object]
    """The settings that the splits were decided by."""
    counts: dict[str, dict[str, int]]
    """Bins by split and quantity."""
    shards: tuple[Shard, ...]
    manifests: dict[str, str]
    """SHA-256 of each part of the manifest, by its channel; "" is the whole."""

    def to_bytes(self) -> bytes:
        """JSON, the same for the same set."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes, place: str) -> Index:
        """Raises StocktakeError when it is no index of a published set."""
        try:
            content = json.loads(data)
            if content["format"] != _FORMAT:
                raise StocktakeError(f"--root {place}: {INDEX} has format {content['format']}: publish the set again")
            shards = tuple(Shard(**one) for one in content.pop("shards"))
            index = cls(**content, shards=shards)
            names = {f"{one.split}/{one.split}-" for one in shards}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StocktakeError(f"--root {place}: {INDEX} is none of a published set ({error!r})") from None
        if strange := names - {f"{split}/{split}-" for split in SPLITS}:
            raise StocktakeError(f"--root {place}: {INDEX} names a shard {min(strange)!r}, which is of no split")
        return index


class ShardSource(FolderSource):
    """The unpacked bins of a published set, and what its publisher decided."""

    def __init__(self, folder: Path, root: str, table: pd.DataFrame, index: Index) -> None:
        super().__init__(folder, root)
        self._table = table
        self.index = index

    def ids(self) -> list[str]:
        """Every published id, sorted."""
        return [str(bin_id) for bin_id in self._table["id"]]

    def decided(self) -> pd.DataFrame:
        """id, group and split as published."""
        return self._table


def cut(sizes: Sequence[int], most: int) -> list[range]:
    """Rows of each shard: in order, together at most so many bytes, though always one row at least."""
    shards: list[range] = []
    begin = total = 0
    for row, size in enumerate(sizes):
        if row > begin and total + size > most:
            shards.append(range(begin, row))
            begin, total = row, 0
        total += size
    return [*shards, range(begin, len(sizes))] if sizes else []


def _require_webdataset(option: str) -> None:
    if importlib.util.find_spec("webdataset") is None:
        raise StocktakeError(f"{option} needs webdataset: pip install 'stocktake[aws]'")


def pack(source: Source, ids: Iterable[str]) -> bytes:
    """A tar of photos and records in this order; nothing in it tells when or by whom it was made."""
    from webdataset import TarWriter

    file = io.BytesIO()
    with TarWriter(file, encoder=False, mtime=0, user="stocktake", group="stocktake", mode=0o444) as tar:
        for bin_id in ids:
            tar.write({"__key__": bin_id, "jpg": source.photo(bin_id), "json": source.record(bin_id)})
    return file.getvalue()


def unpack(tar: IO[bytes], folder: Path) -> int:
    """Write the photos and records of a shard to bin-images/ and metadata/; how many bins there were."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    count = 0
    for sample in group_by_keys(tar_file_expander([{"url": "shard", "stream": tar}])):
        bin_id = str(sample["__key__"])
        if not ID.fullmatch(bin_id):
            raise StocktakeError(f"a shard holds {bin_id!r}, which is no id of a bin")
        for part, suffix in (("metadata", "json"), ("bin-images", "jpg")):
            beside = folder / part / f".{bin_id}.part"
            beside.write_bytes(sample[suffix])
            beside.replace(folder / part / f"{bin_id}.{suffix}")
        count += 1
    return count


# Publishing -----------------------------------------------------------------------------------------------------------


def publish(manifest: Manifest, bucket: Bucket, config: DataConfig) -> tuple[Index, int]:
    """Upload the bins of a manifest; the index, and how many of its shards had to be sent.

    The index goes last: who finds one finds the whole set. What the bucket holds already is not sent again.

    Raises:
        StocktakeError: the bucket cannot be written.
    """
    _require_webdataset(f"--publish {bucket.address}")
    most = config.shard_mb * _BYTES_PER_MB
    plans: list[tuple[Split, str, list[str]]] = []
    for split in SPLITS:
        rows = manifest.split(split)
        sizes = [size + _TAR_OVERHEAD for size in rows["bytes"].tolist()]
        for number, part in enumerate(cut(sizes, most)):
            plans.append((split, f"{split}/{split}-{number:06d}.tar", rows["id"].iloc[list(part)].tolist()))
    sent = 0

    def upload(plan: tuple[Split, str, list[str]]) -> tuple[Shard, bool]:
        split, name, ids = plan
        data = pack(manifest.source, ids)
        is_new = not bucket.holds(name, data)
        if is_new:
            bucket.put(name, data)
        return Shard(split, name, len(ids), len(data), hashlib.sha256(data).hexdigest()), is_new

    shards: list[Shard] = []
    try:
        with progress("publishing shards", len(plans)) as advance, ThreadPoolExecutor(_AT_A_TIME) as threads:
            for shard, is_new in threads.map(upload, plans):
                shards.append(shard)
                sent += is_new
                advance(1)
        parts = {"": _parquet(manifest.bins)} | {split: _parquet(manifest.split(split)) for split in SPLITS}
        counts = manifest.counts()
        index = Index(
            format=_FORMAT,
            task=config.task,
            fingerprint=manifest.fingerprint,
            source=manifest.source.root,
            split=asdict(config.split) | {"fractions": list(config.split.fractions)},
            counts={split: {str(label): int(n) for label, n in counts[split].items()} for split in SPLITS},
            shards=tuple(shards),
            manifests={channel: hashlib.sha256(table).hexdigest() for channel, table in parts.items()},
        )
        for channel, table in reversed(parts.items()):
            for name, data in ((MANIFEST, table), (INDEX, index.to_bytes())):
                key = f"{channel}/{name}".lstrip("/")
                if not bucket.holds(key, data):
                    bucket.put(key, data)
    except RefusedError as error:
        raise StocktakeError(f"--publish {bucket.address} cannot be written: {error}") from None
    except UnreachableError as error:
        raise StocktakeError(
            f"--publish {bucket.address} cannot be written: {error}; the same command goes on from here"
        ) from None
    except OSError as error:
        raise StocktakeError(f"{manifest.source.root} cannot be read: {error.strerror} ({error.filename})") from None
    return index, sent


def _parquet(table: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    table.to_parquet(file, index=False)
    return file.getvalue()


# Reading --------------------------------------------------------------------------------------------------------------


def published_in(folder: Path) -> list[Path]:
    """The indexes of a published set in a folder: its own, or those of channels as a training job finds them."""
    places = [folder, *(folder / split for split in SPLITS)]
    if (folder / "bin-images").is_dir() or (folder / "metadata").is_dir():
        return []
    return [place / INDEX for place in places if (place / INDEX).is_file()]


def open_folder(folder: Path, workspace: Path) -> ShardSource:
    """The set whose channels lie in a folder, unpacked once into the workspace.

    Raises:
        StocktakeError: channels of different sets, or a shard that is not as published.
    """
    indexes = [Index.parse(path.read_bytes(), str(folder)) for path in published_in(folder)]
    index = indexes[0]
    if any(other != index for other in indexes):
        raise StocktakeError(f"--root {folder}: its channels are of different published sets: give those of one")

    def read(name: str) -> bytes:
        return (folder / name).read_bytes()

    channels = [split for split in SPLITS if (folder / split).is_dir()]
    shards = [one for one in index.shards if one.split in channels]
    into = workspace / "mirrors" / f"{source_key(str(folder))}-{index.fingerprint}"
    with FileLock(into / "lock"):
        return _unpack_all(into, str(folder), index, shards, channels, read, at_a_time=1)


def open_prefix(mirror: Mirror, index_data: bytes) -> ShardSource:
    """The set published at a mirror's address, fetched and unpacked once. Under the mirror's lock."""
    place = str(mirror.address)
    index = Index.parse(index_data, place)

    def read(name: str) -> bytes:
        return mirror.bucket.get(name, most=_LARGEST_SHARD).data

    into = mirror.folder / index.fingerprint
    try:
        return _unpack_all(into, place, index, index.shards, [""], read, at_a_time=_AT_A_TIME)
    except RefusedError as error:
        raise StocktakeError(f"--root {place} cannot be read: {error}") from None
    except UnreachableError as error:
        raise StocktakeError(f"--root {place} cannot be read: {error}; the same command goes on from here") from None


def _unpack_all(
    into: Path,
    place: str,
    index: Index,
    shards: Sequence[Shard],
    channels: Sequence[str],
    read: Callable[[str], bytes],
    at_a_time: int,
) -> ShardSource:
    """Unpack what is not unpacked yet; a shard's mark is set when all of it lies there."""
    _require_webdataset(f"--root {place}")
    for part in ("bin-images", "metadata", "unpacked"):
        (into / part).mkdir(parents=True, exist_ok=True)

    def checked(name: str, sha256: str) -> bytes:
        try:
            data = read(name)
        except FileNotFoundError:
            raise StocktakeError(f"--root {place}: {name} of the published set is missing: publish it again") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StocktakeError(f"--root {place}: {name} is not as it was published: publish or copy it again")
        return data

    def fetch(shard: Shard) -> None:
        unpack(io.BytesIO(checked(shard.name, shard.sha256)), into)
        (into / "unpacked" / shard.sha256).touch()

    todo = [one for one in shards if not (into / "unpacked" / one.sha256).exists()]
    with progress("unpacking shards", len(todo)) as advance, ThreadPoolExecutor(at_a_time) as threads:
        for _ in threads.map(fetch, todo):
            advance(1)
    tables = []
    for channel in channels:
        kept = into / f"{channel or 'whole'}.parquet"
        if not kept.exists() or hashlib.sha256(kept.read_bytes()).hexdigest() != index.manifests[channel]:
            beside = kept.with_suffix(".part")
            beside.write_bytes(checked(f"{channel}/{MANIFEST}".lstrip("/"), index.manifests[channel]))
            beside.replace(kept)
        tables.append(pd.read_parquet(kept, columns=["id", "group", "split"]))
    return ShardSource(into, place, pd.concat(tables).sort_values("id", ignore_index=True), index)
