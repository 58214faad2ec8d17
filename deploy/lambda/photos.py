"""From a request for a photo to the endpoint's prediction, with an error that says whose fault it is."""

import base64
import binascii
import json
import time
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, ReadTimeoutError
from photo_url import FetchLimits, PhotoUrlError, fetch_photo
from pydantic import BaseModel, ConfigDict, model_validator
from settings import Settings

_THROTTLED = {"ThrottlingException", "TooManyRequestsException", "ServiceUnavailable", "ServiceUnavailableException"}
_SIGNATURES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
_PAUSE = 0.2
"""Seconds before the endpoint is asked again; doubled each time."""


class RequestError(Exception):
    """A request that cannot be answered with a prediction."""

    def __init__(self, status: int, detail: str) -> None:
        """status: the HTTP status of the answer."""
        super().__init__(detail)
        self.status = status
        self.detail = detail


class PhotoRequest(BaseModel):
    """One photo, said in one of three ways."""

    model_config = ConfigDict(extra="forbid")

    url: str | None = None
    s3_uri: str | None = None
    photo: str | None = None
    """base64 of the photo itself."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "PhotoRequest":
        if sum(value is not None for value in (self.url, self.s3_uri, self.photo)) != 1:
            raise ValueError("give exactly one of url, s3_uri and photo")
        return self


class Endpoint:
    """The SageMaker endpoint and S3, as this function may reach them. One object a container: connections are kept."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # The budget is kept here, not by botocore, whose retries know no deadline.
        config = Config(connect_timeout=2, read_timeout=settings.seconds, retries={"total_max_attempts": 1})
        self._runtime = boto3.client("sagemaker-runtime", config=config)
        self._s3 = boto3.client("s3", config=config)

    def predict(self, request: PhotoRequest, request_id: str) -> dict[str, Any]:
        """The prediction for a photo: quantity, confidence, probabilities, likely quantities, model version.

        Raises:
            RequestError: the photo cannot be had or used, or the endpoint does not answer in time.
        """
        if request.url is not None:
            photo = self._from_url(request.url)
        elif request.s3_uri is not None:
            photo = self._from_s3(request.s3_uri)
        else:
            photo = decoded(request.photo or "")
        return self.ask(photo, request_id)

    def ask(self, photo: bytes, request_id: str) -> dict[str, Any]:
        """The prediction for a photo's bytes; asks again while the endpoint is throttled and time is left."""
        deadline = time.monotonic() + self._settings.seconds
        media_type = sniff(photo, self._settings.fetch.max_bytes)
        pause = _PAUSE
        while True:
            try:
                answer = self._runtime.invoke_endpoint(
                    EndpointName=self._settings.endpoint,
                    ContentType=media_type,
                    Accept="application/json",
                    CustomAttributes=request_id,
                    Body=photo,
                )
                return dict(json.loads(answer["Body"].read()))
            except (ReadTimeoutError, ConnectTimeoutError):
                raise RequestError(504, "the endpoint does not answer in time") from None
            except ClientError as error:
                if error.response["Error"]["Code"] not in _THROTTLED:
                    raise _endpoint_error(error) from None
                if time.monotonic() + pause > deadline:
                    raise RequestError(429, "the endpoint is busy: ask again later") from None
            except (BotoCoreError, ValueError) as error:
                raise RequestError(502, f"the endpoint cannot be asked ({type(error).__name__})") from None
            time.sleep(pause)
            pause *= 2

    def _from_url(self, url: str) -> bytes:
        limits = self._settings.fetch
        try:
            return fetch_photo(url, limits)
        except PhotoUrlError as error:
            raise RequestError(error.status, str(error)) from None

    def _from_s3(self, uri: str) -> bytes:
        parts = urlsplit(uri)
        bucket, key = parts.netloc, uri.removeprefix(f"s3://{parts.netloc}/")
        if parts.scheme != "s3" or not bucket or not key or key == uri:
            raise RequestError(400, "s3_uri must be s3://bucket/key")
        if bucket not in self._settings.buckets:
            raise RequestError(403, f"photos may not come from the bucket {bucket}")
        limits: FetchLimits = self._settings.fetch
        try:
            found = self._s3.get_object(Bucket=bucket, Key=key)
            if found["ContentLength"] > limits.max_bytes:
                raise RequestError(413, f"the photo has more than {limits.max_bytes} bytes")
            return bytes(found["Body"].read(limits.max_bytes + 1))
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in ("NoSuchKey", "404", "NoSuchBucket"):
                raise RequestError(404, f"there is no {uri}") from None
            if code in ("AccessDenied", "403"):
                raise RequestError(403, f"this function may not read {uri}") from None
            raise RequestError(502, f"S3 answers {code}") from None
        except (ReadTimeoutError, ConnectTimeoutError):
            raise RequestError(504, "S3 does not answer in time") from None
        except BotoCoreError as error:
            raise RequestError(502, f"S3 cannot be asked ({type(error).__name__})") from None


def decoded(text: str) -> bytes:
    """The bytes of a photo in base64.

    Raises:
        RequestError: it is no base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, "photo is no base64") from None


def sniff(photo: bytes, max_bytes: int) -> str:
    """The media type of a photo by its first bytes; what a sender says of it is not believed.

    Raises:
        RequestError: it is too large, or neither JPEG, PNG nor WebP.
    """
    if len(photo) > max_bytes:
        raise RequestError(413, f"the photo has more than {max_bytes} bytes")
    if photo[:4] == b"RIFF" and photo[8:12] == b"WEBP":
        return "image/webp"
    for signature, media_type in _SIGNATURES.items():
        if photo.startswith(signature):
            return media_type
    raise RequestError(415, "the content is neither JPEG, PNG nor WebP")


def _endpoint_error(error: ClientError) -> RequestError:
    code = error.response["Error"]["Code"]
    if code != "ModelError":
        return RequestError(502, f"the endpoint answers {code}")
    status = int(error.response.get("OriginalStatusCode", 500))
    try:
        detail = str(json.loads(error.response.get("OriginalMessage", "{}"))["error"])
    except (ValueError, KeyError, TypeError):
        detail = "the model cannot answer"
    return RequestError(status if 400 <= status < 500 else 502, detail)
