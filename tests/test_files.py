"""Files that are written whole or not at all."""

import stat
from pathlib import Path

import pytest

from stocktake.files import atomic_path, atomic_write


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results" / "metrics.json"
    atomic_write(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half of the new")
        _ = 1 / 0
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_share_a_temporary(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with atomic_path(path) as first, atomic_path(path) as second:
        assert first != second
        assert {first.suffix, second.suffix} == {".html"}
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() in ("first", "second")


def test_the_file_has_the_rights_of_an_ordinary_new_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    atomic_write(tmp_path / "atomic", b"\x00")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "atomic")}
    assert len(modes) == 1
