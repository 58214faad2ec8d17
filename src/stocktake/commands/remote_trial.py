"""`stocktake remote_trial`: one trial of a search that SageMaker leads, as a run of its own."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from stocktake import distributed
from stocktake.aws.request import GIVEN
from stocktake.commands.ddp import launch
from stocktake.commands.stage_runs import log_config, own_run, plain, prepare_data, run_tags
from stocktake.commands.trial import train_trial
from stocktake.config import FinetuneConfig, RemoteTrialConfig
from stocktake.tuning.experiment import EXPERIMENT, write_experiment
from stocktake.tuning.search_defaults import STAGES, StageConfig, stage_config


def remote_trial(config: RemoteTrialConfig) -> None:
    """Train with the given settings and evaluate on val; the settings are kept as an experiment from the start.

    `--resume` goes on in the run of an interrupted trial, from its last epoch.

    Raises:
        StocktakeError: settings with which nothing can be learnt.
    """
    if config.nproc * config.nnodes > 1:
        _launch(config)
        return
    own = stage_config(config)
    timeout = own.training.collective_timeout if isinstance(own, FinetuneConfig) else 300.0
    expected = own.training.world_size if isinstance(own, FinetuneConfig) else None
    with distributed.process_group(timeout=timeout, expected=expected):
        prepared = prepare_data(own)
        tags = run_tags(own, prepared.manifest, "trial") | {"trial.stage": config.stage, "trial.state": "running"}
        with own_run(own, "trial", tags, reopen=Path(config.resume) if config.resume else None) as run:
            if distributed.is_rank_zero():
                given = as_given(own)
                log_config(run, given, STAGES[config.stage], prepared.manifest)
                write_experiment(run.artifacts / EXPERIMENT, given, ())
            state, values = train_trial(run, config.stage, own, None, prepared)
            run.set_tags({"trial.state": state.name.lower()})
            if distributed.is_rank_zero() and values:
                # The last value that SageMaker reads is the trial's: that of the best epoch, not of the last one
                print(f"trial ended: val_macro_f1={values[0]:.6f}", flush=True)


def as_given(config: StageConfig) -> StageConfig:
    """The config as it means the same elsewhere: with the paths of whoever has started the search."""
    given: dict[str, Any] = {name: os.environ.get(variable) for name, variable in GIVEN.items()}
    # A value that is no path here, such as weights that the search has chosen by name, is nobody's file
    files = [name for name, value in given.items() if value and Path(str(getattr(config, name, ""))).is_absolute()]
    own = {name: given[name] for name in files}
    if isinstance(config, FinetuneConfig):  # the processes of this trial, not of whoever trains its settings again
        own["training"] = dataclasses.replace(config.training, world_size=None)
    return dataclasses.replace(config, **own)


def _launch(config: RemoteTrialConfig) -> None:
    """This trial in several processes."""
    settings = plain(dataclasses.asdict(config))
    settings["training"]["world_size"] = config.nproc * config.nnodes
    alone = {"nproc": 1, "nnodes": 1, "node_rank": 0, "rendezvous": None, "max_restarts": 0}
    with tempfile.TemporaryDirectory() as folder:
        experiment = Path(folder) / "experiment.yaml"
        experiment.write_text(yaml.safe_dump(settings | alone, sort_keys=False), encoding="utf-8")
        launch(
            ["remote_trial", "--all_settings", str(experiment)],
            nproc=config.nproc,
            nnodes=config.nnodes,
            node_rank=config.node_rank,
            rendezvous=config.rendezvous,
            timeout=config.training.collective_timeout,
        )
