"""S3 as jobs see it, within the server's process: what lies under a prefix into a folder, and files back."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from moto.s3.models import FakeKey, S3Backend, s3_backends
from moto.sagemaker.models import SageMakerModelBackend


class UnsafePathError(Exception):
    """A name from a key, an archive or a request that leads out of its folder."""


class Storage:
    """The objects of an account."""

    def __init__(self, backend: SageMakerModelBackend) -> None:
        self._s3: S3Backend = s3_backends[backend.account_id][backend.partition]

    def has_bucket(self, uri: str) -> bool:
        """Return True if the bucket of a URI exists."""
        return split_uri(uri)[0] in self._s3.buckets

    def keys(self, uri: str) -> list[str]:
        """Return the keys that begin with the URI's, sorted; empty if there is no such bucket."""
        bucket, prefix = split_uri(uri)
        if bucket not in self._s3.buckets:
            return []
        return sorted(
            key
            for key, value in list(self._s3.buckets[bucket].keys.items())
            if key.startswith(prefix) and isinstance(value, FakeKey)
        )

    def read(self, uri: str) -> bytes:
        """Return an object.

        Raises:
            FileNotFoundError: there is none.
        """
        bucket, key = split_uri(uri)
        value = self._s3.get_object(bucket, key) if bucket in self._s3.buckets else None
        if value is None:
            raise FileNotFoundError(uri)
        return value.value

    def write(self, uri: str, content: bytes) -> None:
        """Put an object."""
        self._s3.put_object(*split_uri(uri), content)

    def objects(self, uri: str) -> list[tuple[str, str]]:
        """Return URI, and path as a job sees it, of every object under a prefix, sorted."""
        bucket, prefix = split_uri(uri)
        keys = [key for key in self.keys(uri) if not key.endswith("/")]
        return [(f"s3://{bucket}/{key}", relative_path(key, prefix)) for key in keys]

    def download(self, objects: Iterable[tuple[str, str]], folder: Path) -> None:
        """Write objects, given as `objects` returns them, into files of a folder.

        Raises:
            FileNotFoundError: an object is gone.
            UnsafePathError: a path leads out of the folder; nothing is written for it.
        """
        for uri, name in objects:
            path = path_inside(folder, name)
            content = self.read(uri)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def upload_archive(self, uri: str, folders: Sequence[Path]) -> None:
        """Put the contents of folders as one .tar.gz; of files with one name, the first folder's."""
        data = io.BytesIO()
        names: set[str] = set()
        with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as archive:
            for folder in folders:
                for path in sorted(folder.rglob("*")):
                    name = str(path.relative_to(folder))
                    if name not in names:
                        names.add(name)
                        archive.add(path, name, recursive=False)
        self.write(uri, data.getvalue())

    def unpack(self, uri: str, folder: Path) -> None:
        """Extract the regular files and folders of a .tar.gz.

        Raises:
            FileNotFoundError: there is none.
            tarfile.TarError: it is no archive.
            UnsafePathError: a member is a link or a device, or leads out of the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(self.read(uri))) as archive:
            for member in archive:
                path_inside(folder, member.name)
                if not (member.isfile() or member.isdir()):
                    raise UnsafePathError(f"{member.name} is neither a file nor a folder")
                archive.extract(member, folder, filter="data")


class FolderMirror:
    """Uploads what is new or changed in a folder, as often as it is asked to."""

    def __init__(self, storage: Storage, folder: Path, uri: str) -> None:
        self._storage = storage
        self._folder = folder
        self._uri = uri.rstrip("/")
        self._uploaded: dict[Path, tuple[int, int]] = {}

    def restore(self) -> None:
        """Fetch what is in S3; it counts as uploaded."""
        objects = self._storage.objects(f"{self._uri}/")
        self._storage.download(objects, self._folder)
        self._uploaded = {path: _version(path) for path in self._folder.rglob("*") if path.is_file()}

    def upload(self) -> None:
        """Put the files that changed since the last call."""
        for path in sorted(self._folder.rglob("*")):
            try:
                version = _version(path)
                if path.is_file() and self._uploaded.get(path) != version:
                    self._storage.write(f"{self._uri}/{path.relative_to(self._folder)}", path.read_bytes())
                    self._uploaded[path] = version
            except FileNotFoundError:  # renamed by the job meanwhile
                continue


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and key of s3://bucket/key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def path_inside(folder: Path, name: str) -> Path:
    """Return `folder / name`.

    Raises:
        UnsafePathError: it is absolute, or leads out of the folder.
    """
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(folder):
        raise UnsafePathError(f"{name} leads out of its folder")
    return path


def relative_path(key: str, prefix: str) -> str:
    """Return where a job sees an object: its key below the prefix's last folder; its name if the prefix is its key."""
    if key == prefix:
        return key.rpartition("/")[2]
    folder = prefix if prefix.endswith("/") or not prefix else f"{prefix}/"
    if not key.startswith(folder):
        folder = prefix[: prefix.rfind("/") + 1]
    return key[len(folder) :]


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
