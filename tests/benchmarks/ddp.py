"""What a second process gains and costs: photos a second of training, and memory, of one process and of several.

    python tests/benchmarks/ddp.py [BACKBONE [PRECISION]]

Without a GPU, one process with all cores' threads against two that share them out; with GPUs, one process a GPU. The
settings take turns and the best of each counts, so that other work on the machine does not decide; ratios are what to
compare. Memory is the share of each process (PSS): what two of them map, such as the prepared photos, counts half.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, SIZE, BINS, ROUNDS = 32, 128, 640, 2
WARM_UP = 3
"""Steps that are not counted."""


def train(workspace: Path, backbone: str, precision: str) -> None:
    """One process of a job: an epoch; each says what it took, in workspace/RANK.json."""
    from stocktake import distributed
    from stocktake.machine import share_the_machine

    share_the_machine()  # as the command line does, before the libraries are loaded
    import psutil

    from stocktake.config.data import SplitConfig, SyntheticConfig
    from stocktake.config.training import FinetuneConfig, TrainingConfig
    from stocktake.models.network import create_network
    from stocktake.models.precision import Precision
    from stocktake.stages.prepare import prepare_data
    from stocktake.training.fit import fit
    from stocktake.training.module import NetworkModule

    config = FinetuneConfig(
        workspace=str(workspace),
        backbone=backbone,
        weights="none",
        image_size=SIZE,
        batch_size=BATCH,
        epochs=1,
        split=SplitConfig(fractions=(0.9, 0.05, 0.05)),
        synthetic=SyntheticConfig(count=BINS),
        training=TrainingConfig(schedule="constant"),
    )
    moments: list[float] = []
    heard = NetworkModule.on_train_batch_start

    def on_train_batch_start(module: NetworkModule, batch: Any, index: int) -> None:
        moments.append(time.perf_counter())
        heard(module, batch, index)

    NetworkModule.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
    with distributed.process_group(timeout=300) as world:
        prepared = prepare_data(config)
        model = create_network(prepared.manifest.labels, SIZE, backbone, "none")
        form: Precision = "bf16" if precision == "bf16" else "fp32"
        checkpoints = distributed.run_on_rank_zero(lambda: Path(tempfile.mkdtemp(dir=workspace)))
        fit(model, prepared.manifest, prepared.photos, config, form, checkpoints=checkpoints, on_epoch=lambda *_: False)
        distributed.gather(None)  # all are still there when each looks at its share
        mapped = re.findall(
            r"photos-\d+px/data\.mdb\nSize:.*?\nRss: +(\d+) kB\nPss: +(\d+) kB",
            re.sub(r"\n(KernelPageSize|MMUPageSize):.*", "", Path("/proc/self/smaps").read_text()),
        )
        told = {
            "photos/s": BATCH * (len(moments) - 1 - WARM_UP) / (moments[-1] - moments[WARM_UP]),
            "pss": psutil.Process().memory_full_info().pss,
            "photos": [1024 * sum(int(part) for part in column) for column in zip(*mapped, strict=True)] or [0, 0],
        }
        (workspace / f"{world.rank}.json").write_text(json.dumps(told))
        distributed.gather(None)


def run(workspace: Path, processes: int, backbone: str, precision: str) -> list[dict[str, Any]]:
    """What each process of a job said."""
    from stocktake.commands.ddp import launch

    program = (sys.executable, __file__)
    launch([str(workspace), backbone, precision], nproc=processes, program=program)
    return [json.loads((workspace / f"{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    """Print a line for each setting."""
    import torch

    backbone, precision = [*sys.argv[1:3], *("efficientnet_lite0", "fp32")[len(sys.argv) - 1 :]]
    gpus = torch.cuda.device_count()
    counts = [1, *range(2, gpus + 1)] if gpus else [1, 2]
    cores = len(os.sched_getaffinity(0))
    print(f"{backbone} {precision} {SIZE} px, batch {BATCH}; {cores} cores, {gpus} GPUs; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as temporary:
        best: dict[int, list[dict[str, Any]]] = {}
        for turn in range(ROUNDS):
            for count in counts:
                told = run(Path(temporary), count, backbone, precision)
                print(
                    f"  round {turn + 1}: {count} x {told[0]['photos/s']:.1f} photos/s, load {os.getloadavg()[0]:.1f}"
                )
                if count not in best or told[0]["photos/s"] > best[count][0]["photos/s"]:
                    best[count] = told
    alone = best[1]
    for count, told in best.items():
        rate, peer = told[0]["photos/s"], alone[0]["photos/s"]
        efficiency = rate / peer / (count if gpus else 1)
        each = "GPU" if gpus else f"{cores // count} threads"
        memory = [one["pss"] / 2**20 for one in told]
        print(
            f"{count} x {each:10} {rate:7.1f} photos/s  efficiency {efficiency:.2f}  "
            f"memory {' + '.join(f'{one:.0f}' for one in memory)} = {sum(memory):.0f} MiB"
        )
        if count > 1:
            added = (sum(memory) - alone[0]["pss"] / 2**20) / (count - 1)
            mapped = sum(one["photos"][0] for one in told) / count / 2**20
            shares = sum(one["photos"][1] for one in told) / 2**20
            print(
                f"  each further process adds {added:.0f} MiB; the photos are {mapped:.0f} MiB in each, "
                f"and {shares:.0f} MiB in all"
            )


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        train(Path(sys.argv[1]), *sys.argv[2:])
    else:
        main()
