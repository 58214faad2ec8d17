"""What a job needs from this machine, in S3: stored by its content, so that the same is uploaded once."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocktake.aws.connection import split_uri
from stocktake.errors import StocktakeError

SOURCE = "source.tar.gz"
_LOCK = "deploy/images/training/requirements.lock"
_LEFT_OUT = {"__pycache__", ".mypy_cache", ".ruff_cache"}


def pack_source(project: Path) -> bytes:
    """Pack the package, its lock and the container's first script; the same files give the same bytes.

    Sources rather than a wheel: the package is pure Python, and nothing needs to be installed to build it.

    Raises:
        StocktakeError: this is no checkout of the project.
    """
    package = project / "src" / "stocktake"
    others = [project / name for name in ("pyproject.toml", _LOCK, "deploy/start_job.sh")]
    for path in (package, *others):
        if not path.exists():
            raise StocktakeError(f"{project} is no checkout of stocktake: {path.relative_to(project)} is missing")
    files = [path for path in package.rglob("*") if path.is_file() and not set(path.parts) & _LEFT_OUT]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted([*files, *others]):
            content = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(project).as_posix())  # no times and owners: content only
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)


class ArtifactUploader:
    """Uploads below one prefix, encrypted with a key if one is given."""

    def __init__(self, s3: Any, prefix: str, kms_key: str | None = None) -> None:
        """`s3` is boto3's client; `prefix` is s3://bucket/prefix."""
        self._s3, self._prefix = s3, prefix
        self._encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}

    def put(self, kind: str, files: Mapping[str, bytes]) -> str:
        """Upload files by their names to PREFIX/KIND/DIGEST/, where they are not there yet; that prefix."""
        digest = hashlib.sha256()
        for name, content in sorted(files.items()):
            digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
        prefix = f"{self._prefix}/{kind}/{digest.hexdigest()[:24]}/"
        for name, content in files.items():
            bucket, key = split_uri(prefix + name)
            if not self._s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("KeyCount"):
                self._s3.put_object(Bucket=bucket, Key=key, Body=content, **self._encryption)
        return prefix
