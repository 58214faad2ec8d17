"""A bucket's bins on this machine: whole, once, again after a kill, and with a reason for what is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from s3_server import Server, serve
from stocktake.commands.data import data
from stocktake.config.data import BinsConfig, DataConfig, S3Config
from stocktake.data import s3_download
from stocktake.data.manifest import Manifest, build_manifest
from stocktake.data.s3_client import ObjectError
from stocktake.data.sources import open_source
from stocktake.errors import StocktakeError

QUANTITIES = [1, 2, 3, 4, 5, 0, 7, 2] * 3
QUICK = S3Config(retries=2, timeout=20, concurrency=8)


@pytest.fixture
def root(tmp_path: Path, make_root: Callable[..., Path]) -> Path:
    """24 bins, of which 18 are of the task 1-5."""
    return make_root(tmp_path / "root", QUANTITIES)


@pytest.fixture
def config(tmp_path: Path) -> BinsConfig:
    return BinsConfig(root="s3://bins", workspace=str(tmp_path / "workspace"), s3=replace(QUICK))


@pytest.fixture
def server(root: Path, served: Callable[..., Server]) -> Server:
    """The root as the bucket s3://bins."""
    return served(root, page=20)


def of_folder(config: BinsConfig, root: Path) -> Manifest:
    return build_manifest(replace(config, root=str(root)))


def keys_of(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*.*")}


def objects_asked(server: Server) -> dict[str, int]:
    return {key: count for key, count in server.seen().items() if key not in ("LIST", "index.parquet")}


def mirror_of(config: BinsConfig) -> Path:
    (folder,) = (path for path in (Path(config.workspace) / "mirrors").iterdir() if path.is_dir())
    return folder


# Whole, and once ------------------------------------------------------------------------------------------------------


def test_a_buckets_manifest_is_the_folders(config: BinsConfig, root: Path, server: Server, tmp_path: Path) -> None:
    manifest, expected = build_manifest(config), of_folder(config, root)
    assert manifest.fingerprint == expected.fingerprint
    pd.testing.assert_frame_equal(manifest.bins, expected.bins)
    assert (manifest.source.root, manifest.out_of_range) == ("s3://bins", expected.out_of_range)
    for bin_id in ("00001", "00024"):
        assert manifest.source.photo(bin_id) == (root / "bin-images" / f"{bin_id}.jpg").read_bytes()
    assert objects_asked(server) == dict.fromkeys(keys_of(root), 1)
    os.kill(server.pid, 9)  # what is here is not asked for again
    assert build_manifest(config).fingerprint == expected.fingerprint
    exported = data(DataConfig(**vars(config), export=str(tmp_path / "tree")))
    assert len(list((tmp_path / "tree").glob("*/*/*.jpg"))) == exported["bins"] == 18


def test_bins_are_fetched_by_list_without_a_listing(
    config: BinsConfig, root: Path, server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "list.json"
    ids = {"00001", "00009", "00002", "00010"}
    path.write_text(json.dumps({"1": ["data/metadata/00001.json", "00009"], "2": ["00002", "00010"]}))
    listed = replace(config, list=str(path))
    assert build_manifest(listed).fingerprint == of_folder(listed, root).fingerprint
    assert "LIST" not in server.seen()
    assert {Path(key).stem for key in objects_asked(server)} == ids


@pytest.mark.parametrize(("limit", "task"), [(5, "1-5"), (5, "4-7"), (100, "1-5")])
def test_a_limit_is_the_first_bins_of_the_task(
    limit: int, task: str, config: BinsConfig, root: Path, server: Server
) -> None:
    limited = replace(config, limit=limit, task=task)
    manifest, expected = build_manifest(limited), of_folder(limited, root)
    assert manifest.fingerprint == expected.fingerprint
    assert dict(manifest.bins[["id", "split"]].to_numpy()) == dict(expected.bins[["id", "split"]].to_numpy())
    photos = {Path(key).stem for key in objects_asked(server) if key.startswith("bin-images/")}
    assert photos == set(manifest.bins["id"])  # of what is outside the task, the record only
    assert len(manifest.bins) == min(limit, 18)
    seen = server.seen()
    assert build_manifest(limited).fingerprint == expected.fingerprint
    assert server.seen() == seen
    assert build_manifest(config).fingerprint == of_folder(config, root).fingerprint  # all of them, later
    assert max(objects_asked(server).values()) == 1


def test_a_smaller_copy_is_kept_by_setting(
    tmp_path: Path,
    config: BinsConfig,
    bin_photo: Callable[..., bytes],
    write_bin: Callable[..., None],
    served: Callable[..., Server],
) -> None:
    root = tmp_path / "large"
    for number in range(1, 6):
        size = (200, 160) if number > 1 else (60, 48)
        write_bin(root, f"{number:05d}", number, photo=bin_photo(number, size))
    write_bin(root, "00006", 2, photo=b"no photo")
    served(root)
    whole = build_manifest(config)
    small = build_manifest(replace(config, s3=replace(QUICK, resize=64)))
    assert set(zip(small.bins["width"], small.bins["height"], strict=True)) == {(60, 48), (80, 64)}
    assert small.bins["hash"][0] == whole.bins["hash"][0]  # small enough as it came
    assert small.rejected["reason"].tolist() == whole.rejected["reason"].tolist()
    with Image.open(small.source.folder / "bin-images" / "00002.jpg") as photo:
        assert photo.format == "JPEG"
    assert small.source.folder != whole.source.folder


def test_a_large_bucket_is_not_fetched_unasked(
    config: BinsConfig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_download, "UNASKED", 16)
    with pytest.raises(StocktakeError, match=r"more than 16 photos .*--limit N.*--list"):
        build_manifest(config)
    assert objects_asked(server) == {}
    assert len(build_manifest(replace(config, limit=10)).bins) == 10
    assert len(build_manifest(config).bins) == 18  # the rest is little


def test_of_two_at_once_one_fetches(config: BinsConfig, root: Path, server: Server) -> None:
    with ThreadPoolExecutor(2) as threads:
        sources = list(threads.map(lambda _: open_source("s3://bins", config, range(1, 6), None), range(2)))
    assert sources[0].ids() == sources[1].ids() == sorted({Path(key).stem for key in keys_of(root)})
    assert objects_asked(server) == dict.fromkeys(keys_of(root), 1)


# Faults ---------------------------------------------------------------------------------------------------------------


def test_faults_by_schedule_change_nothing(config: BinsConfig, root: Path, served: Callable[..., Server]) -> None:
    kinds = ["503", "reset", "truncate", "corrupt", "slow"]
    faults = [{"key": f"{digit}\\.(jpg|json)$", "do": kind, "times": 2} for digit, kind in enumerate(kinds)]
    server = served(root, faults=faults)
    manifest = build_manifest(config)
    assert manifest.fingerprint == of_folder(config, root).fingerprint
    assert set(objects_asked(server).values()) == {1, 2, 3}
    assert len(manifest.rejected) == 0
    for key in keys_of(root):
        assert (mirror_of(config) / key).read_bytes() == (root / key).read_bytes()


def test_a_killed_download_goes_on_without_fetching_again(
    config: BinsConfig, root: Path, served: Callable[..., Server]
) -> None:
    server = served(root, delay=0.1)
    command = [sys.executable, "-m", "stocktake", "data", "--root", "s3://bins", "--workspace", config.workspace]
    process = subprocess.Popen([*command, "--s3.concurrency", "4"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    mirrors = Path(config.workspace) / "mirrors"
    while len(list(mirrors.glob("*/*/[0-9]*.jp*g")) + list(mirrors.glob("*/*/[0-9]*.json"))) < 24:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    copied = {str(path.relative_to(mirror_of(config))) for path in mirror_of(config).glob("*/[0-9]*.j*")}
    assert 24 <= len(copied) < len(keys_of(root))
    (mirror_of(config) / "bin-images" / ".00024.1.jpg").write_bytes(b"half")
    assert build_manifest(config).fingerprint == of_folder(config, root).fingerprint
    requests = objects_asked(server)
    assert {requests[key] for key in copied} == {1}
    assert sum(requests.values()) <= len(keys_of(root)) + 4  # those on their way when it was killed
    assert not list(mirror_of(config).glob("*/.*"))


def test_what_is_missing_is_rejected_and_not_asked_for_again(
    config: BinsConfig, root: Path, tmp_path: Path, served: Callable[..., Server]
) -> None:
    path = tmp_path / "list.json"
    ids = [f"{number:05d}" for number in range(1, 25)]
    path.write_text(json.dumps([*ids, "77777"]))
    for key in ("bin-images/00001.jpg", "metadata/00002.json"):
        (root / key).unlink()
    server = served(root)
    listed = replace(config, list=str(path))
    manifest = build_manifest(listed)
    rejected = pd.read_csv(manifest.folder / "rejected.csv", dtype=str)
    assert dict(zip(rejected["id"], rejected["reason"], strict=True)) == {
        "00001": "file is missing",
        "00002": "file is missing",
        "77777": "named by --list, but not in the root",
    }
    assert manifest.fingerprint == of_folder(listed, root).fingerprint
    seen = server.seen()
    build_manifest(listed)
    assert server.seen() == seen
    build_manifest(replace(listed, s3=replace(QUICK, refresh=True)))
    assert server.seen()["metadata/77777.json"] == 2


def test_a_refresh_follows_the_bucket(
    config: BinsConfig, root: Path, served: Callable[..., Server], write_bin: Callable[..., None]
) -> None:
    with serve(root) as before, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", before.url)
        build_manifest(config)
    for name in ("bin-images/00001.jpg", "metadata/00001.json"):
        (root / name).unlink()
    write_bin(root, "00060", 3)
    served(root, port=int(before.url.rpartition(":")[2]))
    assert "00060" not in set(build_manifest(config).bins["id"])
    manifest = build_manifest(replace(config, s3=replace(QUICK, refresh=True)))
    assert manifest.fingerprint == of_folder(config, root).fingerprint
    assert "00060" in set(manifest.bins["id"])


def test_one_refused_object_is_rejected_with_the_reason(
    config: BinsConfig, root: Path, served: Callable[..., Server]
) -> None:
    faults = [
        {"key": "bin-images/00003", "do": "403", "times": 99},
        {"key": "metadata/00004", "do": "corrupt", "times": 99},
    ]
    server = served(root, faults=faults)
    manifest = build_manifest(config)
    seen = server.seen()
    assert build_manifest(config).fingerprint == manifest.fingerprint
    assert server.seen() == seen
    reasons = dict(zip(manifest.rejected["id"], manifest.rejected["reason"], strict=True))
    assert reasons.keys() == {"00003", "00004"}
    assert "access is denied" in reasons["00003"]
    assert "never as its checksum says" in reasons["00004"]


@pytest.mark.parametrize(("fault", "is_temporary"), [("403", False), ("corrupt", False), ("503", True)])
def test_a_bucket_that_gives_nothing_ends_the_command_soon(
    fault: str, is_temporary: bool, config: BinsConfig, root: Path, served: Callable[..., Server]
) -> None:
    server = served(root, faults=[{"key": "^(bin-images|metadata)/", "do": fault, "times": 99}])
    hasty = replace(config, s3=replace(QUICK, retries=1, concurrency=2))
    with pytest.raises(ObjectError, match="--root s3://bins: metadata/") as failure:
        build_manifest(hasty)
    assert failure.value.is_temporary == is_temporary
    assert len(objects_asked(server)) <= 32
    served(root)
    assert build_manifest(config).fingerprint == of_folder(config, root).fingerprint


def test_an_empty_and_a_missing_bucket_are_named(config: BinsConfig, server: Server) -> None:
    with pytest.raises(StocktakeError, match="--root s3://bins/nothing holds no bins"):
        build_manifest(replace(config, root="s3://bins/nothing"))
    with pytest.raises(StocktakeError, match="--root s3://others: there is no bucket others"):
        build_manifest(replace(config, root="s3://others"))
