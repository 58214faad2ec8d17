"""How fast bins are rendered, checked and read, beside a plain peer in the same run.

    python tests/benchmarks/bins.py [ROOT]

ROOT is a folder of real bins; without it the rendered ones are used. Ratios are what to compare between machines.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from stocktake.config.data import BinsConfig, SyntheticConfig
from stocktake.data.manifest import build_manifest
from stocktake.data.photos import prepare_photos
from stocktake.data.sources import Source
from stocktake.data.synthetic.root import make_synthetic_root

COUNT = 600


def timed(title: str, count: int, start: float, peer: float | None = None) -> float:
    """Print photos a second, and how many times as fast as the peer."""
    rate = count / (time.perf_counter() - start)
    print(f"{title:48} {rate:9.0f} photos/s" + (f"  {rate / peer:5.2f} x the peer" if peer else ""), flush=True)
    return rate


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        workspace = Path(temporary)
        start = time.perf_counter()
        rendered = make_synthetic_root(workspace / "synthetic", SyntheticConfig(count=COUNT), workers=1)
        timed("render at 224 px, one process", COUNT, start)
        root = Path(sys.argv[1]) if len(sys.argv) > 1 else rendered
        source = Source(root)
        ids = source.ids()

        start = time.perf_counter()
        for bin_id in ids:
            Image.open(io.BytesIO(source.photo(bin_id))).convert("RGB").resize((128, 128))
        peer = timed("peer: read, decode, resize, one thread", len(ids), start)

        config = BinsConfig(root=str(root), task="0-99", workspace=str(workspace))
        start = time.perf_counter()
        manifest = build_manifest(config, photo_size=128)
        timed("data: check, hash, group, split, prepare; cold", len(manifest.bins), start, peer)
        start = time.perf_counter()
        build_manifest(config)
        timed("data: nothing changed", len(manifest.bins), start, peer)

        start = time.perf_counter()
        prepare_photos(manifest.source, manifest.bins, 64, workspace)
        timed("prepare photos at another size", len(manifest.bins), start, peer)
        photos = prepare_photos(manifest.source, manifest.bins, 128, workspace)
        start = time.perf_counter()
        for photo in manifest.bins["hash"]:
            photos[photo]
        timed("read prepared photos, one by one", len(manifest.bins), start, peer)


if __name__ == "__main__":
    main()
