"""`stocktake deploy`: a model becomes an endpoint, and real photos through it must give the model's own answers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from stocktake.commands.serve import model_folder, server_settings
from stocktake.config.serving import DeployConfig
from stocktake.data.images import PhotoError
from stocktake.data.manifest import build_manifest
from stocktake.errors import StocktakeError
from stocktake.serving import endpoints
from stocktake.serving.client import Client
from stocktake.serving.endpoints import Endpoint
from stocktake.serving.predictor import Prediction, Predictor

_SHOWN = 5


@dataclass(frozen=True)
class Difference:
    """A photo that the endpoint does not answer as the model does."""

    bin_id: str
    reason: str


def deploy(config: DeployConfig) -> dict[str, float]:
    """Create or update the endpoint, compare, and say how it is used.

    Returns:
        smoke/photos, smoke/different, smoke/largest: of photos compared and different, and the largest distance of a
        probability.

    Raises:
        StocktakeError: no such model, a bad setting, it did not come up, or the comparison failed.
    """
    settings = server_settings(config.settings, config.server)
    photos = smoke_photos(config)
    before = next((each for each in endpoints.list_endpoints() if each.name == config.name), None)
    with tempfile.TemporaryDirectory(prefix="stocktake-deploy-") as temporary:
        model = model_folder(config.model, Path(temporary) / "model", config.tracking)
        if before:
            kept = shutil.copytree(before.model, Path(temporary) / "before")  # the update removes it
            endpoint = endpoints.update(config.name, model, model_uri=config.model, settings=settings)
        else:
            endpoint = endpoints.create(config.name, model, model_uri=config.model, settings=settings)
        print(
            f"endpoint {endpoint.name}: {endpoint.version} ({endpoint.model_uri}) on {endpoint.address},"
            f" generation {endpoint.generation}"
        )
        largest, different = compare(endpoint, photos, config.tolerance)
        if different and before and config.on_failure == "rollback":
            failure = _failure(different, len(photos))
            back = endpoints.update(
                config.name, kept, model_uri=before.model_uri, settings=before.settings, exactly=True
            )
            raise StocktakeError(f"{failure}; the update is undone: {back.name} serves {back.version} as before")
    if different:
        raise StocktakeError(
            f"{_failure(different, len(photos))}; {endpoint.name} serves it nevertheless: see {endpoint.log}, then"
            f" deploy another model or `mlflow deployments delete -t stocktake-local --name {endpoint.name}`"
        )
    if photos:
        print(f"smoke test: {len(photos)} photos answered as by the model itself (largest difference {largest:.4f})")
    _say_how(endpoint)
    return {
        "smoke/photos": float(len(photos)),
        "smoke/different": float(len(different)),
        "smoke/largest": largest,
    }


def smoke_photos(config: DeployConfig) -> list[tuple[str, bytes]]:
    """Id and photo of some bins of the test split, always the same ones.

    Raises:
        StocktakeError: the root cannot be used, or has no test split.
    """
    if not config.smoke:
        return []
    manifest = build_manifest(config)
    bins = manifest.split("test")
    if bins.empty:
        raise StocktakeError(f"the test split of {manifest.source.root} is empty: give another --root, or --smoke 0")
    chosen = bins["id"].sample(min(config.smoke, len(bins)), random_state=config.seed)
    return [(bin_id, manifest.source.photo(bin_id)) for bin_id in chosen]


def compare(
    endpoint: Endpoint, photos: Sequence[tuple[str, bytes]], tolerance: float
) -> tuple[float, list[Difference]]:
    """Ask the endpoint, and its model in this process.

    Two quantities that the model itself holds for as probable, within the tolerance, may change places.

    Returns:
        The largest distance of a probability, and the photos that differ.
    """
    if not photos:
        return 0.0, []
    own = Predictor(endpoint.model, version=endpoint.version).predict([photo for _, photo in photos])
    largest, different = 0.0, []
    served = Client(endpoint.address).predict_all(photo for _, photo in photos)
    with tqdm(total=len(photos), desc="comparing", disable=None) as progress:
        for (bin_id, _), answer, prediction in zip(photos, served, own, strict=True):
            progress.update()
            if isinstance(answer, PhotoError):
                different.append(Difference(bin_id, f"refused: {answer}"))
                continue
            if answer.model_version != prediction.model_version:
                different.append(
                    Difference(bin_id, f"answered by {answer.model_version}, not {prediction.model_version}")
                )
                continue
            distance = _distance(answer, prediction)
            largest = max(largest, distance)
            tied = prediction.confidence - prediction.probabilities.get(answer.quantity, 0.0) <= tolerance
            if distance > tolerance or (answer.quantity != prediction.quantity and not tied):
                reason = f"{answer.quantity} for {prediction.quantity}, a probability off by {distance:.3f}"
                different.append(Difference(bin_id, reason))
    return largest, different


def _distance(answer: Prediction, other: Prediction) -> float:
    quantities = answer.probabilities.keys() | other.probabilities.keys()
    return max(abs(answer.probabilities.get(key, 0.0) - other.probabilities.get(key, 0.0)) for key in quantities)


def _failure(different: Sequence[Difference], photos: int) -> str:
    shown = ", ".join(f"{each.bin_id} ({each.reason})" for each in different[:_SHOWN])
    more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    return f"the smoke test failed: {len(different)} of {photos} photos are not answered as by the model: {shown}{more}"


def _say_how(endpoint: Endpoint) -> None:
    if str(endpoint.settings.get("page", "")).lower() == "true":
        print(f"page:   {endpoint.address}/")
    print(f"ask:    curl --data-binary @bin.jpg -H 'Content-Type: image/jpeg' {endpoint.address}/invocations")
    print(f"        stocktake predict bin.jpg --endpoint {endpoint.name}")
    print(f"look:   mlflow deployments get -t stocktake-local --name {endpoint.name}")
    print(f"remove: mlflow deployments delete -t stocktake-local --name {endpoint.name}")
