"""`stocktake compare`: the leaderboard of an experiment, in the terminal, as HTML and as CSV."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING

from stocktake.config import CompareConfig
from stocktake.errors import StocktakeError

if TYPE_CHECKING:
    import pandas as pd

_TITLES = {
    "run": "run",
    "stage": "stage",
    "backbone": "backbone",
    "val/macro_f1": "val macro-F1",
    "val/accuracy": "val accuracy",
    "test/macro_f1": "test macro-F1",
    "test/accuracy": "test accuracy",
    "test/rmse": "test RMSE",
    "n": "n",
    "duration_s": "duration",
    "task": "task",
    "data.fingerprint": "data",
    "parent": "parent",
    "status": "status",
    "run_id": "run id",
}
_NUMBERS = ("val/macro_f1", "val/accuracy", "test/macro_f1", "test/accuracy", "test/rmse", "n", "duration_s")
_WIDTH = 120
_UNLIKE = "≠"  # on a run that was measured on other data


def compare(config: CompareConfig) -> pd.DataFrame:
    """Print the leaderboard and write leaderboard.html and leaderboard.csv.

    Returns:
        One row a run, best val/macro_f1 first; the columns are `stocktake.tracking.leaderboard.COLUMNS`.

    Raises:
        StocktakeError: no such experiment, no run with a score in it, or a store that cannot be used.
    """
    from stocktake.tracking.leaderboard import read_leaderboard

    os.environ.pop("MLFLOW_RUN_ID", None)  # a comparison is no run
    if config.best < 1:
        raise StocktakeError(f"--best {config.best} shows nothing: give 1 or more")
    frame, link = read_leaderboard(config.tracking, stage=config.stage)
    if frame.empty:
        of = f" of stage {config.stage!r}" if config.stage else ""
        raise StocktakeError(f"the experiment {config.tracking.experiment!r} has no run{of} with a score yet")
    frame = frame.head(config.best)
    folder = Path(config.output) if config.output else Path(config.workspace) / "compare"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "leaderboard.csv", frame.to_csv(index=False))
        _write(folder / "leaderboard.html", _page(frame, config.tracking.experiment, link))
    except OSError as error:
        raise StocktakeError(
            f"cannot write the leaderboard into {folder}: {error.strerror}; choose --output"
        ) from error
    print_leaderboard(frame, config.tracking.experiment)
    print(f"written: {folder / 'leaderboard.html'} and leaderboard.csv" + (f"; in MLflow: {link}" if link else ""))
    return frame


def _write(path: Path, content: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(content, encoding="utf-8")
    beside.replace(path)


def print_leaderboard(frame: pd.DataFrame, experiment: str) -> None:
    """On the terminal, the columns that fit: what is the same in all rows is said once, below."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from stocktake.tracking.leaderboard import text

    shown = [
        "run",
        "stage",
        "backbone",
        "val/macro_f1",
        "test/macro_f1",
        "test/accuracy",
        "test/rmse",
        "n",
        "duration_s",
    ]
    if (frame["run"] == frame["stage"]).all():
        shown.remove("stage")
    console = Console(width=min(_WIDTH, Console().width) if Console().is_terminal else _WIDTH)
    table = Table(title=escape(experiment), title_justify="left", pad_edge=False, box=None, header_style="bold")
    for name in shown:
        numeric = name in _NUMBERS
        table.add_column(
            _TITLES[name].replace("macro-F1", "F1").replace("accuracy", "acc"),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="ellipsis" if numeric else "fold",
        )
    for row in frame.to_dict("records"):
        cells = [text(row, name) for name in shown]
        if not row["comparable"]:
            cells[0] = f"{_UNLIKE} {cells[0]}"
        table.add_row(*(escape(cell) for cell in cells), style=None if row["comparable"] else "dim")
    console.print(table)
    reference = frame[frame["comparable"]]
    if not reference.empty:
        first = reference.iloc[0]
        console.print(
            f"task {first['task'] or '?'}, data {first['data.fingerprint'] or '?'}", style="dim", markup=False
        )
    if not frame["comparable"].all():
        console.print(f"{_UNLIKE} another task or other data: not comparable with the rest", style="dim", markup=False)


def _page(frame: pd.DataFrame, experiment: str, link: str | None) -> str:
    from stocktake.tracking.leaderboard import text

    head = "".join(_heading(name, title) for name, title in _TITLES.items())
    best = frame["val/macro_f1"].max()
    body = []
    for row in frame.to_dict("records"):
        cells = []
        for name in _TITLES:
            shown = text(row, name)
            if name == "run_id":
                shown = shown[:8]
            if name == "run" and not row["comparable"]:
                shown = f"{_UNLIKE} {shown}"
            key = "" if row[name] is None or row[name] != row[name] else str(row[name])
            kind = ' class="number"' if name in _NUMBERS else ""
            bar = ""
            if name == "val/macro_f1" and key and best > 0:
                bar = f' style="--share:{100 * max(row[name], 0) / best:.1f}%"'
            cells.append(f'<td{kind}{bar} data-key="{html.escape(key)}">{html.escape(shown)}</td>')
        unlike = "" if row["comparable"] else ' class="unlike" title="another task or other data: not comparable"'
        body.append(f"<tr{unlike}>{''.join(cells)}</tr>")
    about = f"{len(frame)} runs, best val/macro_f1 first. Brackets: 95 % bootstrap interval."
    if not frame["comparable"].all():
        about += f" {_UNLIKE}: another task or other data than most, not comparable with the rest."
    opened = f' <a href="{html.escape(link)}">Open in MLflow</a>' if link else ""
    return _HTML.format(
        title=html.escape(f"Leaderboard of {experiment}"),
        about=html.escape(about) + opened,
        head=head,
        body="\n".join(body),
    )


def _heading(name: str, title: str) -> str:
    kind = ' class="number"' if name in _NUMBERS else ""
    order = "descending" if name == "val/macro_f1" else "none"
    return f'<th{kind} aria-sort="{order}"><button>{html.escape(title)}</button></th>'


_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: light-dark(#dde2e7, #343a41); --soft: light-dark(#5b6570, #9aa5b1);
  --bar: light-dark(#d7e8f7, #1d3b57); --over: light-dark(#f4f7fa, #22272d); }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem; max-width: 110rem; }}
h1 {{ font-size: 1.4rem; margin: 0 0 .2rem; }}
p {{ color: var(--soft); margin: 0 0 1.2rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .45rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }}
th {{ border-bottom-width: 2px; }}
.number {{ text-align: right; }}
td[style] {{ background: linear-gradient(to right, var(--bar) var(--share), transparent 0); }}
tbody tr:hover {{ background-color: var(--over); }}
tr.unlike td {{ color: var(--soft); font-style: italic; }}
th button {{ all: unset; cursor: pointer; font-weight: 600; }}
th button:focus-visible {{ outline: 2px solid currentcolor; }}
th[aria-sort=ascending] button::after {{ content: " ↑"; }}
th[aria-sort=descending] button::after {{ content: " ↓"; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{about}</p>
<div class="wide"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<script>
document.querySelectorAll("th").forEach((th, column) => th.addEventListener("click", () => {{
  const numeric = th.classList.contains("number");
  const before = th.getAttribute("aria-sort");
  const down = before === "none" ? numeric : before === "ascending";
  document.querySelectorAll("th").forEach(other => other.setAttribute("aria-sort", "none"));
  th.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.key;
  const rows = [...document.querySelectorAll("tbody tr")].sort((a, b) => {{
    const x = key(a), y = key(b);
    if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1);
    return (down ? -1 : 1) * (numeric ? x - y : x.localeCompare(y, undefined, {{numeric: true}}));
  }});
  document.querySelector("tbody").append(...rows);
}}));
</script>
</body>
</html>
"""
