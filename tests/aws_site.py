"""What job tests submit from: the emulator as a user with the policies' rights, a store, a root in S3, a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Run

from emulated_aws import EmulatedAws
from tiny_bins import TINY_JOB

PROJECT = Path(__file__).parents[1]


@dataclass
class Site:
    """The emulator, a store and an experiment in it, a root in S3, and a workspace."""

    emulator: EmulatedAws
    uri: str
    experiment: str
    root: str
    workspace: Path
    role: str

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.uri, self.uri)

    def settings(self, **changes: Any) -> dict[str, Any]:
        """A backend config."""
        settings = {"role": self.role, "bucket": f"s3://{self.emulator.bucket}/stocktake", "max_run_seconds": 600}
        return {**settings, "image": "somewhere/stocktake-training:latest", **changes}

    def parameters(self, **changes: Any) -> dict[str, str]:
        """-P of a small training; a mapping is written as a search space."""
        if isinstance(space := changes.get("space"), dict):
            path = self.workspace / f"{abs(hash(json.dumps(space)))}.space.yaml"
            path.write_text(json.dumps(space))
            changes["space"] = str(path)
        return {**TINY_JOB, "root": self.root, "workspace": str(self.workspace), **changes}

    def submit(
        self, entry_point: str, settings: dict[str, Any] | None = None, *, wait: bool = True, **parameters: Any
    ) -> Run:
        """`mlflow.run(backend="sagemaker")`: the run."""
        mlflow.set_tracking_uri(self.uri)
        submitted = mlflow.projects.run(
            str(PROJECT),
            entry_point,
            parameters=self.parameters(**parameters),
            experiment_id=self.experiment,
            backend="sagemaker",
            backend_config=settings or self.settings(),
            synchronous=wait,
        )
        return self.client.get_run(submitted.run_id)

    def newest(self, condition: str = "") -> Run:
        return self.client.search_runs([self.experiment], condition, max_results=1)[0]

    def steps(self, run: Run, metric: str) -> list[int]:
        return sorted(point.step for point in self.client.get_metric_history(run.info.run_id, metric))


@contextmanager
def make_site(emulator: EmulatedAws, rights: Any, tiny_root: Path, folder: Path, uri: str) -> Iterator[Site]:
    """A site in a folder, with the tiny root; the environment is that of the user."""
    (folder / "workspace").mkdir()
    for path in [*tiny_root.glob("bin-images/*"), *tiny_root.glob("metadata/*")]:
        emulator.put(f"tiny/{path.relative_to(tiny_root)}", path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
            patch.delenv(name)
        for name, value in rights.environment.items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.chdir(folder)
        before = mlflow.get_tracking_uri()
        experiment = mlflow.MlflowClient(uri, uri).create_experiment("jobs", artifact_location=_artifacts(folder, uri))
        yield Site(emulator, uri, experiment, f"s3://{emulator.bucket}/tiny", folder / "workspace", rights.role)
        mlflow.set_tracking_uri(before)


def _artifacts(folder: Path, uri: str) -> str | None:
    """Beside a database; a server says itself where they go."""
    return str(folder / "stored") if uri.startswith("sqlite:") else None
