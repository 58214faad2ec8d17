"""One bucket, over real HTTP: signed or not, whole or repeated, refused with a reason; never without end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from s3_server import Server
from stocktake.config.data import S3Config
from stocktake.data.s3_client import Bucket, ObjectError, S3Address
from stocktake.errors import StocktakeError

QUICK = S3Config(retries=2, timeout=20)
UNSIGNED = replace(QUICK, anonymous=True)
KEY = "bin-images/00001.jpg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven objects below bin-images/ and one beside."""
    folder = tmp_path_factory.mktemp("bucket")
    (folder / "bin-images").mkdir()
    for number in range(7):
        (folder / "bin-images" / f"{number:05d}.jpg").write_bytes(bytes([number]) * (1000 + number))
    (folder / "other.txt").write_text("other")
    return folder


def bucket_of(settings: S3Config, address: str = "s3://bins") -> Bucket:
    return Bucket(S3Address.parse(address), settings)


def content(bucket: Bucket) -> bytes:
    fetched = bucket.get(KEY, limit=10_000)
    assert fetched is not None
    return fetched[0]


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [
        ("s3://aft-vbi-pds", "aft-vbi-pds", ""),
        ("s3://aft-vbi-pds/", "aft-vbi-pds", ""),
        ("s3://my.bucket/a/b/", "my.bucket", "a/b"),
        ("s3://bins//a//b", "bins", "a/b"),
    ],
)
def test_an_address_is_a_bucket_and_a_prefix(text: str, bucket: str, prefix: str) -> None:
    assert S3Address.parse(text) == S3Address(bucket, prefix)


@pytest.mark.parametrize("text", ["s3://", "s3:///x", "s3://Bad_Name", "gs://bins", "bins", "s3://bins/../x", "s3://a"])
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(StocktakeError, match=r"--publish .* is no address of a bucket: write s3://bucket"):
        S3Address.parse(text, "--publish")


def test_requests_are_signed_where_there_are_credentials_unless_told_otherwise(
    folder: Path, served: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = served(folder)
    unsigned = bucket_of(QUICK)
    assert content(unsigned) == (folder / KEY).read_bytes()
    assert len(list(unsigned.list("bin-images/"))) == 7
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    content(bucket_of(UNSIGNED))
    assert (unsigned.is_signed, server.authorized()) == (False, 0)
    content(bucket_of(QUICK))
    assert server.authorized() == 1


def test_the_public_bucket_is_never_asked_with_a_signature(
    folder: Path, served: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "eu-west-1")
    server = served(folder, bucket="aft-vbi-pds")
    bucket = bucket_of(QUICK, "s3://aft-vbi-pds")
    content(bucket)
    assert (bucket.is_signed, server.authorized()) == (False, 0)


def test_a_prefix_is_below_every_key(folder: Path, served: Callable[..., Server]) -> None:
    server = served(folder.parent, page=3)
    bucket = bucket_of(UNSIGNED, f"s3://bins/{folder.name}")
    assert list(bucket.list("bin-images/")) == [f"bin-images/{number:05d}.jpg" for number in range(7)]
    assert server.seen()["LIST"] == 3


@pytest.mark.parametrize("fault", ["503", "reset", "truncate", "corrupt", "slow"])
def test_a_passing_fault_is_repeated(fault: str, folder: Path, served: Callable[..., Server]) -> None:
    server = served(folder, faults=[{"key": KEY, "do": fault, "times": 1 if fault == "slow" else 2}])
    assert content(bucket_of(UNSIGNED)) == (folder / KEY).read_bytes()
    # what arrived of a body that was cut off is not asked for again
    assert server.seen()[KEY] == {"slow": 1, "truncate": 2}.get(fault, 3)


@pytest.mark.parametrize(
    ("fault", "is_temporary", "reason", "requests"),
    [
        ("503", True, "503 Service Unavailable", 3),
        ("reset", True, "HTTP error", 3),
        ("hang", True, "no answer in time", 3),
        ("corrupt", False, "--s3.verify false", 3),
        ("403", False, "AccessDenied", 1),
    ],
)
def test_a_lasting_fault_ends(
    fault: str, is_temporary: bool, reason: str, requests: int, folder: Path, served: Callable[..., Server]
) -> None:
    server = served(folder, faults=[{"key": KEY, "do": fault, "times": 99}])
    with pytest.raises(ObjectError, match=KEY) as failure:
        content(bucket_of(replace(UNSIGNED, timeout=0.3 if fault == "hang" else 30)))
    assert failure.value.is_temporary == is_temporary
    assert reason in failure.value.reason
    assert server.seen()[KEY] == requests


def test_an_etag_that_is_no_checksum_can_be_left_alone(folder: Path, served: Callable[..., Server]) -> None:
    served(folder, faults=[{"key": KEY, "do": "stale_etag", "times": 99}])
    assert content(bucket_of(replace(UNSIGNED, verify=False))) == (folder / KEY).read_bytes()


def test_what_is_too_large_missing_or_unchanged_is_not_read(folder: Path, served: Callable[..., Server]) -> None:
    served(folder)
    bucket = bucket_of(UNSIGNED)
    with pytest.raises(ObjectError, match="1001 bytes, more than 1000"):
        bucket.get(KEY, limit=1000)
    with pytest.raises(FileNotFoundError):
        bucket.get("bin-images/none.jpg", limit=1000)
    fetched = bucket.get(KEY, limit=2000)
    assert fetched is not None
    assert bucket.get(KEY, limit=2000, since=fetched[1]) is None
    nowhere = bucket_of(UNSIGNED, "s3://others")
    with pytest.raises(StocktakeError, match="--root s3://others: there is no bucket others"):
        nowhere.get(KEY, limit=1000)
    with pytest.raises(StocktakeError, match="--root s3://others: there is no bucket others"):
        list(nowhere.list("bin-images/"))


@pytest.mark.parametrize("region", [None, "ap-south-1"])
def test_credentials_and_region_may_come_from_a_profile(
    region: str | None, folder: Path, served: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = AKIATEST\naws_secret_access_key = b\n")
    (tmp_path / "config").write_text("[default]\nregion = eu-north-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    if region:
        monkeypatch.setenv("AWS_REGION", region)
    server = served(folder)
    content(bucket_of(QUICK))
    assert server.authorized() == 1
    assert "AKIATEST" in server.authorization()
    assert f"/{region or 'eu-north-1'}/s3/" in server.authorization()


@pytest.mark.aws
def test_what_was_put_is_there_and_is_read_again(private_bucket: str) -> None:
    bucket = Bucket(S3Address.parse(f"{private_bucket}/some/where"), QUICK)
    data = bytes(range(256)) * 50
    assert not bucket.holds("a/b.tar", data)
    bucket.put("a/b.tar", data)
    assert bucket.holds("a/b.tar", data)
    assert not bucket.holds("a/b.tar", data[::-1])
    fetched = bucket.get("a/b.tar", limit=20_000)
    assert fetched is not None
    assert fetched[0] == data
    with pytest.raises(StocktakeError, match="there is no bucket"):
        Bucket(S3Address.parse("s3://no-such-bucket-here"), QUICK).put("x", b"x")
