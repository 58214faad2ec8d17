"""Where photos and records come from: a folder in the public bucket's layout, a bucket, or a published set."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stocktake.data.images import LARGEST_FILE
from stocktake.data.record import LARGEST_RECORD
from stocktake.errors import StocktakeError

if TYPE_CHECKING:
    import pandas as pd

    from stocktake.config.data import BinsConfig

ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")
PHOTOS, RECORDS = ("bin-images/", ".jpg"), ("metadata/", ".json")
"""What stands before and after an id in the two places of the public bucket."""


class Source(Protocol):
    """A root. Another kind of storage is another class with these members."""

    @property
    def root(self) -> str:
        """The root as a user would write it."""

    @property
    def folder(self) -> Path:
        """Where the photos lie on this machine, as bin-images/<id>.jpg."""

    def published_splits(self) -> pd.DataFrame | None:
        """id, group and split of every bin, where whoever published the root has decided them."""

    def ids(self) -> list[str]:
        """Every id with a photo or a record, sorted."""

    def change_key(self, bin_id: str) -> str:
        """Changes when the photo or the record does; cheap to ask."""

    def photo(self, bin_id: str) -> bytes:
        """The photo's bytes; FileNotFoundError when there is none."""

    def record(self, bin_id: str) -> bytes:
        """The record's bytes; FileNotFoundError when there is none."""


class FolderSource:
    """A folder with `bin-images/<id>.jpg` and `metadata/<id>.json`."""

    def __init__(self, folder: Path, root: str | None = None) -> None:
        """Scan the folder once.

        Args:
            folder: with the bins.
            root: what the folder is a copy of, if it is one.

        Raises:
            StocktakeError: the folder or both of its parts are missing, or nothing is in them.
        """
        self._folder = folder
        self._root = root or str(folder)
        try:
            if not folder.is_dir():
                raise StocktakeError(f"--root {folder} is not a folder: give one that holds bin-images/ and metadata/")
            self._photos = dict(_file_versions(folder / "bin-images", ".jpg"))
            self._records = dict(_file_versions(folder / "metadata", ".json"))
        except OSError as error:
            raise StocktakeError(f"--root {folder} cannot be read: {error}") from None
        if not self._photos and not self._records:
            raise StocktakeError(
                f"--root {self._root} holds no bins: photos belong in bin-images/<id>.jpg, "
                "records in metadata/<id>.json"
            )

    @property
    def root(self) -> str:
        """The root as a user would write it."""
        return self._root

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._folder

    def published_splits(self) -> pd.DataFrame | None:
        """None: a folder has no splits."""
        return None

    def ids(self) -> list[str]:
        """Every id with a photo or a record, sorted."""
        return sorted(self._photos.keys() | self._records.keys())

    def change_key(self, bin_id: str) -> str:
        """Sizes and modification times of the two files."""
        return f"{self._photos.get(bin_id)} {self._records.get(bin_id)}"

    def photo(self, bin_id: str) -> bytes:
        """The photo's bytes; FileNotFoundError when there is none."""
        return _read(self._folder / "bin-images" / f"{bin_id}.jpg", LARGEST_FILE)

    def record(self, bin_id: str) -> bytes:
        """The record's bytes; FileNotFoundError when there is none."""
        return _read(self._folder / "metadata" / f"{bin_id}.json", LARGEST_RECORD)


def open_source(root: str, config: BinsConfig, labels: Sequence[int], listed: Sequence[str] | None) -> Source:
    """The bins of a root; from a bucket, those that the config asks for are downloaded first.

    Args:
        root: a folder or an address.
        config: its limit, workspace and S3 settings.
        labels: the quantities of the task.
        listed: the ids of --list; None: all.

    Raises:
        StocktakeError: the root cannot be used.
    """
    if root.startswith("s3://"):
        from stocktake.data.s3_download import open_bucket

        return open_bucket(root, config, labels, listed)
    if "://" in root:
        raise StocktakeError(f"--root {root}: only folders and s3:// can be read; copy the bins to a folder first")
    from stocktake.data.publish import is_published, open_published_folder

    if is_published(Path(root)):
        return open_published_folder(Path(root), Path(config.workspace), labels)
    return FolderSource(Path(root))


def read_id_list(path: Path) -> list[str]:
    """Ids of a list: {"1": ["data/metadata/100313.json", ...], ...}, or a plain JSON list of ids or paths.

    Raises:
        StocktakeError: the file is missing, is not such JSON, or names no id.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise StocktakeError(f"--list {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise StocktakeError(f"--list {path} is not JSON: {error}") from None
    classes = list(content.values()) if isinstance(content, dict) else [content]
    if not all(isinstance(entries, list) and all(isinstance(e, str) for e in entries) for entries in classes):
        raise StocktakeError(f'--list {path} must look like {{"1": ["data/metadata/100313.json", ...], ...}}')
    entries = [Path(entry) for entries in classes for entry in entries]
    strange = next((str(entry) for entry in entries if not ID.fullmatch(entry.stem) or ".." in entry.parts), None)
    if strange is not None:
        raise StocktakeError(f"--list {path} holds {strange!r}, which is no id of a bin")
    if not entries:
        raise StocktakeError(f"--list {path} names no bin")
    return sorted({entry.stem for entry in entries})


def source_key(root: str) -> str:
    """A folder name for what is remembered about a root."""
    place = root if "://" in root else str(Path(root).resolve())
    name = re.sub(r"[^0-9A-Za-z]+", "-", Path(place).name).strip("-")[:40] or "root"
    return f"{name}-{hashlib.blake2b(place.encode(), digest_size=4).hexdigest()}"


def _read(path: Path, limit: int) -> bytes:
    """The file, or one byte more than a good one has: whoever checks it sees that it is too large."""
    with path.open("rb") as file:
        return file.read(limit + 1)


def _file_versions(folder: Path, suffix: str) -> Iterator[tuple[str, str]]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            stem = entry.name.removesuffix(suffix)
            if stem != entry.name and ID.fullmatch(stem) and entry.is_file():
                stat = entry.stat()
                yield stem, f"{stat.st_size}:{stat.st_mtime_ns}"
