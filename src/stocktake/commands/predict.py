"""`stocktake predict`: photos, folders and CSVs of records in; a row a photo out, and which records to recount."""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stocktake.commands.serve import model_folder
from stocktake.config.serving import PredictConfig
from stocktake.data.images import LARGEST_FILE, PhotoError
from stocktake.errors import StocktakeError
from stocktake.machine import cores
from stocktake.serving import endpoints
from stocktake.serving.client import Client
from stocktake.serving.deployment import version_of
from stocktake.serving.predictor import Prediction, Predictor
from stocktake.tables import show_table

Row = dict[str, Any]
Outcome = Prediction | PhotoError
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
    """Predict for every photo. Photos that cannot be used are listed on stderr; their rows have the reason.

    Returns:
        A row a photo, in the order given: photo, a CSV's other columns, recorded (its quantity), quantity, confidence,
        likely_quantities, probabilities, variance (photo and record disagree), recount (the record is not
        even likely), model_version, error. Of a record beyond the quantities that the model tells apart, it says
        neither.

    Raises:
        StocktakeError: nothing to count, no such model or endpoint, or not one photo could be counted.
    """
    photos = find_photos(list(config.photos))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="stocktake-predict-") as temporary:
        predict_each = _predict_each(config, Path(temporary))
        with tqdm(total=len(photos), desc="predicting", disable=None) as progress:
            for start in range(0, len(photos), config.batch_size):
                chunk = photos[start : start + config.batch_size]
                outcomes = _outcomes([path for path, _ in chunk], predict_each)
                rows += [
                    _row(first_columns, outcome) for (_, first_columns), outcome in zip(chunk, outcomes, strict=True)
                ]
                progress.update(len(chunk))
    if config.output or config.format != "table":
        flat = [_with_columns(row) for row in rows] if config.format == "csv" else rows
        show_table(flat, config.format, output=config.output)
    else:
        show_table(rows, headers=_headers(rows), style=lambda row: "bold" if row.get("recount") else None)
    _summarise(rows, config.output)
    return rows


def find_photos(arguments: Sequence[str]) -> list[tuple[Path, Row]]:
    """The path of every photo, and the first columns of its row.

    Raises:
        StocktakeError: no argument, a folder without photos, or a CSV that cannot be read.
    """
    if not arguments:
        raise StocktakeError("which photos? Name files, folders or a CSV: stocktake predict bin.jpg")
    photos: list[tuple[Path, Row]] = []
    for word in arguments:
        path = Path(word)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
            if not inside:
                raise StocktakeError(f"{word} holds no photo: they end with {', '.join(_SUFFIXES)}")
            photos += [(file, {"photo": str(file)}) for file in inside]
        elif path.suffix.lower() == ".csv":
            photos += _listed(path)
        else:
            photos.append((path, {"photo": word}))
    return photos


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
    rows = []
    for record in records:
        row: Row = {"photo": record[column] or ""}
        for name, value in record.items():
            if name is not None and name not in (column, "quantity"):  # None: cells beyond the header's
                row[f"given_{name}" if name in _OWN else name] = value
        if "quantity" in record:
            row["recorded"] = _whole(record["quantity"])
        rows.append((path.parent / row["photo"], row))
    return rows


def _predict_each(config: PredictConfig, temporary: Path) -> Callable[[Sequence[bytes]], Iterable[Outcome]]:
    """What predicts: an endpoint, or a model in this process."""
    if config.endpoint is not None:
        address = config.endpoint
        if "://" not in address:
            endpoint = endpoints.get(address)
            if endpoint.pid is None:
                raise StocktakeError(f"the endpoint {endpoint.name} is {endpoint.status}: {endpoint.error}")
            address = endpoint.address
        return Client(address).predict_all
    folder = model_folder(config.model, temporary / "model", config.tracking)
    predictor = Predictor(folder, threads=cores(), version=version_of(folder))

    def predict_each(photos: Sequence[bytes]) -> Iterable[Outcome]:
        with ThreadPoolExecutor(cores()) as threads:
            yield from predictor.predict_each(photos, threads.map)

    return predict_each


def _outcomes(paths: Sequence[Path], predict_each: Callable[[Sequence[bytes]], Iterable[Outcome]]) -> list[Outcome]:
    contents = [_read(path) for path in paths]
    predicted = iter(predict_each([content for content in contents if isinstance(content, bytes)]))
    return [content if isinstance(content, PhotoError) else next(predicted) for content in contents]


def _read(path: Path) -> bytes | PhotoError:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        return PhotoError("file is missing")
    except (OSError, ValueError) as error:
        return PhotoError(f"file cannot be read: {getattr(error, 'strerror', None) or error}")


def _row(first_columns: Row, outcome: Outcome) -> Row:
    row = dict(first_columns)
    row |= dict.fromkeys(("quantity", "confidence", "likely_quantities", "probabilities"))
    if "recorded" in first_columns:
        row |= {"variance": None, "recount": None}
    row |= {"model_version": None, "error": None}
    if isinstance(outcome, PhotoError):
        return row | {"error": str(outcome)}
    if (recorded := first_columns.get("recorded")) in outcome.probabilities:
        row |= {"variance": outcome.quantity != recorded, "recount": recorded not in outcome.likely_quantities}
    return row | {
        "quantity": outcome.quantity,
        "confidence": round(outcome.confidence, 6),
        "likely_quantities": list(outcome.likely_quantities),
        "probabilities": {str(quantity): round(share, 6) for quantity, share in outcome.probabilities.items()},
        "model_version": outcome.model_version,
    }


def _whole(text: str | None) -> int | None:
    with suppress(TypeError, ValueError, OverflowError):
        number = float(text or "")
        return int(number) if number == int(number) else None
    return None


def _with_columns(row: Row) -> Row:
    """A row for CSV: a column p_<quantity> a probability."""
    shares = {f"p_{quantity}": share for quantity, share in (row["probabilities"] or {}).items()}
    return {name: value for name, value in row.items() if name != "probabilities"} | shares


def _headers(rows: Sequence[Row]) -> dict[str, str]:
    """The columns of a table for people."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("probabilities", "model_version"))
    return {name: name for name in names if name != "error" or any(row["error"] for row in rows)}


def _summarise(rows: Sequence[Row], output: str | None) -> None:
    """What became of the photos, on stderr: stdout is for the rows."""
    failed = [row for row in rows if row["error"]]
    for row in failed[:_SHOWN]:
        print(f"rejected: {row['photo']}: {row['error']}", file=sys.stderr)
    if len(failed) > _SHOWN:
        print(f"rejected: {len(failed) - _SHOWN} more", file=sys.stderr)
    if len(failed) == len(rows):
        raise StocktakeError(f"none of {len(rows)} photos could be counted, the first because: {failed[0]['error']}")
    version = next(row["model_version"] for row in rows if row["model_version"])
    parts = [f"{len(rows) - len(failed)} photos counted by {version}"]
    if failed:
        parts.append(f"{len(failed)} rejected")
    if any("recorded" in row for row in rows):
        counts = {name: sum(row.get(name) is True for row in rows) for name in ("variance", "recount")}
        parts.append(f"{counts['variance']} at variance with their records, {counts['recount']} to recount")
    if output:
        parts.append(f"written to {output}")
    print("; ".join(parts), file=sys.stderr)
