"""`stocktake predict`: every source of photos, every form of answer, records at variance, and what is rejected."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from stocktake.config.runs import TrackingConfig
from stocktake.models.export import export_model
from stocktake.registry.registration import register_candidate
from stocktake.serving import endpoints
from stocktake.serving.predictor import FOLDER, Predictor
from stocktake.serving.pyfunc import save_pyfunc
from stocktake.tracking.runs import start_run
from tiny_bins import draw_bin, tiny_model


@pytest.fixture(scope="module")
def exported(few_bins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / FOLDER
    export_model(tiny_model("pca_svm", few_bins), folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: photos/a.jpg, photos/b/c.PNG and photos/notes.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "b").mkdir(parents=True)
    (tmp_path / "photos" / "a.jpg").write_bytes(draw_bin(1, 731))
    (tmp_path / "photos" / "b" / "c.PNG").write_bytes(draw_bin(2, 732))
    (tmp_path / "photos" / "notes.txt").write_text("no photo")
    return tmp_path


@pytest.fixture
def predict(stocktake: Callable[..., Any], exported: Path, here: Path) -> Callable[..., Any]:
    def run(*words: str) -> Any:
        return stocktake("predict", *words, "--model", str(exported))

    return run


def test_photos_and_folders_are_counted_in_order(predict: Callable[..., Any], exported: Path) -> None:
    ended = predict("photos/b/c.PNG", "photos", "--format", "json")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)
    assert [row["photo"] for row in rows] == ["photos/b/c.PNG", "photos/a.jpg", "photos/b/c.PNG"]
    assert rows[0] == rows[2]
    counter = Predictor(exported)
    for row, photo in zip(rows, (draw_bin(2, 732), draw_bin(1, 731)), strict=False):
        (own,) = counter.predict([photo])
        assert (row["quantity"], row["model_version"]) == (own.quantity, counter.version)
        assert row["likely_quantities"] == list(own.likely_quantities)
        assert row["confidence"] == pytest.approx(own.confidence, abs=1e-4)
        assert row["probabilities"] == pytest.approx(
            {str(quantity): share for quantity, share in own.probabilities.items()}, abs=1e-4
        )
        assert row["error"] == ""
    assert f"3 photos counted by {counter.version}\n" == ended.err


def test_records_are_checked_against_their_photos(predict: Callable[..., Any], exported: Path, here: Path) -> None:
    """A CSV's rows keep their order and columns; paths are relative to it."""
    (seen,) = Predictor(exported).predict([draw_bin(1, 731)])
    wrong = seen.quantity % 3 + 1
    (here / "photos" / "records.csv").write_text(
        "\ufeffbin,photo,quantity,confidence\n"
        f"B7,b/c.PNG,many,high\nB1,a.jpg,{seen.quantity},low\nB2,a.jpg,{wrong},\nB3,gone.jpg,1,\n"
    )
    ended = predict("photos/records.csv", "--format", "csv")
    assert ended.code == 0, ended.err
    rows = list(csv.DictReader(io.StringIO(ended.out)))
    assert [row["bin"] for row in rows] == ["B7", "B1", "B2", "B3"]
    assert [row["variance"] for row in rows] == ["", "false", "true", ""]
    assert [row["recorded"] for row in rows] == ["", str(seen.quantity), str(wrong), "1"]
    assert [row["quantity"] for row in rows[1:]] == [str(seen.quantity)] * 2 + [""]
    assert [row["csv_confidence"] for row in rows] == ["high", "low", "", ""]
    assert sum(float(rows[1][f"p_{quantity}"]) for quantity in (1, 2, 3)) == pytest.approx(1, abs=1e-5)
    assert rows[3]["error"] == "file cannot be read: No such file or directory"
    assert "rejected: gone.jpg: file cannot be read: No such file or directory\n" in ended.err
    assert "1 rejected; 1 at variance with their records" in ended.err

    shown = predict("photos/records.csv")
    assert shown.code == 0
    for word in ("recorded", "variance", "gone.jpg", "yes"):
        assert word in shown.out


def test_a_record_is_to_be_recounted_when_it_is_not_even_likely(
    stocktake: Callable[..., Any], exported: Path, here: Path, tmp_path: Path
) -> None:
    """Of a record that the model cannot count to it says nothing."""
    sure = tmp_path / "sure"
    shutil.copytree(exported, sure)
    (seen,) = Predictor(exported).predict([draw_bin(1, 731)])
    least, second, best = sorted(seen.probabilities, key=seen.probabilities.__getitem__)
    threshold = (seen.probabilities[least] + seen.probabilities[second]) / 2
    description = json.loads((sure / "model.json").read_text())
    description["calibration"] |= {"set_threshold": threshold}
    (sure / "model.json").write_text(json.dumps(description))
    lines = [f"a.jpg,{quantity}" for quantity in (best, second, least, 9)]
    (here / "photos" / "audit.csv").write_text("\n".join(["photo,quantity", *lines]) + "\n")
    ended = stocktake("predict", "photos/audit.csv", "--format", "jsonl", "--model", str(sure))
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [row["variance"] for row in rows] == [False, True, True, None]
    assert [row["recount"] for row in rows] == [False, False, True, None]
    assert "2 at variance with their records, 1 to recount" in ended.err


def test_bad_photos_are_set_aside_and_all_bad_is_an_error(predict: Callable[..., Any], here: Path) -> None:
    (here / "photos" / "bad.jpg").write_bytes(b"no photo")
    (here / "photos" / "cut.jpg").write_bytes(draw_bin(1, 733)[:300])
    ended = predict("photos", "--format", "jsonl", "--output", "out/counts.jsonl")
    assert (ended.code, ended.out) == (0, "")
    rows = [json.loads(line) for line in (here / "out" / "counts.jsonl").read_text().splitlines()]
    assert [bool(row["error"]) for row in rows] == [False, False, True, True]
    assert rows[2]["quantity"] is None
    assert "rejected: photos/bad.jpg: photo is not a JPEG, PNG or WebP image\n" in ended.err
    assert "2 photos counted" in ended.err
    assert "2 rejected; written to out/counts.jsonl" in ended.err
    ended = predict("photos/bad.jpg", "gone.jpg")
    assert ended.code == 2
    assert "none of 2 photos could be counted, the first because: photo is not" in ended.err


def test_an_endpoint_answers_as_its_model(
    predict: Callable[..., Any], exported: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOCKTAKE_STATE", str(here / "state"))
    (here / "photos" / "bad.jpg").write_bytes(b"no photo")
    own = json.loads(predict("photos", "--format", "json").out)
    endpoint = endpoints.create("bins", exported, model_uri="m", settings={"port": 0})
    try:
        for asked in ("bins", endpoint.address):
            served = json.loads(predict("photos", "--format", "json", "--endpoint", asked).out)
            assert [row["quantity"] for row in served] == [row["quantity"] for row in own]
            assert [bool(row["error"]) for row in served] == [False, False, True]
            assert [row["model_version"] for row in served] == [row["model_version"] for row in own]
    finally:
        endpoints.delete("bins")
    assert "there is no endpoint bins" in predict("photos", "--endpoint", "bins").err
    assert "does not answer" in predict("photos", "--endpoint", endpoint.address).err


def test_the_champion_answers_where_nothing_else_is_named(
    exported: Path, sqlite_store: str, here: Path, stocktake: Callable[..., Any]
) -> None:
    ended = stocktake("predict", "--photos", "photos/a.jpg")
    assert ended.code == 2
    assert "no model models:/stocktake@champion" in ended.err
    saved = save_pyfunc(Path(shutil.copytree(exported, here / FOLDER)), here / "model", draw_bin(1, 0))
    quiet = TrackingConfig(system_metrics=False)
    with start_run(quiet, workspace=Path("workspace"), name="classical", tags={"stage": "classical"}) as run:
        run.log_model(saved)
    assert register_candidate(quiet, run.folder, Path("workspace")) is not None
    MlflowClient(sqlite_store, sqlite_store).set_registered_model_alias("stocktake", "champion", "1")
    ended = stocktake("predict", "photos", "--format", "json")
    assert ended.code == 0, ended.err
    assert {row["model_version"] for row in json.loads(ended.out)} == {"stocktake/1"}


def test_what_is_no_source_of_photos_is_told(predict: Callable[..., Any], here: Path) -> None:
    (here / "none").mkdir()
    (here / "empty.csv").write_text("photo\n")
    (here / "other.csv").write_text("picture\na.jpg\n")
    for words, said in (
        ([], "which photos?"),
        (["none"], "none holds no photo: they end with .jpg"),
        (["empty.csv"], "empty.csv has no rows"),
        (["other.csv"], "has no column photo or path, but picture"),
        (["missing.csv"], "missing.csv cannot be read"),
        (["photos", "--output", "photos"], "photos cannot be written"),
    ):
        ended = predict(*words)
        assert ended.code == 2
        assert said in ended.err
