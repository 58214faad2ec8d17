"""This server against its bare engine and `mlflow models serve` of the same network: latency, throughput, memory.

    python tests/benchmarks/serving.py [--backbone resnet18] [--size 224] [--seconds 2]

One photo of 45 kB: raw bytes here; base64 in JSON there, since MLflow's scoring server takes no images. Both servers
have one worker with the same number of threads; the same client, keep-alive, in this process asks each with 1, 8 and 64
connections. The two take turns, five rounds, and the best of each figure counts, so that other work on the machine does
not decide; ratios are what to compare. Every answer is checked. The bare engine is the predictor's forward pass on a
decoded photo, in a process of its own, in the same rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

PHOTO_BYTES = 45_000
CONNECTIONS = (1, 8, 64)
ROUNDS = 5
HERE = Path(__file__).parent
THREADS = len(os.sched_getaffinity(0))


@dataclass
class Figures:
    """Of one server at one number of connections."""

    p50: float
    p95: float
    """Milliseconds."""
    rate: float
    """Answers a second."""


def photo() -> bytes:
    """A JPEG of about 45 kB, 256 x 256, like a bin's: smooth shapes and fine grain."""
    rng = np.random.default_rng(0)
    shapes = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize(
        (256, 256), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 12, (256, 256, 3))
    picture = Image.fromarray(np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8))
    best = b""
    for quality in range(60, 100):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        if len(file.getvalue()) > PHOTO_BYTES:
            break
        best = file.getvalue()
    return best


def request(body: bytes, content_type: str) -> bytes:
    head = f"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def connection(port: int, sent: bytes, until: float, times: list[float], answers: set[bytes]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    while time.perf_counter() < until:
        began = time.perf_counter()
        writer.write(sent)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise SystemExit(f"answered {head[:200]!r}")
        lines = (line.partition(b":") for line in head.lower().split(b"\r\n"))
        length = next(int(value) for name, _, value in lines if name == b"content-length")
        answers.add(await reader.readexactly(length))
        times.append(time.perf_counter() - began)
    writer.close()


async def ask(port: int, sent: bytes, connections: int, seconds: float) -> tuple[Figures, set[bytes]]:
    times: list[float] = []
    answers: set[bytes] = set()
    began = time.perf_counter()
    await asyncio.gather(*(connection(port, sent, began + seconds, times, answers) for _ in range(connections)))
    taken = time.perf_counter() - began
    p50, p95 = np.percentile(times, [50, 95]) * 1000
    return Figures(float(p50), float(p95), len(times) / taken), answers


BARE_ENGINE = """
import pathlib, sys, time
import numpy as np
from stocktake.serving.predictor import Predictor
predictor = Predictor(pathlib.Path(sys.argv[1]), threads=int(sys.argv[3]))
prepared = predictor.prepare(pathlib.Path(sys.argv[2]).read_bytes())[None]
for _ in range(20):
    predictor.probabilities(prepared)
times, end = [], time.perf_counter() + float(sys.argv[4])
while time.perf_counter() < end:
    began = time.perf_counter()
    predictor.probabilities(prepared)
    times.append(time.perf_counter() - began)
p50, p95 = np.percentile(times, [50, 95]) * 1000
print(p50, p95, len(times) / sum(times))
"""


def bare_engine(model: Path, photo: Path, seconds: float) -> Figures:
    """The forward pass alone."""
    command = [sys.executable, "-c", BARE_ENGINE, str(model), str(photo), str(THREADS), str(seconds)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Figures(*map(float, printed.split()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server process, and how long it took from its start to its first answer."""

    def __init__(self, name: str, command: list[str], port: int, sent: bytes, log: Path) -> None:
        self.name, self.port, self.sent = name, port, sent
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # mlflow looks for its uvicorn there
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": str(THREADS), "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment["STOCKTAKE_PORT"] = str(port)
        began = time.perf_counter()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True, cwd=log.parent
            )
        while True:
            try:
                asyncio.run(ask(port, sent, 1, 0.001))
                break
            except (OSError, asyncio.IncompleteReadError):
                if self.process.poll() is not None or time.perf_counter() - began > 120:
                    raise SystemExit(f"{name} did not start: {log.read_text()[-3000:]}") from None
                time.sleep(0.02)
        self.cold_start = time.perf_counter() - began

    def worker_megabytes(self) -> float:
        """Resident memory of the largest process: the worker that holds the model."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return max(process.memory_info().rss for process in family) / 2**20

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def models(folder: Path, backbone: str, size: int, data: bytes) -> tuple[Path, Path]:
    """The same network as an export and as a model of mlflow.pytorch."""
    import mlflow.pyfunc
    import mlflow.pytorch
    import torch

    from stocktake.data.images import decode, resize_to_square
    from stocktake.models.export import export_model
    from stocktake.models.network import create_network
    from stocktake.serving.export_check import check_export

    if size != 224:
        raise SystemExit("the peer takes photos of 224 pixels")
    model = create_network((1, 2, 3, 4, 5), size, backbone, "none", seed=0).eval()
    prepared = resize_to_square(decode(data), size)[None]
    with torch.inference_mode():
        shares = torch.softmax(model(torch.from_numpy(prepared)).double(), 1).numpy()
    mlflow.pytorch.save_model(model, str(folder / "network"), serialization_format="pickle")
    mlflow.pyfunc.save_model(
        str(folder / "peer"),
        python_model=str(HERE / "torch_peer.py"),
        artifacts={"network": str(folder / "network")},
        pip_requirements=["mlflow", "torch"],
    )
    export_model(model, folder / "exported")
    check_export(folder / "exported", ["photo"], prepared, shares)
    return folder / "exported", folder / "peer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=2)
    options = parser.parse_args()
    data = photo()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exported, peer = models(folder, options.backbone, options.size, data)
        description = json.loads((exported / "model.json").read_text())
        print(
            f"{options.backbone} at {options.size} px, photo of {len(data):,} bytes, {THREADS} threads; ours in "
            f"{description['precision']}, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        raw = request(data, "image/jpeg")
        table = {"dataframe_split": {"columns": ["photo"], "data": [[base64.b64encode(data).decode()]]}}
        encoded = request(json.dumps(table).encode(), "application/json")
        port, other = free_port(), free_port()
        ours = [sys.executable, "-P", "-m", "stocktake.serving.serve", str(exported)]
        theirs = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(peer), "-p", str(other)]
        servers: list[Server] = []
        try:
            servers.append(Server("stocktake", ours, port, raw, folder / "ours.log"))
            servers.append(Server("mlflow", [*theirs, "--env-manager", "local"], other, encoded, folder / "theirs.log"))
            best: dict[tuple[str, int], Figures] = {}
            answers: dict[str, set[bytes]] = {}
            (folder / "photo.jpg").write_bytes(data)
            for _ in range(ROUNDS):
                for connections in CONNECTIONS:
                    keep_best(best, "engine", 1, bare_engine(exported, folder / "photo.jpg", options.seconds))
                    for server in servers:
                        figures, bodies = asyncio.run(ask(server.port, server.sent, connections, options.seconds))
                        answers.setdefault(server.name, set()).update(bodies)
                        keep_best(best, server.name, connections, figures)
            report(servers, best, answers)
        finally:
            for server in servers:
                server.stop()


def keep_best(best: dict[tuple[str, int], Figures], name: str, connections: int, figures: Figures) -> None:
    """The best of each figure: other work on the machine only makes them worse."""
    former = best.get((name, connections), figures)
    p50, p95 = min(former.p50, figures.p50), min(former.p95, figures.p95)
    best[name, connections] = Figures(p50, p95, max(former.rate, figures.rate))


def print_row(name: str, connections: int, figures: Figures) -> None:
    print(f"{name:10} {connections:8d} {figures.p50:9.2f} {figures.p95:9.2f} {figures.rate:10.1f}")


def report(servers: list[Server], best: dict[tuple[str, int], Figures], answers: dict[str, set[bytes]]) -> None:
    quantities = {
        "stocktake": {json.loads(answer)["quantity"] for answer in answers["stocktake"]},
        "mlflow": {json.loads(answer)["predictions"][0]["quantity"] for answer in answers["mlflow"]},
    }
    if quantities["stocktake"] != quantities["mlflow"] or len(quantities["mlflow"]) != 1:
        raise SystemExit(f"the servers disagree: {quantities}")
    print(f"{'':10} {'clients':>8} {'p50 ms':>9} {'p95 ms':>9} {'answers/s':>10}")
    for connections in CONNECTIONS:
        for server in servers:
            print_row(server.name, connections, best[server.name, connections])
        ours, theirs = best["stocktake", connections], best["mlflow", connections]
        print(
            f"{'ratio':10} {connections:8d} {theirs.p50 / ours.p50:9.1f} {theirs.p95 / ours.p95:9.1f} "
            f"{ours.rate / theirs.rate:10.1f}"
        )
    engine, alone = best["engine", 1], best["stocktake", 1]
    rate = max(best["stocktake", connections].rate for connections in CONNECTIONS)
    print_row("engine", 1, engine)
    print(f"p50 {alone.p50 / engine.p50:.2f} x the bare engine's; answers/s {rate / engine.rate:.2f} x")
    for server in servers:
        print(f"{server.name}: cold start {server.cold_start:.1f} s, worker {server.worker_megabytes():.0f} MB")


if __name__ == "__main__":
    main()
