"""`stocktake predict`: photos, folders and CSVs of records in; a row a photo out, and which records to recount."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stocktake.commands.serve import model_folder
from stocktake.config import PredictConfig
from stocktake.data.images import LARGEST_FILE, PhotoError
from stocktake.errors import StocktakeError
from stocktake.machine import cores
from stocktake.progress import progress
from stocktake.serving import endpoints
from stocktake.serving.client import Client
from stocktake.serving.deployment import version_of
from stocktake.serving.predictor import Prediction, Predictor

Row = dict[str, Any]
Answer = Prediction | PhotoError
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_COLUMNS = ("photo", "path")
_OWN = (
    "photo",
    "recorded",
    "quantity",
    "confidence",
    "likely_quantities",
    "probabilities",
    "variance",
    "recount",
    "model_version",
    "error",
)
_SHOWN = 20


def predict(config: PredictConfig) -> list[Row]:
    """Count every photo; those that cannot be used are set aside: listed on stderr, their rows kept with the reason.

    Returns:
        A row a photo, in the order given: photo, a CSV's other columns, recorded (its quantity), quantity, confidence,
        quantities (that are likely), probabilities, variance (photo and record disagree), recount (the record is not
        even likely), model_version, error. Of a record beyond the quantities that the model tells apart, it says
        neither.

    Raises:
        StocktakeError: nothing to count, no such model or endpoint, or not one photo could be counted.
    """
    os.environ.pop("MLFLOW_RUN_ID", None)  # an answer is no run
    found = find_photos(list(config.photos))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="stocktake-predict-") as temporary:
        answers = _answers_of(config, Path(temporary))
        with progress("counting", len(found)) as advance:
            for start in range(0, len(found), config.batch_size):
                batch = found[start : start + config.batch_size]
                counted = _count([path for path, _ in batch], answers)
                rows += [_row(given, answer) for (_, given), answer in zip(batch, counted, strict=True)]
                advance(len(batch))
    text = write(rows, config.format)
    if config.output:
        _save(Path(config.output), text)
    else:
        print(text, end="")
    _summarise(rows, config.output)
    return rows


def find_photos(given: Sequence[str]) -> list[tuple[Path, Row]]:
    """Where every photo lies, and what its row begins with.

    Raises:
        StocktakeError: nothing was given, a folder without photos, or a CSV that cannot be read.
    """
    if not given:
        raise StocktakeError("which photos? Name files, folders or a CSV: stocktake predict bin.jpg")
    found: list[tuple[Path, Row]] = []
    for word in given:
        path = Path(word)
        if path.is_dir():
            inside = sorted(one for one in path.rglob("*") if one.suffix.lower() in _SUFFIXES and one.is_file())
            if not inside:
                raise StocktakeError(f"{word} holds no photo: they end with {', '.join(_SUFFIXES)}")
            found += [(one, {"photo": str(one)}) for one in inside]
        elif path.suffix.lower() == ".csv":
            found += _listed(path)
        else:
            found.append((path, {"photo": word}))
    return found


def write(rows: Sequence[Row], form: Literal["table", "csv", "json", "jsonl"]) -> str:
    """The rows as text: a table for people, CSV with a column p_<quantity> a probability, JSON, or a line a row."""
    if form == "json":
        return json.dumps(list(rows), indent=2) + "\n"
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    if form == "table":
        return _table(rows)
    shares = {f"p_{quantity}": None for row in rows for quantity in row.get("probabilities") or ()}
    columns = {name: None for row in rows for name in row if name != "probabilities"} | shares
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {name: _cell(value) for name, value in row.items() if name != "probabilities"}
        shares_of = {f"p_{quantity}": share for quantity, share in (row.get("probabilities") or {}).items()}
        writer.writerow(flat | shares_of)
    return file.getvalue()


def _listed(path: Path) -> list[tuple[Path, Row]]:
    """The rows of a CSV; its paths are relative to it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise StocktakeError(f"{path} cannot be read: {error}") from None
    if not records:
        raise StocktakeError(f"{path} has no rows")
    column = next((name for name in _COLUMNS if name in records[0]), None)
    if column is None:
        raise StocktakeError(f"{path} has no column photo or path, but {', '.join(map(str, records[0]))}: name it so")
    found = []
    for record in records:
        row: Row = {"photo": record[column] or ""}
        for name, value in record.items():
            if name is not None and name not in (column, "quantity"):  # None: cells beyond the header's
                row[f"given_{name}" if name in _OWN else name] = value
        if "quantity" in record:
            row["recorded"] = _whole(record["quantity"])
        found.append((path.parent / row["photo"], row))
    return found


def _answers_of(config: PredictConfig, temporary: Path) -> Callable[[Sequence[bytes]], Iterable[Answer]]:
    """What counts a batch: an endpoint, or a model in this process."""
    if config.endpoint is not None:
        address = config.endpoint
        if "://" not in address:
            endpoint = endpoints.get(address)
            if endpoint.pid is None:
                raise StocktakeError(f"the endpoint {endpoint.name} is {endpoint.status}: {endpoint.error}")
            address = endpoint.address
        return Client(address).predict_all
    folder = model_folder(config.model, temporary / "model", config.tracking)
    counter = Predictor(folder, threads=cores(), version=version_of(folder))

    def prepared(photo: bytes) -> Any:
        try:
            return counter.prepare(photo)
        except PhotoError as error:
            return error

    def answers(photos: Sequence[bytes]) -> list[Answer]:
        with ThreadPoolExecutor(cores()) as threads:
            ready = list(threads.map(prepared, photos))
        good = [one for one in ready if not isinstance(one, PhotoError)]
        counts = iter(counter.answers(counter.probabilities(np.stack(good))) if good else ())
        return [one if isinstance(one, PhotoError) else next(counts) for one in ready]

    return answers


def _count(paths: Sequence[Path], answers: Callable[[Sequence[bytes]], Iterable[Answer]]) -> list[Answer]:
    read = [_read(path) for path in paths]
    counted = iter(answers([photo for photo in read if isinstance(photo, bytes)]))
    return [photo if isinstance(photo, PhotoError) else next(counted) for photo in read]


def _read(path: Path) -> bytes | PhotoError:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        return PhotoError("file is missing")
    except (OSError, ValueError) as error:
        return PhotoError(f"file cannot be read: {getattr(error, 'strerror', None) or error}")


def _row(given: Row, answer: Answer) -> Row:
    row = dict(given)
    row |= dict.fromkeys(("quantity", "confidence", "likely_quantities", "probabilities"))
    if "recorded" in given:
        row |= {"variance": None, "recount": None}
    row |= {"model_version": None, "error": None}
    if isinstance(answer, PhotoError):
        return row | {"error": str(answer)}
    if (recorded := given.get("recorded")) in answer.probabilities:
        row |= {"variance": answer.quantity != recorded, "recount": recorded not in answer.likely_quantities}
    return row | {
        "quantity": answer.quantity,
        "confidence": round(answer.confidence, 6),
        "likely_quantities": list(answer.likely_quantities),
        "probabilities": {str(quantity): round(share, 6) for quantity, share in answer.probabilities.items()},
        "model_version": answer.model_version,
    }


def _whole(text: str | None) -> int | None:
    with suppress(TypeError, ValueError, OverflowError):
        number = float(text or "")
        return int(number) if number == int(number) else None
    return None


def _cell(value: Any) -> Any:
    """A value in a CSV or a table."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else value


def _table(rows: Sequence[Row]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = list({name: None for row in rows for name in row if name not in ("probabilities", "model_version")})
    if not any(row["error"] for row in rows):
        names.remove("error")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        right = name in ("recorded", "quantity", "confidence")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        cells = [f"{row[name]:.3f}" if name == "confidence" and row[name] else _cell(row.get(name)) for name in names]
        table.add_row(*(Text(str(cell)) for cell in cells), style="bold" if row.get("recount") else None)
    file = io.StringIO()
    on_terminal = sys.stdout.isatty()
    console = Console(file=file, force_terminal=on_terminal, width=None if on_terminal else 160)
    console.print(table)
    return file.getvalue()


def _save(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise StocktakeError(f"--output {path} cannot be written: {error.strerror}") from None


def _summarise(rows: Sequence[Row], output: str | None) -> None:
    """What became of the photos, on stderr: stdout is for the rows."""
    failed = [row for row in rows if row["error"]]
    for row in failed[:_SHOWN]:
        print(f"set aside: {row['photo']}: {row['error']}", file=sys.stderr)
    if len(failed) > _SHOWN:
        print(f"set aside: {len(failed) - _SHOWN} more", file=sys.stderr)
    if len(failed) == len(rows):
        raise StocktakeError(f"none of {len(rows)} photos could be counted, the first because: {failed[0]['error']}")
    version = next(row["model_version"] for row in rows if row["model_version"])
    said = [f"{len(rows) - len(failed)} photos counted by {version}"]
    if failed:
        said.append(f"{len(failed)} set aside")
    if any("recorded" in row for row in rows):
        counts = {name: sum(row.get(name) is True for row in rows) for name in ("variance", "recount")}
        said.append(f"{counts['variance']} at variance with their records, {counts['recount']} to recount")
    if output:
        said.append(f"written to {output}")
    print("; ".join(said), file=sys.stderr)
