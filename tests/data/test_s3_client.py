"""One bucket, over real HTTP: signed or not, whole or repeated, refused with a reason; never without end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3_server import serve
from stocktake.config.data import S3Config
from stocktake.data.s3_client import Bucket, Fetched, ObjectError, S3Address
from stocktake.errors import StocktakeError

QUICK = S3Config(retries=2, timeout=20)
KEY = "bin-images/00001.jpg"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven objects below bin-images/ and one beside."""
    for number in range(7):
        path = tmp_path / "bucket" / "bin-images" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * (1000 + number))
    (tmp_path / "bucket" / "other.txt").write_text("other")
    return tmp_path / "bucket"


def content(bucket: Bucket) -> bytes:
    fetched = bucket.get(KEY, limit=10_000)
    assert isinstance(fetched, Fetched)
    return fetched.data


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


@given(st.lists(st.from_regex(r"[A-Za-z0-9_=-]{1,12}", fullmatch=True), max_size=4))
def test_an_address_is_read_as_it_is_written(parts: list[str]) -> None:
    address = S3Address("some-bucket", "/".join(parts))
    assert S3Address.parse(str(address)) == address


def test_without_credentials_no_request_is_signed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(folder) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        bucket = Bucket(S3Address.parse("s3://bins"), QUICK)
        assert content(bucket) == (folder / KEY).read_bytes()
        assert len(list(bucket.list("bin-images/"))) == 7
        assert not bucket.is_signed
        assert server.authorized() == 0
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        Bucket(S3Address.parse("s3://bins"), S3Config(anonymous=True)).get(KEY, limit=10_000)
        assert server.authorized() == 0
        Bucket(S3Address.parse("s3://bins"), QUICK).get(KEY, limit=10_000)
        assert server.authorized() == 1


def test_the_public_bucket_is_never_asked_with_a_signature(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    with serve(folder, bucket="aft-vbi-pds") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the service's own address goes before
        bucket = Bucket(S3Address.parse("s3://aft-vbi-pds"), QUICK)
        bucket.get(KEY, limit=10_000)
        assert (bucket.is_signed, server.authorized()) == (False, 0)


def test_a_prefix_is_below_every_key(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path, page=3) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        bucket = Bucket(S3Address.parse("s3://bins/bucket"), S3Config(anonymous=True))
        assert list(bucket.list("bin-images/")) == [f"bin-images/{number:05d}.jpg" for number in range(7)]
        assert server.seen()["LIST"] == 3


@pytest.mark.parametrize("fault", ["503", "reset", "truncate", "corrupt", "slow"])
def test_a_passing_fault_is_repeated(fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(folder, faults=[{"key": KEY, "do": fault, "times": 1 if fault == "slow" else 2}]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        bucket = Bucket(S3Address.parse("s3://bins"), S3Config(anonymous=True, retries=3))
        assert content(bucket) == (folder / KEY).read_bytes()
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
    fault: str, is_temporary: bool, reason: str, requests: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(folder, faults=[{"key": KEY, "do": fault, "times": 99}]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        settings = S3Config(anonymous=True, retries=2, timeout=0.5 if fault == "hang" else 30)
        with pytest.raises(ObjectError, match=KEY) as failure:
            Bucket(S3Address.parse("s3://bins"), settings).get(KEY, limit=10_000)
        assert failure.value.is_temporary == is_temporary
        assert reason in failure.value.reason
        assert server.seen()[KEY] == requests


def test_an_etag_that_is_no_checksum_can_be_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(folder, faults=[{"key": KEY, "do": "stale_etag", "times": 99}]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        bucket = Bucket(S3Address.parse("s3://bins"), S3Config(anonymous=True, verify=False))
        assert content(bucket) == (folder / KEY).read_bytes()


def test_what_is_too_large_is_refused_and_what_is_missing_is_not_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(folder) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        bucket = Bucket(S3Address.parse("s3://bins"), S3Config(anonymous=True))
        with pytest.raises(ObjectError, match="1001 bytes, more than 1000"):
            bucket.get(KEY, limit=1000)
        with pytest.raises(ObjectError, match="1001 bytes, more than 1000"):
            bucket.download(KEY, tmp_path / "copy", limit=1000)
        with pytest.raises(FileNotFoundError):
            bucket.get("bin-images/none.jpg", limit=1000)
        assert not (tmp_path / "copy").exists()
        bucket.download(KEY, tmp_path / "copy", limit=2000)
        assert (tmp_path / "copy").read_bytes() == (folder / KEY).read_bytes()
        fetched = bucket.get(KEY, limit=2000)
        assert fetched is not None
        assert bucket.get(KEY, limit=2000, since=fetched.modified) is None
        nowhere = Bucket(S3Address.parse("s3://others"), S3Config(anonymous=True))
        with pytest.raises(StocktakeError, match="--root s3://others: there is no bucket others"):
            nowhere.get(KEY, limit=1000)
        with pytest.raises(StocktakeError, match="--root s3://others: there is no bucket others"):
            list(nowhere.list("bin-images/"))


def test_credentials_and_region_may_come_from_a_profile(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = AKIATEST\naws_secret_access_key = b\n")
    (tmp_path / "config").write_text("[default]\nregion = eu-north-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with serve(folder) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        bucket = Bucket(S3Address.parse("s3://bins"), QUICK)
        bucket.get(KEY, limit=10_000)
        assert (bucket.is_signed, server.authorized()) == (True, 1)
        assert "AKIATEST" in server.authorization()
        assert "/eu-north-1/s3/" in server.authorization()


@pytest.mark.aws
def test_what_is_put_is_held_and_given_back(private_bucket: str) -> None:
    bucket = Bucket(S3Address.parse(f"{private_bucket}/some/where"), QUICK)
    data = bytes(range(256)) * 50
    assert not bucket.holds("a/b.tar", data)
    bucket.put("a/b.tar", data)
    assert bucket.holds("a/b.tar", data)
    assert not bucket.holds("a/b.tar", data[::-1])
    fetched = bucket.get("a/b.tar", limit=20_000)
    assert fetched is not None
    assert fetched.data == data
    with pytest.raises(StocktakeError, match="there is no bucket"):
        Bucket(S3Address.parse("s3://no-such-bucket-here"), QUICK).put("x", b"x")
