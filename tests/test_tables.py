"""One printer of tables."""

import csv
import json
from pathlib import Path

import pytest

from stocktake.errors import StocktakeError
from stocktake.tables import Format, show_table

ROWS = [
    {"run": "majority", "score": 0.08213, "likely": [1, 2], "best": False},
    {"run": "[bold]finetune[/bold]", "score": None, "likely": [3], "best": True, "note": "resumed, twice"},
]


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_a_table_shows_what_is_asked_for_without_reading_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(ROWS, title="leaderboard", headers={"run": "run", "score": "F1"})
    shown = capsys.readouterr().out
    assert "leaderboard" in shown
    assert "F1" in shown
    assert "0.082" in shown
    assert "[bold]finetune[/bold]" in shown
    assert "resumed" not in shown


@pytest.mark.parametrize("format", ["csv", "json", "jsonl"])
def test_programs_get_every_column_in_full_precision(format: Format, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows"
    show_table(ROWS, format, output=path)
    text = path.read_text()
    if format == "csv":
        first, second = read_csv(text)
        assert (float(first["score"]), first["likely"], second["score"], second["best"]) == (0.08213, "1 2", "", "true")
        assert second["note"] == "resumed, twice"
    elif format == "json":
        assert json.loads(text) == ROWS
    else:
        assert [json.loads(line) for line in text.splitlines()] == ROWS


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StocktakeError, match="file"):
        show_table(ROWS, "csv", output=tmp_path / "file" / "below")
