"""Models and how they are trained and searched. The ladder's config is every stage's config at once."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stocktake.config.runs import ImageConfig
from stocktake.config.settings import Settings
from stocktake.errors import StocktakeError


@dataclass
class MajorityConfig(ImageConfig):
    """Always answer the most frequent quantity of the training split.

    Examples:
        stocktake majority --root ../bins
    """


@dataclass
class PcaSvmConfig(Settings):
    """PCA of the pixels, then a support vector machine (the paper's best classical pipeline)."""

    pixels: Annotated[int, Field(ge=1, le=256)] = 32
    """The photo is averaged down to this many pixels a side before PCA."""
    components: Annotated[int, Field(ge=1)] = 60
    """Principal components kept; at most one for every 4 bins of train."""
    c: Annotated[float, Field(ge=1e-12)] = 3.0
    """Penalty of the SVM."""
    gamma: Annotated[float, Field(ge=1e-12)] | None = None
    """Width of the radial kernel. Default: 1 / components, on whitened components."""
    max_train: Annotated[int, Field(ge=10)] = 20_000
    """Fit on at most this many bins: training an SVM grows with their square."""


@dataclass
class ClassicalConfig(ImageConfig):
    """A classical pipeline on the pixels: PCA and a support vector machine.

    Examples:
        stocktake classical --root ../bins --classical.components 120 --classical.c 10
    """

    classical: PcaSvmConfig = field(default_factory=PcaSvmConfig)


@dataclass
class NetworkConfig(ImageConfig):
    """A run with a backbone."""

    backbone: str = "efficientnet_lite0"
    """efficientnet_lite0, or any model of timm: resnet18, resnet34, resnet50, ..."""
    weights: str = "imagenet"
    """imagenet, none, or the path of a checkpoint (.safetensors, .pth)."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Photos a step, over all processes."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of training. auto: bf16 on GPUs that have it and on CPUs with avx512_bf16 or AMX, there not for networks with
    depthwise convolutions; else fp32. Features of a frozen backbone are fp32 unless bf16 is given."""


@dataclass
class HeadConfig(Settings):
    """The linear head on frozen features."""

    c: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Inverse strengths of regularisation to try; the best on val is kept."""
    class_weight: Literal["balanced", "none"] = "balanced"
    """balanced: every class weighs the same in the loss."""


@dataclass
class FrozenConfig(NetworkConfig):
    """A linear head on the features of a frozen backbone.

    Examples:
        stocktake frozen --root ../bins --image_size 224
        stocktake frozen --backbone resnet50
    """

    head: HeadConfig = field(default_factory=HeadConfig)


@dataclass
class TrainingConfig(Settings):
    """How the whole network is trained."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with Nesterov momentum 0.9. one_cycle varies the momentum (adamw's first beta) too, from 0.95 to
    0.85 and back."""
    schedule: Literal["one_cycle", "cosine", "step", "constant"] = "one_cycle"
    """Learning rate over the run. step divides by 10 every third of it."""
    head_lr_factor: Annotated[float, Field(ge=1e-6, le=1e6)] = 5.0
    """The new head learns this many times faster than the backbone."""
    freeze_epochs: Annotated[int, Field(ge=0, le=1e6)] = 0
    """Epochs in which only the head learns."""
    label_smoothing: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Share of the target spread over the other classes."""
    ordinal_smoothing: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Share of the target given to the neighbouring quantities."""
    class_weight: Literal["balanced", "none"] = "none"
    """balanced: every class weighs the same in the loss."""
    augment: Literal["none", "flip", "full"] = "full"
    """flip: horizontal flips (the paper's). full: flips, crops and colour."""
    patience: Annotated[int, Field(ge=1, le=1e6)] = 4
    """Stop after this many epochs without a better val/macro_f1."""
    gradient_clip: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    accumulate: Annotated[int, Field(ge=1, le=1e6)] = 1
    """Batches whose gradients are added up before a step."""
    workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    """Processes that load photos. Default: none on a CPU, one a core beside a GPU."""
    max_steps: Annotated[int, Field(ge=-1, le=1e12)] = -1
    """Stop after this many steps; -1: no limit. For quick looks."""
    sync_batchnorm: bool = True
    """With several GPUs, normalise over the whole batch (nn.SyncBatchNorm), so that their number does not change what
    is learnt. false, and always on CPUs: each process normalises its own share of the batch."""
    collective_timeout: Annotated[float, Field(ge=1, le=1e6)] = 300.0
    """Seconds that a process waits for another one's part of a step before it gives up."""
    world_size: Annotated[int, Field(ge=1, le=1e6)] | None = None
    """The number of processes that the job must have; another one is an error. Default: any."""


@dataclass
class FinetuneConfig(NetworkConfig):
    """Train the whole network, stop early, keep the best checkpoint.

    Examples:
        stocktake finetune --root ../bins --epochs 12 --lr 5e-4 --training.augment flip
        stocktake finetune --backbone resnet34 --weights resnet34-b627a593.pth
        stocktake finetune --root ../bins --resume workspace/runs/finetune-1a2b3c
    """

    epochs: Annotated[int, Field(ge=1)] = 6
    """Passes over the training split at most."""
    lr: Annotated[float, Field(ge=1e-12, le=100)] = 1e-3
    """Peak learning rate of the backbone."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay; none on biases and normalisation."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    resume: str | None = None
    """Go on from this run folder's last checkpoint."""

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
    """Train the whole network in several processes, on one machine or more: finetune, started by torchrun.

    Examples:
        stocktake ddp --nproc 2 --root ../bins --epochs 12
        stocktake ddp --nproc 8 --max_restarts 2 --batch_size 512 --experiment experiments/quick.yaml
        stocktake ddp --nproc 8 --nnodes 2 --node_rank 0 --rendezvous 10.0.0.1:29500
    """

    nproc: Annotated[int, Field(ge=1, le=1024)] = 2
    """Processes on each machine: one a GPU, or a few that share the cores. On one machine they listen on 127.0.0.1
    only."""
    nnodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Machines. The same command is given on each, with its own --node_rank. They need a private network: whoever
    reaches the port of --rendezvous can run code in the job."""
    node_rank: Annotated[int, Field(ge=0)] = 0
    """This machine's number, from 0. Machine 0 logs the run and keeps its files."""
    rendezvous: str | None = None
    """host:port of machine 0, where all meet. Default: any free port, for one machine."""
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 0
    """Begin again at the last checkpoint this many times when a process fails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.node_rank >= self.nnodes:
            raise StocktakeError(f"--node_rank {self.node_rank} must be below --nnodes {self.nnodes}")


STAGE_CONFIGS = {
    "majority": MajorityConfig,
    "classical": ClassicalConfig,
    "frozen": FrozenConfig,
    "finetune": FinetuneConfig,
}
"""By the stage's name, weakest first."""

if TYPE_CHECKING:
    StageName = str
else:  # the parser takes these names only, and shows them in the help
    StageName = Literal[tuple(STAGE_CONFIGS)]


@dataclass
class AnyStageConfig(FinetuneConfig, FrozenConfig, ClassicalConfig, MajorityConfig):
    """The settings of every stage at once."""


@dataclass
class LadderConfig(AnyStageConfig):
    """Majority, classical, frozen and fine-tuned on one manifest, a leaderboard, and a candidate version.

    Examples:
        stocktake ladder
        stocktake ladder --root ../bins --task 0-5 --epochs 12
        stocktake ladder --experiment experiments/quick.yaml --stages '[majority,frozen]'
    """

    stages: tuple[StageName, ...] = tuple(STAGE_CONFIGS)
    """Which models to train, in this order."""


@dataclass
class TuneConfig(AnyStageConfig):
    """Search a stage's settings with Optuna: a run for the study, a child run a trial, the best as an experiment.

    Examples:
        stocktake tune --root ../bins --trials 20 --workers 2
        stocktake tune --root ../bins --stage frozen --objectives '[macro_f1,latency]' --pruner none
        stocktake tune --space my.space.yaml --timeout 3600 --warm_start 3
        stocktake tune --resume workspace/runs/tune-1a2b3c --trials 40
    """

    stage: StageName = "finetune"
    """What is searched. All its settings that the space does not vary are the same for all trials."""
    space: str | None = None
    """YAML of the search space: a path, or the NAME of experiments/NAME.space.yaml. Default: the stage's own, for
    finetune lr, weight_decay, batch_size, epochs and training.freeze_epochs."""
    trials: Annotated[int, Field(ge=1, le=1e6)] | None = None
    """How many trials the study has in all. Default: 20, or as many as the study was begun with."""
    timeout: Annotated[float, Field(ge=0)] | None = None
    """Begin no further trial after this many seconds."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Trials at a time, each in a process of its own; they share the processor's cores out."""
    sampler: Literal["tpe", "random"] = "tpe"
    """tpe: learns from the trials before (multivariate). random: what the others found does not matter."""
    pruner: Literal["auto", "asha", "hyperband", "median", "none"] = "auto"
    """Ends trials that fall behind. auto: asha, or none where there are two objectives or no epochs."""
    objectives: tuple[Literal["macro_f1", "latency"], ...] = ("macro_f1",)
    """macro_f1 on val alone, or [macro_f1,latency]: also the milliseconds of one photo, as a Pareto front."""
    storage: str | None = None
    """URL of a database for the study, without a password (sqlite:///study.db). Default: the environment variable
    STOCKTAKE_STORAGE, where a password may stand (postgresql://user:password@host/studies), else SQLite in the run's
    folder."""
    study: str | None = None
    """Name of the study in its database. Several machines that give the same one search together; each may start a
    trial more than --trials says, if they do so at the same moment. Default: the name of the run's folder."""
    warm_start: Annotated[int, Field(ge=0, le=1e4)] = 0
    """Try the settings of this many earlier runs first: the best ones of the same task and stage in the space."""
    resume: str | None = None
    """Go on with the study of this run folder (workspace/runs/tune-...); its settings are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objectives not in (("macro_f1",), ("macro_f1", "latency")):
            raise StocktakeError("--objectives must be [macro_f1] or [macro_f1,latency]")
