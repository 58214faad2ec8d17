"""What every command takes: dataclasses whose field docstrings are the command line's help.

Ground floor: imports nothing heavy, so that `stocktake COMMAND --help` answers at once. A command's config
inherits the fields that it shares with others; the ladder's config is every rung's config at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from stocktake.errors import StocktakeError


def _bound(settings: object, name: str, *, least: float, most: float = float("inf"), option: str = "") -> None:
    """Raises StocktakeError unless the field is within its bounds."""
    value = getattr(settings, name)
    if value is not None and not least <= value <= most:
        reach = f"at least {least:g}" if most == float("inf") else f"from {least:g} to {most:g}"
        raise StocktakeError(f"--{option}{name} {value:g} must be {reach}")


@dataclass
class SplitConfig:
    """How bins are divided into train, val and test."""

    by: Literal["group", "id"] = "group"
    """group: all looks at one bin stay together. id: the plain random split of published figures."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, val and test; they sum to 1."""
    seed: int = 0
    """Changes which bins fall into which split; any whole number."""
    twin_distance: int = 4
    """Photos whose perceptual hashes differ in at most this many of 64 bits are looks at one bin. On real
    bins 4 finds near-identical photos, 8 already pairs different bins behind the same bands."""

    def __post_init__(self) -> None:
        _bound(self, "twin_distance", least=0, most=16, option="split.")


@dataclass
class SyntheticConfig:
    """The synthetic root that is made when no root is given."""

    count: int = 1200
    """How many bins to render."""
    seed: int = 0
    """The same seed renders the same photos."""
    size: int = 224
    """Short side of a photo, in pixels."""

    def __post_init__(self) -> None:
        _bound(self, "count", least=1, most=1_000_000, option="synthetic.")
        _bound(self, "seed", least=0, most=2**32 - 1, option="synthetic.")
        _bound(self, "size", least=32, most=1024, option="synthetic.")


@dataclass
class S3Config:
    """How a root at s3://bucket/prefix is fetched."""

    anonymous: bool = False
    """Ask without a signature. Default: only for the public bucket, and where no credentials are found."""
    resize: int | None = None
    """Keep only a copy of each photo whose short side has at most this many pixels. Default: photos as they are."""
    concurrency: int = 32
    """Requests at a time."""
    retries: int = 8
    """How often a request is repeated that was answered by 503 or not at all, ever later."""
    timeout: float = 30.0
    """Seconds that a request may take."""
    verify: bool = True
    """Compare each object with the MD5 in its ETag; false for buckets encrypted with KMS, whose ETag is none."""
    refresh: bool = False
    """List the bucket again, ask again for what was missing, and fetch what has changed."""

    def __post_init__(self) -> None:
        _bound(self, "resize", least=32, most=4096, option="s3.")
        _bound(self, "concurrency", least=1, most=256, option="s3.")
        _bound(self, "retries", least=0, most=100, option="s3.")
        _bound(self, "timeout", least=0.1, most=3600, option="s3.")


@dataclass
class TrackingConfig:
    """Where runs are logged."""

    uri: str | None = None
    """MLflow tracking URI. Default: MLFLOW_TRACKING_URI, else mlflow.db in the current folder."""
    registry_uri: str | None = None
    """MLflow registry URI. Default: MLFLOW_REGISTRY_URI, else the tracking URI."""
    experiment: str = field(default_factory=lambda: os.environ.get("MLFLOW_EXPERIMENT_NAME") or "stocktake")
    """MLflow experiment. Default: MLFLOW_EXPERIMENT_NAME, else stocktake. A run that `mlflow run` opened
    stays in that run's experiment."""
    run_name: str | None = None
    """Name of the run. Default: the command's name."""
    model_name: str = "stocktake"
    """Name of the registered model."""
    offline: bool = False
    """Write to disk only; `stocktake sync` uploads later."""
    system_metrics: bool = True
    """Log CPU, memory, disk, network and GPU use of the run."""


@dataclass
class BinsConfig:
    """Which bins, and how they are split."""

    root: str | None = None
    """Folder or s3://bucket/prefix with bin-images/<id>.jpg and metadata/<id>.json, or a published set. Default: a
    synthetic root is made."""
    task: str = "1-5"
    """The quantities to tell apart: 1-5, 0-5, any range. Bins outside of it are left out."""
    list: str | None = None
    """JSON file of the ids to use: {"1": ["data/metadata/100313.json", ...], ...}."""
    limit: int | None = None
    """Use only the first bins of the task, by id, this many."""
    workspace: str = "workspace"
    """Folder for everything the program writes: synthetic root, manifests, caches, runs."""
    seed: int = 0
    """Seeds weights, shuffling, augmentation and bootstrap."""
    split: SplitConfig = field(default_factory=SplitConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    s3: S3Config = field(default_factory=S3Config)

    def __post_init__(self) -> None:
        _bound(self, "seed", least=0, most=2**32 - 1)
        _bound(self, "limit", least=1)


@dataclass
class DataConfig(BinsConfig):
    """Build the manifest: check every photo and record, group the looks at one bin, assign splits."""

    export: str | None = None
    """Also write an ImageFolder tree here: train/1/<id>.jpg, ..."""
    publish: str | None = None
    """Also upload the bins of the task to s3://bucket/prefix, as shards that training jobs read; a root as well."""
    shard_mb: int = 64
    """Megabytes of a shard."""
    plan: bool = False
    """Fetch nothing but a sample of the root at s3://, and tell what all of it takes: objects, hours, cost, memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _bound(self, "shard_mb", least=1, most=2000)


@dataclass
class RunConfig(BinsConfig):
    """A tracked run over bins."""

    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class EdaConfig(RunConfig):
    """Explore the bins: a tracked run with figures and one self-contained HTML page."""


@dataclass
class ImageConfig(RunConfig):
    """A run of a model over photos of one size."""

    image_size: int = 128
    """Side of the square that a photo is resized to, in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _bound(self, "image_size", least=8, most=2048)


@dataclass
class MajorityConfig(ImageConfig):
    """Benchmark A: always answer the most frequent quantity of the training split."""


@dataclass
class PcaSvmConfig:
    """PCA of the pixels, then a support vector machine (the paper's best classical pipeline)."""

    pixels: int = 32
    """The photo is averaged down to this many pixels a side before PCA."""
    components: int = 60
    """Principal components kept."""
    c: float = 3.0
    """Penalty of the SVM."""
    gamma: float | None = None
    """Width of the radial kernel. Default: 1 / components, on whitened components."""
    max_train: int = 20_000
    """Fit on at most this many bins: training an SVM grows with their square."""

    def __post_init__(self) -> None:
        _bound(self, "pixels", least=1, most=256, option="classical.")
        _bound(self, "components", least=1, option="classical.")
        _bound(self, "c", least=1e-12, option="classical.")
        _bound(self, "gamma", least=1e-12, option="classical.")
        _bound(self, "max_train", least=10, option="classical.")


@dataclass
class ClassicalConfig(ImageConfig):
    """A classical pipeline on the pixels: PCA and a support vector machine."""

    classical: PcaSvmConfig = field(default_factory=PcaSvmConfig)


@dataclass
class NetworkConfig(ImageConfig):
    """A run with a backbone."""

    backbone: str = "efficientnet_lite0"
    """efficientnet_lite0, or any torchvision classifier: resnet18, resnet34, resnet50, ..."""
    weights: str = "imagenet"
    """imagenet, none, or the path of a checkpoint (.safetensors, .pth)."""
    batch_size: int = 32
    """Photos a step, over all processes."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: the fastest of precision and memory layout for this backbone on this processor, measured once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _bound(self, "batch_size", least=1)


@dataclass
class HeadConfig:
    """The linear head on frozen features."""

    c: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Inverse strengths of regularisation to try; the best on val is kept."""
    class_weight: Literal["balanced", "none"] = "balanced"
    """balanced: every class weighs the same in the loss."""


@dataclass
class FrozenConfig(NetworkConfig):
    """Benchmark B: features of a frozen backbone, then a linear head."""

    head: HeadConfig = field(default_factory=HeadConfig)


@dataclass
class TrainingConfig:
    """How the whole network is trained."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with Nesterov momentum 0.9."""
    schedule: Literal["one_cycle", "cosine", "step", "constant"] = "one_cycle"
    """Learning rate over the run. step divides by 10 every third of it."""
    head_lr_factor: float = 5.0
    """The new head learns this many times faster than the backbone."""
    freeze_epochs: int = 0
    """Epochs in which only the head learns."""
    label_smoothing: float = 0.0
    """Share of the target spread over the other classes."""
    ordinal_smoothing: float = 0.0
    """Share of the target given to the neighbouring quantities."""
    class_weight: Literal["balanced", "none"] = "none"
    """balanced: every class weighs the same in the loss."""
    augment: Literal["none", "flip", "full"] = "full"
    """flip: horizontal flips (the paper's). full: flips, crops and colour."""
    patience: int = 4
    """Stop after this many epochs without a better val/macro_f1."""
    gradient_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    accumulate: int = 1
    """Batches whose gradients are added up before a step."""
    workers: int | None = None
    """Processes that load photos. Default: none on a CPU, one a core beside a GPU."""
    max_steps: int = -1
    """Stop after this many steps; -1: no limit. For quick looks."""
    sync_batchnorm: bool = True
    """With several processes, normalise over the whole batch, so that their number does not change what is learnt.
    false: each over its own share: faster on a CPU, and another training for another number."""
    collective_timeout: float = 300.0
    """Seconds that a process waits for another one's part of a step before it gives up."""
    world_size: int | None = None
    """The number of processes that the job must have; another one is an error. Default: any."""

    def __post_init__(self) -> None:
        _bound(self, "head_lr_factor", least=1e-6, most=1e6, option="training.")
        _bound(self, "freeze_epochs", least=0, most=1e6, option="training.")
        _bound(self, "label_smoothing", least=0, most=0.9, option="training.")
        _bound(self, "ordinal_smoothing", least=0, most=0.9, option="training.")
        _bound(self, "patience", least=1, most=1e6, option="training.")
        _bound(self, "gradient_clip", least=0, most=1e6, option="training.")
        _bound(self, "accumulate", least=1, most=1e6, option="training.")
        _bound(self, "workers", least=0, most=1024, option="training.")
        _bound(self, "max_steps", least=-1, most=1e12, option="training.")
        _bound(self, "collective_timeout", least=1, most=1e6, option="training.")
        _bound(self, "world_size", least=1, most=1e6, option="training.")


@dataclass
class FinetuneConfig(NetworkConfig):
    """Train the whole network, stop early, keep the best checkpoint."""

    epochs: int = 6
    """Passes over the training split at most."""
    lr: float = 1e-3
    """Peak learning rate of the backbone."""
    weight_decay: float = 0.05
    """Weight decay; none on biases and normalisation."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    resume: str | None = None
    """Go on from this run folder's last checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _bound(self, "epochs", least=1)
        _bound(self, "lr", least=1e-12, most=100)
        _bound(self, "weight_decay", least=0)

    def check_batch(self, processes: int) -> None:
        """Raises StocktakeError unless that many processes can share a batch out, at least 2 photos for each."""
        if self.batch_size < 2:
            raise StocktakeError(f"--batch_size {self.batch_size}: batch normalisation needs at least 2 photos")
        if self.batch_size % processes or self.batch_size < 2 * processes:
            raise StocktakeError(
                f"--batch_size {self.batch_size} is the batch of all processes together, and {processes} cannot share "
                f"it: give a multiple of {processes}, from {2 * processes}"
            )


@dataclass
class DdpConfig(FinetuneConfig):
    """Train the whole network in several processes, on one machine or more: finetune, started by torchrun."""

    nproc: int = 2
    """Processes on each machine: one a GPU, or a few that share the cores."""
    nnodes: int = 1
    """Machines. The same command is given on each, with its own --node_rank."""
    node_rank: int = 0
    """This machine's number, from 0. Machine 0 logs the run and keeps its files."""
    rendezvous: str | None = None
    """host:port of machine 0, where all meet. Default: any free port, for one machine."""
    max_restarts: int = 0
    """Begin again at the last checkpoint this many times when a process fails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _bound(self, "nproc", least=1, most=1024)
        _bound(self, "nnodes", least=1, most=1024)
        _bound(self, "node_rank", least=0, most=self.nnodes - 1)
        _bound(self, "max_restarts", least=0, most=1000)


@dataclass
class LadderConfig(FinetuneConfig, FrozenConfig, ClassicalConfig, MajorityConfig):
    """Majority, classical, frozen and fine-tuned on one manifest, a leaderboard, and a candidate version."""

    rungs: tuple[Literal["majority", "classical", "frozen", "finetune"], ...] = (
        "majority",
        "classical",
        "frozen",
        "finetune",
    )
    """Which models to train, in this order."""


@dataclass
class TuneConfig(FinetuneConfig, FrozenConfig, ClassicalConfig):
    """Search a stage's settings with Optuna: a run for the study, a child run a trial, the best as an experiment."""

    stage: Literal["finetune", "frozen", "classical"] = "finetune"
    """What is searched. All its settings that the space does not vary are the same for all trials."""
    space: str | None = None
    """YAML of the search space: a path, or the NAME of experiments/NAME.space.yaml. Default: the stage's own, for
    finetune lr, weight_decay, batch_size, epochs and training.freeze_epochs."""
    trials: int | None = None
    """How many trials the study has in all. Default: 20, or as many as the study was begun with."""
    timeout: float | None = None
    """Begin no further trial after this many seconds."""
    workers: int = 1
    """Trials at a time, each in a process of its own; they share the processor's cores out."""
    sampler: Literal["tpe", "random"] = "tpe"
    """tpe: learns from the trials before (multivariate). random: what the others found does not matter."""
    pruner: Literal["auto", "asha", "hyperband", "median", "none"] = "auto"
    """Ends trials that fall behind. auto: asha, or none where there are two objectives or no epochs."""
    objectives: tuple[Literal["macro_f1", "latency"], ...] = ("macro_f1",)
    """macro_f1 on val alone, or [macro_f1,latency]: also the milliseconds of one photo, as a Pareto front."""
    storage: str | None = None
    """URL of a database for the study (sqlite:///study.db, postgresql://...). Default: a journal in the run's
    folder."""
    warm_start: int = 0
    """Try the settings of this many earlier runs first: the best ones of the same task and stage in the space."""
    nproc: int = 1
    """Processes a trial: more than one make every trial of finetune a DDP job."""
    resume: str | None = None
    """Go on with the study of this run folder (workspace/runs/tune-...); its settings are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _bound(self, "trials", least=1, most=1e6)
        _bound(self, "timeout", least=0)
        _bound(self, "workers", least=1, most=256)
        _bound(self, "warm_start", least=0, most=1e4)
        _bound(self, "nproc", least=1, most=256)
        if self.objectives not in (("macro_f1",), ("macro_f1", "latency")):
            raise StocktakeError("--objectives must be [macro_f1] or [macro_f1,latency]")
        if self.nproc > 1 and self.stage != "finetune":
            raise StocktakeError(f"--nproc {self.nproc}: only finetune trains in several processes")


@dataclass
class TrialConfig:
    """Train one trial of a study in several processes: what tune --nproc starts."""

    study: str
    """Run folder of the study (workspace/runs/tune-...)."""
    number: int
    """Which trial; it must be in work."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class EvaluateConfig(RunConfig):
    """Evaluate a registered or saved model on a split of any root."""

    model: str = "models:/stocktake/latest"
    """models:/NAME/VERSION, models:/NAME@ALIAS, runs:/ID/model, or a model folder."""
    on: Literal["train", "val", "test"] = "test"
    """The split to evaluate on."""
    batch_size: int = 32
    """Photos a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _bound(self, "batch_size", least=1)


@dataclass
class CompareConfig:
    """The leaderboard of an experiment: in the terminal, as HTML and as CSV."""

    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    workspace: str = "workspace"
    """The leaderboard is written to compare/ in here."""
    output: str | None = None
    """Folder for leaderboard.html and leaderboard.csv. Default: WORKSPACE/compare."""
    stage: str | None = None
    """Only runs of this stage: majority, classical, frozen, finetune, ..."""
    best: int = 50
    """How many runs to show at most, best val/macro_f1 first."""


@dataclass
class SyncConfig:
    """Upload runs that a tracking server could not take when they ran."""

    workspace: str = "workspace"
    """Folder whose runs/ are uploaded."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class GateConfig:
    """What a challenger has to show before it becomes the champion."""

    min_gain: float = 0.0
    """The gain in test macro-F1 over the champion: the lower end of its paired 95 % interval must be above this."""
    max_recall_drop: float = 0.10
    """No quantity's recall on test may fall by more than this."""
    max_latency_ms: float = 100.0
    """One photo's median milliseconds on this machine must be below this."""
    max_size_mb: float = 200.0
    """The model's megabytes must be below this."""

    def __post_init__(self) -> None:
        _bound(self, "min_gain", least=-1, most=1, option="gate.")
        _bound(self, "max_recall_drop", least=0, most=1, option="gate.")
        _bound(self, "max_latency_ms", least=0, option="gate.")
        _bound(self, "max_size_mb", least=0, option="gate.")


@dataclass
class ModelConfig:
    """A registered model, and where it is registered."""

    model_name: str | None = None
    """Name of the registered model. Default: --tracking.model_name."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.model_name is not None:
            self.tracking.model_name = self.model_name
        name = self.tracking.model_name
        if not name.strip() or set(name) & set("/:"):
            raise StocktakeError(f"--model_name {name!r} must be a name without / and :")


@dataclass
class RegisterConfig(ModelConfig):
    """Make a finished run's model a version, with the alias candidate and a model card."""

    run: str | None = None
    """Which run: its id, its name in the experiment, or its folder (workspace/runs/frozen-1a2b3c)."""
    workspace: str = "workspace"
    """Run folders are looked for in runs/, and model cards written to registry/ in here."""


@dataclass
class PromoteConfig(ModelConfig):
    """Make a version the challenger and, if the gate lets it pass, the champion."""

    version: str = "candidate"
    """Which version: its number, or an alias (candidate, challenger)."""
    to: Literal["champion", "challenger"] = "champion"
    """champion: through the gate. challenger: no gate."""
    gate: GateConfig = field(default_factory=GateConfig)
    force: bool = False
    """Promote what the gate refuses; needs --reason."""
    reason: str | None = None
    """Why, for the history."""
    workspace: str = "workspace"
    """Model cards are written to registry/ in here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.force and not (self.reason or "").strip():
            raise StocktakeError("--force needs --reason TEXT: the history keeps why the gate was overruled")


@dataclass
class RollbackConfig(ModelConfig):
    """Make the champion before this one the champion again."""

    reason: str | None = None
    """Why, for the history."""
    workspace: str = "workspace"
    """Model cards are written to registry/ in here."""


@dataclass
class RegistryConfig(ModelConfig):
    """List the versions of a model, with their aliases and figures, and the history of promotions."""

    format: Literal["table", "json"] = "table"
    """table: for people. json: for programs."""


@dataclass
class ServeConfig:
    """Serve a model over HTTP in the foreground, until Ctrl-C."""

    model: str = "models:/stocktake@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a model folder."""
    settings: str = "deploy/local.yaml"
    """YAML of the server's settings; none at this default place: the server's own defaults."""
    server: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Single settings over those of the file: --server.port 0 --server.workers 2. `serve --help` explains them."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class DeployConfig(BinsConfig):
    """Deploy a model as an endpoint, or update it, and compare its answers with the model's own."""

    target: Literal["local"] = "local"
    """local: a server on this machine that outlives the command."""
    model: str = "models:/stocktake@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a model folder."""
    name: str = "bins"
    """Of the endpoint. One that is there already is updated, without dropping a request."""
    settings: str = "deploy/local.yaml"
    """YAML of the server's settings; none at this default place: the server's own defaults."""
    server: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Single settings over those of the file: --server.port 0 --server.workers 2. `serve --help` explains them."""
    smoke: int = 16
    """Photos of the root's test split to compare; 0: none."""
    tolerance: float = 0.02
    """How far a probability may lie from the model's own."""
    on_failure: Literal["rollback", "keep"] = "rollback"
    """After a failed comparison. rollback: an update is undone; a new endpoint stays. keep: an update stays too."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _bound(self, "smoke", least=0, most=10_000)
        _bound(self, "tolerance", least=0, most=1)


@dataclass
class PredictConfig:
    """Count photos: files, folders, or the rows of a CSV, whose recorded quantities are checked."""

    photos: list[str] | str = field(default_factory=list)
    """Photos, folders with photos, or CSV files with a column photo or path; given before the options."""
    model: str = "models:/stocktake@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a model folder."""
    endpoint: str | None = None
    """Ask this endpoint instead: its name on this machine, or its address (http://host:port)."""
    format: Literal["table", "csv", "json", "jsonl"] = "table"
    """table: for people. The others: for programs."""
    output: str | None = None
    """File to write. Default: the terminal."""
    batch_size: int = 32
    """Photos a step."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if isinstance(self.photos, str):
            self.photos = [self.photos]
        _bound(self, "batch_size", least=1, most=4096)


@dataclass
class RehearseConfig:
    """A local AWS whose jobs train and whose endpoints answer, in the foreground, until Ctrl-C."""

    port: int = 0
    """Of 127.0.0.1; 0: any free one."""
    region: str = "us-east-1"
    """The region that it plays."""
    state: str | None = None
    """Folder for what containers write; emptied at the end. Default: the system's temporary folder."""
    grace: float = 10.0
    """Seconds between SIGTERM and SIGKILL when a container is stopped; AWS gives 120."""
    startup: float = 60.0
    """Seconds that a model server may take until it answers /ping."""
    images: dict[str, str] = field(default_factory=dict)
    """What images start with, as their ENTRYPOINT: '{"*/mine:*": "python -m mine"}'. SageMaker adds train or serve."""

    def __post_init__(self) -> None:
        _bound(self, "port", least=0, most=65535)
        _bound(self, "grace", least=0, most=120)
        _bound(self, "startup", least=1, most=3600)


@dataclass
class JobConfig:
    """Run the command of a training job's hyperparameters: what a training container starts."""

    base: str | None = None
    """Folder with input/, output/, model/ and checkpoints/. Default: SAGEMAKER_BASE_DIR, else /opt/ml."""


@dataclass
class JobsConfig:
    """List SageMaker training jobs; follow one and bring its results home; stop one."""

    follow: str | None = None
    """Name of a job: show its log and state until it ends, then bring its results into its MLflow run."""
    stop: str | None = None
    """Name of a job: end it, and bring home what it has."""
    limit: int = 20
    """How many to list, newest first."""
    region: str | None = None
    """AWS region. Default: AWS_DEFAULT_REGION, or the profile's."""
    workspace: str = "workspace"
    """Run folders come home to runs/ in here."""
    prices: str = "deploy/prices.yaml"
    """YAML with what machines cost."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        _bound(self, "limit", least=1, most=1000)
        if self.follow and self.stop:
            raise StocktakeError("--follow and --stop exclude each other: --stop follows the job to its end too")
