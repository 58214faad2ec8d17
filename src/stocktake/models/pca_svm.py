"""PCA of the pixels and a support vector machine: the paper's best classical pipeline, as a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from stocktake.config.training import PcaSvmConfig
from stocktake.data.array_cache import ArrayCache
from stocktake.models.counting_model import CountingModel, ModelSpec

_CHUNK = 512
_BINS_A_COMPONENT = 4


class PcaSvmModel(CountingModel):
    """Average pooling, whitened PCA, an RBF support vector machine with one-versus-one votes.

    Computes what scikit-learn's SVC computes (`decision_function_shape="ovr"`, `break_ties=True`); a test holds the
    two together.
    """

    mean: Tensor
    whitening: Tensor
    support: Tensor
    dual: Tensor
    intercept: Tensor
    gamma: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        pixels, components, vectors = (int(spec.options[key]) for key in ("pixels", "components", "support_vectors"))
        classes = len(spec.labels)
        self.pairs = [(i, j) for i in range(classes) for j in range(i + 1, classes)]
        self.buffer("mean", 3 * pixels * pixels)
        self.buffer("whitening", components, 3 * pixels * pixels)
        self.buffer("support", vectors, components)
        self.buffer("dual", len(self.pairs), vectors)
        self.buffer("intercept", len(self.pairs))
        self.buffer("gamma", 1)

    def forward(self, photos: Tensor) -> Tensor:
        """Votes of the pairwise machines plus their confidence, squeezed below one vote."""
        components = (pooled_pixels(photos, int(self.spec.options["pixels"])) - self.mean) @ self.whitening.T
        squares = (components**2).sum(1, keepdim=True) + (self.support**2).sum(1) - 2 * components @ self.support.T
        decisions = torch.exp(-self.gamma * squares) @ self.dual.T + self.intercept
        votes: list[Tensor | float] = [0.0] * len(self.spec.labels)
        confidences: list[Tensor | float] = [0.0] * len(self.spec.labels)
        for column, (first, second) in enumerate(self.pairs):
            decision = decisions[:, column]
            confidences[first], confidences[second] = confidences[first] + decision, confidences[second] - decision
            won = (decision > 0).float()
            votes[first], votes[second] = votes[first] + won, votes[second] + (1 - won)
        confidence = torch.stack([torch.as_tensor(part) for part in confidences], 1)
        return torch.stack([torch.as_tensor(part) for part in votes], 1) + confidence / (3 * (confidence.abs() + 1))


def pooled_pixels(photos: Tensor, pixels: int) -> Tensor:
    """(n, 3 * pixels * pixels) in 0..1: each photo averaged down to pixels x pixels, as an antialiased resize does.

    As two products of matrices: every engine multiplies alike, and resizes in its own way.
    """
    channels_first = photos.permute(0, 3, 1, 2).float() / 255
    height, width = (_averaging(int(side), pixels) for side in channels_first.shape[2:])
    return (height @ channels_first @ width.T).flatten(1)


def _averaging(side: int, pixels: int) -> Tensor:
    """(pixels, side): the weights with which the antialiased bilinear resize averages a line of pixels."""
    lines = torch.eye(side)[None, None]
    return F.interpolate(lines, (pixels, side), mode="bilinear", antialias=True)[0, 0]


def fit_pca_svm(
    labels: Sequence[int],
    photos: ArrayCache,
    hashes: Sequence[str],
    quantities: npt.NDArray[np.integer],
    config: PcaSvmConfig,
    seed: int,
) -> PcaSvmModel:
    """Fit on the photos with these content hashes and their quantities (n,).

    More than `config.max_train` photos are thinned out to a random choice of that many.
    """
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

    chosen = np.sort(np.random.default_rng(seed).permutation(len(hashes))[: config.max_train])
    pixels = np.concatenate(
        [
            pooled_pixels(torch.from_numpy(photos.read([hashes[row] for row in part])), config.pixels).numpy()
            for part in np.array_split(chosen, math.ceil(len(chosen) / _CHUNK))
        ]
    )
    quantities = quantities[chosen]
    # with as many components as bins, whitening puts all bins equally far apart, and the machine learns nothing
    components = max(1, min(config.components, len(pixels) // _BINS_A_COMPONENT, pixels.shape[1]))
    pca = PCA(components, whiten=True, svd_solver="randomized", random_state=seed).fit(pixels)
    gamma = config.gamma or 1 / components
    machine = SVC(C=config.c, gamma=gamma, class_weight="balanced", cache_size=500).fit(
        pca.transform(pixels), quantities
    )
    options = {"pixels": config.pixels, "components": components, "support_vectors": len(machine.support_vectors_)}
    model = PcaSvmModel(ModelSpec("pca_svm", tuple(labels), photos.shape[0], options))
    model.mean.copy_(torch.from_numpy(pca.mean_))
    model.whitening.copy_(torch.from_numpy(pca.components_ / np.sqrt(pca.explained_variance_)[:, None]))
    model.support.copy_(torch.from_numpy(machine.support_vectors_))
    sign = -1 if len(labels) == 2 else 1  # scikit-learn turns two classes around: positive is the second
    model.dual.copy_(torch.from_numpy(sign * _pairwise_dual(machine.dual_coef_, machine.n_support_, model.pairs)))
    model.intercept.copy_(torch.from_numpy(sign * machine.intercept_))
    model.gamma.fill_(gamma)
    return model.eval()


def _pairwise_dual(
    dual: npt.NDArray[np.float64], counts: npt.NDArray[np.integer], pairs: Sequence[tuple[int, int]]
) -> npt.NDArray[np.float64]:
    """libsvm's packed coefficients (classes - 1, vectors), unpacked to a row a pair of classes (pairs, vectors)."""
    ends = np.cumsum(counts)
    rows = np.zeros((len(pairs), dual.shape[1]))
    for row, (first, second) in zip(rows, pairs, strict=True):
        for owner, other in ((first, second - 1), (second, first)):
            own = slice(ends[owner] - counts[owner], ends[owner])
            row[own] = dual[other, own]
    return rows
