"""What the exploration says about a manifest, on bins small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from stocktake.evaluation import eda, eda_figures
from stocktake.evaluation.figures import save


def bins(n: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": [f"{i:05d}" for i in range(n)],
            "quantity": rng.integers(1, 5, n),
            "split": rng.choice(["train", "val", "test"], n),
            "width": rng.choice([224, 300], n),
            "height": 224,
            "bytes": rng.integers(5_000, 20_000, n),
            "group": [f"{i // 3 * 3:05d}" for i in range(n)],
            "flags": [["png", "greyscale"] if i % 10 == 0 else ["png"] if i % 5 == 0 else [] for i in range(n)],
        }
    )


def class_counts(frame: pd.DataFrame) -> pd.DataFrame:
    table = pd.crosstab(frame["quantity"], frame["split"])
    table = table.reindex(index=range(1, 5), columns=["train", "val", "test"], fill_value=0)
    return table.assign(all=table.sum(axis=1))


def test_imbalance_is_of_the_classes_that_have_a_bin():
    assert eda.imbalance_ratio(np.array([2, 0, 1])) == 2.0


def test_group_sizes_and_groups_across_splits():
    frame = pd.DataFrame({"group": list("aabbbc"), "split": ["train", "val", *["test"] * 4]})
    assert eda.group_sizes(frame).to_dict() == {1: 1, 2: 1, 3: 1}
    assert eda.groups_across_splits(frame) == 1


def test_neighbour_changes_are_of_consecutive_ids_in_one_group():
    frame = pd.DataFrame(
        {
            "id": ["0009", "0010", "0011", "0013", "0014", "x1", "x2"],
            "group": ["a", "a", "a", "a", "b", "c", "c"],
            "quantity": [3, 2, 4, 1, 5, 1, 2],
        }
    )
    assert eda.neighbour_changes(frame).to_dict() == {-1: 1, 2: 1}  # 9 to 10 and 10 to 11; 13 is no neighbour
    assert eda.neighbour_changes(frame.iloc[5:]).empty


def test_nearest_photo_is_the_one_a_full_search_finds():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 40, dtype=np.uint64)
    hashes[7] = hashes[30]
    distance, position = eda.nearest_photos(hashes, np.array([3, 7]))
    assert (distance[1], position[1]) == (0, 30)
    bits = [int(hashes[3] ^ other).bit_count() if i != 3 else 99 for i, other in enumerate(hashes)]
    assert distance[0] == min(bits) == bits[position[0]]
    assert eda.nearest_photos(hashes[:1], np.array([0]))[0].size == 0


def test_brightness_and_sharpness():
    white = np.full((32, 32, 3), 255, dtype=np.uint8)
    assert eda.photo_measures(white) == pytest.approx((255, 0), abs=0.01)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    blurred = noise.filter(ImageFilter.GaussianBlur(2))
    sharp, soft = (eda.photo_measures(np.asarray(image)) for image in (noise, blurred))
    assert soft[1] < sharp[1] / 100
    assert soft[0] == pytest.approx(sharp[0], abs=5)


def test_size_and_flag_tables():
    frame = bins()
    sizes = eda.size_table(frame)
    assert sizes["bins"].sum() == 60
    assert sizes["share"].sum() == pytest.approx(1)
    assert sizes["bins"].is_monotonic_decreasing
    flags = eda.flag_table(frame)
    assert flags[["flag", "bins"]].to_numpy().tolist() == [["png", 12], ["greyscale", 6]]
    assert eda.flag_table(frame[frame["flags"].str.len() == 0]).empty


@pytest.mark.parametrize("n", [1, 60])
def test_figures_of_few_and_many_bins(tmp_path: Path, n: int):
    frame = bins(n)
    rng = np.random.default_rng(0)
    photos = [(f"${i}_$", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for i in range(7)]
    figures = {
        "classes": eda_figures.classes_figure(class_counts(frame)),
        "sheet": eda_figures.sheet_figure({"": photos[:n], "more": photos}, "Photos"),
        "sizes": eda_figures.sizes_figure(frame),
        "light": eda_figures.light_figure(rng.uniform(0, 255, n), np.zeros(n)),
        "snapshots": eda_figures.snapshots_figure(eda.group_sizes(frame), eda.neighbour_changes(frame)),
        "nearest": eda_figures.nearest_figure(rng.integers(0, 20, n), rng.random(n) < 0.5, 4),
    }
    for name, figure in figures.items():
        save(figure, tmp_path / f"{name}.png", dpi=50)
        with Image.open(tmp_path / f"{name}.png") as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20, name
