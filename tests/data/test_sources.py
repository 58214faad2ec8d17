"""Roots and lists of ids: what is read, what is refused, and that nothing outside of a root is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from stocktake.config.data import BinsConfig
from stocktake.data.images import LARGEST_FILE, PhotoError, decode_validated
from stocktake.data.sources import Source, open_source, read_id_list, source_key
from stocktake.errors import StocktakeError


def test_a_folder_is_read_in_the_buckets_layout(tmp_path: Path, make_root: Callable[..., Path]) -> None:
    root = make_root(tmp_path / "root", [1, 2])
    source = Source(root)
    (root / "metadata" / "lonely.json").write_text("{}")
    (root / "metadata" / "notes.txt").write_text("no record")
    assert source.ids() == ["00001", "00002"]
    assert Source(root).ids() == ["00001", "00002", "lonely"]
    assert json.loads(source.record("00002"))["EXPECTED_QUANTITY"] == 2
    assert decode_validated(source.photo("00001"))[0].size == (48, 40)
    with pytest.raises(FileNotFoundError):
        source.photo("lonely")


def test_a_change_key_changes_with_either_file(
    tmp_path: Path, make_root: Callable[..., Path], bin_photo: Callable[..., bytes]
) -> None:
    root = make_root(tmp_path / "root", [1])
    change_keys = [Source(root).change_key("00001")]
    (root / "bin-images" / "00001.jpg").write_bytes(bin_photo("another"))
    change_keys.append(Source(root).change_key("00001"))
    (root / "metadata" / "00001.json").unlink()
    change_keys.append(Source(root).change_key("00001"))
    assert len(set(change_keys)) == 3
    assert Source(root).change_key("00001") == change_keys[-1]


def test_a_huge_file_is_not_read_into_memory(tmp_path: Path, make_root: Callable[..., Path]) -> None:
    root = make_root(tmp_path / "root", [1])
    with (root / "bin-images" / "00001.jpg").open("r+b") as file:
        file.truncate(10 * LARGEST_FILE)  # sparse: takes no space
    data = Source(root).photo("00001")
    assert len(data) <= LARGEST_FILE + 1
    with pytest.raises(PhotoError, match="more than"):
        decode_validated(data)


@pytest.mark.parametrize(
    ("root", "reason"),
    [("nowhere", "is not a folder"), ("x" * 5000, "cannot be read"), (".", "holds no bins")],
    ids=["missing", "too long a name", "empty"],
)
def test_a_root_that_cannot_be_used_is_named(
    root: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StocktakeError, match=f"^--root {re.escape(root)} {reason}"):
        open_source(root, BinsConfig(), range(1, 6), None)


def test_a_list_holds_ids_by_class_as_paths(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"1": ["data/metadata/100313.json", "09912"], "2": ["bin-images/5.jpg", "5"]}))
    assert read_id_list(path) == ["09912", "100313", "5"]
    path.write_text(json.dumps(["7", "a/6.json"]))
    assert read_id_list(path) == ["6", "7"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1, 2", "is not JSON"),
        ("", "is not JSON"),
        pytest.param("[" * 100_000, "is not JSON", id="deep"),
        ("7", "must look like"),
        ('{"1": "5.json"}', "must look like"),
        ('{"1": [5]}', "must look like"),
        ('{"1": []}', "names no bin"),
        ("{}", "names no bin"),
        *(
            (json.dumps({"1": ["data/metadata/1.json", entry]}), "no id of a bin")
            for entry in (
                *("../../etc", "../../etc/passwd", "", ".", "..", "a b"),
                *("-x", ".hidden", "1;2", "x" * 65, "1\n", "1\u0000"),
            )
        ),
    ],
)
def test_what_is_no_list_of_ids_is_refused_with_the_reason(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(StocktakeError, match=f"--list {path} .*{reason}"):
        read_id_list(path)
    with pytest.raises(StocktakeError, match="cannot be read: No such file"):
        read_id_list(tmp_path / "another.json")


def test_two_roots_of_one_name_are_remembered_apart(tmp_path: Path) -> None:
    names = {source_key(str(tmp_path / parent / "bins")) for parent in "ab"}
    assert len(names) == 2
    assert all(name.startswith("bins-") for name in names)
    assert source_key(f"{tmp_path}/b/../a/bins") == source_key(str(tmp_path / "a" / "bins"))
