"""Objects of an S3 prefix, by obstore.

obstore (Rust) fetches several times the objects a second of boto3 in 16 threads, for a fraction of the CPU time
(tests/benchmarks/ingest.py). It lets go of Python's lock, so that plain threads are enough.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from stocktake.config.data import S3Config
from stocktake.errors import StocktakeError

if TYPE_CHECKING:
    from obstore.store import S3Store

PUBLIC = {"aft-vbi-pds": "us-east-1"}
"""Public buckets and their regions: requests to them are not signed."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_MD5 = re.compile(r'"([0-9a-f]{32})"')
_CORRUPT_ATTEMPTS = 3
_BACKOFF = {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=15), "base": 2}
_PAGE = 1000
"""Objects a listing request: S3 gives no more."""


class ObjectError(StocktakeError):
    """An object that could not be read or written."""

    def __init__(self, place: str, reason: str, *, is_temporary: bool) -> None:
        super().__init__(f"{place}: {reason}{'; the same command goes on from here' if is_temporary else ''}")
        self.reason = reason
        self.is_temporary = is_temporary
        """No good answer came, after every retry; otherwise the answer was that it cannot be had."""


@dataclass(frozen=True)
class S3Address:
    """s3://bucket/prefix."""

    bucket: str
    prefix: str
    """Without slashes around it; may be empty."""

    @classmethod
    def parse(cls, text: str, option: str = "--root") -> S3Address:
        """Raises StocktakeError when the text is no such address."""
        scheme, _, rest = text.partition("://")
        bucket, _, prefix = rest.partition("/")
        if scheme != "s3" or not _BUCKET.fullmatch(bucket) or {"..", "."} & {*prefix.split("/")}:
            raise StocktakeError(f"{option} {text} is no address of a bucket: write s3://bucket or s3://bucket/prefix")
        return cls(bucket, "/".join(filter(None, prefix.split("/"))))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


class Bucket:
    """The objects below an address. Any number of threads may use one."""

    def __init__(self, address: S3Address, settings: S3Config, option: str = "--root") -> None:
        """Find credentials, region and endpoint; nothing is asked of the bucket yet.

        Raises:
            StocktakeError: obstore is not installed, or the endpoint is no address.
        """
        try:
            from obstore.store import S3Store
        except ModuleNotFoundError:
            raise StocktakeError(f"{option} {address} needs obstore: pip install 'stocktake[aws]'") from None
        self.address = address
        self.option = option
        self._verify = settings.verify
        config: dict[str, Any] = {}
        if region := PUBLIC.get(address.bucket) or os.environ.get("AWS_REGION"):
            config["region"] = region
        provider = None
        if settings.anonymous or address.bucket in PUBLIC or (provider := _credentials()) is None:
            config["skip_signature"] = True
        else:
            config["checksum_algorithm"] = "SHA256"  # the bucket refuses what was damaged on the way up
        self.is_signed = provider is not None
        client = {
            "timeout": timedelta(seconds=settings.timeout),
            "connect_timeout": timedelta(seconds=min(10.0, settings.timeout)),
            "allow_http": True,  # where AWS_ENDPOINT_URL says so
        }
        retrying = {
            "max_retries": settings.retries,
            "backoff": _BACKOFF,
            "retry_timeout": timedelta(seconds=max(180.0, settings.timeout * settings.retries)),
        }
        try:
            self._store: S3Store = S3Store(
                address.bucket,
                prefix=address.prefix or None,
                config=config,  # type: ignore[arg-type]
                client_options=client,  # type: ignore[arg-type]
                retry_config=retrying,  # type: ignore[arg-type]
                credential_provider=provider,
            )
        except Exception as error:
            raise StocktakeError(f"{option} {address} cannot be opened: {_brief(error)}") from None

    def get(self, key: str, *, limit: int, since: datetime | None = None) -> tuple[bytes, datetime] | None:
        """An object's content and when it was modified.

        The content has the length that was announced and, with `--s3.verify`, the MD5 of its ETag where that is one.

        Args:
            key: below the address.
            limit: bytes; a larger object is refused before its content is read.
            since: give None when the object has not changed since then.

        Raises:
            FileNotFoundError: there is no such object.
            ObjectError: too large, not ours to read, never as its ETag says, or no good answer came.
            StocktakeError: there is no such bucket.
        """
        import obstore

        for _ in range(_CORRUPT_ATTEMPTS):
            with self._errors_of(key):
                try:
                    answer = obstore.get(self._store, key, options={"if_modified_since": since} if since else {})
                except obstore.exceptions.NotModifiedError:
                    return None
                if answer.meta["size"] > limit:
                    raise self._refused(key, f"object has {answer.meta['size']} bytes, more than {limit}")
                data = answer.bytes().to_bytes()
            md5 = _MD5.fullmatch(answer.meta["e_tag"] or "") if self._verify else None
            if md5 is None or _md5(data) == md5[1]:
                return data, answer.meta["last_modified"]
        raise self._refused(
            key,
            f"never as its checksum says in {_CORRUPT_ATTEMPTS} attempts "
            "(a bucket encrypted with KMS has no checksums in its ETags: --s3.verify false)",
        )

    def list(self, prefix: str) -> Iterator[str]:
        """Keys below a prefix ending in `/`, in order.

        Raises:
            StocktakeError: the bucket does not exist or does not let itself be listed.
        """
        import obstore

        with self._errors_of(f"{prefix}*"):
            for page in obstore.list(self._store, prefix, chunk_size=_PAGE):
                yield from (entry["path"] for entry in page)

    def holds(self, key: str, data: bytes) -> bool:
        """Whether an object has this content, by its ETag; False where that is no MD5, as in a bucket with KMS."""
        import obstore

        try:
            with self._errors_of(key):
                return obstore.head(self._store, key)["e_tag"] == f'"{_md5(data)}"'
        except FileNotFoundError:
            return False

    def put(self, key: str, data: bytes) -> None:
        """Upload, with a checksum that the bucket verifies.

        Raises:
            ObjectError: not ours to write, or no good answer came.
        """
        import obstore

        with self._errors_of(key):
            obstore.put(self._store, key, data, use_multipart=False)

    def _refused(self, key: str, reason: str) -> ObjectError:
        return ObjectError(f"{self.option} {self.address}: {key}", reason, is_temporary=False)

    @contextmanager
    def _errors_of(self, key: str) -> Iterator[None]:
        from obstore import exceptions

        try:
            yield
        except (FileNotFoundError, exceptions.BaseError) as error:
            if "NoSuchBucket" in str(error):
                raise StocktakeError(
                    f"{self.option} {self.address}: there is no bucket {self.address.bucket}"
                ) from None
            if isinstance(error, FileNotFoundError):
                raise
            if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
                how = "with the credentials found" if self.is_signed else "anonymously (no credentials were found)"
                raise self._refused(key, f"access is denied {how}{_code(error)}") from None
            name = f"{self.option} {self.address}: {key}"
            raise ObjectError(name, _brief(error), is_temporary=True) from None


def _credentials() -> Any:
    """What boto3 finds in variables, files, or the machine's role; None when there is nothing."""
    try:
        from boto3.session import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ModuleNotFoundError:
        return None
    session = Session()
    return Boto3CredentialProvider(session) if session.get_credentials() is not None else None


def _brief(error: Exception) -> str:
    """The line of obstore's message that says what went wrong, without its account of how it came about."""
    line = str(error).partition("\n")[0]
    if status := re.search(r"non-2xx status code: (\d{3}[^:]*)", line):
        return f"the answer was {status[1].strip()}{_code(error)}"
    if "without LOCATION" in line:
        return "the bucket is in another region: set AWS_REGION"
    if "kind: Timeout" in str(error):
        return "no answer in time"
    return line.rpartition(" - ")[2][:200]


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _code(error: Exception) -> str:
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    return f" ({code[1]})" if code else ""
