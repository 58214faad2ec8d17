"""The backend as MLflow loads it: whatever can be known to be wrong is refused before anything is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import ExecutionException
from mlflow.projects.backend import loader

from tiny_bins import sqlite_store

__all__ = ["sqlite_store"]
PROJECT = Path(__file__).parents[2]
GIVEN = {"role": "arn:aws:iam::123456789012:role/jobs", "bucket": "s3://some-bucket/here", "image": "image:1"}


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An AWS that nobody answers for: a request that is sent all the same takes another error's place."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("change", "parameters", "told"),
    [
        ({"sport": True}, {}, "'sport' is no setting of a job: did you mean spot?"),
        ({}, {"lr": "abc"}, 'Parser key "lr"'),
        ({}, {"root": "bins"}, "-P root=bins is a folder of this machine"),
        ({"upload_bins": True}, {"root": "nowhere"}, "--root nowhere holds no bins"),
        ({}, {"root": "https://bins"}, "a job reads s3:// addresses"),
        ({"instance_type": "ml.qq.large"}, {}, "instance_type: 'ml.qq.large'"),
        ({"tracking_uri": "http://me:secret@host"}, {}, "http://***@host has credentials in it"),
    ],
)
def test_refused_before_anything_is_sent(
    sqlite_store: str, nowhere: None, change: dict[str, Any], parameters: dict[str, str], told: str
) -> None:
    client = mlflow.MlflowClient(sqlite_store, sqlite_store)
    experiment = client.create_experiment("refused")
    backend = loader.load_backend("sagemaker")
    with pytest.raises(ExecutionException) as refused:
        backend.run(str(PROJECT), "finetune", parameters, None, GIVEN | change, sqlite_store, experiment)
    assert told in str(refused.value).replace(str(PROJECT) + "/", "")
    assert client.search_runs([experiment]) == [], "nothing was begun"


def test_an_aws_that_does_not_answer_is_said(sqlite_store: str, nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    backend = loader.load_backend("sagemaker")
    with pytest.raises(ExecutionException, match="no AWS region"):
        backend.run(str(PROJECT), "finetune", {}, None, GIVEN, sqlite_store, "0")
