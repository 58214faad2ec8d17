"""The synthetic root: the public layout, the public dataset's statistics, the same bytes every time."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stocktake.config.data import SyntheticConfig
from stocktake.data.synthetic import root as root_module
from stocktake.data.synthetic.bins import QUANTITIES, Plan
from stocktake.data.synthetic.bins import plans as endless_plans
from stocktake.data.synthetic.root import MARKER, _photo, make_synthetic_root
from stocktake.errors import StocktakeError

COUNT = 60
CONFIG = SyntheticConfig(count=COUNT, seed=3)
FIELDS = {"asin", "height", "length", "name", "normalizedName", "quantity", "weight", "width"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic_root(tmp_path_factory.mktemp("synthetic") / "root", CONFIG, workers=1)


@pytest.fixture(scope="module")
def plans():
    return list(islice(endless_plans(SyntheticConfig(seed=0)), 2000))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout_is_the_public_buckets_beside_a_marker_with_the_config(root: Path) -> None:
    ids = [f"{k:05d}" for k in range(1, COUNT + 1)]
    expected = [f"bin-images/{i}.jpg" for i in ids] + [f"metadata/{i}.json" for i in ids] + [MARKER]
    assert list(contents(root)) == sorted(expected)
    assert json.loads((root / MARKER).read_text())["config"] == {"count": COUNT, "seed": 3, "size": 224}


def test_the_same_config_draws_the_same_bytes_whatever_the_workers_and_the_count(root: Path, tmp_path: Path) -> None:
    again = contents(make_synthetic_root(tmp_path / "again", SyntheticConfig(count=30, seed=3), workers=2))
    whole = contents(root)
    assert len(again) == 61
    assert all(whole[name] == content for name, content in again.items() if name != MARKER)


def test_another_seed_draws_other_photos(plans) -> None:
    other = next(endless_plans(SyntheticConfig(seed=1)))
    assert _photo(other) != _photo(plans[0])
    assert other.record != plans[0].record


def test_a_finished_root_is_left_alone(root: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert make_synthetic_root(root, CONFIG) == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_a_root_is_there_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = SyntheticConfig(count=3, size=32), tmp_path / "root"

    def interrupt(_: Plan) -> bytes:
        raise KeyboardInterrupt

    (tmp_path / ".root.killed" / "bin-images").mkdir(parents=True)  # of a process that could not clean up
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(root_module, "_photo", interrupt)
        make_synthetic_root(folder, config)
    assert [path.name for path in tmp_path.iterdir()] == ["root.lock"]
    assert len(contents(make_synthetic_root(folder, config))) == 7


@pytest.mark.parametrize("name", [MARKER, "bin-images/00001.jpg"])
def test_a_folder_with_something_else_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    """The root of another config, or other photos."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes((root / name).read_bytes())
    before = contents(tmp_path)
    with pytest.raises(StocktakeError, match=f"{tmp_path} holds something else"):
        make_synthetic_root(tmp_path, SyntheticConfig(count=COUNT, seed=4))
    assert contents(tmp_path) == before
    with pytest.raises(StocktakeError, match=name):
        make_synthetic_root(tmp_path / name, CONFIG)


def test_photos_decode_in_the_real_sizes(root: Path) -> None:
    sizes = []
    for path in sorted((root / "bin-images").iterdir()):
        with Image.open(path) as photo:
            photo.load()
            assert photo.mode == "RGB"
            sizes.append(photo.size)
    square = [size for size in sizes if size == (224, 224)]
    assert 0.25 * COUNT < len(square) < 0.75 * COUNT
    for width, height in sizes:
        assert min(width, height) == 224
        assert max(width, height) <= 1.8 * 224


@pytest.mark.parametrize(("size", "photos"), [(32, 60), (64, 20), (1024, 3)])
def test_every_allowed_size_is_drawn(size: int, photos: int) -> None:
    for plan in islice(endless_plans(SyntheticConfig(size=size)), photos):
        assert min(Image.open(io.BytesIO(_photo(plan))).size) == size


def test_photos_have_the_real_ones_light_and_colour(root: Path) -> None:
    """Over the public photos: mean red 103..167, green 87..142, blue 72..110 (5 % to 95 %), spread 26..45."""
    means, spreads = [], []
    for path in sorted((root / "bin-images").iterdir()):
        pixels = np.asarray(Image.open(path), np.float64)
        means.append(pixels.mean((0, 1)))
        spreads.append(pixels.std())
    red, green, blue = np.median(means, 0)
    assert 115 < red < 150
    assert 97 < green < 130
    assert 75 < blue < 105
    assert 28 < np.median(spreads) < 45
    assert np.std(np.mean(means, 1)) > 8, "exposure varies"
    assert all(mean[0] > mean[2] for mean in means), "the fabric is yellow"


def test_records_have_the_public_fields(plans) -> None:
    entries = [entry for plan in plans for entry in plan.record["BIN_FCSKU_DATA"].values()]
    for plan in plans:
        assert set(plan.record) == {"BIN_FCSKU_DATA", "EXPECTED_QUANTITY"}
        assert all(key == entry["asin"] for key, entry in plan.record["BIN_FCSKU_DATA"].items())
    assert {frozenset(entry) for entry in entries} == {frozenset(FIELDS), frozenset(FIELDS - {"normalizedName"})}
    assert all(entry["height"] is None or entry["height"]["unit"] == "IN" for entry in entries)
    gaps = Counter(key for entry in entries for key in FIELDS if entry.get(key) is None)
    assert 0.01 < gaps["weight"] / len(entries) < 0.035
    assert 0.001 < gaps["normalizedName"] / len(entries) < 0.01
    assert gaps["name"] / len(entries) < 0.002


def test_quantities_sum_but_for_a_few_wrong_records(plans) -> None:
    wrong = 0
    for plan in plans:
        counted = sum(entry["quantity"] for entry in plan.record["BIN_FCSKU_DATA"].values())
        assert plan.record["EXPECTED_QUANTITY"] == len(plan.poses)
        wrong += counted != len(plan.poses)
    assert wrong / len(plans) < 0.003


def test_quantities_are_distributed_as_in_the_public_dataset(plans) -> None:
    counts = np.bincount([min(6, plan.record["EXPECTED_QUANTITY"]) for plan in plans], minlength=7)
    public = np.array([*QUANTITIES[:6], sum(QUANTITIES[6:])])
    expected = public / public.sum() * len(plans)
    # Snapshots of one bin depend on one another, so this is looser than independence would allow.
    assert ((counts - expected) ** 2 / expected).sum() < 60
    assert np.abs(counts / len(plans) - expected / len(plans)).max() < 0.03


def test_neighbouring_ids_are_often_one_bin_before_and_after_an_event(plans) -> None:
    changes: Counter[int] = Counter()
    shared: list[bool] = []
    neighbours: set[int] = set()
    for k, (before, after) in enumerate(itertools.pairwise(plans)):
        a, b = (set(plan.record["BIN_FCSKU_DATA"]) for plan in (before, after))
        if before.compartment != after.compartment:
            assert not a & b
            continue
        changes[after.record["EXPECTED_QUANTITY"] - before.record["EXPECTED_QUANTITY"]] += 1
        shared.append(2 * len(a & b) >= max(len(a), len(b)) if a and b else True)  # an emptied bin has nothing to share
        neighbours |= {k, k + 1}
    pairs = changes.total()
    assert 0.4 < len(neighbours) / len(plans) < 0.6
    assert np.mean(shared) > 0.98
    assert 0.45 < changes[-1] / pairs < 0.62
    assert 0.22 < changes[1] / pairs < 0.38
    assert changes[0] == 0


def test_snapshots_of_one_bin_look_alike_and_strangers_do_not(plans) -> None:
    def tiny(plan) -> np.ndarray:
        pixels = np.asarray(Image.open(io.BytesIO(_photo(plan))).resize((16, 16)), np.float64)
        return (pixels - pixels.mean()) / pixels.std()

    pairs = list(islice(((a, b) for a, b in itertools.pairwise(plans) if a.compartment == b.compartment), 12))
    snapshots = [np.abs(tiny(a) - tiny(b)).mean() for a, b in pairs]
    strangers = [np.abs(tiny(a) - tiny(b)).mean() for (a, _), (b, _) in itertools.pairwise(pairs) if a is not b]
    assert np.median(snapshots) < 0.75 * np.median(strangers)
    assert min(snapshots) > 0
