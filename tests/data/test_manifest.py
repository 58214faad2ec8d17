"""The manifest: what is used, what is rejected, what is read again, and what its fingerprint says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from stocktake.config.data import BinsConfig, SplitConfig
from stocktake.data import checks
from stocktake.data.images import decode, resize_to_square
from stocktake.data.manifest import Manifest, build_manifest
from stocktake.data.photos import photo_cache, prepare_photos
from stocktake.data.sources import Source
from stocktake.errors import StocktakeError

QUANTITIES = [1, 2, 3, 4, 5] * 8
COLUMNS = ["id", "quantity", "split", "width", "height", "bytes", "hash", "phash", "group", "items", "flags"]


@pytest.fixture
def config(tmp_path: Path, make_root: Callable[..., Path]) -> BinsConfig:
    """40 bins, each its own group."""
    return BinsConfig(root=str(make_root(tmp_path / "root", QUANTITIES)), workspace=str(tmp_path / "workspace"))


@pytest.fixture
def photos_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids whose photos are read from now on."""
    read: list[str] = []
    original = Source.photo

    def photo(self: Source, bin_id: str) -> bytes:
        read.append(bin_id)
        return original(self, bin_id)

    monkeypatch.setattr(Source, "photo", photo)
    return read


def root_of(config: BinsConfig) -> Path:
    return Path(config.root or "")


def reasons(manifest: Manifest) -> dict[str, str]:
    return dict(zip(manifest.rejected["id"], manifest.rejected["reason"], strict=True))


def test_a_row_a_bin_with_what_is_known_of_it(config: BinsConfig, bin_photo: Callable[..., bytes]) -> None:
    manifest = build_manifest(config)
    assert list(manifest.bins.columns) == COLUMNS
    assert manifest.bins["id"].tolist() == [f"{number:05d}" for number in range(1, 41)]
    assert manifest.bins["quantity"].tolist() == QUANTITIES
    row = manifest.bins.iloc[1]
    assert (row["width"], row["height"], row["bytes"]) == (48, 40, len(bin_photo("00002")))
    assert (list(row["items"]), list(row["flags"]), row["group"]) == (["item-00002"], [], "00002")
    assert len(row["phash"]) == 16
    assert manifest.bins["hash"].is_unique
    assert (len(manifest.rejected), manifest.out_of_range, manifest.labels) == (0, 0, (1, 2, 3, 4, 5))
    written = pd.read_parquet(manifest.folder / "manifest.parquet")
    assert written["id"].tolist() == manifest.bins["id"].tolist()
    assert written["split"].tolist() == manifest.bins["split"].tolist()
    assert not list(manifest.folder.glob(".*"))


def test_a_second_call_reads_no_photo_and_is_the_same(config: BinsConfig, photos_read: list[str]) -> None:
    first = build_manifest(config)
    assert sorted(photos_read) == first.bins["id"].tolist()
    photos_read.clear()
    second = build_manifest(config)
    assert photos_read == []
    assert second.fingerprint == first.fingerprint
    pd.testing.assert_frame_equal(
        first.bins.assign(items=first.bins["items"].map(list), flags=first.bins["flags"].map(list)),
        second.bins.assign(items=second.bins["items"].map(list), flags=second.bins["flags"].map(list)),
    )


@pytest.mark.parametrize("changed", ["photo", "time", "record"])
def test_a_changed_bin_is_read_again_and_only_it(
    config: BinsConfig, photos_read: list[str], bin_photo: Callable[..., bytes], changed: str
) -> None:
    before = build_manifest(config)
    photos_read.clear()
    photo = root_of(config) / "bin-images" / "00007.jpg"
    if changed == "photo":
        photo.write_bytes(bin_photo("another", size=(30, 20)))
    elif changed == "time":  # of a photo of the same size
        os.utime(photo, ns=(0, photo.stat().st_mtime_ns + 1))
    else:
        (root_of(config) / "metadata" / "00007.json").write_text('{"EXPECTED_QUANTITY": 4}')
    after = build_manifest(config)
    assert photos_read == ["00007"]
    row = after.bins.set_index("id").loc["00007"]
    expected = {
        "photo": (30, 2, []),
        "time": (48, 2, []),
        "record": (48, 4, ["record_disagrees", "no_items"]),
    }
    assert (row["width"], row["quantity"], list(row["flags"])) == expected[changed]
    assert (after.fingerprint == before.fingerprint) == (changed == "time")


def test_bins_that_come_and_go_are_noticed(
    config: BinsConfig, photos_read: list[str], write_bin: Callable[..., None]
) -> None:
    before = build_manifest(config)
    photos_read.clear()
    write_bin(root_of(config), "90000", 2)
    more = build_manifest(config)
    assert (photos_read, len(more.bins)) == (["90000"], 41)
    kept = more.bins[more.bins["id"] != "90000"]
    assert kept["split"].tolist() == before.bins["split"].tolist()
    for file in ("bin-images/90000.jpg", "metadata/90000.json"):
        (root_of(config) / file).unlink()
    assert build_manifest(config).fingerprint == before.fingerprint


def test_a_fingerprint_is_of_the_data_not_of_its_place_or_order(
    config: BinsConfig, tmp_path: Path, write_bin: Callable[..., None]
) -> None:
    for number, quantity in reversed([*enumerate(QUANTITIES, 1)]):
        write_bin(tmp_path / "elsewhere", f"{number:05d}", quantity)
    first = build_manifest(config)
    moved = build_manifest(dataclasses.replace(config, root=str(tmp_path / "elsewhere")))
    assert moved.fingerprint == first.fingerprint
    assert moved.folder != first.folder
    for changed in (
        dataclasses.replace(config, task="1-4"),
        dataclasses.replace(config, split=SplitConfig(seed=1)),
        dataclasses.replace(config, split=SplitConfig(fractions=(0.5, 0.2, 0.3))),
    ):
        assert build_manifest(changed).fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ["garbage", "cut", "other bytes", "empty", "other checks"])
def test_damaged_checks_are_made_again(
    config: BinsConfig, photos_read: list[str], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    manifest = build_manifest(config)
    (memory,) = manifest.folder.glob("checks-*.sqlite")
    whole = memory.read_bytes()
    contents = {
        "garbage": b"no table" * 100,
        "cut": whole[: len(whole) // 2],
        "other bytes": whole[:100] + bytes(len(whole) - 100),
        "empty": b"",
        "other checks": whole,
    }
    memory.write_bytes(contents[damage])
    if damage == "other checks":
        monkeypatch.setattr(checks, "CHECKS_VERSION", checks.CHECKS_VERSION + 1)
    photos_read.clear()
    assert build_manifest(config).fingerprint == manifest.fingerprint
    assert len(photos_read) == 40
    photos_read.clear()
    build_manifest(config)
    assert photos_read == []


CHECK = """
import os, sys
from stocktake.config.data import BinsConfig
from stocktake.data import checks
from stocktake.data.manifest import build_manifest
from stocktake.data.sources import Source
photo, read = Source.photo, []
def counted(self, bin_id):
    read.append(bin_id)
    if len(read) > 30:
        os.kill(os.getpid(), 9)
    return photo(self, bin_id)
Source.photo = counted
checks._CHUNK = 8
build_manifest(BinsConfig(root=sys.argv[1], workspace=sys.argv[2]))
"""


def test_checks_are_saved_as_they_are_made(config: BinsConfig, photos_read: list[str]) -> None:
    command = [sys.executable, "-c", CHECK, config.root or "", config.workspace]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(build_manifest(config).bins) == 40
    assert len(photos_read) <= 40 - 24


def test_a_photo_is_read_and_decoded_once(config: BinsConfig, photos_read: list[str]) -> None:
    """Checked, and prepared for training, on a first run."""
    manifest = build_manifest(config, photo_size=24)
    photos = prepare_photos(manifest.source, manifest.bins, 24, Path(config.workspace))
    assert sorted(photos_read) == manifest.bins["id"].tolist()
    for bin_id, key in zip(manifest.bins["id"], manifest.bins["hash"], strict=True):
        data = (root_of(config) / "bin-images" / f"{bin_id}.jpg").read_bytes()
        assert (photos[key] == resize_to_square(decode(data), 24)).all()


def test_a_damaged_cache_of_photos_is_filled_anew_with_those_of_the_task(
    config: BinsConfig, photos_read: list[str]
) -> None:
    cache = photo_cache(Path(config.workspace), 24)
    cache.path.parent.mkdir(parents=True)
    cache.path.write_bytes(b"no cache" * 1000)
    manifest = build_manifest(dataclasses.replace(config, task="2-3"), photo_size=24)
    assert cache.missing(manifest.bins["hash"]) == []
    assert (len(cache), len(photos_read)) == (16, 40)


def test_a_split_does_not_depend_on_the_limit_nor_on_the_task(
    config: BinsConfig, write_bin: Callable[..., None]
) -> None:
    """Bin 00000, of another quantity, names the group of some bins that a task or a limit would take alone."""
    for number in range(1, 41):
        write_bin(root_of(config), f"0{number:04d}a", 7, items=[f"item-{number:05d}", f"item-{number + 1:05d}"])
    split_of = dict(build_manifest(dataclasses.replace(config, task="0-9")).bins[["id", "split"]].to_numpy())
    for changed in ({"task": "1-3"}, {"limit": 7}, {"task": "2-3", "limit": 5}):
        elsewhere = f"{config.workspace}-{len(changed)}-{changed.get('limit')}"  # where no assignment is remembered
        bins = build_manifest(dataclasses.replace(config, workspace=elsewhere, **changed)).bins
        assert len(bins) == {"1-3": 24}.get(str(changed.get("task")), changed.get("limit"))
        assert {bin_id: split_of[bin_id] for bin_id in bins["id"]} == dict(bins[["id", "split"]].to_numpy())


def test_the_largest_group_is_reported(config: BinsConfig, write_bin: Callable[..., None]) -> None:
    for number in range(5):
        write_bin(root_of(config), f"9000{number}", 7, items=["shared"])
    assert build_manifest(config).largest_group == 5


def test_quantities_outside_the_task_are_counted_and_left_out(config: BinsConfig) -> None:
    manifest = build_manifest(dataclasses.replace(config, task="2-3"))
    assert set(manifest.bins["quantity"]) == {2, 3}
    assert (len(manifest.bins), manifest.out_of_range, len(manifest.rejected)) == (16, 24, 0)
    with pytest.raises(StocktakeError, match=r"--task 6-9 matches no bin of .*: its quantities are 1 to 5"):
        build_manifest(dataclasses.replace(config, task="6-9"))


def test_counts_have_a_cell_for_each_quantity_and_split(config: BinsConfig) -> None:
    manifest = build_manifest(dataclasses.replace(config, task="0-5"))
    counts = manifest.counts()
    assert (list(counts.index), list(counts.columns)) == ([0, 1, 2, 3, 4, 5], ["train", "val", "test"])
    assert counts.loc[0].sum() == 0
    assert counts.to_numpy().sum() == 40
    assert counts["val"].sum() == len(manifest.split("val"))
    assert {(split, label): n for split, label, n in manifest.counted()} == {
        (split, label): counts.loc[label, split] for split in counts.columns for label in counts.index
    }


def test_a_list_names_the_bins_to_use(config: BinsConfig, tmp_path: Path, photos_read: list[str]) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"1": ["data/metadata/00001.json"], "2": ["data/metadata/00007.json", "x/77777.json"]}))
    manifest = build_manifest(dataclasses.replace(config, list=str(path)))
    assert manifest.bins["id"].tolist() == ["00001", "00007"]
    assert sorted(photos_read) == ["00001", "00007"]
    assert reasons(manifest) == {"77777": "named by --list, but not in the root"}
    written = pd.read_csv(manifest.folder / "rejected.csv", dtype=str)
    assert written["id"].tolist() == ["77777"]
    photos_read.clear()
    assert len(build_manifest(config).bins) == 40
    assert len(photos_read) == 38  # the listed ones are remembered
    photos_read.clear()
    (root_of(config) / "metadata" / "00001.json").touch()
    build_manifest(dataclasses.replace(config, list=str(path)))
    build_manifest(config)
    assert photos_read == ["00001"]  # and so are the others when only the listed ones are looked at


def test_snapshots_stay_together_unless_split_by_id(config: BinsConfig, write_bin: Callable[..., None]) -> None:
    for number in range(1, 41):
        write_bin(root_of(config), f"{number:05d}b", 2, items=[f"item-{number:05d}"])
    grouped = build_manifest(config).bins
    assert grouped["group"].nunique() == 40
    assert (grouped.groupby("group")["split"].nunique() == 1).all()
    by_id = build_manifest(dataclasses.replace(config, split=SplitConfig(by="id"))).bins
    assert (by_id["group"] == grouped["group"]).all()
    assert (by_id.groupby("group")["split"].nunique() > 1).any()


def test_splits_are_remembered_as_a_root_changes(config: BinsConfig, write_bin: Callable[..., None]) -> None:
    """A smaller id that joins each bin, and a bin between two groups of different splits."""
    before = build_manifest(config).bins.set_index("id")["split"]
    for number in range(1, 41):
        write_bin(root_of(config), f"{number:05d}"[1:], 2, items=[f"item-{number:05d}"])
    assert all(build_manifest(config).bins.set_index("id")["split"][before.index] == before)
    in_train, in_test = (before.index[before == split][0] for split in ("train", "test"))
    write_bin(root_of(config), "90000", 2, items=[f"item-{in_train}", f"item-{in_test}"])
    joined = build_manifest(config)
    assert (joined.conflicts.groups, joined.conflicts.bins) == (1, 2)
    splits = joined.bins.set_index("id")["split"]
    assert splits[in_test] == splits["90000"] == "train"
    again = build_manifest(config)
    assert (again.fingerprint, again.conflicts.groups) == (joined.fingerprint, 0)


def test_splits_of_a_list_are_kept_in_the_whole_root(
    config: BinsConfig, write_bin: Callable[..., None], tmp_path: Path
) -> None:
    """The list draws a group by another first id than the whole root would."""
    for number in range(1, 41):
        write_bin(root_of(config), f"{number:05d}b", 2, items=[f"item-{number:05d}"])
    path = tmp_path / "list.json"
    path.write_text(json.dumps([f"{number:05d}b" for number in range(1, 41)]))
    listed = build_manifest(dataclasses.replace(config, list=str(path))).bins.set_index("id")["split"]
    assert all(build_manifest(config).bins.set_index("id")["split"][listed.index] == listed)


def test_other_settings_have_a_memory_of_their_own(config: BinsConfig) -> None:
    first = build_manifest(config)
    other = build_manifest(dataclasses.replace(config, split=SplitConfig(seed=1)))
    assert other.fingerprint != first.fingerprint
    assert build_manifest(config).fingerprint == first.fingerprint
    assert len(list(first.folder.glob("splits-*.parquet"))) == 2


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "moved", "twice"])
def test_a_damaged_memory_is_named_and_never_overwritten(config: BinsConfig, damage: str, tmp_path: Path) -> None:
    first = build_manifest(config)
    (memory,) = first.folder.glob("splits-*.parquet")
    good = memory.read_bytes()
    kept = tmp_path / "splits.parquet"
    kept.write_bytes(good)
    table = pd.read_parquet(memory)
    if damage in ("moved", "twice"):
        table = table.replace("test", "holdout") if damage == "moved" else pd.concat([table, table])
        table.to_parquet(memory)
    else:
        flipped = good[:60] + bytes([good[60] ^ 16]) + good[61:]
        memory.write_bytes({"empty": b"", "half": good[: len(good) // 2], "flipped": flipped}[damage])
    damaged = memory.read_bytes()
    for _ in range(2):
        with pytest.raises(StocktakeError, match=re.escape(str(memory))):
            build_manifest(config)
    assert memory.read_bytes() == damaged
    assert build_manifest(dataclasses.replace(config, split=SplitConfig(like=str(kept)))).fingerprint == (
        first.fingerprint
    )
    shutil.copy(kept, memory)
    assert build_manifest(config).fingerprint == first.fingerprint


def test_a_split_like_another_one_goes_on_from_it(
    config: BinsConfig, write_bin: Callable[..., None], tmp_path: Path
) -> None:
    """The same bins, at another place and in another workspace, and then more of them."""
    kept = tmp_path / "splits.parquet"
    other = build_manifest(dataclasses.replace(config, split=SplitConfig(seed=7)))
    other.bins[["id", "split"]].to_parquet(kept)
    alike = dataclasses.replace(config, workspace=str(tmp_path / "w2"), split=SplitConfig(like=str(kept)))
    assert build_manifest(alike).fingerprint == other.fingerprint
    write_bin(root_of(config), "00000", 1, items=["item-00001"])
    write_bin(root_of(config), "90000", 1)
    write_bin(root_of(config), "0", 1, items=["item-90000"])
    grown = build_manifest(alike).bins.set_index("id")["split"]
    assert all(grown[other.bins["id"]].to_numpy() == other.bins["split"])
    assert grown["90000"] == grown["0"]
    assert build_manifest(config).fingerprint != build_manifest(alike).fingerprint  # drawn without it


@pytest.mark.parametrize("content", [None, b"id,split\n1,train\n"])
def test_a_file_of_no_splits_is_named(config: BinsConfig, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "like.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StocktakeError, match=re.escape(f"--split.like {path}")):
        build_manifest(dataclasses.replace(config, split=SplitConfig(like=str(path))))


def test_two_builds_at_once_forget_nothing(config: BinsConfig) -> None:
    """Each knows bins that the other does not list."""
    ids = [f"{number:05d}" for number in range(1, 41)]
    lists = [root_of(config).parent / f"list-{name}.json" for name in ("a", "b")]
    for path, half in zip(lists, (ids[:20], ids[20:]), strict=True):
        path.write_text(json.dumps(half))
    threads = [
        threading.Thread(target=build_manifest, args=(dataclasses.replace(config, list=str(path)),)) for path in lists
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (memory,) = build_manifest(dataclasses.replace(config, list=str(lists[0]))).folder.glob("splits-*.parquet")
    assert pd.read_parquet(memory)["id"].tolist() == ids


def test_a_root_may_be_all_test(config: BinsConfig) -> None:
    manifest = build_manifest(dataclasses.replace(config, split=SplitConfig(fractions=(0, 0, 1))))
    assert set(manifest.bins["split"]) == {"test"}
    with pytest.raises(StocktakeError, match=r"train split of .* is empty"):
        manifest.require_train_classes()


def test_the_same_photo_under_two_records_is_one_group(config: BinsConfig, write_bin: Callable[..., None]) -> None:
    photo = (root_of(config) / "bin-images" / "00001.jpg").read_bytes()
    write_bin(root_of(config), "90000", 3, photo=photo)
    bins = build_manifest(config).bins.set_index("id")
    assert bins.loc["90000", "group"] == "00001"


def test_learning_needs_every_quantity_in_train_and_no_empty_split(
    tmp_path: Path, make_root: Callable[..., Path]
) -> None:
    config = BinsConfig(root=str(make_root(tmp_path / "root", [1, 2, 2, 2, 2, 2])), workspace=str(tmp_path), task="1-2")
    in_test = build_manifest(config)  # bin 00001 falls into test
    with pytest.raises(StocktakeError, match=r"quantity 1 has no bin in the train split of .*narrow --task"):
        in_test.require_train_classes()
    others = build_manifest(dataclasses.replace(config, split=SplitConfig(fractions=(0.98, 0.01, 0.01))))
    with pytest.raises(StocktakeError, match=r"the (val|test) split of .* is empty \(6 bins in all\)"):
        others.require_train_classes()
    enough = BinsConfig(root=str(make_root(tmp_path / "more", QUANTITIES)), workspace=str(tmp_path))
    build_manifest(enough).require_train_classes()


def test_a_bad_bin_is_rejected_with_its_file_and_the_rest_is_used(
    config: BinsConfig, write_bin: Callable[..., None]
) -> None:
    root = root_of(config)
    write_bin(root, "91000", photo=b"")
    write_bin(root, "91001", record=b"{")
    write_bin(root, "91002")
    (root / "bin-images" / "91002.jpg").unlink()
    write_bin(root, "91003")
    (root / "metadata" / "91003.json").unlink()
    write_bin(root, "91004")
    (root / "bin-images" / "91004.jpg").unlink()
    (root / "bin-images" / "91004.jpg").mkdir()
    manifest = build_manifest(config)
    assert len(manifest.bins) == 40
    rejected = manifest.rejected.set_index("id")
    assert rejected["file"].to_dict() == {
        "91000": "bin-images/91000.jpg",
        "91001": "metadata/91001.json",
        "91002": "bin-images/91002.jpg",
        "91003": "metadata/91003.json",
        "91004": "bin-images/91004.jpg",
    }
    assert rejected.loc["91000", "reason"] == "photo is empty"
    assert rejected.loc["91001", "reason"].startswith("record is not JSON")
    assert rejected.loc["91002", "reason"] == rejected.loc["91003", "reason"] == "file is missing"
    assert rejected.loc["91004", "reason"] == "file cannot be read: Is a directory"
    assert build_manifest(config).rejected.equals(manifest.rejected)
    write_bin(root, "91000")
    assert "91000" in build_manifest(config).bins["id"].tolist()


def test_any_text_in_a_record_can_be_remembered(config: BinsConfig, write_bin: Callable[..., None]) -> None:
    record = rb'{"EXPECTED_QUANTITY": 1, "BIN_FCSKU_DATA": {"\ud800, \u0000 \n \"": {"quantity": 1}}}'
    write_bin(root_of(config), "91000", record=record)
    for _ in range(2):
        assert "91000" in build_manifest(config).bins["id"].tolist()


@pytest.mark.parametrize("in_the_way", ["manifest.parquet", "rejected.csv", "checks-v2.sqlite"])
def test_a_workspace_that_cannot_be_written_is_named(config: BinsConfig, in_the_way: str) -> None:
    """A folder where a file should be: refused to any user, root too."""
    blocked = build_manifest(config).folder / in_the_way
    blocked.unlink()
    blocked.mkdir()
    (blocked / "kept").touch()
    with pytest.raises(StocktakeError, match=f"{config.workspace}.* cannot be written"):
        build_manifest(config)
    assert not list(blocked.parent.glob(".*"))


def test_a_rotated_photo_has_its_upright_size(
    config: BinsConfig, write_bin: Callable[..., None], bin_photo: Callable[..., bytes]
) -> None:
    write_bin(root_of(config), "91000", photo=bin_photo(1, orientation=6))
    row = build_manifest(config).bins.set_index("id").loc["91000"]
    assert (row["width"], row["height"], list(row["flags"])) == (40, 48, ["exif_rotated"])


def test_with_no_root_a_synthetic_one_is_made(tmp_path: Path) -> None:
    config = BinsConfig(workspace=str(tmp_path))
    config.synthetic.count, config.synthetic.size = 12, 32
    manifest = build_manifest(dataclasses.replace(config, task="0-99"))
    assert len(manifest.bins) == 12
    assert Path(manifest.source.root).is_relative_to(tmp_path)
    with Image.open(next((Path(manifest.source.root) / "bin-images").iterdir())) as photo:
        assert min(photo.size) == 32
