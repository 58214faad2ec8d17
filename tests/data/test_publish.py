"""A published set: same bytes for same bins, sent once, read as if it were the original root, never trusted."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from stocktake.commands.data import data
from stocktake.config.data import BinsConfig, DataConfig, S3Config, SplitConfig
from stocktake.data import publish as publish_module
from stocktake.data.manifest import Manifest, build_manifest
from stocktake.data.photos import prepare_photos
from stocktake.data.publish import INDEX, cut, pack, publish, read_index, unpack
from stocktake.data.s3_client import Bucket, ObjectError, S3Address
from stocktake.data.sources import FolderSource
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
    monkeypatch.setattr(publish_module, "_BYTES_PER_MB", 70_000)


def bucket_of(address: str) -> Bucket:
    return Bucket(S3Address.parse(address), S3Config(retries=2, timeout=30), "--publish")


def published(config: DataConfig, address: str) -> tuple[Manifest, int, int]:
    """The manifest, how many shards there are, and how many had to be sent."""
    manifest = build_manifest(config)
    shards, _, sent = publish(manifest, bucket_of(address), replace(config, shard_mb=1))
    return manifest, shards, sent


def elsewhere(config: DataConfig, tmp_path: Path, root: str) -> BinsConfig:
    """A job's config: another workspace, and no word of the publisher's splits."""
    return BinsConfig(root=root, workspace=str(tmp_path / "job"), s3=config.s3)


def objects(address: str) -> dict[str, str]:
    """ETags by key."""
    place = S3Address.parse(address)
    prefix = f"{place.prefix}/" if place.prefix else ""
    listed = boto3.client("s3").list_objects_v2(Bucket=place.bucket, Prefix=prefix).get("Contents", [])
    return {entry["Key"].removeprefix(prefix): entry["ETag"] for entry in listed}


def download(address: str, folder: Path) -> None:
    """The set as a training job finds it: a folder of files."""
    folder.mkdir(parents=True)
    place = S3Address.parse(address)
    for name in objects(address):
        key = f"{place.prefix}/{name}".lstrip("/")
        (folder / name).write_bytes(boto3.client("s3").get_object(Bucket=place.bucket, Key=key)["Body"].read())


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
    (tmp_path / "shard.tar").write_bytes(data)
    unpack(tmp_path / "shard.tar", tmp_path, set(ids))
    copy = FolderSource(tmp_path)
    assert copy.ids() == ids
    for bin_id in ids:
        assert (copy.photo(bin_id), copy.record(bin_id)) == (source.photo(bin_id), source.record(bin_id))


def test_webdataset_reads_the_shards(root: Path, tmp_path: Path) -> None:
    source = FolderSource(root)
    ids = source.ids()[:5]
    (tmp_path / "train-000000.tar").write_bytes(pack(source, ids))
    samples = list(webdataset.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ids
    assert all(sample["jpg"] == source.photo(sample["__key__"]) for sample in samples)
    assert json.loads(samples[0]["json"])["EXPECTED_QUANTITY"] == 1


# Publishing and reading -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["prefix", "folder"])
def test_a_published_set_is_the_original(kind: str, config: DataConfig, private_bucket: str, tmp_path: Path) -> None:
    address = f"{private_bucket}/sets/one"
    original, shards, _ = published(config, address)
    assert len(objects(address)) == shards + 1 > len(SPLITS) + 1
    place = address
    if kind == "folder":
        place = str(tmp_path / "set")
        download(address, tmp_path / "set")
    copy = build_manifest(elsewhere(config, tmp_path, place))
    assert copy.fingerprint == original.fingerprint
    pd.testing.assert_frame_equal(copy.bins, original.bins)
    assert (copy.source.root, copy.labels) == (place, original.labels)
    photos = [
        prepare_photos(manifest.source, manifest.bins, 32, tmp_path / name)
        for name, manifest in (("a", original), ("b", copy))
    ]
    hashes = original.bins["hash"].tolist()
    assert np.array_equal(photos[0].read(hashes), photos[1].read(hashes))


@pytest.mark.usefixtures("small_shards")
def test_training_reads_the_same_photos_in_the_same_order_from_a_folder_and_from_shards(
    config: DataConfig, private_bucket: str, tmp_path: Path
) -> None:
    original, _, _ = published(config, private_bucket)
    copy = build_manifest(elsewhere(config, tmp_path, private_bucket))
    batches: list[list[np.ndarray]] = []
    for name, manifest in (("folder", original), ("shards", copy)):
        photos = prepare_photos(manifest.source, manifest.bins, 32, tmp_path / name)
        module = BinsDataModule(manifest, photos, batch_size=8, augment="full", workers=0, seed=5)
        batches.append([batch.numpy() for batch, _ in module.train_dataloader()])
    assert len(batches[0]) > 2
    assert all(np.array_equal(*pair) for pair in zip(*batches, strict=True))


@pytest.mark.usefixtures("small_shards")
def test_what_did_not_change_is_not_sent_again(
    config: DataConfig,
    private_bucket: str,
    tmp_path: Path,
    make_root: Callable[..., Path],
    write_bin: Callable[..., None],
) -> None:
    config = replace(config, root=str(make_root(tmp_path / "root", QUANTITIES)))
    _, shards, sent = published(config, private_bucket)
    assert sent == shards
    assert published(config, private_bucket)[1:] == (shards, 0)
    train = build_manifest(config).split("train")
    last = train["id"].iloc[-1]
    write_bin(Path(config.root or ""), last, int(train["quantity"].iloc[-1]), items=[f"item-{last}"], photo=b"")
    changed, _, sent = published(config, private_bucket)
    assert sent == 1
    assert build_manifest(elsewhere(config, tmp_path, private_bucket)).fingerprint == changed.fingerprint


PUBLISH = """
import sys, time
from stocktake import cli
from stocktake.data import publish, s3_client
publish._BYTES_PER_MB = 30_000  # some ten shards
put = s3_client.Bucket.put
s3_client.Bucket.put = lambda *arguments: (time.sleep(0.5), put(*arguments))
cli.main(["data", *sys.argv[1:]])
"""


def test_a_publication_that_was_killed_goes_on(
    config: DataConfig, private_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    killed, undisturbed = f"{private_bucket}/killed", f"{private_bucket}/undisturbed"
    words = ["--root", config.root, "--workspace", config.workspace, "--split.seed", str(SPLIT.seed)]
    words += ["--split.fractions", str(list(SPLIT.fractions)), "--shard_mb", "1", "--publish", killed]
    process = subprocess.Popen([sys.executable, "-c", PUBLISH, *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(objects(killed)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = objects(killed)
    assert len(kept) >= 2
    assert {Path(name).suffix for name in kept} == {".tar"}
    with pytest.raises(StocktakeError, match="holds no bins"):  # nobody takes half a set for a whole one
        build_manifest(elsewhere(config, tmp_path / "early", killed))

    monkeypatch.setattr(publish_module, "_BYTES_PER_MB", 30_000)
    original, shards, sent = published(config, killed)
    assert sent == shards - len(kept)
    assert published(config, undisturbed)[2] == shards
    assert objects(killed) == objects(undisturbed)
    assert build_manifest(elsewhere(config, tmp_path, killed)).fingerprint == original.fingerprint


@pytest.mark.usefixtures("small_shards")
def test_reading_goes_on_where_it_was_cut_off(
    config: DataConfig, private_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, shards, _ = published(config, private_bucket)
    get_file, asked = Bucket.download, []
    fails = True

    def cut_off(self: Bucket, key: str, path: Path, **settings: Any) -> None:
        if len(asked) == 3 and fails:
            raise ObjectError(str(self.address), "no answer in time", is_temporary=True)
        asked.append(key)
        get_file(self, key, path, **settings)

    monkeypatch.setattr(Bucket, "download", cut_off)
    job = elsewhere(config, tmp_path, private_bucket)
    with pytest.raises(ObjectError, match="no answer in time"):
        build_manifest(job)
    fails = False
    assert build_manifest(job).fingerprint == original.fingerprint
    assert sorted(asked) == sorted(set(asked))
    assert len(asked) == shards
    build_manifest(job)
    assert len(asked) == shards


def test_a_narrower_task_is_a_part_and_a_wider_one_is_refused(
    config: DataConfig, private_bucket: str, tmp_path: Path
) -> None:
    original, _, _ = published(config, private_bucket)
    job = elsewhere(config, tmp_path, private_bucket)
    part = build_manifest(replace(job, task="2-3")).bins
    whole = original.bins[original.bins["quantity"].isin([2, 3])].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, whole)
    with pytest.raises(StocktakeError, match=r"--task 0-5: s3://.* --task 1-5"):
        build_manifest(replace(job, task="0-5"))


def test_the_command_publishes(
    config: DataConfig, private_bucket: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    address = f"{private_bucket}/bins"
    data(replace(config, publish=address))
    assert f"published: {address}, 3 shards (" in capsys.readouterr().out
    counts = data(DataConfig(**vars(elsewhere(config, tmp_path, address))))
    assert counts["bins"] == 60


def test_a_set_is_not_published_over_its_root_nor_into_a_folder(
    config: DataConfig, private_bucket: str, tmp_path: Path
) -> None:
    with pytest.raises(StocktakeError, match="--publish here"):
        data(replace(config, publish="here"))
    published(config, private_bucket)
    job = elsewhere(config, tmp_path, private_bucket)
    with pytest.raises(StocktakeError, match="is the root itself"):
        data(DataConfig(**vars(job), publish=f"{private_bucket}/"))


# A set from somebody else ---------------------------------------------------------------------------------------------


@pytest.fixture
def good_set(config: DataConfig, private_bucket: str, tmp_path: Path) -> Path:
    """A published set in a folder."""
    published(config, private_bucket)
    download(private_bucket, tmp_path / "set")
    return tmp_path / "set"


def read(folder: Path) -> Manifest:
    return build_manifest(BinsConfig(root=str(folder), workspace=str(folder.parent / "job" / "workspace")))


def change_index(folder: Path, **columns: Any) -> None:
    """Other values in the first row, or for the whole table's description."""
    table = pq.read_table(folder / INDEX)
    about = json.loads(table.schema.metadata[b"stocktake"])
    for name, value in columns.items():
        if name not in table.column_names:
            about[name] = value
            continue
        values = table[name].to_pylist()
        values[0] = value
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table.replace_schema_metadata({b"stocktake": json.dumps(about)}), folder / INDEX)


def replace_shard(folder: Path, content: bytes) -> None:
    """Another val shard, with the checksum of its content in the index: everything is as its publisher wants it."""
    import hashlib

    table = pq.read_table(folder / INDEX)
    sums = [
        hashlib.sha256(content).hexdigest() if shard == "val-000000.tar" else old
        for shard, old in zip(table["shard"].to_pylist(), table["shard_sha256"].to_pylist(), strict=True)
    ]
    place = table.schema.get_field_index("shard_sha256")
    pq.write_table(table.set_column(place, "shard_sha256", pa.array(sums)), folder / INDEX)
    (folder / "val-000000.tar").write_bytes(content)


def tar_with(folder: Path, *extra: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """The val shard with more members at its end."""
    file = io.BytesIO((folder / "val-000000.tar").read_bytes())
    with tarfile.open(fileobj=file, mode="a") as tar:
        for member, content in extra:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "columns",
    [
        {"id": "../../00001"},
        {"id": "/tmp/x"},
        {"id": "00002"},
        {"group": "../x"},
        {"split": "holdout"},
        {"shard": "/dev/zero"},
        {"shard": "../train-000000.tar"},
        {"shard": "train-000000.tar\n"},
        {"shard_sha256": "../../../x"},
        {"shard_sha256": "f" * 64},
        {"task": "../.."},
        {"format": 1},
        {"id": None},
    ],
    ids=str,
)
def test_an_index_with_strange_values_is_refused_and_writes_nothing(good_set: Path, columns: dict[str, Any]) -> None:
    change_index(good_set, **columns)
    before = files_below(good_set.parent)
    with pytest.raises(StocktakeError, match=f"--root {good_set}"):
        read(good_set)
    assert not any(Path(name).suffix in (".jpg", ".json") for name in files_below(good_set.parent) - before)


def test_a_fingerprint_is_no_path(good_set: Path) -> None:
    """Nothing that the index says is: the copy lies in a folder named after the hash of the index."""
    change_index(good_set, fingerprint="../../../../overwritten", source="../../x")
    outside = files_below(good_set.parent)
    assert len(read(good_set).bins) == 60
    assert {name.split("/")[0] for name in files_below(good_set.parent) - outside} == {"job"}


@pytest.mark.parametrize("content", [b"", b"PAR1", b"[]", b"PAR1" * 1000, "columns", "metadata"], ids=str)
def test_what_is_no_index_is_one_error(content: bytes | str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    if isinstance(content, bytes):
        (tmp_path / "set" / INDEX).write_bytes(content)
    else:
        about = {b"stocktake": b"[" * 100_000 if content == "metadata" else b'{"format": 2, "task": "1-5"}'}
        pq.write_table(pa.table({"id": ["1"]}).replace_schema_metadata(about), tmp_path / "set" / INDEX)
    with pytest.raises(StocktakeError, match=f"--root {tmp_path}/set: {INDEX}"):
        read(tmp_path / "set")


def test_a_large_index_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million equal names are a few kilobytes of parquet."""
    monkeypatch.setattr(publish_module, "_LARGEST_INDEX_IN_MEMORY", 1000)
    file = io.BytesIO()
    pq.write_table(pa.table({"id": ["1" * 60] * 10_000}), file, use_dictionary=False)
    with pytest.raises(StocktakeError, match="larger than any index"):
        read_index(file.getvalue(), "here")


@pytest.mark.timeout(30)  # /dev/zero never ends
def test_a_shard_that_is_not_as_published_is_refused(good_set: Path) -> None:
    shard = good_set / "val-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    with pytest.raises(StocktakeError, match=r"val-000000.tar is not as it was published"):
        read(good_set)
    shard.unlink()
    with pytest.raises(StocktakeError, match=r"val-000000.tar of the published set is missing"):
        read(good_set)
    shard.symlink_to("/dev/zero")
    with pytest.raises(StocktakeError, match=r"val-000000.tar of the published set is missing"):
        read(good_set)


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize(
    "extra",
    [
        (member("../../escaped.jpg"), b"x"),
        (member("/tmp/escaped.jpg"), b"x"),
        (member("99999.jpg"), b"of no bin in the index"),
        (member("-x.jpg"), b"x"),
        (member("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (member("link.jpg", tarfile.LNKTYPE, "00001.jpg"), b""),
        (member("device.jpg", tarfile.CHRTYPE), b""),
    ],
    ids=lambda value: f"{value[0].name} {value[0].type!r}",
)
def test_a_member_that_is_no_photo_or_record_of_the_index_is_refused(
    good_set: Path, extra: tuple[tarfile.TarInfo, bytes]
) -> None:
    replace_shard(good_set, tar_with(good_set, extra))
    before = files_below(good_set.parent)
    with pytest.raises(StocktakeError, match="no photo or record of its bins"):
        read(good_set)
    assert not any("escaped" in name or "link" in name for name in files_below(good_set.parent) - before)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_photo_that_is_no_regular_file_is_refused(good_set: Path, kind: bytes) -> None:
    with tarfile.open(good_set / "val-000000.tar") as tar:
        name = tar.getnames()[0]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(member(name, kind, "/etc/passwd"))
    replace_shard(good_set, file.getvalue())
    with pytest.raises(StocktakeError, match=r"val-000000.tar"):
        read(good_set)


def test_a_member_larger_than_any_photo_is_refused_before_it_is_read(
    good_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_module, "LARGEST_FILE", 100)
    with pytest.raises(StocktakeError, match="no photo or record of its bins"):
        read(good_set)


def test_a_compressed_shard_is_refused(good_set: Path) -> None:
    """A gigabyte of zeros is a megabyte of gzip."""
    replace_shard(good_set, gzip.compress(bytes(50_000_000)))
    with pytest.raises(StocktakeError, match=r"val-000000.tar is no tar"):
        read(good_set)


def test_a_shard_that_lacks_a_bin_is_refused(good_set: Path) -> None:
    file = io.BytesIO()
    tarfile.open(fileobj=file, mode="w").close()
    replace_shard(good_set, file.getvalue())
    with pytest.raises(StocktakeError, match=r"val-000000.tar lacks"):
        read(good_set)
