"""`stocktake remote_trial`: one trial of a search that SageMaker leads, as a run of its own."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from stocktake.aws.request import ORIGINAL_PATHS
from stocktake.config.aws import RemoteTrialConfig
from stocktake.config.runs import ImageConfig
from stocktake.config.yaml_io import EXPERIMENT, write_experiment
from stocktake.stages.prepare import prepare_data
from stocktake.stages.run import log_config, own_run, run_tags
from stocktake.stages.table import STAGES, stage_config
from stocktake.tuning.trial import train_trial


def remote_trial(config: RemoteTrialConfig) -> None:
    """Train with the given settings and evaluate on val; the settings are kept as an experiment from the start.

    `--resume` goes on in the run of an interrupted trial, from its last epoch.

    Raises:
        StocktakeError: settings with which nothing can be learnt.
    """
    own = stage_config(config)
    prepared = prepare_data(own)
    tags = run_tags(own, prepared.manifest, "trial") | {"trial.stage": config.stage, "trial.state": "running"}
    with own_run(own, "trial", tags, reopen=Path(config.resume) if config.resume else None) as run:
        portable = with_original_paths(own)
        log_config(run, portable, STAGES[config.stage].config, prepared.manifest)
        write_experiment(run.artifacts / EXPERIMENT, portable, ())
        (value,) = train_trial(run, config.stage, own, prepared)
        run.set_tags({"trial.state": "complete"})
        # The last value that SageMaker reads is the trial's: that of the best epoch, not of the last one
        print(f"trial ended: val_macro_f1={value:.6f}", flush=True)


def with_original_paths(config: ImageConfig) -> ImageConfig:
    """The config with the paths of whoever has started the search, so that it means the same elsewhere."""
    originals = {name: os.environ.get(variable) for name, variable in ORIGINAL_PATHS.items()}
    # A value that is no path here, such as weights that the search has chosen by name, is nobody's file
    files = {name: value for name, value in originals.items() if Path(str(getattr(config, name, ""))).is_absolute()}
    return dataclasses.replace(config, **{name: value for name, value in files.items() if value})  # type: ignore[arg-type]
