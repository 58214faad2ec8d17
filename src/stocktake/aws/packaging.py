"""What a job needs from this machine, in S3: stored by its content, so that the same is uploaded once."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stocktake.errors import StocktakeError

SOURCE = "source.tar.gz"
_MOST_BINS = 2000
_THREADS = 16
_LEFT_OUT = ("__pycache__", ".mypy_cache", ".ruff_cache")


def pack_source(project: Path) -> bytes:
    """The package, requirements.lock and the container's first script; the same files give the same bytes.

    Sources rather than a wheel: the package is pure Python, and nothing needs to be installed to build it.

    Raises:
        StocktakeError: this is no checkout of the project.
    """
    package = project / "src" / "stocktake"
    wanted = [project / "pyproject.toml", project / "requirements.lock", project / "deploy" / "start_job.sh"]
    missing = [path for path in (package, *wanted) if not path.exists()]
    if missing:
        raise StocktakeError(f"{project} is no checkout of stocktake: {missing[0].relative_to(project)} is missing")
    files = [path for path in package.rglob("*") if path.is_file() and not set(path.parts) & set(_LEFT_OUT)]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted([*files, *wanted]):
            content = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(project).as_posix())  # no times and owners: content only
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


class ArtifactUploader:
    """Uploads below one prefix."""

    def __init__(self, s3: Any, place: str, kms_key: str | None = None) -> None:
        """`s3` is boto3's client; `place` is s3://bucket/prefix; what is put there is encrypted with the key."""
        self._s3 = s3
        self._place = place
        self._extra = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}

    def put_source(self, source: bytes) -> str:
        """The prefix that holds the packed source."""
        prefix = f"{self._place}/code/{_digest([source])}/"
        self._put_once(prefix + SOURCE, source)
        return prefix

    def put_files(self, files: Mapping[str, Path | bytes]) -> str:
        """The prefix that holds these files, or contents, by their names."""
        contents = {
            name: file if isinstance(file, bytes) else file.read_bytes() for name, file in sorted(files.items())
        }
        digest = _digest(part for name, content in contents.items() for part in (name.encode(), content))
        prefix = f"{self._place}/files/{digest}/"
        for name, content in contents.items():
            self._put_once(prefix + name, content)
        return prefix

    def put_bins(self, root: Path) -> str:
        """The prefix that holds a root's photos and records.

        A note beside it says that all have arrived: an upload that was cut off begins again.
        """
        files = bin_files(root)
        digest = _digest(
            part for path in files for part in (path.relative_to(root).as_posix().encode(), path.read_bytes())
        )
        prefix = f"{self._place}/bins/{digest}/"
        note = f"{self._place}/bins/{digest}.complete"
        if not self._has(note):
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(lambda path: self._put(prefix + path.relative_to(root).as_posix(), path), files))
            self._put(note, b"")
        return prefix

    def _has(self, uri: str) -> bool:
        from botocore.exceptions import ClientError

        bucket, key = split_uri(uri)
        try:
            self._s3.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                return False
            raise
        return True

    def _put_once(self, uri: str, content: bytes) -> None:
        if not self._has(uri):
            self._put(uri, content)

    def _put(self, uri: str, content: bytes | Path) -> None:
        bucket, key = split_uri(uri)
        body = content.read_bytes() if isinstance(content, Path) else content
        self._s3.put_object(Bucket=bucket, Key=key, Body=body, **self._extra)


def bin_files(root: Path) -> list[Path]:
    """Photos and records of a small root.

    Raises:
        StocktakeError: there are none, or too many to upload along with a job.
    """
    files = sorted([*root.glob("bin-images/*.jpg"), *root.glob("metadata/*.json")])
    if not files:
        raise StocktakeError(f"--root {root} holds no bins: photos belong in bin-images/<id>.jpg")
    if len(files) > _MOST_BINS:
        raise StocktakeError(
            f"--root {root} holds {len(files)} files, more than the {_MOST_BINS} that upload_bins takes: publish it "
            f"(`stocktake data --root {root} --publish s3://...`) and give that address"
        )
    return files


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:24]
