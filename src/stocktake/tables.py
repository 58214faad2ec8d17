"""One printer of tables: for the terminal, as CSV, JSON or JSON lines."""

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from stocktake.errors import StocktakeError
from stocktake.files import atomic_write

Format = Literal["table", "csv", "json", "jsonl"]
Row = Mapping[str, Any]
_WIDTH = 120
"""Columns of a table that is not printed to a terminal."""


def show_table(
    rows: Sequence[Row],
    format: Format = "table",
    *,
    output: str | Path | None = None,
    title: str | None = None,
    headers: Mapping[str, str] | None = None,
    style: Callable[[Row], str | None] | None = None,
) -> None:
    """Print rows, or write them to a file.

    Args:
        rows: a mapping a row; the columns are the keys of all rows, in the order in which they first occur.
        format: table for people; csv, json and jsonl keep all columns and full precision.
        output: file to write, created with its folder; None prints to stdout.
        title: printed above a table.
        headers: column -> title of a table's columns, in their order; columns that are not in it are left out.
        style: the rich style of a table's row, such as "dim" or "bold".

    Raises:
        StocktakeError: the output cannot be written.
    """
    if output is None and format == "table":
        _console().print(_table(rows, title, headers, style))
        return
    text = _as_text(rows, format, title, headers, style)
    if output is None:
        sys.stdout.write(text)
        return
    try:
        atomic_write(Path(output), text)
    except OSError as error:
        raise StocktakeError(f"{output} cannot be written: {error.strerror}") from error


def cell(value: Any) -> str:
    """A value as a table's cell: nothing for None and NaN, three digits for a fraction, lists with spaces."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.3f}"
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return str(value)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _console(file: io.StringIO | None = None) -> Any:
    from rich.console import Console

    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=_WIDTH)


def _table(
    rows: Sequence[Row],
    title: str | None,
    headers: Mapping[str, str] | None,
    style: Callable[[Row], str | None] | None,
) -> Any:
    from rich.table import Table
    from rich.text import Text

    headers = headers or {name: name for name in _columns(rows)}
    table = Table(
        title=Text(title) if title else None, title_justify="left", pad_edge=False, box=None, header_style="bold"
    )
    for name, header in headers.items():
        values = [row.get(name) for row in rows if row.get(name) is not None]
        is_number = bool(values) and all(isinstance(value, int | float) for value in values)
        table.add_column(header, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row.get(name))) for name in headers), style=style(row) if style else None)
    return table


def _as_text(
    rows: Sequence[Row],
    format: Format,
    title: str | None,
    headers: Mapping[str, str] | None,
    style: Callable[[Row], str | None] | None,
) -> str:
    file = io.StringIO()
    if format == "table":
        _console(file).print(_table(rows, title, headers, style))
    elif format == "json":
        file.write(json.dumps(list(rows), indent=2, default=str) + "\n")
    elif format == "jsonl":
        file.writelines(json.dumps(dict(row), default=str) + "\n" for row in rows)
    else:
        writer = csv.DictWriter(file, _columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _csv_value(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def _csv_value(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if value is None or isinstance(value, str | int | float) else cell(value)
