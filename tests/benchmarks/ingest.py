"""How fast objects come from S3 beside a plain loop of boto3, and what a manifest of half a million bins takes.

    python tests/benchmarks/ingest.py [--objects 5000] [--rounds 2] [--bins 535234]

Clients fetch the same objects of 4 to 45 kB from a static server on this machine, a process of its own, in turns; the
best round of each counts. CPU seconds are those of the client's process. Ratios are what to compare between machines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3_server import serve
from stocktake.config.data import BinsConfig, S3Config
from stocktake.data import checks
from stocktake.data import manifest as manifest_module
from stocktake.data.s3_client import Bucket, S3Address
from stocktake.data.s3_download import _Download

Fetch = Callable[[list[str]], None]


def write_objects(folder: Path, count: int) -> list[str]:
    """Bytes that are no photos; their keys."""
    drawn = random.Random(0)
    (folder / "bin-images").mkdir(parents=True)
    keys = [f"bin-images/{number:06d}.jpg" for number in range(count)]
    for key in keys:
        (folder / key).write_bytes(drawn.randbytes(drawn.randint(4_000, 45_000)))
    return keys


def by_boto3(url: str, threads: int, folder: Path | None = None) -> Fetch:
    """The plain loop, to memory or to files."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    settings = Config(signature_version=UNSIGNED, max_pool_connections=threads)
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=settings)

    def fetch_one(key: str) -> None:
        answer = client.get_object(Bucket="bins", Key=key)
        content = answer["Body"].read()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != answer["ETag"].strip('"'):
            raise ValueError("an object is not as its ETag says")
        if folder is not None:
            (folder / Path(key).name).write_bytes(content)

    def fetch(keys: list[str]) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fetch_one, keys))

    return fetch


def by_bucket(threads: int) -> Fetch:
    """The project's client, to memory, with the same check."""
    bucket = Bucket(S3Address("bins", ""), S3Config(anonymous=True))

    def fetch(keys: list[str]) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda key: bucket.get(key, limit=10**6), keys))

    return fetch


def by_download(folder: Path, threads: int) -> Fetch:
    """What `stocktake data --root s3://...` does: the same, to files."""
    config = BinsConfig(s3=S3Config(anonymous=True, concurrency=threads))

    def fetch(keys: list[str]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        _Download(Bucket(S3Address("bins", ""), config.s3), config, folder)._fetch(keys, "downloading")

    return fetch


def compare_clients(objects: int, rounds: int) -> None:
    """Print the table."""
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        keys = write_objects(Path(temporary) / "bucket", objects)
        with serve(Path(temporary) / "bucket") as server:
            os.environ["AWS_ENDPOINT_URL"] = server.url
            by_bucket(16)(keys)  # the server reads its files once
            clients = {
                "boto3, loop in 16 threads": by_boto3(server.url, 16),
                "boto3, loop in 64 threads": by_boto3(server.url, 64),
                "boto3, loop in 16 threads, to files": by_boto3(server.url, 16, Path(temporary)),
                "stocktake, 32 threads": by_bucket(32),
                "stocktake, 32 threads, to files": by_download(Path(temporary) / "copy", 32),
            }
            for _ in range(rounds):
                for name, fetch in clients.items():
                    began, used = time.perf_counter(), time.process_time()
                    fetch(keys)
                    rate = objects / (time.perf_counter() - began)
                    best[name] = max(best.get(name, (0.0, 0.0)), (rate, (time.process_time() - used) / objects * 1000))
    print(f"{objects} objects, best of {rounds} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'client':36} {'objects/s':>10} {'x boto3':>8} {'CPU s / 1000':>13}")
    for name, (rate, cpu) in best.items():
        print(f"{name:36} {rate:10.0f} {rate / best['boto3, loop in 16 threads'][0]:8.1f} {cpu:13.2f}")


class _SyntheticSource:
    """So many bins, none of which is ever read."""

    root, folder = "s3://synthetic", Path()

    def __init__(self, count: int) -> None:
        self._ids = [f"{number:06d}" for number in range(count)]

    def ids(self) -> list[str]:
        return self._ids

    def change_key(self, bin_id: str) -> str:
        return f"{40_000 + int(bin_id)}:1400000000000000000 2500:1400000000000000000"

    def published_splits(self) -> None:
        return None


def _checked(_source: Any, bin_id: str, change_key: str, _photos: Any) -> tuple[Any, None]:
    """A row as a real photo gives it: 1 to 5 items, shared by two neighbours, and in every 20th bin a bestseller."""
    number = int(bin_id)
    digest = hashlib.blake2b(bin_id.encode(), digest_size=24).hexdigest()
    items = [f"B{number // 2 * 7 + item:09d}" for item in range(1 + number % 5)]
    items += ["BESTSELLER"] if number % 20 == 0 else []
    row = checks._Check(bin_id, change_key, 1 + number % 5, 500, 400, 50_000, digest[:32], digest[32:])
    return row._replace(items=json.dumps(items)), None


def measure_memory(count: int) -> None:
    """Print what a manifest of so many bins takes."""
    checks._check_bin = _checked
    manifest_module.open_source = lambda *_: _SyntheticSource(count)
    with tempfile.TemporaryDirectory() as temporary:
        config = BinsConfig(root="s3://synthetic", workspace=temporary)
        for title in ("first time", "nothing changed"):
            before, began = _peak(), time.perf_counter()
            manifest = manifest_module.build_manifest(config)
            size = manifest.bins.memory_usage(deep=True).sum() / 1e6
            print(
                f"manifest of {count} bins, an item in 5 % of them, {title}: {time.perf_counter() - began:.0f} s, "
                f"{size:.0f} MB without the names of items, peak {_peak() - before:.0f} MB more than before, "
                f"largest group {manifest.largest_group}"
            )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bins", type=int, default=535_234)
    arguments = parser.parse_args()
    if arguments.objects:
        compare_clients(arguments.objects, arguments.rounds)
    if arguments.bins:
        measure_memory(arguments.bins)
