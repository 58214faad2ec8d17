"""Features of a frozen backbone, extracted once, and a linear head on them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from stocktake.data.array_cache import ArrayCache
from stocktake.data.images import PREPROCESSING_VERSION
from stocktake.errors import StocktakeError
from stocktake.models.network import NetworkModel
from stocktake.models.precision import Precision, autocast

_CHUNK = 512


def extract_features(
    model: NetworkModel,
    photos: ArrayCache,
    hashes: Sequence[str],
    *,
    batch_size: int,
    precision: Precision,
    device: torch.device,
    workspace: Path,
) -> tuple[npt.NDArray[np.float32], int]:
    """Features (n, model.head.in_features) of photos, and how many of them had to be computed.

    They are kept under the fingerprint of weights and preprocessing, by the photo's content: a second run does not
    touch the backbone, and a killed one goes on where it was. Of several processes that want the same features, one
    computes them and the others wait for it.
    """
    fingerprint = backbone_fingerprint(model, precision)
    cache = ArrayCache(workspace / "cache" / f"features-{fingerprint}.sqlite", (model.head.in_features,), "float32")
    computed = 0
    if cache.missing(hashes):
        with cache.fill_lock():
            computed = _fill(cache, model, photos, hashes, batch_size, precision, device)
    return cache.read(hashes), computed


def _fill(
    cache: ArrayCache,
    model: NetworkModel,
    photos: ArrayCache,
    hashes: Sequence[str],
    batch_size: int,
    precision: Precision,
    device: torch.device,
) -> int:
    missing = cache.missing(hashes)
    model.eval().to(device)
    title = f"extracting features of {model.spec.options['backbone']}"
    bar = tqdm(total=len(missing), desc=title, leave=False, disable=None)
    with bar, torch.inference_mode(), autocast(precision, device):
        for begin in range(0, len(missing), _CHUNK):
            found: dict[str, npt.NDArray[np.float32]] = {}
            chunk = missing[begin : begin + _CHUNK]
            for start in range(0, len(chunk), batch_size):
                keys = chunk[start : start + batch_size]
                given = model.features(torch.from_numpy(photos.read(keys)).to(device)).float().cpu().numpy()
                found |= dict(zip(keys, given, strict=True))
                bar.update(len(keys))
            cache.add(found)
    return len(missing)


def backbone_fingerprint(model: NetworkModel, precision: Precision) -> str:
    """Of the weights, the photo's size and scale, and the number format."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(
        f"{model.spec.options['backbone']} {model.spec.image_size} {precision} v{PREPROCESSING_VERSION}".encode()
    )
    tensors = {**model.backbone.state_dict(), "mean": model.mean, "std": model.std}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def fit_head(
    model: NetworkModel,
    features: npt.NDArray[np.float32],
    quantities: npt.NDArray[np.integer],
    *,
    c: float,
    balanced: bool,
) -> None:
    """Fit the model's linear head by logistic regression on standardised features (n, d).

    Args:
        model: its head is filled; the standardisation is folded into it.
        features: of the training split.
        quantities: (n,), each of model.spec.labels present.
        c: inverse strength of the L2 penalty.
        balanced: weigh classes by the inverse of their frequency.

    Raises:
        StocktakeError: features that are no numbers.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, std = features.mean(0), features.std(0) + np.float32(1e-6)
    standard = (features - mean) / std
    if not np.isfinite(standard).all():
        raise StocktakeError(f"--backbone {model.spec.options['backbone']} gives features that are not finite numbers")
    classifier = LogisticRegression(C=c, class_weight="balanced" if balanced else None, max_iter=200, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 200 steps are enough: the best c is chosen on val
        classifier.fit(standard, quantities)
    weight, bias = classifier.coef_, classifier.intercept_
    if len(weight) == 1:  # of two classes scikit-learn keeps the difference
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight / std))
        model.head.bias.copy_(torch.from_numpy(bias - (weight / std) @ mean))
