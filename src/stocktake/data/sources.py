"""Where photos and records come from: a folder in the public bucket's layout, a bucket, or a published set."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stocktake.data.images import LARGEST_FILE
from stocktake.data.record import LARGEST_RECORD
from stocktake.errors import StocktakeError

if TYPE_CHECKING:
    import pandas as pd

    from stocktake.config.data import BinsConfig, SplitConfig

ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")


@dataclass(frozen=True)
class PublishedSplits:
    """What whoever published a root has decided."""

    bins: pd.DataFrame
    """id, group and split of every bin."""
    config: SplitConfig
    """By which they were decided."""


class Source:
    """A folder with `bin-images/<id>.jpg` and `metadata/<id>.json`, scanned once."""

    def __init__(self, folder: Path, root: str | None = None) -> None:
        """Scan the folder.

        Args:
            folder: with the bins.
            root: as a user would write it, where the folder is a copy; default: the folder.

        Raises:
            StocktakeError: the folder or both of its parts are missing, or nothing is in them.
        """
        self.folder = folder
        self.root = root or str(folder)
        try:
            if not folder.is_dir():
                raise StocktakeError(f"--root {folder} is not a folder: give one that holds bin-images/ and metadata/")
            self._photos = dict(_file_versions(folder / "bin-images", ".jpg"))
            self._records = dict(_file_versions(folder / "metadata", ".json"))
        except OSError as error:
            raise StocktakeError(f"--root {folder} cannot be read: {error}") from None
        if not self._photos and not self._records:
            raise StocktakeError(
                f"--root {self.root} holds no bins: photos belong in bin-images/<id>.jpg, records in metadata/<id>.json"
            )

    def published_splits(self) -> PublishedSplits | None:
        """The publisher's splits, if the root was published with them."""
        return None

    def ids(self) -> list[str]:
        """Every id with a photo or a record, sorted."""
        return sorted(self._photos.keys() | self._records.keys())

    def change_key(self, bin_id: str) -> str:
        """Sizes and modification times of the two files: changes when one of them does."""
        return f"{self._photos.get(bin_id)} {self._records.get(bin_id)}"

    def photo(self, bin_id: str) -> bytes:
        """The photo's bytes; FileNotFoundError when there is none."""
        return self._read(f"bin-images/{bin_id}.jpg", LARGEST_FILE)

    def record(self, bin_id: str) -> bytes:
        """The record's bytes; FileNotFoundError when there is none."""
        return self._read(f"metadata/{bin_id}.json", LARGEST_RECORD)

    def _read(self, name: str, limit: int) -> bytes:
        """The file's first bytes, one more than the limit: its check sees then that it is too large."""
        with (self.folder / name).open("rb") as file:
            return file.read(limit + 1)


def open_source(root: str, config: BinsConfig, labels: Sequence[int], listed: Sequence[str] | None) -> Source:
    """The bins of a root; a bucket's are downloaded first, as far as the config needs them.

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
    return Source(Path(root))


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
    for entry in entries:
        if not ID.fullmatch(entry.stem) or ".." in entry.parts:
            raise StocktakeError(f"--list {path} holds {str(entry)!r}, which is no id of a bin")
    if not entries:
        raise StocktakeError(f"--list {path} names no bin")
    return sorted({entry.stem for entry in entries})


def source_key(root: str) -> str:
    """A folder name for what is remembered about a root."""
    address = root if "://" in root else str(Path(root).resolve())
    name = re.sub(r"[^0-9A-Za-z]+", "-", Path(address).name).strip("-")[:40] or "root"
    return f"{name}-{hashlib.blake2b(address.encode(), digest_size=4).hexdigest()}"


def _file_versions(folder: Path, suffix: str) -> Iterator[tuple[str, str]]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            stem = entry.name.removesuffix(suffix)
            if stem != entry.name and ID.fullmatch(stem) and entry.is_file():
                stat = entry.stat()
                yield stem, f"{stat.st_size}:{stat.st_mtime_ns}"
