from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from stocktake.errors import StocktakeError
from stocktake.tracking.local_store import DatasetRecord, LocalRun


@pytest.fixture
def folder(tmp_path: Path) -> LocalRun:
    return LocalRun.create(tmp_path / "runs", name="a run/1", experiment="e", tracking_uri=None)


def test_a_folder_reads_back_as_it_was_written(folder: LocalRun) -> None:
    folder.log_params({"lr": 1e-3, "uri": "http://ann:s3cret@host"})
    folder.set_tags({"stage": "frozen"})
    folder.log_dataset(DatasetRecord("bins", "d" * 50, "s3://bucket", 3), "training")
    folder.log_metrics({"val/macro_f1": 0.5, "train/loss": math.nan}, step=2)
    folder.finish("FAILED", "ValueError: no")
    again = LocalRun.open(folder.folder)
    assert again.state == folder.state
    assert again.params == {"lr": "0.001", "uri": "http://***@host"}
    assert again.tags == {"stage": "frozen"}
    assert len(again.inputs[0]["digest"]) == 36
    assert again.final_metrics()["val/macro_f1"] == 0.5
    result = json.loads((folder.folder / "result.json").read_text())
    assert (result["status"], result["reason"]) == ("FAILED", "ValueError: no")
    assert result["metrics"] == {"val/macro_f1": 0.5, "train/loss": None}


def test_the_first_value_of_a_param_stays(folder: LocalRun) -> None:
    folder.log_params({"lr": 1})
    folder.log_params({"lr": 2, "seed": 0})
    assert folder.params == {"lr": "1", "seed": "0"}


def test_the_result_is_the_value_at_the_largest_step(folder: LocalRun) -> None:
    for step, value in ((1, 0.1), (3, 0.3), (2, 0.9)):
        folder.log_metrics({"val/macro_f1": value}, step)
    assert folder.final_metrics() == {"val/macro_f1": 0.3}


def test_a_torn_line_is_no_point(folder: LocalRun) -> None:
    folder.log_metrics({"a": 1.0}, 0)
    whole = (folder.folder / "metrics.csv").stat().st_size
    with (folder.folder / "metrics.csv").open("a") as file:
        file.write("1700000000000,1,a,0.")
    points, end = folder.read_metrics()
    assert [point.value for point in points] == [1.0]
    assert end == whole


def test_a_folder_is_locked_while_its_run_is_alive(folder: LocalRun) -> None:
    other = LocalRun.open(folder.folder)
    assert not other.try_lock()
    folder.release()
    assert other.try_lock()


@pytest.mark.parametrize("name", ["", "a@b", "../x", "/x", "a//b", "x" * 251, "a\nb"])
def test_names_that_a_store_refuses_are_refused_at_once(folder: LocalRun, name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        folder.log_metrics({name: 1.0}, 0)
    assert folder.read_metrics()[0] == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"uploads": 3}', "[" * 100_000], ids=lambda text: text[:9])
def test_a_broken_folder_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(StocktakeError, match=str(tmp_path)):
        LocalRun.open(tmp_path)
