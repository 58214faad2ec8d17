"""Which bins, how they are split, where they come from."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from stocktake.config.settings import Settings


@dataclass
class SplitConfig(Settings):
    """How bins are divided into train, val and test.

    The workspace remembers which bins of a root went where: a root that grows keeps their splits. A published set
    has settings of its own: an option left at its default takes the set's, another value is refused.
    """

    by: Literal["group", "id"] = "group"
    """group: all snapshots of one bin stay together. id: the plain random split of published figures."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, val and test; they sum to 1. A share may be 0: [0,0,1] for a root to evaluate on only."""
    seed: int = 0
    """Changes which bins fall into which split; any whole number."""
    near_duplicate_distance: Annotated[int, Field(ge=0, le=16)] = 4
    """Photos whose perceptual hashes differ in at most this many of 64 bits are snapshots of one bin. Chosen on the
    pairs that `stocktake eda` draws: on real bins 4 finds near-identical photos, 8 already pairs different bins."""
    common_item: Annotated[int, Field(ge=1)] = 100
    """An item that more bins than this record says nothing about which bin it is in: records that share only such
    items are not taken for snapshots of one bin."""
    like: str | None = None
    """Give bins the split that they had in an earlier run: its id, its name in the experiment or its folder; or in a
    Parquet file with the columns id and split, such as a run's splits.parquet. Other bins are drawn as ever."""


@dataclass
class SyntheticConfig(Settings):
    """The synthetic root that is made when no root is given."""

    count: Annotated[int, Field(ge=1, le=1_000_000)] = 1200
    """How many bins to render."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """The same seed renders the same photos."""
    size: Annotated[int, Field(ge=32, le=1024)] = 224
    """Short side of a photo, in pixels."""


@dataclass
class S3Config(Settings):
    """How a root at s3://bucket/prefix is downloaded."""

    anonymous: bool = False
    """Ask without a signature. Default: only for the public bucket, and where no credentials are found."""
    resize: Annotated[int, Field(ge=32, le=4096)] | None = None
    """Keep only a copy of each photo whose short side has at most this many pixels. Default: photos as they are."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 32
    """Requests at a time."""
    retries: Annotated[int, Field(ge=0, le=100)] = 8
    """How often a request is repeated that was answered by 503 or not at all, ever later."""
    timeout: Annotated[float, Field(ge=0.1, le=3600)] = 30.0
    """Seconds that a request may take."""
    verify: bool = True
    """Compare each object with the MD5 in its ETag; false for buckets encrypted with KMS, whose ETag is none."""
    refresh: bool = False
    """List the bucket again, ask again for what was missing, and download what has changed."""


@dataclass
class BinsConfig(Settings):
    """Which bins, and how they are split."""

    root: str | None = None
    """Folder or s3://bucket/prefix with bin-images/<id>.jpg and metadata/<id>.json, or a published set. Default: a
    synthetic root is made."""
    task: str = "1-5"
    """The quantities to tell apart: 1-5, 0-5, any range. Bins outside of it are left out."""
    list: str | None = None
    """JSON file of the ids to use: {"1": ["data/metadata/100313.json", ...], ...}."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first bins of the task, by id, this many. All bins of a folder are checked and grouped first, so
    that a bin's split does not depend on the limit; of a bucket, no more than these are downloaded."""
    workspace: str = "workspace"
    """Folder for everything the program writes: synthetic root, manifests, caches, runs."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seeds weights, shuffling, augmentation and bootstrap."""
    split: SplitConfig = field(default_factory=SplitConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    s3: S3Config = field(default_factory=S3Config)


@dataclass
class DataConfig(BinsConfig):
    """Build the manifest: check every photo and record, group the snapshots of one bin, assign splits.

    Examples:
        stocktake data --root ../bins
        stocktake data --root ../bins --split.fractions '[0.7,0.2,0.1]' --split.by id
        stocktake data --root ../bins --list file_list.json --export imagefolder
        stocktake data --root s3://aft-vbi-pds --task 1-5 --limit 5000 --s3.resize 256
        stocktake data --root s3://aft-vbi-pds --list file_list.json --publish s3://my-bucket/bins
    """

    export: str | None = None
    """Also write an ImageFolder tree here: train/1/<id>.jpg, ..."""
    publish: str | None = None
    """Also upload the bins of the task to s3://bucket/prefix, as webdataset shards with an index: a root as well."""
    shard_mb: Annotated[int, Field(ge=1, le=1000)] = 64
    """Megabytes of a shard."""
