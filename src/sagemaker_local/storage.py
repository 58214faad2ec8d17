"""S3 as jobs see it: what lies under a prefix into a folder, and a folder's files back; within the server's process."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moto.s3.models import FakeKey, S3Backend, s3_backends
from moto.sagemaker.models import SageMakerModelBackend


class Storage:
    """The objects of an account."""

    def __init__(self, backend: SageMakerModelBackend) -> None:
        self._s3: S3Backend = s3_backends[backend.account_id][backend.partition]

    def has_bucket(self, uri: str) -> bool:
        return split_uri(uri)[0] in self._s3.buckets

    def keys(self, uri: str) -> list[str]:
        """Of the objects whose key begins with the URI's, sorted; none if there is no such bucket."""
        bucket, prefix = split_uri(uri)
        if bucket not in self._s3.buckets:
            return []
        return sorted(
            key
            for key, value in list(self._s3.buckets[bucket].keys.items())
            if key.startswith(prefix) and isinstance(value, FakeKey)
        )

    def read(self, uri: str) -> bytes:
        """An object.

        Raises:
            FileNotFoundError: there is none.
        """
        bucket, key = split_uri(uri)
        found = self._s3.get_object(bucket, key) if bucket in self._s3.buckets else None
        if found is None:
            raise FileNotFoundError(uri)
        return found.value

    def write(self, uri: str, content: bytes) -> None:
        bucket, key = split_uri(uri)
        self._s3.put_object(bucket, key, content)

    def objects(self, source: dict[str, Any]) -> list[tuple[str, str]]:
        """Of an S3DataSource: URI of an object and the path that a job sees it under, sorted."""
        uri = source["S3Uri"]
        if source["S3DataType"] == "ManifestFile":
            first, *names = json.loads(self.read(uri))
            return [(first["prefix"] + name, name) for name in names]
        bucket, prefix = split_uri(uri)
        keys = [key for key in self.keys(uri) if not key.endswith("/")]
        return [(f"s3://{bucket}/{key}", relative_path(key, prefix)) for key in keys]

    def download(self, objects: Iterable[tuple[str, str]], folder: Path, compressed: bool = False) -> None:
        """Into files of a folder."""
        for uri, name in objects:
            content = self.read(uri)
            if compressed:
                content, name = gzip.decompress(content), name.removesuffix(".gz")
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def upload_archive(self, uri: str, folders: Sequence[Path]) -> None:
        """The contents of the folders as one .tar.gz; of files with one name, the first folder's."""
        data = io.BytesIO()
        seen: set[str] = set()
        with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as archive:
            for folder in folders:
                for path in sorted(folder.rglob("*")):
                    name = str(path.relative_to(folder))
                    if name not in seen:
                        seen.add(name)
                        archive.add(path, name, recursive=False)
        self.write(uri, data.getvalue())

    def unpack(self, uri: str, folder: Path) -> None:
        """A .tar.gz into a folder.

        Raises:
            FileNotFoundError: there is none.
            tarfile.TarError: it is no archive.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(self.read(uri))) as archive:
            archive.extractall(folder, filter="data")


class FolderMirror:
    """Uploads what is new or changed in a folder, as often as it is asked to."""

    def __init__(self, storage: Storage, folder: Path, uri: str) -> None:
        self._storage = storage
        self._folder = folder
        self._uri = uri.rstrip("/")
        self._seen: dict[Path, tuple[int, int]] = {}

    def restore(self) -> None:
        """Fetch what is in S3; it counts as uploaded."""
        objects = self._storage.objects({"S3Uri": f"{self._uri}/", "S3DataType": "S3Prefix"})
        self._storage.download(objects, self._folder)
        self._seen = {path: _version(path) for path in self._folder.rglob("*") if path.is_file()}

    def upload(self) -> None:
        for path in sorted(self._folder.rglob("*")):
            try:
                version = _version(path)
                if path.is_file() and self._seen.get(path) != version:
                    self._storage.write(f"{self._uri}/{path.relative_to(self._folder)}", path.read_bytes())
                    self._seen[path] = version
            except FileNotFoundError:  # renamed by the job meanwhile
                continue


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def relative_path(key: str, prefix: str) -> str:
    """Where a job sees an object: the key below the prefix's last folder, or its name if the prefix is the object."""
    if key == prefix:
        return key.rpartition("/")[2]
    folder = prefix if prefix.endswith("/") or not prefix else f"{prefix}/"
    if not key.startswith(folder):
        folder = prefix[: prefix.rfind("/") + 1]
    return key[len(folder) :]


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
