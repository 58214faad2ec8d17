"""The command line in this process, and small roots with photos, quantities and items as a test wants them."""

from __future__ import annotations

import io
import json
import signal
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

from stocktake.cli import main

pytest_plugins = ["sagemaker_local.pytest_plugin", "emulated_aws", "tracking_server"]
hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is no fault
hypothesis.settings.load_profile("any machine")
EXIF_ORIENTATION = 0x0112


def pytest_configure() -> None:
    """Ctrl-C reaches the tests' commands, also where a shell in the background started pytest with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among several workers, files with slow tests come first: one that begins last ends long after the others."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def fresh_aws_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3's default session, and MLflow's S3 client, keep the first keys that they see, which are another test's."""
    if boto3 := sys.modules.get("boto3"):
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    if repository := sys.modules.get("mlflow.store.artifact.s3_artifact_repo"):
        repository._cached_get_s3_client.cache_clear()


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def stocktake(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """stocktake("data", "--root", ...): the command line, in this process."""

    def run(*arguments: str) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(arguments)
        said = capsys.readouterr()
        return Ended(int(left.value.code or 0), said.out, said.err)

    return run


@pytest.fixture(scope="session")
def bin_photo() -> Callable[..., bytes]:
    """bin_photo(seed, size=(48, 40), format="JPEG", mode="RGB", orientation=None): bytes of a photo.

    Photos of two seeds differ far beyond what makes two photos looks at one bin.
    """

    def make(
        seed: int | str,
        size: tuple[int, int] = (48, 40),
        format: str = "JPEG",
        mode: str = "RGB",
        orientation: int | None = None,
    ) -> bytes:
        patches = np.random.default_rng(zlib.crc32(str(seed).encode())).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        photo = Image.fromarray(patches).resize(size, Image.Resampling.NEAREST).convert(mode)
        settings = {"quality": 90} if format == "JPEG" else {}
        if orientation is not None:
            exif = Image.Exif()
            exif[EXIF_ORIENTATION] = orientation
            settings["exif"] = exif
        file = io.BytesIO()
        photo.save(file, format, **settings)
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def write_bin(bin_photo: Callable[..., bytes]) -> Callable[..., None]:
    """write_bin(root, id, quantity=1, items=None, photo=None, record=None): one bin in a root.

    `items` are the keys of the recorded items (default: one of the bin's own); `photo` and `record` are the files'
    bytes, if not a good photo and a record that agrees with the quantity.
    """

    def write(
        root: Path,
        bin_id: str,
        quantity: int = 1,
        items: Sequence[str] | None = None,
        photo: bytes | None = None,
        record: bytes | None = None,
    ) -> None:
        for folder in ("bin-images", "metadata"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        keys = [f"item-{bin_id}"] if items is None else items
        contents = {key: {"asin": key, "quantity": quantity if key == keys[0] else 0} for key in keys}
        agreed = json.dumps({"BIN_FCSKU_DATA": contents, "EXPECTED_QUANTITY": quantity}).encode()
        (root / "bin-images" / f"{bin_id}.jpg").write_bytes(bin_photo(bin_id) if photo is None else photo)
        (root / "metadata" / f"{bin_id}.json").write_bytes(agreed if record is None else record)

    return write


@pytest.fixture(scope="session")
def make_root(write_bin: Callable[..., None]) -> Callable[..., Path]:
    """make_root(folder, quantities): bins 00001, 00002, ... with these quantities, each its own group."""

    def make(folder: Path, quantities: Iterable[int]) -> Path:
        for number, quantity in enumerate(quantities, 1):
            write_bin(folder, f"{number:05d}", quantity)
        return folder

    return make
