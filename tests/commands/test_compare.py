from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from stocktake.commands.compare import compare
from stocktake.config.runs import CompareConfig, TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.leaderboard import COLUMNS, as_markdown
from stocktake.tracking.runs import start_run

pytestmark = pytest.mark.usefixtures("sqlite_store")
QUIET = TrackingConfig(system_metrics=False)


def _run(name: str, stage: str, scores: dict[str, float], fingerprint: str = "f1") -> None:
    tags = {"stage": stage, "task": "1-5", "data.fingerprint": fingerprint}
    with start_run(QUIET, workspace=Path("workspace"), name=name, tags=tags) as run:
        run.log_params({"backbone": "resnet18"} if stage != "majority" else {"seed": 0})
        run.log_metrics(scores)


TEST = {"test/macro_f1": 0.512, "test/macro_f1_low": 0.47, "test/macro_f1_high": 0.55, "test/n": 863.0}


def test_the_leaderboard(capsys: pytest.CaptureFixture[str]) -> None:
    _run("majority", "majority", {"val/macro_f1": 0.08, "test/rmse": 1.4})
    _run("<b>fine</b>", "finetune", {"val/macro_f1": 0.53, "test/accuracy": 0.51, **TEST})
    _run("frozen [red]", "frozen", {"val/macro_f1": 0.3})
    _run("elsewhere", "frozen", {"val/macro_f1": 0.9}, fingerprint="f2")
    _run("no score", "eda", {"bins/total": 3.0})
    frame = compare(CompareConfig())
    assert list(frame.columns) == list(COLUMNS)
    assert list(frame["run"]) == ["elsewhere", "<b>fine</b>", "frozen [red]", "majority"]
    assert list(frame["comparable"]) == [False, True, True, True]
    fine = frame.iloc[1]
    assert (fine["test/macro_f1"], fine["test/macro_f1 interval"], fine["n"]) == (0.512, "[0.47, 0.55]", 863)
    assert fine["backbone"] == "resnet18"
    out = capsys.readouterr().out
    assert "0.512 [0.47, 0.55]" in out
    assert "≠ elsewhere" in out
    assert "frozen [red]" in out
    assert max(len(line) for line in out.splitlines()) <= 100
    folder = Path("workspace/compare")
    pd.testing.assert_frame_equal(pd.read_csv(folder / "leaderboard.csv")[["run", "n"]], frame[["run", "n"]])
    page = (folder / "leaderboard.html").read_text()
    assert "&lt;b&gt;fine&lt;/b&gt;" in page
    assert "<b>" not in page
    assert page.count("<tr") == 5
    assert 'class="unlike"' in page
    assert "://" not in page
    assert as_markdown(frame).splitlines()[2].startswith("| elsewhere | 0.900 |")


def test_only_one_stage_and_only_the_best() -> None:
    _run("a", "frozen", {"val/macro_f1": 0.1})
    _run("b", "frozen", {"val/macro_f1": 0.2})
    _run("c", "finetune", {"val/macro_f1": 0.3})
    frame = compare(CompareConfig(stage="frozen", best=1, output="here"))
    assert list(frame["run"]) == ["b"]
    assert Path("here/leaderboard.html").is_file()


def test_nothing_to_compare_is_said() -> None:
    with pytest.raises(StocktakeError, match=r"'stocktake'.*'Default'"):
        compare(CompareConfig())
    _run("a", "frozen", {"train/loss": 0.1})
    with pytest.raises(StocktakeError, match="no run"):
        compare(CompareConfig())
    with pytest.raises(StocktakeError, match="'ddp'"):
        compare(CompareConfig(stage="ddp"))
    with pytest.raises(StocktakeError, match="best"):
        CompareConfig(best=0)
