"""A published set: the same bytes for the same bins, sent once, and read as if it were the original root."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stocktake.commands.data import data
from stocktake.config import BinsConfig, DataConfig, S3Config, SplitConfig
from stocktake.data import shards
from stocktake.data.manifest import Manifest, build_manifest
from stocktake.data.photos import prepare_photos
from stocktake.data.s3_source import Bucket, S3Address
from stocktake.data.shards import Index, cut, pack, publish, unpack
from stocktake.data.source import FolderSource
from stocktake.data.splits import SPLITS
from stocktake.errors import StocktakeError
from stocktake.training.data import BinsDataModule

pytestmark = pytest.mark.aws
QUANTITIES = [1, 2, 3, 4, 5, 7] * 12
SPLIT = SplitConfig(fractions=(0.6, 0.2, 0.2), seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_root: Callable[..., Path]) -> Path:
    """72 bins, of which 60 are of the task 1-5: read only."""
    return make_root(tmp_path_factory.mktemp("shards") / "root", QUANTITIES)


@pytest.fixture
def config(tmp_path: Path, root: Path) -> DataConfig:
    s3 = S3Config(retries=2, timeout=30)
    return DataConfig(root=str(root), workspace=str(tmp_path / "here"), split=SPLIT, s3=s3)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some twenty bins a shard."""
    monkeypatch.setattr(shards, "_BYTES_PER_MB", 70_000)


def bucket_of(address: str) -> Bucket:
    return Bucket(S3Address.parse(address), S3Config(retries=2, timeout=30), "--publish")


def published(config: DataConfig, address: str) -> tuple[Manifest, Index, int]:
    manifest = build_manifest(config)
    return manifest, *publish(manifest, bucket_of(address), replace(config, shard_mb=1))


def elsewhere(config: DataConfig, tmp_path: Path, root: str) -> BinsConfig:
    """A job's config: another workspace, and no word of the publisher's splits."""
    return BinsConfig(root=root, workspace=str(tmp_path / "job"), s3=config.s3)


def download(address: str, folder: Path) -> None:
    """The set as a training job finds it: a folder a channel, and nothing beside them."""
    place = S3Address.parse(address)
    client = boto3.client("s3")
    for one in client.list_objects_v2(Bucket=place.bucket, Prefix=f"{place.prefix}/")["Contents"]:
        name = one["Key"].removeprefix(f"{place.prefix}/")
        if "/" in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(client.get_object(Bucket=place.bucket, Key=one["Key"])["Body"].read())


# Shards ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000)), st.integers(1, 3000))
def test_every_row_is_in_one_shard_in_order(sizes: list[int], most: int) -> None:
    parts = cut(sizes, most)
    assert [row for part in parts for row in part] == list(range(len(sizes)))
    totals = [sum(sizes[row] for row in part) for part in parts]
    assert all(part for part in parts)
    assert all(total <= most or len(part) == 1 for total, part in zip(totals, parts, strict=True))
    # and no shard could have taken the next one's first row
    following = [sizes[part[0]] for part in parts[1:]]
    assert all(total + first > most for total, first in zip(totals, following, strict=False))


@given(st.lists(st.integers(1, 1000), max_size=30), st.lists(st.integers(1, 1000)), st.integers(1, 3000))
def test_later_bins_leave_the_shards_before_as_they_are(before: list[int], after: list[int], most: int) -> None:
    whole = cut(before, most)[:-1]
    assert cut(before + after, most)[: len(whole)] == whole


def test_a_shard_is_the_same_whoever_packs_it(root: Path, tmp_path: Path) -> None:
    source = FolderSource(root)
    ids = source.ids()[:5]
    data = pack(source, ids)
    assert pack(FolderSource(root), ids) == data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == [f"{bin_id}.{suffix}" for bin_id in ids for suffix in ("jpg", "json")]
        assert {member.mtime for member in tar.getmembers()} == {0}
    for part in ("bin-images", "metadata"):
        (tmp_path / part).mkdir()
    assert unpack(io.BytesIO(data), tmp_path) == 5
    copy = FolderSource(tmp_path)
    assert copy.ids() == ids
    assert all((copy.photo(one), copy.record(one)) == (source.photo(one), source.record(one)) for one in ids)


@pytest.mark.parametrize("name", ["../../x.jpg", "-x.jpg", "a b.jpg"])
def test_a_shard_with_a_strange_name_is_refused(name: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for suffix in ("jpg", "json"):
            member = tarfile.TarInfo(name.replace("jpg", suffix))
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(StocktakeError, match="which is no id of a bin"):
        unpack(io.BytesIO(file.getvalue()), tmp_path)
    assert not list(tmp_path.rglob("*.jpg"))


# Publishing and reading -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["prefix", "channels"])
def test_a_published_set_is_the_original(kind: str, config: DataConfig, private_bucket: str, tmp_path: Path) -> None:
    address = f"{private_bucket}/sets/one"
    original, index, _ = published(config, address)
    assert len(index.shards) > len(SPLITS)
    place = address
    if kind == "channels":
        place = str(tmp_path / "channels")
        download(address, tmp_path / "channels")
    found = build_manifest(elsewhere(config, tmp_path, place))
    assert found.fingerprint == original.fingerprint == index.fingerprint
    pd.testing.assert_frame_equal(found.bins, original.bins)
    assert (found.source.root, found.labels) == (place, original.labels)
    photos = [
        prepare_photos(manifest.source, manifest.bins, 32, tmp_path / name)
        for name, manifest in (("a", original), ("b", found))
    ]
    hashes = original.bins["hash"].tolist()
    assert np.array_equal(photos[0].read(hashes), photos[1].read(hashes))


@pytest.mark.usefixtures("small_shards")
def test_training_meets_the_same_photos_in_the_same_order_from_folder_shards_and_channels(
    config: DataConfig, private_bucket: str, tmp_path: Path
) -> None:
    address = f"{private_bucket}/sets/one"
    original, _, _ = published(config, address)
    download(address, tmp_path / "channels")
    channels = build_manifest(elsewhere(config, tmp_path / "c", str(tmp_path / "channels")))
    streamed = build_manifest(elsewhere(config, tmp_path / "s", address))
    seen, given = {}, {}
    for name, manifest in (("folder", original), ("shards", streamed), ("channels", channels)):
        photos = prepare_photos(manifest.source, manifest.bins, 32, tmp_path / name)
        loader = BinsDataModule(manifest, photos, batch_size=8, augment="full", workers=0, seed=5).train_dataloader()
        ids = manifest.split("train")["id"]
        seen[name], given[name] = [], []
        for epoch in (0, 1):
            loader.batch_sampler.sampler.set_epoch(epoch)
            seen[name] += [[ids[row] for _, row in batch] for batch in loader.batch_sampler]
            given[name] += [batch.numpy() for batch, _ in loader]
    assert seen["folder"] == seen["shards"] == seen["channels"]
    half = len(seen["folder"]) // 2
    assert half > 2
    assert seen["folder"][:half] != seen["folder"][half:]
    for name in ("shards", "channels"):
        assert all(np.array_equal(one, other) for one, other in zip(given[name], given["folder"], strict=True))


@pytest.mark.usefixtures("small_shards")
def test_what_did_not_change_is_not_sent_again(
    config: DataConfig,
    private_bucket: str,
    tmp_path: Path,
    make_root: Callable[..., Path],
    write_bin: Callable[..., None],
) -> None:
    root = make_root(tmp_path / "root", QUANTITIES)
    config = replace(config, root=str(root))
    _, index, sent = published(config, private_bucket)
    assert sent == len(index.shards)
    _, again, sent = published(config, private_bucket)
    assert (again, sent) == (index, 0)
    manifest = build_manifest(config)
    last = manifest.split("train")["id"].iloc[-1]
    write_bin(root, last, int(manifest.split("train")["quantity"].iloc[-1]), items=[f"item-{last}"], photo=b"")
    _, changed, sent = published(config, private_bucket)
    assert changed.fingerprint != index.fingerprint
    assert sent == 1
    assert build_manifest(elsewhere(config, tmp_path, private_bucket)).fingerprint == changed.fingerprint


@pytest.mark.usefixtures("small_shards")
def test_a_publication_that_was_cut_off_goes_on(
    config: DataConfig, private_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put, count = Bucket.put, 0

    def failing(self: Bucket, key: str, data: bytes) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise shards.UnreachableError("no answer in time")
        put(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put", failing)
        with pytest.raises(StocktakeError, match=r"--publish s3://.* cannot be written: no answer in time; the same"):
            published(config, private_bucket)
    with pytest.raises(StocktakeError, match="holds no bins"):  # no index: nobody takes half a set for a whole one
        build_manifest(elsewhere(config, tmp_path, private_bucket))
    _, index, sent = published(config, private_bucket)
    assert sent == len(index.shards) - 2
    assert build_manifest(elsewhere(config, tmp_path, private_bucket)).fingerprint == index.fingerprint


PUBLISH = """
import sys, time
from stocktake import cli
from stocktake.data import s3_source, shards
shards._BYTES_PER_MB = 30_000  # some ten shards
put = s3_source.Bucket.put
s3_source.Bucket.put = lambda *arguments: (time.sleep(0.5), put(*arguments))
cli.main(["data", *sys.argv[1:]])
"""


def test_a_publication_that_was_killed_goes_on(
    config: DataConfig, private_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    killed, undisturbed = f"{private_bucket}/killed", f"{private_bucket}/undisturbed"
    client = boto3.client("s3")

    def held(address: str) -> dict[str, str]:
        place = S3Address.parse(address)
        found = client.list_objects_v2(Bucket=place.bucket, Prefix=f"{place.prefix}/").get("Contents", [])
        return {one["Key"].removeprefix(f"{place.prefix}/"): one["ETag"] for one in found}

    words = ["--root", config.root, "--workspace", config.workspace, "--split.seed", str(SPLIT.seed)]
    words += ["--split.fractions", str(list(SPLIT.fractions)), "--shard_mb", "1", "--publish", killed]
    process = subprocess.Popen([sys.executable, "-c", PUBLISH, *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(held(killed)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = held(killed)
    assert len(kept) >= 2
    assert {Path(name).suffix for name in kept} == {".tar"}
    with pytest.raises(StocktakeError, match="holds no bins"):  # nobody takes half a set for a whole one
        build_manifest(elsewhere(config, tmp_path, killed))

    monkeypatch.setattr(shards, "_BYTES_PER_MB", 30_000)
    (original, index, sent), (_, _, all_sent) = (published(config, place) for place in (killed, undisturbed))
    assert all_sent == len(index.shards)
    assert sent == len(index.shards) - len(kept)
    assert held(killed) == held(undisturbed)
    assert {name: held(killed)[name] for name in kept} == kept
    assert build_manifest(elsewhere(config, tmp_path, killed)).fingerprint == original.fingerprint


@pytest.mark.usefixtures("small_shards")
def test_reading_goes_on_where_it_was_cut_off(
    config: DataConfig, private_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, index, _ = published(config, private_bucket)
    get, asked = Bucket.get, []

    def counted(self: Bucket, key: str, **settings: Any) -> Any:
        asked.append(key)
        if len([one for one in asked if one.endswith(".tar")]) == 3 and fails:
            raise shards.UnreachableError("no answer in time")
        return get(self, key, **settings)

    monkeypatch.setattr(Bucket, "get", counted)
    job = elsewhere(config, tmp_path, private_bucket)
    fails = True
    with pytest.raises(StocktakeError, match="cannot be read: no answer in time; the same command goes on from here"):
        build_manifest(job)
    fails = False
    first, asked = [one for one in asked if one.endswith(".tar")], []
    assert build_manifest(job).fingerprint == index.fingerprint
    shards_asked = [one for one in asked if one.endswith(".tar")]
    assert len(shards_asked) < len(index.shards)
    assert {*first, *shards_asked} == {shard.name for shard in index.shards}
    asked.clear()
    build_manifest(job)
    assert asked == ["index.json"]


def test_a_narrower_task_is_a_part_and_a_wider_one_is_refused(
    config: DataConfig, private_bucket: str, tmp_path: Path
) -> None:
    original, _, _ = published(config, private_bucket)
    job = elsewhere(config, tmp_path, private_bucket)
    part = build_manifest(replace(job, task="2-3")).bins
    whole = original.bins[original.bins["quantity"].isin([2, 3])].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, whole)
    with pytest.raises(StocktakeError, match=r"--task 0-5: s3://.* was published with --task 1-5, and holds no other"):
        build_manifest(replace(job, task="0-5"))


def test_channels_that_are_not_as_published_are_refused(
    config: DataConfig, private_bucket: str, tmp_path: Path
) -> None:
    published(config, f"{private_bucket}/one")
    folder = tmp_path / "channels"
    job = elsewhere(config, tmp_path, str(folder))
    download(f"{private_bucket}/one", folder)
    shard = folder / "val" / "val-000000.tar"
    good = shard.read_bytes()
    shard.write_bytes(good[:700] + bytes([good[700] ^ 1]) + good[701:])
    with pytest.raises(StocktakeError, match=r"val/val-000000.tar is not as it was published"):
        build_manifest(job)
    shard.unlink()
    with pytest.raises(StocktakeError, match=r"val/val-000000.tar of the published set is missing"):
        build_manifest(job)
    shard.write_bytes(good)
    index = json.loads((folder / "train" / "index.json").read_text())
    (folder / "train" / "index.json").write_text(json.dumps(index | {"fingerprint": "other"}))
    with pytest.raises(StocktakeError, match="its channels are of different published sets"):
        build_manifest(job)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1, "shards": [{}]}', '{"format": 1, "shards": 7}', "[" * 100_000],
    ids=lambda text: text[:20] or "empty",
)
def test_what_is_no_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(StocktakeError, match=f"--root {tmp_path}"):
        build_manifest(BinsConfig(root=str(tmp_path), workspace=str(tmp_path / "workspace")))


def test_an_index_cannot_lead_out_of_its_folder(config: DataConfig, private_bucket: str) -> None:
    _, index, _ = published(config, private_bucket)
    shard = asdict(index.shards[0]) | {"split": "..", "name": "../../x.tar"}
    content = json.loads(index.to_bytes()) | {"shards": [shard]}
    with pytest.raises(StocktakeError, match="which is of no split"):
        Index.parse(json.dumps(content).encode(), "here")
    assert Index.parse(index.to_bytes(), "here") == index


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_publishes_and_tells(
    config: DataConfig, private_bucket: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    address = f"{private_bucket}/bins"
    data(replace(config, publish=address))
    assert f"published: {address}, 3 shards (" in capsys.readouterr().out
    job = elsewhere(config, tmp_path, address)
    counts = data(DataConfig(**vars(job)))
    assert counts["bins"] == 60
    assert "splits are the publisher's" in capsys.readouterr().out
    place = S3Address.parse(address)
    client = boto3.client("s3")
    index = json.loads(client.get_object(Bucket=place.bucket, Key="bins/index.json")["Body"].read())
    assert sum(map(sum, (one.values() for one in index["counts"].values()))) == 60
    for shard in index["shards"]:
        body = client.get_object(Bucket=place.bucket, Key=f"bins/{shard['name']}")["Body"].read()
        assert hashlib.sha256(body).hexdigest() == shard["sha256"]


def test_a_set_is_not_published_over_its_root_nor_into_a_folder(
    config: DataConfig, private_bucket: str, tmp_path: Path
) -> None:
    with pytest.raises(StocktakeError, match="--publish here is no address of a bucket"):
        data(replace(config, publish="here"))
    published(config, private_bucket)
    job = elsewhere(config, tmp_path, private_bucket)
    with pytest.raises(StocktakeError, match="is the root itself: give another prefix"):
        data(DataConfig(**vars(job), publish=f"{private_bucket}/"))
