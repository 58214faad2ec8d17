"""Linear probe (the command `frozen`): a linear head on the features of a frozen backbone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from stocktake.config.training import FrozenConfig
from stocktake.evaluation.metrics import confusion_matrix, scores
from stocktake.models.inference import pick_device
from stocktake.models.linear_probe import extract_features, fit_head
from stocktake.models.network import NetworkModel, create_network
from stocktake.models.precision import Precision
from stocktake.stages.prepare import PreparedData
from stocktake.tracking.runs import TrackedRun

if TYPE_CHECKING:
    from stocktake.training.fit import EpochVerdict  # Lightning takes seconds to import


def train(
    run: TrackedRun, config: FrozenConfig, prepared: PreparedData, _should_stop: EpochVerdict | None = None
) -> NetworkModel:
    """Extract what is not on disk, fit heads on the train split, keep the best on val."""
    began = time.monotonic()
    manifest, workspace, device = prepared.manifest, Path(config.workspace), pick_device()
    model = create_network(manifest.labels, config.image_size, config.backbone, config.weights, seed=config.seed)
    # features and figures are those of the served graph unless bf16 is asked for
    precision: Precision = "bf16" if config.precision == "bf16" else "fp32"
    features, computed = extract_features(
        model,
        prepared.photos,
        manifest.bins["hash"].tolist(),
        batch_size=config.batch_size,
        precision=precision,
        device=device,
        workspace=workspace,
    )
    run.set_tags({"precision": precision})
    run.log_metrics({"features/computed": computed, "features/seconds": time.monotonic() - began})
    split, quantities = manifest.bins["split"].to_numpy(), manifest.bins["quantity"].to_numpy()
    train, val = split == "train", split == "val"
    model.cpu()
    heads = []
    for step, c in enumerate(config.head.c):
        balanced = config.head.class_weight == "balanced"
        fit_head(model, features[train], quantities[train], c=c, balanced=balanced)
        with torch.inference_mode():
            best = model.head(torch.from_numpy(features[val])).argmax(1).numpy()
        counted = np.array(manifest.labels)[best]
        found = scores(confusion_matrix(manifest.labels, quantities[val], counted), manifest.labels)
        head = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
        heads.append((float(found["macro_f1"]), -step, head))
        run.log_metrics({"head/c": c, "head/val_macro_f1": float(found["macro_f1"])}, step=step)
    _, minus_step, head = max(heads, key=lambda one: one[:2])
    model.head.load_state_dict(head)
    run.log_params({"head.chosen_c": config.head.c[-minus_step]})
    return model
