"""A copy of a bucket's bins on this machine, in the same layout: fetched once, and gone on with after a kill.

A file that is there is whole: it was checked, written beside and renamed. What cannot be had is remembered with the
reason; a bucket that does not answer ends the command, and the next one goes on.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from stocktake.config import BinsConfig
from stocktake.data.images import LARGEST_FILE, shrink
from stocktake.data.listing import Listing
from stocktake.data.record import LARGEST_RECORD, RecordError, parse_record
from stocktake.data.s3_source import Bucket, Fetched, RefusedError, S3Address, UnreachableError, utc
from stocktake.data.source import PHOTOS, RECORDS, FolderSource, in_order, source_key
from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.progress import progress, shown

UNASKED = 20_000
"""More photos than this are fetched only when --list or --limit says so: nobody wants 30 GB by mistake."""
_HOPELESS = 20
"""So many failures in a row, and it is not the objects."""
_NO_OBJECT = "there is no such object"
_TELL_EVERY = 60.0
"""Seconds between two lines of progress, where no terminal shows a bar."""


class MirrorSource(FolderSource):
    """The copy, with the reasons for what is not in it."""

    def __init__(self, folder: Path, root: str, missing: dict[str, str]) -> None:
        super().__init__(folder, root)
        self._missing = {key: reason for key, reason in missing.items() if reason != _NO_OBJECT}
        self._refused = {Path(key).stem for key in self._missing}

    def ids(self) -> list[str]:
        """Every id with a photo or a record, or with one that was refused; sorted."""
        return sorted({*super().ids(), *self._refused}) if self._refused else super().ids()

    def stamp(self, bin_id: str) -> str:
        """Changes with the two files, or the reasons for their absence."""
        reasons = [self._missing[key] for key in _keys(bin_id) if key in self._missing]
        return " ".join([super().stamp(bin_id), *reasons])

    def photo(self, bin_id: str) -> bytes:
        """The photo's bytes; OSError with the reason when it was refused."""
        self._check(_keys(bin_id)[1])
        return super().photo(bin_id)

    def record(self, bin_id: str) -> bytes:
        """The record's bytes; OSError with the reason when it was refused."""
        self._check(_keys(bin_id)[0])
        return super().record(bin_id)

    def _check(self, key: str) -> None:
        if key in self._missing:
            raise OSError(errno.EIO, self._missing[key], key)


class Mirror:
    """The folder that a bucket is copied to. One process at a time, with the lock `mirror.lock`."""

    def __init__(self, address: S3Address, config: BinsConfig) -> None:
        """Nothing is asked of the bucket yet, and nothing at all where everything wanted is here."""
        self.address = address
        self.settings = config.s3
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        place = f"{address!s}?{endpoint}" if endpoint else str(address)
        size = f"-short{self.settings.resize}" if self.settings.resize else ""
        self.folder = Path(config.workspace) / "mirrors" / f"{source_key(place)}{size}"
        self.lock = FileLock(self.folder / "lock")
        self._missing_file = self.folder / "missing.tsv"
        self.missing: dict[str, str] = {}
        """What cannot be had: key -> reason."""
        self._unsure: dict[str, str] = {}
        self._guard = threading.Lock()
        self._stop = False
        self._in_a_row = 0
        self._answered = 0
        self.fetched = 0
        self.bytes = 0
        self.unreachable: list[tuple[str, str]] = []

    @cached_property
    def bucket(self) -> Bucket:
        """Opened when it is first needed."""
        return Bucket(self.address, self.settings)

    def listing(self, place: tuple[str, str]) -> Listing:
        """The remembered listing of photos or records."""
        return Listing(lambda: self.bucket, place, self.folder / "listing")

    def open(self) -> None:
        """Remove what a killed process left half written; read what cannot be had. Under the lock."""
        for place, _ in (PHOTOS, RECORDS):
            (self.folder / place).mkdir(parents=True, exist_ok=True)
            for part in (self.folder / place).glob(".*.part"):
                part.unlink()
        if self.settings.refresh:
            self._missing_file.unlink(missing_ok=True)
            for one in (PHOTOS, RECORDS):
                self.listing(one).forget()
        self.missing = {}
        if self._missing_file.exists():
            whole = self._missing_file.read_text().rpartition("\n")[0]
            self.missing = dict(line.partition("\t")[::2] for line in whole.splitlines())

    def has(self, key: str) -> bool:
        """Whether it need not be asked for."""
        return key in self.missing or os.path.exists(f"{self.folder}/{key}")  # noqa: PTH110 - asked a million times

    def fetch(self, keys: Callable[[], Iterable[str]], title: str) -> None:
        """Copy what is not here yet; only as many objects as requests are in memory.

        Args:
            keys: begins a walk over the keys; walked twice.
            title: of the bar.

        Raises:
            StocktakeError: no bucket, no access, nothing as its checksum says, or answers that did not come.
        """
        total = sum(map(self._is_wanted, keys()))
        if not total:
            return
        self._stop, self._in_a_row, self._answered = False, 0, 0
        todo, turn = filter(self._is_wanted, keys()), threading.Lock()

        def work() -> None:
            while not self._stop:
                with turn:
                    key = next(todo, None)
                if key is None:
                    return
                try:
                    self._fetch_one(key)
                except BaseException:
                    self._stop = True
                    raise
                tell(1)

        with _told(title, total) as tell, ThreadPoolExecutor(self.settings.concurrency) as threads:
            workers = [threads.submit(work) for _ in range(min(total, self.settings.concurrency))]
            try:
                wait(workers)
            except BaseException:  # Ctrl-C: the objects on their way are finished, no other is begun
                self._stop = True
                raise
        for worker in workers:
            worker.result()
        self._settle()

    def _is_wanted(self, key: str) -> bool:
        return self.settings.refresh or not self.has(key)

    def _fetch_one(self, key: str) -> None:
        path = self.folder / key
        since = utc(path.stat().st_mtime) if self.settings.refresh and path.exists() else None
        try:
            found = self.bucket.get_changed(key, since, most=_most(key))
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            with self._guard:
                self._remember({key: _NO_OBJECT})
        except RefusedError as error:
            with self._guard:
                self._unsure[key] = str(error)
                self._failed()
        except UnreachableError as error:
            with self._guard:
                self.unreachable.append((key, str(error)))
                self._failed()
        else:
            if found is not None:
                self._keep(path, found)
            with self._guard:
                self._in_a_row = 0
                self._answered += 1
                self.fetched += found is not None
                self.bytes += len(found.data) if found else 0

    def _failed(self) -> None:
        self._in_a_row += 1
        self._stop = self._stop or self._in_a_row >= max(_HOPELESS, self.settings.concurrency)

    def _settle(self) -> None:
        """Set aside what was refused, if others were not; raise for what did not come."""
        if self._unsure and not self.unreachable and not self._stop and (self._answered or self._is_begun()):
            self._remember(self._unsure)
            self._unsure = {}
        if self._unsure:
            key, reason = next(iter(self._unsure.items()))
            way = " (a bucket encrypted with KMS has no checksums in its ETags: --s3.verify false)"
            raise StocktakeError(
                f"--root {self.address}: {len(self._unsure)} objects were refused, such as {key}: {reason}"
                f"{way if 'checksum' in reason else ''}"
            )
        if self.unreachable:
            key, reason = self.unreachable[0]
            raise StocktakeError(
                f"--root {self.address}: {len(self.unreachable)} objects could not be fetched, the first {key}: "
                f"{reason}; the same command goes on from here"
            )

    def _is_begun(self) -> bool:
        return any(next((self.folder / place).glob(f"*{suffix}"), None) for place, suffix in (PHOTOS, RECORDS))

    def _keep(self, path: Path, found: Fetched) -> None:
        data = found.data
        if self.settings.resize and path.suffix == PHOTOS[1]:
            data = shrink(data, self.settings.resize)
        beside = f"{path.parent}/.{path.name}.{threading.get_ident()}.part"
        try:
            with open(beside, "wb") as file:  # noqa: PTH123 - plain calls: half of the time is spent here
                file.write(data)
                file.flush()
                os.utime(file.fileno(), (found.modified.timestamp(),) * 2)  # what --s3.refresh compares
            os.replace(beside, path)  # noqa: PTH105
        except OSError:
            with suppress(OSError):
                os.unlink(beside)  # noqa: PTH108
            raise

    def _remember(self, reasons: dict[str, str]) -> None:
        with self._missing_file.open("a") as file:
            file.writelines(f"{key}\t{reason}\n" for key, reason in reasons.items())
        self.missing |= reasons


def fetch_bins(mirror: Mirror, config: BinsConfig, labels: Sequence[int], wanted: list[str] | None) -> MirrorSource:
    """Everything that the config wants of a bucket in the public one's layout, here. Under the mirror's lock.

    Raises:
        StocktakeError: the bucket cannot be read, or holds more than anybody asked for.
    """
    began = time.monotonic()
    if config.limit is not None:
        _fetch_first(mirror, wanted, labels, config.limit)
    elif wanted is not None:
        ids = wanted
        mirror.fetch(lambda: (key for bin_id in ids for key in _keys(bin_id)), "fetching bins")
    else:
        _fetch_everything(mirror)
    if mirror.fetched:
        seconds = time.monotonic() - began
        print(
            f"fetched {mirror.fetched} objects ({mirror.bytes / 1e6:.1f} MB) of {mirror.address} in {seconds:.1f} s: "
            f"{mirror.fetched / seconds:.0f} a second",
            flush=True,
        )
    return MirrorSource(mirror.folder, str(mirror.address), mirror.missing)


def _fetch_everything(mirror: Mirror) -> None:
    listed = {place: mirror.listing(place) for place in (RECORDS, PHOTOS)}
    absent = (bin_id for bin_id, _ in listed[PHOTOS] if not mirror.has(_keys(bin_id)[1]))
    if sum(1 for _ in islice(absent, UNASKED + 1)) > UNASKED:  # known before all of it is listed
        plan = f"stocktake data --root {mirror.address} --plan true"
        raise StocktakeError(
            f"--root {mirror.address} holds more than {UNASKED} photos that are not here yet: say how many bins with "
            f"--limit N, or which with --list (what all of them take: {plan})"
        )
    for (before, after), listing in listed.items():
        keys = partial(_named, listing, before, after)
        mirror.fetch(keys, f"fetching {before.strip('/')}")
        if mirror.settings.refresh:
            still = set(keys())
            for path in (mirror.folder / before).iterdir():
                if f"{before}{path.name}" not in still:
                    path.unlink()


def _named(listing: Listing, before: str, after: str) -> Iterator[str]:
    return (f"{before}{bin_id}{after}" for bin_id, _ in listing)


def _fetch_first(mirror: Mirror, wanted: list[str] | None, labels: Sequence[int], limit: int) -> None:
    """Records in order until so many are of the task, then the photos of these."""
    order = iter(in_order(wanted) if wanted is not None else (bin_id for bin_id, _ in mirror.listing(RECORDS)))
    chosen: list[str] = []
    # of the real bins every second has a quantity from 1 to 5; a block is a round of requests
    while len(chosen) < limit and (block := list(islice(order, max(64, 2 * (limit - len(chosen)))))):
        mirror.fetch(lambda block=block: (_keys(bin_id)[0] for bin_id in block), "fetching metadata")  # type: ignore[misc]
        chosen += [bin_id for bin_id in block if _quantity(mirror.folder, bin_id) in labels]
    mirror.fetch(lambda: (_keys(bin_id)[1] for bin_id in chosen[:limit]), "fetching bin-images")


def _quantity(folder: Path, bin_id: str) -> int | None:
    try:
        return parse_record((folder / _keys(bin_id)[0]).read_bytes()).quantity
    except (OSError, RecordError):
        return None


def _keys(bin_id: str) -> tuple[str, str]:
    return f"{RECORDS[0]}{bin_id}{RECORDS[1]}", f"{PHOTOS[0]}{bin_id}{PHOTOS[1]}"


def _most(key: str) -> int:
    return LARGEST_FILE if key.startswith(PHOTOS[0]) else LARGEST_RECORD


@contextmanager
def _told(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; else a line a minute, with the rate and the time left."""
    guard, began, done = threading.Lock(), time.monotonic(), 0
    last = began

    with progress(title, total) as advance:

        def tell(more: int) -> None:
            nonlocal done, last
            with guard:
                done += more
                advance(more)
                now = time.monotonic()
                if shown() or now - last < _TELL_EVERY:
                    return
                last = now
                rate = done / (now - began)
            left = time.strftime("%H:%M:%S", time.gmtime((total - done) / rate))
            print(f"{title}: {done} of {total}, {rate:.0f} a second, {left} left", flush=True)

        yield tell
