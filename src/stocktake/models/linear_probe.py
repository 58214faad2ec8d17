"""Benchmark B: features of a frozen backbone, extracted once, and a linear head on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from stocktake.data.array_cache import ArrayCache
from stocktake.data.images import PREPROCESSING_VERSION
from stocktake.errors import StocktakeError
from stocktake.models.network import NetworkModel
from stocktake.models.precision import Precision
from stocktake.progress import progress

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
    model.lay_out(precision.channels_last)
    title = f"extracting features of {model.spec.options['backbone']}"
    with progress(title, len(missing)) as advance, torch.inference_mode(), precision.autocast(device):
        for begin in range(0, len(missing), _CHUNK):
            found: dict[str, npt.NDArray[np.float32]] = {}
            chunk = missing[begin : begin + _CHUNK]
            for start in range(0, len(chunk), batch_size):
                keys = chunk[start : start + batch_size]
                given = model.features(torch.from_numpy(photos.read(keys)).to(device)).float().cpu().numpy()
                found |= dict(zip(keys, given, strict=True))
                advance(len(keys))
            cache.add(found)
    return len(missing)


def backbone_fingerprint(model: NetworkModel, precision: Precision) -> str:
    """Of the weights, the photo's size and scale, and the number format."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(
        f"{model.spec.options['backbone']} {model.spec.image_size} {precision.dtype} v{PREPROCESSING_VERSION}".encode()
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
    mean, std = features.mean(0), features.std(0) + np.float32(1e-6)
    standard = (features - mean) / std
    if not np.isfinite(standard).all():
        raise StocktakeError(f"--backbone {model.spec.options['backbone']} gives features that are not finite numbers")
    targets = np.searchsorted(model.spec.labels, quantities)
    weight, bias = _logistic_regression(standard, targets, len(model.spec.labels), c, balanced)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight / std))
        model.head.bias.copy_(torch.from_numpy(bias - (weight / std) @ mean))


def _logistic_regression(
    standard: npt.NDArray[np.float32], targets: npt.NDArray[np.integer], classes: int, c: float, balanced: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Weights (classes, d) and biases (classes,) of rows (n, d) that belong to the classes `targets` (n,).

    The problem, the solver and its limits are those of scikit-learn's LogisticRegression(C=c, max_iter=200, tol=1e-3),
    and so is the answer; but the two products of matrices, which are nearly all of the work, are torch's.
    """
    from scipy.optimize import minimize

    rows = torch.from_numpy(standard)
    wanted = torch.nn.functional.one_hot(torch.from_numpy(targets), classes).float()
    share = wanted @ (1 / (classes * wanted.sum(0))) if balanced else torch.full((len(rows),), 1 / len(rows))
    penalty = 1 / (c * len(rows))
    if classes == 2:  # scikit-learn has one row of weights then, the difference of these two
        penalty *= 2

    def loss_and_gradient(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        table = torch.from_numpy(flat).view(classes, -1)
        weight, bias = table[:, :-1], table[:, -1]
        logs = torch.log_softmax(torch.addmm(bias.float(), rows, weight.float().T), 1)
        slope = (logs.exp() - wanted) * share[:, None]
        gradient = torch.cat([(slope.T @ rows).double() + penalty * weight, slope.double().sum(0)[:, None]], 1)
        loss = penalty / 2 * (weight**2).sum() - (share * (logs * wanted).sum(1)).double().sum()
        return loss.item(), gradient.view(-1).numpy()

    start = np.zeros(classes * (standard.shape[1] + 1))
    limits = {"maxiter": 200, "maxls": 50, "gtol": 1e-3, "ftol": 64 * np.finfo(float).eps}
    found = minimize(loss_and_gradient, start, method="L-BFGS-B", jac=True, options=limits).x.reshape(classes, -1)
    return found[:, :-1], found[:, -1]
