"""A root of synthetic bins, in the public bucket's layout: `bin-images/<id>.jpg`, `metadata/<id>.json`.

Made like the real ones in what matters to whoever counts: quantities are distributed as in the public dataset,
neighbouring ids are often the same bin before and after a pick or a stow, records have the same gaps.
"""

from __future__ import annotations

import io
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from filelock import FileLock
from numpy.random import SeedSequence, default_rng
from PIL import Image
from tqdm import tqdm

from stocktake.config.data import SyntheticConfig
from stocktake.data.synthetic import rendering
from stocktake.data.synthetic.bins import Plan, plans
from stocktake.errors import StocktakeError
from stocktake.files import atomic_write
from stocktake.machine import cores

RENDERER = 1  # raise it when the same config draws other photos
MARKER = "synthetic.json"
UNFINISHED = "synthetic.unfinished.json"
POOL_FROM = 200  # fewer photos than this are drawn sooner than a pool starts


def make_synthetic_root(folder: Path, config: SyntheticConfig, *, workers: int | None = None) -> Path:
    """Draw `config.count` bins into `folder` unless they are there; a root left half-made is completed.

    The files depend on the config alone, not on `workers` (default: a process a core when there is much to draw).

    Raises:
        StocktakeError: the folder holds something else.
    """
    marker = json.dumps({"renderer": RENDERER, "config": asdict(config)}, indent=1) + "\n"
    with FileLock(f"{folder}.lock"):
        if not _claim(folder, marker):
            _complete(folder, config, workers)
            atomic_write(folder / MARKER, marker)
            (folder / UNFINISHED).unlink(missing_ok=True)
    return folder


def _complete(folder: Path, config: SyntheticConfig, workers: int | None) -> None:
    for leftover in folder.glob("*/.*"):  # of a process that was killed
        leftover.unlink()
    missing: list[Plan] = []
    for plan in islice(plans(config), config.count):
        atomic_write(folder / "metadata" / f"{plan.name}.json", json.dumps(plan.record))
        if not _is_whole(folder / "bin-images" / f"{plan.name}.jpg"):
            missing.append(plan)
    with tqdm(total=len(missing), desc="rendering synthetic bins", disable=None) as bar:
        _draw_all(folder, missing, workers, bar)


def _claim(folder: Path, expected: str) -> bool:
    """Whether the folder is this very root, finished. If not, it is marked as this root, unfinished."""
    if folder.exists() and not folder.is_dir():
        raise StocktakeError(f"{folder} is a file: name a folder for the synthetic bins, or remove it")
    for marker in (folder / MARKER, folder / UNFINISHED):
        if marker.is_file():
            if marker.read_text(encoding="utf-8") != expected:
                raise StocktakeError(
                    f"{folder} holds synthetic bins of another configuration ({marker.name}): "
                    "name another folder, or remove this one to draw them anew"
                )
            if marker.name == MARKER:
                return True
    if not (folder / UNFINISHED).is_file():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise StocktakeError(
                f"{folder} is not empty and has no {MARKER}: name another folder for the synthetic bins, or empty it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / UNFINISHED, expected)
    for part in ("bin-images", "metadata"):
        (folder / part).mkdir(exist_ok=True)
    return False


def _is_whole(photo: Path) -> bool:
    """Whether the JPEG file has its beginning and its end: a power cut can leave a renamed file empty."""
    try:
        content = photo.read_bytes()
    except FileNotFoundError:
        return False
    return content[:2] == b"\xff\xd8" and content[-2:] == b"\xff\xd9"


def _draw_some(folder: Path, batch: list[Plan]) -> int:
    for plan in batch:
        atomic_write(folder / "bin-images" / f"{plan.name}.jpg", _photo(plan))
    return len(batch)


def _draw_all(folder: Path, missing: list[Plan], workers: int | None, bar: tqdm[None]) -> None:
    if workers is None:
        workers = cores() if len(missing) >= POOL_FROM else 1
    batches = [missing[k : k + 25] for k in range(0, len(missing), 25)]
    if workers > 1 and len(batches) > 1:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the caller's threads
        try:
            with ProcessPoolExecutor(min(workers, len(batches)), mp_context=context) as pool:
                for written in pool.map(_draw_some, [folder] * len(batches), list(batches)):
                    batches.pop(0)
                    bar.update(written)
        except BrokenProcessPool:  # out of memory, or a script without a __main__ guard: go on in this process
            pass
    for batch in batches:
        bar.update(_draw_some(folder, batch))


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
