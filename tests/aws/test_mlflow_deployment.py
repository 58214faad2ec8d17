"""MLflow's own deployments to SageMaker, against the emulator: the serving image's program answers."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.deployments import get_deploy_client

from emulated_aws import EmulatedAws

pytestmark = [pytest.mark.aws, pytest.mark.slow]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that always answers 2."""
    from stocktake.models.export import export_model
    from stocktake.models.majority import fit_majority

    folder = tmp_path_factory.mktemp("model") / "exported"
    export_model(fit_majority((1, 2, 3), 32, np.array([1, 2, 3, 2, 2])), folder)
    return folder


def test_mlflow_deploys_a_model(
    emulator: EmulatedAws,
    exported: Path,
    tmp_path: Path,
    bin_photo: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stocktake.serving.pyfunc import save_pyfunc

    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    model = save_pyfunc(exported, tmp_path / "model", bin_photo(1))
    client = get_deploy_client("sagemaker:/us-east-1")
    config = {"execution_role_arn": emulator.role, "bucket": emulator.bucket, "image_url": "1.dkr.ecr/stocktake:1"}
    config |= {"instance_type": "ml.c7i.large"}
    client.create_deployment("by-mlflow", str(model), "python_function", config)
    assert client.get_deployment("by-mlflow")["EndpointStatus"] == "InService"
    photos = pd.DataFrame({"photo": [base64.b64encode(bin_photo(1)).decode()]})
    assert client.predict("by-mlflow", photos)["predictions"][0]["quantity"] == 2
    client.delete_deployment("by-mlflow")
    assert not emulator.client("sagemaker").list_endpoints(NameContains="by-mlflow")["Endpoints"]
