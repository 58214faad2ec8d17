"""Bad input through the command line: one line and exit code 2, or rejected, listed, and on with the rest."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

GOOD = [1, 2, 3, 4, 5] * 8


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: empty, and the workspace is in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def root(here: Path, make_root: Callable[..., Path]) -> Path:
    """`root` in the current folder: forty good bins, 00001 to 00040."""
    return make_root(here / "root", GOOD)


@pytest.fixture
def refused(stocktake: Callable[..., Any]) -> Callable[..., str]:
    """refused("data", ...): the one line of a command that the user can mend."""

    def run(*arguments: str) -> str:
        ended = stocktake(*arguments)
        assert ended.code == 2
        assert ended.err.startswith("stocktake: ")
        assert ended.err.count("\n") == 1
        assert ended.err.endswith("\n")
        return str(ended.err)

    return run


def rejected(here: Path) -> dict[str, tuple[str, str]]:
    """Of each id in rejected.csv its file and reason."""
    (path,) = (here / "workspace" / "manifests").glob("*/rejected.csv")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return {row.id: (row.file, row.reason) for row in table.itertuples()}


def bins(here: Path) -> pd.DataFrame:
    (path,) = (here / "workspace" / "manifests").glob("*/manifest.parquet")
    return pd.read_parquet(path).set_index("id")


def run_process(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stocktake", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=here, check=False, timeout=120)


def bomb() -> bytes:
    """A PNG of a few bytes that claims 3.6 thousand million pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(9999))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# The root -------------------------------------------------------------------------------------------------------------


def test_a_missing_root_ends_a_real_process_in_one_line(here: Path) -> None:
    ended = run_process(here, "data", "--root", "nowhere")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "stocktake: --root nowhere is not a folder: give one that holds bin-images/ and metadata/\n"
    )
    assert list(here.iterdir()) == []


def test_an_empty_root_says_what_belongs_there(here: Path, refused: Callable[..., str]) -> None:
    (here / "root" / "bin-images").mkdir(parents=True)
    assert "--root root holds no bins: photos belong in bin-images/<id>.jpg" in refused("data", "--root", "root")


def test_a_root_that_is_a_file_is_refused(here: Path, refused: Callable[..., str]) -> None:
    (here / "root").write_text("bins")
    assert "--root root is not a folder" in refused("data", "--root", "root")


def test_a_root_with_nothing_usable_ends_a_real_process_in_one_line(here: Path, write_bin: Callable[..., None]) -> None:
    for number in range(3):
        write_bin(here / "root", f"{number}", photo=b"no photo")
    ended = run_process(here, "data", "--root", "root")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "stocktake: --root root holds nothing usable: all 3 bins were rejected, the first because of "
        "bin-images/0.jpg: photo is not a JPEG, PNG or WebP image\n"
    )


def test_an_empty_root_option_is_no_synthetic_root(here: Path, refused: Callable[..., str]) -> None:
    assert "--root is empty: give a folder" in refused("data", "--root", "")
    assert list(here.iterdir()) == []


def test_another_kind_of_root_is_refused(here: Path, refused: Callable[..., str]) -> None:
    assert "--root ftp://host/bins" in refused("data", "--root", "ftp://host/bins")


# Records and photos ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"", "record is not JSON"),
        (b"{'EXPECTED_QUANTITY': 1}", "record is not JSON"),
        (b"<html>404</html>", "record is not JSON"),
        (b'"1"', "record is a JSON str, not an object"),
        (b'{"BIN_FCSKU_DATA": {}}', "EXPECTED_QUANTITY is missing"),
        (b'{"EXPECTED_QUANTITY": null}', "EXPECTED_QUANTITY is None, not a whole number"),
        (b'{"EXPECTED_QUANTITY": -1}', "EXPECTED_QUANTITY is -1, not a whole number"),
        (b'{"EXPECTED_QUANTITY": 2.5}', "EXPECTED_QUANTITY is 2.5, not a whole number"),
        (b'{"EXPECTED_QUANTITY": "3"}', "EXPECTED_QUANTITY is '3', not a whole number"),
        (b'{"EXPECTED_QUANTITY": true}', "EXPECTED_QUANTITY is True, not a whole number"),
    ],
)
def test_a_bad_record_is_rejected_and_the_rest_is_used(
    record: bytes, reason: str, here: Path, root: Path, write_bin: Callable[..., None], stocktake: Callable[..., Any]
) -> None:
    write_bin(root, "90000", record=record)
    ended = stocktake("data", "--root", "root")
    assert (ended.code, ended.err) == (0, "")
    assert "1 bins rejected, listed in workspace/manifests/" in ended.out
    assert f"  metadata/90000.json: {reason}" in ended.out
    file, told = rejected(here)["90000"]
    assert (file, told[: len(reason)]) == ("metadata/90000.json", reason)
    assert len(bins(here)) == len(GOOD)


def test_bad_photos_are_rejected_and_the_rest_is_used(
    here: Path,
    root: Path,
    bin_photo: Callable[..., bytes],
    write_bin: Callable[..., None],
    stocktake: Callable[..., Any],
) -> None:
    photos = {
        "90001": (b"", "photo is empty"),
        "90002": (bin_photo(2)[:-100], "photo cannot be decoded: image file is truncated"),
        "90003": (b"<html>404 Not Found</html>", "photo is not a JPEG, PNG or WebP image"),
        "90004": (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "photo is not a JPEG, PNG or WebP image"),
        "90005": (bin_photo(5)[:11], "photo "),
    }
    for bin_id, (photo, _) in photos.items():
        write_bin(root, bin_id, photo=photo)
    write_bin(root, "90000")
    (root / "bin-images" / "90000.jpg").unlink()
    ended = stocktake("data", "--root", "root")
    assert (ended.code, ended.err) == (0, "")
    told = rejected(here)
    assert told.keys() == {"90000", *photos}
    assert told["90000"] == ("bin-images/90000.jpg", "file is missing")
    for bin_id, (_, reason) in photos.items():
        file, why = told[bin_id]
        assert (file, why[: len(reason)]) == (f"bin-images/{bin_id}.jpg", reason)
        assert f"  {file}: {why}" in ended.out
    assert len(bins(here)) == len(GOOD)


def test_unusual_photos_are_used_and_flagged(
    here: Path,
    root: Path,
    bin_photo: Callable[..., bytes],
    write_bin: Callable[..., None],
    stocktake: Callable[..., Any],
) -> None:
    write_bin(root, "90001", photo=bin_photo(1, format="PNG"))
    write_bin(root, "90002", photo=bin_photo(2, mode="L"))
    write_bin(root, "90003", photo=bin_photo(3, mode="CMYK"))
    write_bin(root, "90004", photo=bin_photo(4, orientation=6))
    ended = stocktake("data", "--root", "root")
    assert (ended.code, ended.err, rejected(here)) == (0, "", {})
    found = bins(here)
    flags = {bin_id: list(found.loc[bin_id, "flags"]) for bin_id in ("90001", "90002", "90003", "90004", "00001")}
    assert flags == {
        "90001": ["png"],
        "90002": ["greyscale"],
        "90003": ["cmyk"],
        "90004": ["exif_rotated"],
        "00001": [],
    }
    assert (found.loc["90004", "width"], found.loc["90004", "height"]) == (40, 48)
    for flag in ("png 1", "greyscale 1", "cmyk 1", "exif_rotated 1"):
        assert flag in ended.out


def test_a_bomb_is_rejected_in_a_real_process_and_fills_no_memory(
    here: Path, root: Path, write_bin: Callable[..., None]
) -> None:
    for number in range(8):  # as many as threads could have in hand at once, and more
        write_bin(root, f"9000{number}", photo=bomb())
    code = (
        "import atexit, resource, sys; from stocktake.cli import main;"
        "used = lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr);"
        "atexit.register(used); main(['data', '--root', 'root'])"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=here, check=False, timeout=120)
    assert ended.returncode == 0
    assert ended.stdout.count("could be decompression bomb") == 8
    assert int(ended.stderr) < 3_000_000  # kilobytes; decoded, one of them would take ten million
    assert len(bins(here)) == len(GOOD)


# Lists of ids, tasks, splits ------------------------------------------------------------------------------------------


def test_unknown_ids_of_a_list_are_rejected_and_listed(here: Path, root: Path, stocktake: Callable[..., Any]) -> None:
    known = [f"data/metadata/{number:05d}.json" for number in range(1, 21)]
    (here / "list.json").write_text(json.dumps({"1": known, "2": ["data/metadata/77777.json"]}))
    ended = stocktake("data", "--root", "root", "--list", "list.json")
    assert (ended.code, ended.err) == (0, "")
    assert "  77777: named by --list, but not in the root" in ended.out
    assert rejected(here) == {"77777": ("", "named by --list, but not in the root")}
    assert len(bins(here)) == 20


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('["77777", "77778"]', "--list names 2 bins, and none of them is in root"),
        ("1: 77777", "--list list.json is not JSON"),
        ('{"1": 77777}', "--list list.json must look like"),
        ("[]", "--list list.json names no bin"),
        ('["../../etc/passwd"]', "--list list.json holds '../../etc/passwd', which is no id"),
        (None, "--list list.json cannot be read: No such file"),
    ],
)
def test_a_list_that_cannot_be_used_is_named(
    content: str | None, said: str, here: Path, root: Path, refused: Callable[..., str]
) -> None:
    if content is not None:
        (here / "list.json").write_text(content)
    assert said in refused("data", "--root", "root", "--list", "list.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "6-9"], "--task 6-9 matches no bin of root: its quantities are 1 to 5"),
        (["--task", "five"], "--task 'five' is not a range of quantities"),
        (["--task", "5-1"], "--task '5-1' is not a range of quantities"),
        (["--split.fractions", "[0.8,0.1,0.2]"], "--split.fractions [0.8, 0.1, 0.2]"),
        (["--split.fractions", "[1.1,-0.1,0]"], "--split.fractions [1.1, -0.1, 0.0]"),
        (["--split.fractions", "[.nan,0.5,0.5]"], "--split.fractions [nan, 0.5, 0.5]"),
        (["--split.fractions", "[0.8,0.2]"], '"split.fractions": Expected a tuple with 3'),
        (["--split.by", "shelf"], '"split.by": Expected'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_task_or_split_that_cannot_be_is_named(
    options: list[str], said: str, root: Path, refused: Callable[..., str]
) -> None:
    assert said in refused("data", "--root", "root", *options)


def test_a_quantity_without_a_bin_in_a_split_is_a_warning_to_data_and_the_end_of_training(
    here: Path, make_root: Callable[..., Path], stocktake: Callable[..., Any], refused: Callable[..., str]
) -> None:
    make_root(here / "root", [5, *[1, 2, 3, 4] * 10])  # the only 5 is 00001, which falls into test
    ended = stocktake("data", "--root", "root")
    assert (ended.code, ended.err) == (0, "")
    assert "warning: no bin with quantity 5 in train\n" in ended.out
    assert "warning: no bin with quantity 5 in val\n" in ended.out
    assert "quantity 5 in test" not in ended.out
    said = refused("majority", "--root", "root")
    assert "quantity 5 has no bin in the train split of root: add bins, narrow --task, or change --split.seed" in said
    assert not (here / "workspace" / "runs").exists()


# Places to write ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", ["file", "file/below"])
def test_a_workspace_that_cannot_be_written_is_named(
    workspace: str, here: Path, root: Path, refused: Callable[..., str]
) -> None:
    (here / "file").write_text("mine")
    said = refused("data", "--root", "root", "--workspace", workspace)
    assert f"--workspace {workspace} cannot be written (" in said
    assert "give another folder" in said
    assert (here / "file").read_text() == "mine"


@pytest.mark.parametrize("workspace", ["file", "file/below"])
def test_a_workspace_that_cannot_take_a_synthetic_root_is_named(
    workspace: str, here: Path, refused: Callable[..., str]
) -> None:
    (here / "file").write_text("mine")
    assert f"--workspace {workspace} cannot be written" in refused(
        "data", "--synthetic.count", "2", "--synthetic.size", "32", "--workspace", workspace
    )


def test_an_export_that_cannot_be_written_is_named(here: Path, root: Path, refused: Callable[..., str]) -> None:
    (here / "file").write_text("mine")
    assert "--export file/tree cannot be written: Not a directory" in refused(
        "data", "--root", "root", "--export", "file/tree"
    )
