"""`stocktake predict`: photos, folders and CSVs of records in; a row a photo out, and which records to recount."""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
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
from stocktake.serving.predictor import Prediction, Predictor, record
from stocktake.tables import show_table

Row = dict[str, Any]
PredictEach = Callable[[Sequence[bytes]], Iterable[Prediction | PhotoError]]
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_BATCH = 32
"""Photos in memory at a time."""
_SHOWN = 20


def predict(config: PredictConfig) -> list[Row]:
    """Predict for every photo. Photos that cannot be used are listed on stderr; their rows have the reason.

    Returns:
        A row a photo, in the order of the arguments: photo, a CSV's other columns, recorded (its quantity), variance
        (photo and record disagree), recount (the record is not even likely), and what `record` gives. Of a record
        beyond the quantities that the model tells apart, variance and recount are None.

    Raises:
        StocktakeError: nothing to count, no such model or endpoint, or not one photo could be counted.
    """
    photos = find_photos(list(config.photos))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="stocktake-predict-") as temporary:
        predict_each = _predict_each(config, Path(temporary))
        for start in tqdm(range(0, len(photos), _BATCH), desc="predicting", disable=None):
            batch = photos[start : start + _BATCH]
            contents = [_read(path) for path, _ in batch]
            outcomes = iter(predict_each([content for content in contents if isinstance(content, bytes)]))
            for (_, columns), content in zip(batch, contents, strict=True):
                rows.append(_row(columns, next(outcomes) if isinstance(content, bytes) else content))
    show_table(
        [_flat(row) for row in rows] if config.format == "csv" else rows,
        config.format,
        output=config.output,
        headers=_headers(rows),
        style=lambda row: "bold" if row.get("recount") else None,
    )
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
    for path in map(Path, arguments):
        if path.suffix.lower() == ".csv":
            photos += _listed(path)
            continue
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        if not files:
            raise StocktakeError(f"{path} holds no photo: they end with {', '.join(_SUFFIXES)}")
        photos += [(file, {"photo": str(file)}) for file in files]
    return photos


def _listed(path: Path) -> list[tuple[Path, Row]]:
    """The rows of a CSV; its paths are relative to it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = list(csv.DictReader(file, restkey="", restval=""))
    except (OSError, ValueError, csv.Error) as error:
        raise StocktakeError(f"{path} cannot be read: {error}") from None
    if not records:
        raise StocktakeError(f"{path} has no rows")
    column = next((name for name in ("photo", "path") if name in records[0]), None)
    if column is None:
        raise StocktakeError(f"{path} has no column photo or path, but {', '.join(records[0])}: name it so")
    own = {"photo", "recorded", "variance", "recount", *record(PhotoError(), "")}
    rows = []
    for cells in records:
        row: Row = {"photo": cells[column]}
        others = [name for name in cells if name not in ("", column, "quantity")]
        row |= {f"csv_{name}" if name in own else name: cells[name] for name in others}
        if "quantity" in cells:
            row["recorded"] = _whole(cells["quantity"])
        rows.append((path.parent / row["photo"], row))
    return rows


def _predict_each(config: PredictConfig, temporary: Path) -> PredictEach:
    """What predicts: an endpoint, or a model in this process."""
    if config.endpoint is None:
        folder = model_folder(config.model, temporary / "model", config.tracking)
        return Predictor(folder, threads=cores(), version=version_of(folder)).predict_each
    if "://" in config.endpoint:
        return Client(config.endpoint).predict_all
    endpoint = endpoints.get(config.endpoint)
    if endpoint.pid is None:
        raise StocktakeError(f"the endpoint {endpoint.name} is {endpoint.status}: {endpoint.error}")
    return Client(endpoint.address).predict_all


def _read(path: Path) -> bytes | PhotoError:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        return PhotoError(f"file cannot be read: {getattr(error, 'strerror', None) or error}")


def _row(columns: Row, outcome: Prediction | PhotoError) -> Row:
    answer = record(outcome, "")
    if "recorded" not in columns:
        return columns | answer
    recorded = columns["recorded"]
    is_known = str(recorded) in answer["probabilities"]
    return columns | {
        "variance": recorded != answer["quantity"] if is_known else None,
        "recount": recorded not in answer["likely_quantities"] if is_known else None,
        **answer,
    }


def _whole(text: str) -> int | None:
    with suppress(ValueError, OverflowError):
        return int(number) if (number := float(text)).is_integer() else None
    return None


def _flat(row: Row) -> Row:
    """A row for CSV: a column p_<quantity> a probability."""
    shares = {f"p_{quantity}": share for quantity, share in row["probabilities"].items()}
    return {name: value for name, value in row.items() if name != "probabilities"} | shares


def _headers(rows: Sequence[Row]) -> dict[str, str]:
    """The columns of a table for people."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("probabilities", "model_version"))
    return {name: name for name in names if name != "error" or any(row["error"] for row in rows)}


def _summarise(rows: Sequence[Row], output: str | None) -> None:
    """What became of the photos, on stderr: stdout is for the rows."""
    rejected = [row for row in rows if row["error"]]
    for row in rejected[:_SHOWN]:
        print(f"rejected: {row['photo']}: {row['error']}", file=sys.stderr)
    if len(rejected) > _SHOWN:
        print(f"rejected: {len(rejected) - _SHOWN} more", file=sys.stderr)
    if len(rejected) == len(rows):
        raise StocktakeError(f"none of {len(rows)} photos could be counted, the first because: {rejected[0]['error']}")
    version = next(row["model_version"] for row in rows if row["model_version"])
    parts = [f"{len(rows) - len(rejected)} photos counted by {version}"]
    if rejected:
        parts.append(f"{len(rejected)} rejected")
    if any("recorded" in row for row in rows):
        variances, recounts = (sum(row.get(name) is True for row in rows) for name in ("variance", "recount"))
        parts.append(f"{variances} at variance with their records, {recounts} to recount")
    if output:
        parts.append(f"written to {output}")
    print("; ".join(parts), file=sys.stderr)
