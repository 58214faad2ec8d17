"""A copy of a bucket's bins on this machine, in the same layout: downloaded once, resumed after a kill.

A file under its own name is whole: it was verified and then renamed. An object that the bucket refuses is remembered
with the reason; a bucket that does not answer ends the command, and the next one resumes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from stocktake.config.data import BinsConfig
from stocktake.data.images import LARGEST_FILE, shrink
from stocktake.data.publish import INDEX, LARGEST_INDEX, open_published_prefix
from stocktake.data.record import LARGEST_RECORD, RecordError, parse_record
from stocktake.data.s3_client import PUBLIC, Bucket, ObjectError, S3Address
from stocktake.data.sources import ID, Source, source_key
from stocktake.errors import StocktakeError
from stocktake.files import atomic_path, atomic_write

UNASKED = 20_000
"""More photos than this are downloaded only when --list or --limit says so: the public bucket has 30 GB."""
_HOPELESS = 20
"""After so many failures in a row the bucket is at fault, not the objects."""
_ROUNDS = 16
"""Requests of a thread in a batch: half a million at once would be a gigabyte of futures."""
_PHOTOS, _RECORDS = "bin-images/", "metadata/"


class DownloadedSource(Source):
    """The copy, with the reasons for what the bucket refused."""

    def __init__(self, folder: Path, root: str, chosen: Sequence[str] | None, refused: dict[str, str]) -> None:
        """Scan the copy once.

        Args:
            folder: with the copy.
            root: the address.
            chosen: the ids that were asked for by --limit; only these may lack a photo. None: all.
            refused: key -> reason.
        """
        super().__init__(folder, root)
        self._refused = refused
        if chosen is not None:  # the copy has records of other quantities too
            may_lack_photo = self._photos.keys() | set(chosen)
            self._records = {bin_id: key for bin_id, key in self._records.items() if bin_id in may_lack_photo}
        for key, reason in refused.items():
            (self._photos if key.startswith(_PHOTOS) else self._records)[Path(key).stem] = reason

    def _read(self, name: str, limit: int) -> bytes:
        """The file; OSError with the reason when the bucket refused it."""
        if name in self._refused:
            raise OSError(errno.EIO, self._refused[name], name)
        return super()._read(name, limit)


def open_bucket(root: str, config: BinsConfig, labels: Sequence[int], listed: Sequence[str] | None) -> Source:
    """The bins below an address, or the set that is published there, of which missing files are downloaded.

    A request that was completed is remembered: the bucket is not asked again until --s3.refresh.

    Raises:
        StocktakeError: the bucket cannot be read, or holds more photos than are downloaded without --limit or --list.
    """
    address = S3Address.parse(root)
    folder = _mirror_folder(address, config)
    with FileLock(f"{folder}.lock"):
        request = hashlib.blake2b(repr((listed, config.limit, labels)).encode(), digest_size=8).hexdigest()
        done = folder / "requests" / f"{request}.json"
        if config.s3.refresh or not done.exists():
            bucket = Bucket(address, config.s3)
            if address.bucket not in PUBLIC and (config.s3.refresh or not done.parent.exists()):
                published = _published_index(bucket)
                if published is not None:
                    return open_published_prefix(bucket, published, folder, labels)
            download = _Download(bucket, config, folder)
            chosen = download.bins(labels, listed)
            atomic_write(done, json.dumps({"chosen": chosen, "refused": download.refused}))
        answered = json.loads(done.read_text())
        return DownloadedSource(folder, str(address), answered["chosen"], answered["refused"])


def _mirror_folder(address: S3Address, config: BinsConfig) -> Path:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    name = f"{address!s}?{endpoint}" if endpoint else str(address)
    size = f"-short{config.s3.resize}" if config.s3.resize else ""
    return Path(config.workspace) / "mirrors" / f"{source_key(name)}{size}"


def _published_index(bucket: Bucket) -> bytes | None:
    try:
        index = bucket.get(INDEX, limit=LARGEST_INDEX)
    except FileNotFoundError:
        return None
    except ObjectError as error:
        if error.is_temporary:
            raise
        return None  # a bucket that may not be listed answers 403 for what is not there
    return index[0] if index else None


class _Download:
    """What one command asks of a bucket, under the lock of its folder."""

    def __init__(self, bucket: Bucket, config: BinsConfig, folder: Path) -> None:
        self._bucket = bucket
        self._config = config
        self._folder = folder
        self.refused: dict[str, str] = {}
        """Key -> why the object cannot be read."""
        for part in (_PHOTOS, _RECORDS):
            (folder / part).mkdir(parents=True, exist_ok=True)
            for leftover in (folder / part).glob(".*"):  # of a process that was killed
                leftover.unlink()

    def bins(self, labels: Sequence[int], listed: Sequence[str] | None) -> list[str] | None:
        """Download what the config asks for; of a limit, the ids."""
        if self._config.limit is not None:
            return self._first(labels, listed, self._config.limit)
        if listed is not None:
            self._fetch([key for bin_id in listed for key in _keys(bin_id)], "downloading bins")
        else:
            self._everything()
        return None

    def _everything(self) -> None:
        photos: list[str] = []
        absent = 0
        for key in self._listed(_PHOTOS):
            photos.append(key)
            absent += not (self._folder / key).exists()
            if absent > UNASKED:  # before all of it is listed
                raise StocktakeError(
                    f"--root {self._bucket.address} holds more than {UNASKED} photos that are not downloaded yet: "
                    "say how many bins with --limit N, or which with --list"
                )
        keys = [*self._listed(_RECORDS), *photos]
        if self._config.s3.refresh:  # what the bucket no longer has answers 404, and goes
            local = [f"{part}{path.name}" for part in (_RECORDS, _PHOTOS) for path in (self._folder / part).iterdir()]
            keys = list(dict.fromkeys([*keys, *local]))
        self._fetch(keys, "downloading bins")

    def _first(self, labels: Sequence[int], listed: Sequence[str] | None, limit: int) -> list[str]:
        """Records in the bucket's order until so many are of the task, then the photos of these."""
        in_order: Iterator[str]
        if listed is None:
            in_order = (Path(key).stem for key in self._listed(_RECORDS))
        else:
            in_order = iter(sorted(listed, key=lambda bin_id: f"{bin_id}."))
        chosen: list[str] = []
        # of the real bins every second has a quantity from 1 to 5; a block is a round of requests
        while len(chosen) < limit and (block := list(islice(in_order, max(64, 2 * (limit - len(chosen)))))):
            self._fetch([_keys(bin_id)[0] for bin_id in block], "downloading records")
            chosen += [bin_id for bin_id in block if self._quantity(bin_id) in labels]
        self._fetch([_keys(bin_id)[1] for bin_id in chosen[:limit]], "downloading photos")
        if not chosen:
            raise StocktakeError(f"--task {labels[0]}-{labels[-1]} matches no bin of {self._bucket.address}")
        return chosen[:limit]

    def _quantity(self, bin_id: str) -> int | None:
        try:
            return parse_record((self._folder / _keys(bin_id)[0]).read_bytes()).quantity
        except (OSError, RecordError):
            return None

    def _listed(self, part: str) -> Iterable[str]:
        suffix = ".jpg" if part == _PHOTOS else ".json"
        names = (key.removeprefix(part) for key in self._bucket.list(part))
        return (f"{part}{name}" for name in names if name.endswith(suffix) and ID.fullmatch(name.removesuffix(suffix)))

    def _fetch(self, keys: Sequence[str], title: str) -> None:
        """Download what is missing.

        Raises:
            ObjectError: the bucket did not answer, or every object was refused.
        """
        todo = [key for key in keys if self._config.s3.refresh or not (self._folder / key).exists()]
        failures: dict[str, ObjectError] = {}
        failures_in_a_row = 0
        threads = ThreadPoolExecutor(self._config.s3.concurrency)
        step = _ROUNDS * self._config.s3.concurrency
        try:
            with tqdm(total=len(todo), desc=title, disable=None) as bar:
                for begin in range(0, len(todo), step):
                    batch = todo[begin : begin + step]
                    for key, failure in zip(batch, threads.map(self._fetch_object, batch), strict=True):
                        bar.update()
                        failures_in_a_row = failures_in_a_row + 1 if failure else 0
                        if failure:
                            failures[key] = failure
                        if failure and failures_in_a_row >= _HOPELESS:
                            raise failure
        finally:
            threads.shutdown(cancel_futures=True)
        for failure in failures.values():
            if failure.is_temporary or not any((self._folder / _RECORDS).iterdir()):
                raise failure
        self.refused |= {key: failure.reason for key, failure in failures.items()}
        if todo:
            print(f"{title}: {len(todo)} objects of {self._bucket.address}", flush=True)

    def _fetch_object(self, key: str) -> ObjectError | None:
        """Download a file, or remove it when the object is gone; an error if it cannot be read."""
        path = self._folder / key
        is_photo = key.startswith(_PHOTOS)
        since = None
        if self._config.s3.refresh and path.exists():
            since = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        try:
            fetched = self._bucket.get(key, limit=LARGEST_FILE if is_photo else LARGEST_RECORD, since=since)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return None
        except ObjectError as error:
            return error
        if fetched is not None:
            data, modified = fetched
            with atomic_path(path) as temporary:
                resize = self._config.s3.resize if is_photo else None
                temporary.write_bytes(shrink(data, resize) if resize else data)
                os.utime(temporary, (modified.timestamp(),) * 2)  # what --s3.refresh compares
        return None


def _keys(bin_id: str) -> tuple[str, str]:
    return f"{_RECORDS}{bin_id}.json", f"{_PHOTOS}{bin_id}.jpg"
