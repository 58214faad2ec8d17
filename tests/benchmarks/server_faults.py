"""A fifth of malformed requests among good ones: what the server makes of them, and what it keeps of them.

    python tests/benchmarks/server_faults.py [--requests 10000] [--model FOLDER]

Without a model, one is fitted to drawn bins. Ends with code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile_requests import SETTINGS, attack
from serving_process import serving
from stocktake.models.export import export_model
from stocktake.models.network import create_network
from stocktake.serving.predictor import Predictor
from tiny_bins import PLAIN_BACKBONE, draw_bin

MAX_GROWTH = 5.0
"""Per cent of memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--model", type=Path, help="an exported model's folder")
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or Path(temporary) / "model"
        if options.model is None:
            export_model(create_network((1, 2, 3), 64, PLAIN_BACKBONE, "none", seed=1).eval(), folder)
        photos = [draw_bin(1 + number % 3, number, size=160) for number in range(30)]
        expected = [prediction.probabilities for prediction in Predictor(folder).predict(photos)]

        def right(record: dict[str, Any], number: int) -> bool:
            shares = expected[number]
            return all(abs(record["probabilities"][str(label)] - share) < 1e-3 for label, share in shares.items())

        start = time.perf_counter()
        with serving(folder, **SETTINGS) as server:
            worker = psutil.Process(server.process.pid)
            report = attack(
                server, photos, right, options.requests, lambda: worker.memory_info().rss, threads=options.threads
            )
            crashed = server.process.poll() is not None
            faults = [line for line in server.lines() if "traceback" in line]
    malformed = sum(count for kind, count in report.kinds.items() if kind != "good")
    print(
        f"requests        {report.kinds.total()} in {time.perf_counter() - start:.0f} s, by {options.threads} clients"
    )
    print(f"malformed       {malformed} ({malformed / report.kinds.total():.1%})")
    for kind, count in sorted(report.kinds.items()):
        print(f"  {kind:22}{count:6}")
    print(f"wrong answers   {len(report.wrong)} {report.wrong[:10]}")
    print(f"crashes         {int(crashed)}; faults in the log {len(faults)} {json.dumps(faults[:1])}")
    print(f"memory          {' '.join(f'{size / 2**20:.0f}' for size in report.memory)} MB: {report.growth():+.1f} %")
    if report.wrong or crashed or faults or report.growth() > MAX_GROWTH:
        sys.exit(1)


if __name__ == "__main__":
    main()
