"""Which bins, how they are split, where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stocktake.config.bound import bound


@dataclass
class SplitConfig:
    """How bins are divided into train, val and test."""

    by: Literal["group", "id"] = "group"
    """group: all looks at one bin stay together. id: the plain random split of published figures."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, val and test; they sum to 1."""
    seed: int = 0
    """Changes which bins fall into which split; any whole number."""
    twin_distance: int = 4
    """Photos whose perceptual hashes differ in at most this many of 64 bits are looks at one bin. On real
    bins 4 finds near-identical photos, 8 already pairs different bins behind the same bands."""

    def __post_init__(self) -> None:
        bound(self, "twin_distance", least=0, most=16, option="split.")


@dataclass
class SyntheticConfig:
    """The synthetic root that is made when no root is given."""

    count: int = 1200
    """How many bins to render."""
    seed: int = 0
    """The same seed renders the same photos."""
    size: int = 224
    """Short side of a photo, in pixels."""

    def __post_init__(self) -> None:
        bound(self, "count", least=1, most=1_000_000, option="synthetic.")
        bound(self, "seed", least=0, most=2**32 - 1, option="synthetic.")
        bound(self, "size", least=32, most=1024, option="synthetic.")


@dataclass
class S3Config:
    """How a root at s3://bucket/prefix is fetched."""

    anonymous: bool = False
    """Ask without a signature. Default: only for the public bucket, and where no credentials are found."""
    resize: int | None = None
    """Keep only a copy of each photo whose short side has at most this many pixels. Default: photos as they are."""
    concurrency: int = 32
    """Requests at a time."""
    retries: int = 8
    """How often a request is repeated that was answered by 503 or not at all, ever later."""
    timeout: float = 30.0
    """Seconds that a request may take."""
    verify: bool = True
    """Compare each object with the MD5 in its ETag; false for buckets encrypted with KMS, whose ETag is none."""
    refresh: bool = False
    """List the bucket again, ask again for what was missing, and fetch what has changed."""

    def __post_init__(self) -> None:
        bound(self, "resize", least=32, most=4096, option="s3.")
        bound(self, "concurrency", least=1, most=256, option="s3.")
        bound(self, "retries", least=0, most=100, option="s3.")
        bound(self, "timeout", least=0.1, most=3600, option="s3.")


@dataclass
class BinsConfig:
    """Which bins, and how they are split."""

    root: str | None = None
    """Folder or s3://bucket/prefix with bin-images/<id>.jpg and metadata/<id>.json, or a published set. Default: a
    synthetic root is made."""
    task: str = "1-5"
    """The quantities to tell apart: 1-5, 0-5, any range. Bins outside of it are left out."""
    list: str | None = None
    """JSON file of the ids to use: {"1": ["data/metadata/100313.json", ...], ...}."""
    limit: int | None = None
    """Use only the first bins of the task, by id, this many."""
    workspace: str = "workspace"
    """Folder for everything the program writes: synthetic root, manifests, caches, runs."""
    seed: int = 0
    """Seeds weights, shuffling, augmentation and bootstrap."""
    split: SplitConfig = field(default_factory=SplitConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    s3: S3Config = field(default_factory=S3Config)

    def __post_init__(self) -> None:
        bound(self, "seed", least=0, most=2**32 - 1)
        bound(self, "limit", least=1)


@dataclass
class DataConfig(BinsConfig):
    """Build the manifest: check every photo and record, group the looks at one bin, assign splits."""

    export: str | None = None
    """Also write an ImageFolder tree here: train/1/<id>.jpg, ..."""
    publish: str | None = None
    """Also upload the bins of the task to s3://bucket/prefix, as shards that training jobs read; a root as well."""
    shard_mb: int = 64
    """Megabytes of a shard."""
    plan: bool = False
    """Fetch nothing but a sample of the root at s3://, and tell what all of it takes: objects, hours, cost, memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        bound(self, "shard_mb", least=1, most=2000)
