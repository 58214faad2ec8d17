"""Files that are written whole or not at all."""

import stat
import subprocess
import sys
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


def test_two_containers_on_one_disk_do_not_share_a_temporary(tmp_path: Path) -> None:
    """Their processes have the same number, and do the same things in the same order."""
    code = (
        "import os, pathlib, sys; os.getpid = lambda: 1\n"
        "from stocktake.files import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as temporary: temporary.touch(); print(temporary)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "page.html")]
    names = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert names[0] != names[1]


def test_the_file_has_the_rights_of_an_ordinary_new_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    atomic_write(tmp_path / "atomic", b"\x00")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "atomic")}
    assert len(modes) == 1
