"""Whether an exported model answers as its checkpoint does; an export that does not is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stocktake.errors import StocktakeError
from stocktake.serving.predictor import ENGINES, Engine, Precision, Predictor

PHOTOS = 64
"""How many photos an export is checked on."""
TOLERANCES: dict[Precision, float] = {"f32": 1e-3, "bf16": 0.02}
"""By how much a probability may differ from the checkpoint's: rounding adds up to about 1e-5 in f32, and in bf16,
whose mantissa has 8 bits, to 0.01 or 0.02 with fine-tuned networks, 0.04 with a linear head on 1280 frozen features and
0.2 with a support vector machine, measured on real bins: the last two are served in f32."""


@dataclass(frozen=True)
class EngineCheck:
    """How one engine's answers compare."""

    engine: str
    tolerance: float
    largest_difference: float
    """Of any probability of any photo."""
    ties: tuple[str, ...]
    """Photos with another quantity, whose two likeliest quantities lie within twice the tolerance."""
    wrong: tuple[str, ...]
    """Photos with another quantity that are no ties."""

    @property
    def passed(self) -> bool:
        """Whether the probabilities agree, and the quantities but for ties."""
        return self.largest_difference <= self.tolerance and not self.wrong


def check_export(
    folder: Path, ids: Sequence[str], prepared: npt.NDArray[np.uint8], expected: npt.NDArray[np.float64]
) -> list[EngineCheck]:
    """Hold an export to the probabilities of its checkpoint, with every engine that is installed.

    Writes into model.json what was found as `check`, as `precision` bf16 if OpenVINO may compute with it, and as
    `engine` the only one that can load the graph, where another cannot.

    Args:
        folder: as written by the export.
        ids: (n,) names of the photos.
        prepared: (n, size, size, 3), n at least 1.
        expected: (n, K) calibrated probabilities of the checkpoint.

    Raises:
        StocktakeError: an engine answers otherwise in f32, or none can load it. model.json says then that the check
            was not passed.
    """
    checks, unusable = {}, {}
    for engine in filter(find_spec, ENGINES):
        try:
            checks[engine] = _compare(folder, engine, "f32", ids, prepared, expected)
        except StocktakeError as error:
            unusable[engine] = str(error).removeprefix(f"{folder} ")
    if not checks:
        raise StocktakeError(f"the export is refused: {' '.join(unusable.values()) or 'no engine is installed'}")
    results = [*checks.values()]
    passed = all(check.passed for check in results)
    precision: Precision = "f32"
    if "openvino" in checks:
        fast = _compare(folder, "openvino", "bf16", ids, prepared, expected)
        if fast.engine.endswith("bf16"):  # else the processor cannot, and it was f32 again
            results.append(fast)
            precision = "bf16" if fast.passed else "f32"
    path = folder / "model.json"
    described = {check.engine: {**asdict(check), "passed": check.passed} for check in results}
    check = {"passed": passed, "photos": len(ids), "engines": described, "unusable": unusable}
    only = {"engine": next(iter(checks))} if unusable else {}
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"precision": precision, **only, "check": check}, indent=2)
    )
    if not passed:
        worst = next(check for check in results if not check.passed)
        named = f"; other quantities for {', '.join(worst.wrong[:5])}" if worst.wrong else ""
        raise StocktakeError(
            f"the export is refused: with {worst.engine} a probability differs by {worst.largest_difference:.2g} from "
            f"the checkpoint's (tolerance {worst.tolerance:g}){named}; the checkpoint is kept"
        )
    return results


def _compare(
    folder: Path,
    engine: Engine,
    precision: Precision,
    ids: Sequence[str],
    prepared: npt.NDArray[np.uint8],
    expected: npt.NDArray[np.float64],
) -> EngineCheck:
    predictor = Predictor(folder, engine=engine, precision=precision, threads=2)
    parts = np.array_split(prepared, -(-len(prepared) // 16))
    probabilities = np.concatenate([predictor.probabilities(part) for part in parts])
    tolerance = TOLERANCES["bf16" if predictor.engine.endswith("bf16") else "f32"]
    likeliest = np.sort(expected, axis=1)
    is_tie = likeliest[:, -1] - likeliest[:, -2:-1].sum(1) <= 2 * tolerance
    differs = probabilities.argmax(1) != expected.argmax(1)
    named = np.asarray(ids, dtype=object)
    return EngineCheck(
        engine=predictor.engine,
        tolerance=tolerance,
        largest_difference=float(np.abs(probabilities - expected).max()),
        ties=tuple(named[differs & is_tie]),
        wrong=tuple(named[differs & ~is_tie]),
    )
