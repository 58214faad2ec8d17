"""boto3's clients for one region, and AWS's errors as errors of one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from stocktake.errors import StocktakeError


class AwsError(StocktakeError):
    """AWS refused a request, or did not answer."""

    def __init__(self, message: str, *, code: str = "", is_transient: bool = False) -> None:
        """`code` is AWS's, such as ResourceInUse; a transient error may go away by itself."""
        super().__init__(message)
        self.code = code
        self.is_transient = is_transient


class Aws:
    """Clients of one region, with the credentials that boto3 finds.

    They retry in botocore's adaptive mode, which also slows the client down when AWS throttles it.
    """

    def __init__(
        self, region: str | None = None, *, bucket_owner: str | None = None, owned_buckets: Iterable[str] | None = None
    ) -> None:
        """Make clients on first use.

        Args:
            region: of AWS. Default: the environment's or the profile's.
            bucket_owner: account that must own these buckets: S3 refuses requests to them if another one does.
            owned_buckets: their names. Default: all that are used.

        Raises:
            StocktakeError: no region is given or configured.
        """
        import boto3

        with translate_aws_errors("the profile"):
            self._session = boto3.Session(region_name=region)
        if self._session.region_name is None:
            raise StocktakeError("no AWS region: set AWS_DEFAULT_REGION, or region in the backend config")
        self.region: str = self._session.region_name
        self._bucket_owner, self._owned_buckets = (
            bucket_owner,
            None if owned_buckets is None else frozenset(owned_buckets),
        )

    @cached_property
    def sagemaker(self) -> Any:
        """boto3's client of SageMaker."""
        return self._client("sagemaker")

    @cached_property
    def logs(self) -> Any:
        """boto3's client of CloudWatch Logs."""
        return self._client("logs")

    @cached_property
    def s3(self) -> Any:
        """boto3's client of S3."""
        client = self._client("s3")

        def add_owner(params: dict[str, Any], **_: Any) -> None:
            if self._owned_buckets is None or params.get("Bucket") in self._owned_buckets:
                params["ExpectedBucketOwner"] = self._bucket_owner

        if self._bucket_owner:
            client.meta.events.register("provide-client-params.s3", add_owner)
        return client

    def _client(self, service: str) -> Any:
        from botocore.config import Config

        config = Config(retries={"mode": "adaptive"}, connect_timeout=10)  # how often: AWS_MAX_ATTEMPTS, the profile
        with translate_aws_errors(service):
            return self._session.client(service, config=config)


@contextmanager
def translate_aws_errors(subject: str) -> Iterator[None]:
    """Raise what AWS refuses in the block as an AwsError whose line begins with `subject`."""
    from botocore import exceptions

    try:
        yield
    except exceptions.NoCredentialsError:
        raise AwsError(
            f"{subject}: no AWS credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    except exceptions.ClientError as error:
        code, status = error.response["Error"].get("Code", ""), error.response["ResponseMetadata"]["HTTPStatusCode"]
        is_transient = status == 429 or status >= 500 or "Throttl" in code or code == "SlowDown"
        raise AwsError(f"{subject}: {_one_line(error)}", code=code, is_transient=is_transient) from None
    except exceptions.BotoCoreError as error:
        is_transient = isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError)
        raise AwsError(f"{subject}: {_one_line(error)}", is_transient=is_transient) from None


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
