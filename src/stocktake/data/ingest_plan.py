"""What fetching a whole bucket takes, before anybody begins: listed, sampled and measured, not guessed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stocktake.config import BinsConfig
from stocktake.data.ingest import Mirror
from stocktake.data.listing import numbers
from stocktake.data.s3_source import PUBLIC, S3Address
from stocktake.data.source import PHOTOS, RECORDS, in_order, read_id_list

PRICES_OF = "January 2025"
"""Amazon's list prices for S3 Standard in us-east-1, in dollars, without taxes and free tiers. Edit with the date."""
DOLLARS_PER_1000_GETS = 0.0004
DOLLARS_PER_1000_LISTS = 0.005
DOLLARS_PER_GB_OUT = 0.09
"""To the internet; within the region it costs nothing."""
_PAGE = 1000
_SAMPLE = 300
"""Bins that are fetched to measure by; they stay in the copy."""
MANIFEST_BYTES_PER_BIN, BUILDING_BYTES_PER_BIN = 400, 950
"""Of memory, of a manifest and while it is built; measured on 535,234 synthetic bins (tests/benchmarks/ingest.py)."""


@dataclass(frozen=True)
class Plan:
    """The whole root, or the ids of --list."""

    bins: int
    objects: int
    absent: int
    """Bins of which the photo is not here yet."""
    bytes: float
    """Exact where the bucket was listed; of --list, from the sample."""
    rate: float
    """Objects a second, as measured from here, now; 0 when there was nothing left to fetch."""
    hours: float
    """At that rate, for what is not here yet."""
    requests_dollars: float
    egress_dollars: float
    is_free: bool
    """The bucket's owner pays."""
    disk_bytes: float
    manifest_bytes: float
    building_bytes: float


def make_plan(config: BinsConfig) -> Plan:
    """List the bucket (remembered), fetch a sample, and reckon.

    Raises:
        StocktakeError: the root is no address, or cannot be read.
    """
    mirror = Mirror(S3Address.parse(config.root or ""), config)
    with mirror.lock:
        mirror.open()
        if config.list:
            ids: Iterable[tuple[str, int]] = [(bin_id, 0) for bin_id in in_order(read_id_list(Path(config.list)))]
            bins = len(list(ids))
            objects, known, pages = 2 * bins, None, 0
        else:
            listings = [mirror.listing(place) for place in (PHOTOS, RECORDS)]
            counted = [numbers(one) for one in listings]
            ids, bins, objects = listings[0], counted[0][0], counted[0][0] + counted[1][0]
            known = float(counted[0][1] + counted[1][1])
            pages = sum(-(-n // _PAGE) for n, _ in counted)
        absent = [bin_id for bin_id, _ in ids if not mirror.has(f"{PHOTOS[0]}{bin_id}{PHOTOS[1]}")]
        here = absent or [bin_id for bin_id, _ in ids]
        sample = here[:: max(1, len(here) // _SAMPLE)][:_SAMPLE]
        keys = [f"{before}{bin_id}{after}" for bin_id in sample for before, after in (RECORDS, PHOTOS)]
        began = time.monotonic()
        mirror.fetch(lambda: keys, "fetching a sample")
        seconds = time.monotonic() - began
    kept = [path.stat().st_size for key in keys if (path := mirror.folder / key).exists()]
    mean = sum(kept) / max(1, len(kept))
    size = known if known is not None else (mirror.bytes / mirror.fetched if mirror.fetched else mean) * objects
    rate = mirror.fetched / seconds
    return Plan(
        bins=bins,
        objects=objects,
        absent=len(absent),
        bytes=size,
        rate=rate,
        hours=objects * len(absent) / max(1, bins) / rate / 3600 if rate else 0.0,
        requests_dollars=(objects * DOLLARS_PER_1000_GETS + pages * DOLLARS_PER_1000_LISTS) / 1000,
        egress_dollars=size / 1e9 * DOLLARS_PER_GB_OUT,
        is_free=mirror.address.bucket in PUBLIC,
        disk_bytes=mean * objects,
        manifest_bytes=bins * MANIFEST_BYTES_PER_BIN,
        building_bytes=bins * BUILDING_BYTES_PER_BIN,
    )
