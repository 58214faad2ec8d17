"""Objects of an S3 prefix: the one place that knows the client behind it.

The client is obstore (Rust): 6 to 7 times the objects a second of boto3 in 16 threads, for a fifth of the CPU time;
AWS's Common Runtime came to 4 to 5 times, s5cmd to less than 2 (tests/benchmarks/ingest.py). It lets go of Python's
lock, so that plain threads are enough.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from stocktake.config import S3Config
from stocktake.errors import StocktakeError

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import S3Store

PUBLIC = {"aft-vbi-pds": "us-east-1"}
"""Buckets that anybody may read, and their regions: never asked with a signature."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_MD5 = re.compile(r'"([0-9a-f]{32})"')
_CORRUPT_ATTEMPTS = 3
_BACKOFF = {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=15), "base": 2}
_PAGE = 1000
"""Objects a listing request: S3 gives no more."""


class UnreachableError(Exception):
    """An answer that did not come, after every retry; the message says why."""


class RefusedError(Exception):
    """An object that cannot be had, however often it is asked for; the message is the reason."""


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


@dataclass(frozen=True)
class Listed:
    """An object as a listing names it."""

    key: str
    size: int


@dataclass(frozen=True)
class Fetched:
    """An object's content."""

    data: bytes
    modified: datetime


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
        client: dict[str, Any] = {
            "timeout": timedelta(seconds=settings.timeout),
            "connect_timeout": timedelta(seconds=min(10.0, settings.timeout)),
        }
        if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
            config["endpoint"] = endpoint.rstrip("/")
            client["allow_http"] = True
        provider = None
        if settings.anonymous or address.bucket in PUBLIC or (provider := _credentials()) is None:
            config["skip_signature"] = True
        else:
            config["checksum_algorithm"] = "SHA256"  # the bucket refuses what was damaged on the way up
        self.is_signed = provider is not None
        config["region"] = _region(address.bucket, provider)
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

    def get_changed(self, key: str, since: datetime | None, *, most: int) -> Fetched | None:
        """An object's content; None when it has not changed since then. Otherwise as `get`."""
        import obstore

        try:
            return self.get(key, most=most, options={"if_modified_since": since} if since else {})
        except obstore.exceptions.NotModifiedError:
            return None

    def get(self, key: str, *, most: int, options: GetOptions | None = None) -> Fetched:
        """An object's content, of the length that was announced and with the MD5 of its ETag, where that is one.

        Args:
            key: below the address.
            most: a larger object is refused before its content is read.
            options: of the request.

        Raises:
            FileNotFoundError: there is no such object.
            RefusedError: too large, not ours to read, or never as its ETag says.
            UnreachableError: no good answer after every retry.
            StocktakeError: there is no such bucket.
        """
        import obstore

        for _ in range(_CORRUPT_ATTEMPTS):
            with self._asking():
                answer = obstore.get(self._store, key, options=options)
                if answer.meta["size"] > most:
                    raise RefusedError(f"object has {answer.meta['size']} bytes, more than {most}")
                data = answer.bytes().to_bytes()
            md5 = _MD5.fullmatch(answer.meta["e_tag"] or "") if self._verify else None
            good = len(data) == answer.meta["size"]
            if good and (md5 is None or hashlib.md5(data, usedforsecurity=False).hexdigest() == md5[1]):
                return Fetched(data, answer.meta["last_modified"])
        raise RefusedError(f"object is never as its checksum says ({_CORRUPT_ATTEMPTS} attempts)")

    def list(self, prefix: str, after: str = "") -> Iterator[list[Listed]]:
        """Objects below a prefix ending in `/`, by key, a page at a time; only those after a key.

        Raises:
            StocktakeError: the bucket does not exist or does not let itself be listed.
        """
        import obstore

        try:
            with self._asking():
                for page in obstore.list(self._store, prefix, offset=after or None, chunk_size=_PAGE):
                    yield [Listed(one["path"], one["size"]) for one in page]
        except RefusedError as error:
            raise StocktakeError(f"{self.option} {self.address} cannot be listed: {error}") from None
        except UnreachableError as error:
            raise StocktakeError(f"{self.option} {self.address} cannot be listed: {error}; try again") from None

    def holds(self, key: str, data: bytes) -> bool:
        """Whether an object was put with this content (`put` leaves its SHA-256 with it)."""
        import obstore

        try:
            with self._asking():
                answer = obstore.get(self._store, key, options={"head": True})
        except FileNotFoundError:
            return False
        told = dict(answer.attributes).get("sha256")
        return answer.meta["size"] == len(data) and told == hashlib.sha256(data).hexdigest()

    def put(self, key: str, data: bytes) -> None:
        """Upload, with a checksum that the bucket verifies, and look that it is there.

        Raises:
            RefusedError: not ours to write, or not there afterwards.
            UnreachableError: no good answer after every retry.
        """
        import obstore

        attributes = {"sha256": hashlib.sha256(data).hexdigest()}
        with self._asking():
            obstore.put(self._store, key, data, attributes=attributes, use_multipart=False)
        if not self.holds(key, data):
            raise RefusedError("object is not as it was uploaded")

    @contextmanager
    def _asking(self) -> Iterator[None]:
        import obstore

        errors = obstore.exceptions
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._no_bucket() from None
            raise
        except errors.NotModifiedError:
            raise
        except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
            how = "with the credentials found" if self.is_signed else "anonymously (no credentials were found)"
            raise RefusedError(f"access is denied {how}{_code(error)}") from None
        except errors.BaseError as error:
            if "NoSuchBucket" in str(error):
                raise self._no_bucket() from None
            raise UnreachableError(_brief(error)) from None

    def _no_bucket(self) -> StocktakeError:
        return StocktakeError(f"{self.option} {self.address}: there is no bucket {self.address.bucket}")


def _region(bucket: str, provider: Any) -> str:
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    of_profile = provider.config.get("region") if provider is not None else None
    return str(PUBLIC.get(bucket) or named or of_profile or "us-east-1")


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


def _code(error: Exception) -> str:
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return f" ({found[1]})" if found else ""


def utc(timestamp: float) -> datetime:
    """A file's time as an object's."""
    return datetime.fromtimestamp(timestamp, UTC)
