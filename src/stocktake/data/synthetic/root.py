"""A root of synthetic bins, in the public bucket's layout: `bin-images/<id>.jpg`, `metadata/<id>.json`.

Like real bins in what matters for counting: quantities are distributed as in the public dataset,
neighbouring ids are often the same bin before and after a pick or a stow, records have the same gaps.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from numpy.random import SeedSequence, default_rng
from PIL import Image
from tqdm import tqdm

from stocktake.config.data import SyntheticConfig
from stocktake.data.synthetic import rendering
from stocktake.data.synthetic.bins import Plan, plans
from stocktake.errors import StocktakeError
from stocktake.machine import cores

RENDERER = 1
"""Raised when the same config draws other photos."""
MARKER = "synthetic.json"
_POOL_FROM = 200
"""Fewer photos than this are drawn sooner than a pool starts."""
_BATCH = 25


def make_synthetic_root(folder: Path, config: SyntheticConfig, *, workers: int | None = None) -> Path:
    """Draw `config.count` bins into `folder`, unless they are there; the folder appears when it is complete.

    The files depend on the config alone, not on `workers` (default: a process a core when there is much to draw).

    Raises:
        StocktakeError: the folder holds something else.
    """
    marker = json.dumps({"renderer": RENDERER, "config": asdict(config)}, indent=1) + "\n"
    with FileLock(f"{folder}.lock"):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            if (folder / MARKER).is_file() and (folder / MARKER).read_text(encoding="utf-8") == marker:
                return folder
            raise StocktakeError(
                f"{folder} holds something else than the synthetic bins of this configuration ({MARKER}): "
                "name another folder, or remove this one to draw them anew"
            )
        for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
            shutil.rmtree(leftover)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            drawn = Path(temporary) / folder.name
            for part in ("bin-images", "metadata"):
                (drawn / part).mkdir(parents=True)
            _draw(drawn, list(islice(plans(config), config.count)), workers)
            (drawn / MARKER).write_text(marker, encoding="utf-8")
            drawn.rename(folder)
    return folder


def _draw(folder: Path, bins: list[Plan], workers: int | None) -> None:
    if workers is None:
        workers = cores() if len(bins) >= _POOL_FROM else 1
    batches = [bins[start : start + _BATCH] for start in range(0, len(bins), _BATCH)]
    with tqdm(total=len(bins), desc="rendering synthetic bins", disable=None) as bar:
        if workers > 1 and len(batches) > 1:
            context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the caller's threads
            try:
                with ProcessPoolExecutor(min(workers, len(batches)), mp_context=context) as pool:
                    for drawn in pool.map(_draw_batch, [folder] * len(batches), list(batches)):
                        batches.pop(0)
                        bar.update(drawn)
            except BrokenProcessPool:  # out of memory, or a script without a __main__ guard: go on in this process
                pass
        for batch in batches:
            bar.update(_draw_batch(folder, batch))


def _draw_batch(folder: Path, batch: list[Plan]) -> int:
    for plan in batch:
        (folder / "metadata" / f"{plan.name}.json").write_text(json.dumps(plan.record), encoding="utf-8")
        (folder / "bin-images" / f"{plan.name}.jpg").write_bytes(_photo(plan))
    return len(batch)


def _photo(plan: Plan) -> bytes:
    """The plan's JPEG file. What stays the same in every snapshot of a bin comes from the compartment's seed."""
    room = plan.compartment
    fixed, rng = default_rng(room.seed), default_rng(SeedSequence((*plan.seed, 1)))
    drawn = min(512, max(64, plan.size))  # what the textures are made for
    view = rendering.place_camera(room, drawn, fixed, rng)
    photo = rendering.draw_room(view, fixed)
    sprites: dict[str, Image.Image] = {}
    for pose in plan.poses:
        rendering.draw_item(photo, view, room, pose, sprites)
    rendering.draw_shade(photo, view, fixed.uniform(0.15, 0.75) * (1 if plan.poses else 0.3))
    rendering.draw_bands(photo, view, fixed, rng)
    rendering.draw_label(photo, view, fixed, upper=True)
    rendering.draw_label(photo, view, fixed, upper=False)
    photo = rendering.expose(photo, rng)
    if drawn != plan.size:
        photo = photo.resize((round(photo.width * plan.size / drawn), round(photo.height * plan.size / drawn)))
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=75 if room.square else 81)  # the public photos' own
    return file.getvalue()
