"""A published set: same bytes for same bins, sent once, read as if it were the original root, never trusted."""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
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
from stocktake.data.images import LARGEST_FILE
from stocktake.data.manifest import Manifest, build_manifest
from stocktake.data.publish import INDEX, cut, pack, publish, read_index, unpack
from stocktake.data.record import LARGEST_RECORD
from stocktake.data.s3_client import Bucket, ObjectError, S3Address
from stocktake.data.sources import Source
from stocktake.data.splits import SPLITS
from stocktake.errors import StocktakeError

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
    parsed = S3Address.parse(address)
    prefix = f"{parsed.prefix}/" if parsed.prefix else ""
    listed = boto3.client("s3").list_objects_v2(Bucket=parsed.bucket, Prefix=prefix).get("Contents", [])
    return {entry["Key"].removeprefix(prefix): entry["ETag"] for entry in listed}


def download(address: str, folder: Path) -> None:
    """The set as a training job finds it: a folder of files."""
    folder.mkdir(parents=True)
    parsed = S3Address.parse(address)
    for name in objects(address):
        key = f"{parsed.prefix}/{name}".lstrip("/")
        (folder / name).write_bytes(boto3.client("s3").get_object(Bucket=parsed.bucket, Key=key)["Body"].read())


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
    # so that bins that come later leave all shards but the last as they are
    assert cut([*sizes, 500], most)[: len(parts) - 1] == parts[:-1]


def test_a_shard_is_the_same_whoever_packs_it_and_webdataset_reads_it(root: Path, tmp_path: Path) -> None:
    source = Source(root)
    ids = source.ids()[:5]
    data = pack(source, ids)
    assert pack(Source(root), ids) == data
    (tmp_path / "shard.tar").write_bytes(data)
    samples = list(webdataset.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ids
    for folder in ("bin-images", "metadata"):
        (tmp_path / folder).mkdir()
    unpack(data, tmp_path, ids)
    copy = Source(tmp_path)
    assert copy.ids() == ids
    for sample in samples:
        bin_id = sample["__key__"]
        assert copy.photo(bin_id) == source.photo(bin_id) == sample["jpg"]
        assert copy.record(bin_id) == source.record(bin_id) == sample["json"]


# Publishing and reading -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
def test_a_published_set_is_the_original(config: DataConfig, private_bucket: str, tmp_path: Path) -> None:
    address, folder = f"{private_bucket}/sets/one", tmp_path / "set"
    original, shards, _ = published(config, address)
    assert len(objects(address)) == shards + 1 > len(SPLITS) + 1
    download(address, folder)
    for root in (address, str(folder)):
        manifest = build_manifest(elsewhere(config, tmp_path, root))
        assert manifest.fingerprint == original.fingerprint
        pd.testing.assert_frame_equal(manifest.bins, original.bins)
        assert (manifest.source.root, manifest.labels, manifest.split_config) == (root, original.labels, SPLIT)
        with pytest.raises(StocktakeError, match=r"--split\.seed 4"):
            build_manifest(replace(elsewhere(config, tmp_path, root), split=SplitConfig(seed=4)))
        for bin_id in original.bins["id"]:
            assert manifest.source.photo(bin_id) == original.source.photo(bin_id)


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
    words = ["--root", config.root, "--workspace", config.workspace, "--split.seed", str(SPLIT.seed)]
    words += ["--split.fractions", str(list(SPLIT.fractions)), "--shard_mb", "1", "--publish", private_bucket]
    process = subprocess.Popen([sys.executable, "-c", PUBLISH, *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(objects(private_bucket)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    sent_before = objects(private_bucket)
    assert len(sent_before) >= 2
    assert {Path(name).suffix for name in sent_before} == {".tar"}
    with pytest.raises(StocktakeError, match="holds no bins"):  # half a set is none
        build_manifest(elsewhere(config, tmp_path / "early", private_bucket))

    monkeypatch.setattr(publish_module, "_BYTES_PER_MB", 30_000)
    original, shards, sent = published(config, private_bucket)
    assert sent == shards - len(sent_before)
    assert sent_before.items() <= objects(private_bucket).items()
    assert build_manifest(elsewhere(config, tmp_path, private_bucket)).fingerprint == original.fingerprint


@pytest.mark.usefixtures("small_shards")
def test_reading_goes_on_where_it_was_cut_off(
    config: DataConfig, private_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, shards, _ = published(config, private_bucket)
    get, shards_read = Bucket.get, []
    fails = True

    def cut_off(self: Bucket, key: str, **settings: Any) -> Any:
        if key != INDEX:
            if len(shards_read) == 3 and fails:
                raise ObjectError(str(self.address), "no answer in time", is_temporary=True)
            shards_read.append(key)
        return get(self, key, **settings)

    monkeypatch.setattr(Bucket, "get", cut_off)
    job = elsewhere(config, tmp_path, private_bucket)
    with pytest.raises(ObjectError, match="no answer in time"):
        build_manifest(job)
    fails = False
    assert build_manifest(job).fingerprint == original.fingerprint
    build_manifest(job)
    assert len(shards_read) == len(set(shards_read)) == shards


def test_the_command_publishes_but_not_over_its_root_nor_into_a_folder(
    config: DataConfig, private_bucket: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    address = f"{private_bucket}/bins"
    data(replace(config, publish=address))
    assert f"published: {address}, 3 shards (" in capsys.readouterr().out
    job = elsewhere(config, tmp_path, address)
    assert data(DataConfig(**vars(job)))["bins"] == 60
    with pytest.raises(StocktakeError, match="is the root itself"):
        data(DataConfig(**vars(job), publish=f"{address}/"))
    with pytest.raises(StocktakeError, match="--publish here"):
        data(replace(config, publish="here"))


# A hostile set -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_folder(
    tmp_path_factory: pytest.TempPathFactory, root: Path, make_bucket: Callable[[pytest.MonkeyPatch], str]
) -> Path:
    """A published set in a folder: read only."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        address = make_bucket(patch)
        published(DataConfig(root=str(root), workspace=str(folder / "workspace"), split=SPLIT), address)
        download(address, folder / "set")
    return folder / "set"


@pytest.fixture
def good_set(published_folder: Path, tmp_path: Path) -> Path:
    """A published set in a folder."""
    return Path(shutil.copytree(published_folder, tmp_path / "set"))


def read(folder: Path, task: str = "1-5") -> Manifest:
    return build_manifest(BinsConfig(root=str(folder), task=task, workspace=str(folder.parent / "job" / "workspace")))


def change_index(folder: Path, **columns: Any) -> None:
    """Other values in the first row, or for the whole table's description: `about_<name>`, or what no column is."""
    table = pq.read_table(folder / INDEX)
    about = json.loads(table.schema.metadata[b"stocktake"])
    for name, value in columns.items():
        if name not in table.column_names:
            about[name.removeprefix("about_")] = value
            continue
        values = table[name].to_pylist()
        values[0] = value
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table.replace_schema_metadata({b"stocktake": json.dumps(about)}), folder / INDEX)


def replace_shard(folder: Path, content: bytes) -> None:
    """Another val shard, with the checksum of its content in the index: everything is as its publisher wants it."""
    table = pq.read_table(folder / INDEX)
    sums = [
        hashlib.sha256(content).hexdigest() if shard == "val-000000.tar" else old
        for shard, old in zip(table["shard"].to_pylist(), table["shard_sha256"].to_pylist(), strict=True)
    ]
    position = table.schema.get_field_index("shard_sha256")
    pq.write_table(table.set_column(position, "shard_sha256", pa.array(sums)), folder / INDEX)
    (folder / "val-000000.tar").write_bytes(content)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_narrower_task_is_a_part_and_a_wider_one_is_refused(good_set: Path) -> None:
    whole, part = read(good_set).bins, read(good_set, task="2-3").bins
    pd.testing.assert_frame_equal(part, whole[whole["quantity"].isin([2, 3])].reset_index(drop=True))
    with pytest.raises(StocktakeError, match=r"--task 0-5: .* --task 1-5"):
        read(good_set, task="0-5")


@pytest.mark.parametrize(
    "columns",
    [
        {"id": "../../00001"},
        {"id": "/tmp/x"},
        {"id": "00002"},
        {"group": "../x"},
        {"split": "holdout"},
        {"about_split": {"seed": "many"}},
        {"about_split": "by id"},
        {"shard": "/dev/zero"},
        {"shard": "../train-000000.tar"},
        {"shard": "train-/../../../x.tar", "split": "train"},
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
    with pytest.raises(StocktakeError, match=f"--root {good_set}: {INDEX}"):
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


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, target, size
    return made


@pytest.mark.parametrize(
    "extra",
    [
        member("../../escaped.jpg"),
        member("/tmp/escaped.jpg"),
        member("99999.jpg"),
        member("-x.jpg"),
        member("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        member("link.jpg", tarfile.LNKTYPE, "PHOTO"),
        member("device.jpg", tarfile.CHRTYPE),
        member("PHOTO", tarfile.SYMTYPE, "/etc/passwd"),
        member("PHOTO", tarfile.LNKTYPE, "/etc/passwd"),
        member("PHOTO", tarfile.FIFOTYPE),
        member("PHOTO", tarfile.GNUTYPE_SPARSE),
        member("PHOTO", size=LARGEST_FILE + 1),
        member("RECORD", size=LARGEST_RECORD + 1),
    ],
    ids=lambda extra: f"{extra.name} {extra.type!r} {extra.size}",
)
def test_a_member_that_is_no_photo_or_record_of_the_index_is_refused(good_set: Path, extra: tarfile.TarInfo) -> None:
    """PHOTO and RECORD are those of a bin that the index puts into the shard; the others come after all of them."""
    shard = (good_set / "val-000000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        photo, record = tar.getnames()[:2]
    extra = copy.copy(extra)
    extra.name = {"PHOTO": photo, "RECORD": record}.get(extra.name, extra.name)
    extra.linkname = extra.linkname.replace("PHOTO", photo)
    of_a_bin = extra.name in (photo, record)
    file = io.BytesIO(b"" if of_a_bin else shard)
    with tarfile.open(fileobj=file, mode="w" if of_a_bin else "a") as tar:
        tar.addfile(extra, io.BytesIO(bytes(extra.size)))
    replace_shard(good_set, file.getvalue())
    before = files_below(good_set.parent)
    with pytest.raises(StocktakeError, match=rf"--root {good_set}: val-000000.tar holds '{re.escape(extra.name)}'"):
        read(good_set)
    written = {Path(name).name for name in files_below(good_set.parent) - before}
    assert not written & {"escaped.jpg", "link.jpg", "device.jpg", "99999.jpg", "-x.jpg", extra.name}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(gzip.compress, id="compressed: a gigabyte of zeros is a megabyte of gzip"),
        pytest.param(lambda _: bytes(10_240), id="without its bins"),
        pytest.param(lambda _: b"no tar" * 1000, id="no tar"),
    ],
)
def test_what_is_no_tar_of_the_bins_is_refused(good_set: Path, change: Callable[[bytes], bytes]) -> None:
    replace_shard(good_set, change((good_set / "val-000000.tar").read_bytes()))
    with pytest.raises(StocktakeError, match=f"--root {good_set}: val-000000.tar"):
        read(good_set)
