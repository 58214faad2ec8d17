"""The function's settings, from the environment that the stack sets."""

import os
from dataclasses import dataclass, field

from photo_url import FetchLimits


@dataclass(frozen=True)
class Settings:
    """What the function may ask, and for how long.

    Raises:
        KeyError: STOCKTAKE_ENDPOINT is not set.
    """

    endpoint: str = field(default_factory=lambda: os.environ["STOCKTAKE_ENDPOINT"])
    """Name of the SageMaker endpoint."""
    buckets: frozenset[str] = field(default_factory=lambda: frozenset(_words("STOCKTAKE_BUCKETS")))
    """Buckets that photos may come from; none: no S3."""
    cors_origins: tuple[str, ...] = field(default_factory=lambda: tuple(_words("STOCKTAKE_CORS_ORIGINS")))
    """Origins of web pages that may call the API; none: no CORS headers."""
    seconds: float = field(default_factory=lambda: float(os.environ.get("STOCKTAKE_SECONDS", "10")))
    """For asking the endpoint about one photo, with all retries. Fetching the photo has a budget of its own."""
    max_batch: int = field(default_factory=lambda: int(os.environ.get("STOCKTAKE_MAX_BATCH", "100")))
    """Photos in one event."""
    fetch: FetchLimits = field(
        default_factory=lambda: FetchLimits(
            allow_http=os.environ.get("STOCKTAKE_ALLOW_HTTP") == "true",
            allow_private=os.environ.get("STOCKTAKE_ALLOW_PRIVATE") == "true",
        )
    )


def _words(name: str) -> list[str]:
    return os.environ.get(name, "").replace(",", " ").split()
