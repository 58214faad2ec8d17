"""The way to AWS: clients that wait when they are throttled, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from stocktake.errors import StocktakeError

_ATTEMPTS = 10


class Aws:
    """One region, with the credentials that boto3 finds."""

    def __init__(self, region: str | None = None) -> None:
        """Raises StocktakeError where no region is given or configured."""
        import boto3

        with translate_aws_errors("the profile"):
            self._session = boto3.Session(region_name=region)
        if self._session.region_name is None:
            raise StocktakeError("no AWS region: set AWS_DEFAULT_REGION, or region in the backend config")
        self.region: str = self._session.region_name

    @cached_property
    def sagemaker(self) -> Any:
        """boto3's client."""
        return self._client("sagemaker")

    @cached_property
    def logs(self) -> Any:
        """boto3's client of CloudWatch Logs."""
        return self._client("logs")

    @cached_property
    def s3(self) -> Any:
        """boto3's client."""
        return self._client("s3")

    def _client(self, service: str) -> Any:
        from botocore.config import Config

        retries: Any = {"mode": "adaptive", "max_attempts": _ATTEMPTS}
        with translate_aws_errors(service):
            return self._session.client(service, config=Config(retries=retries, max_pool_connections=16))


@contextmanager
def translate_aws_errors(what: str) -> Iterator[None]:
    """What AWS refuses in the block is a StocktakeError that begins with `what`, in one line."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError:
        raise StocktakeError(f"{what}: no AWS credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and its kin") from None
    except (BotoCoreError, ClientError) as error:
        raise StocktakeError(f"{what}: {' '.join(str(error).split())}") from None
