from __future__ import annotations

from pathlib import Path

import pytest

from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.redaction import redact, without_credentials
from stocktake.tracking.addresses import absolute, resolve


def test_the_default_store_is_in_the_current_folder(tmp_path: Path) -> None:
    stores = resolve(TrackingConfig())
    assert stores.tracking == stores.registry == f"sqlite:///{tmp_path}/mlflow.db"


def test_the_config_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000")
    assert resolve(TrackingConfig()).tracking == "http://environment:5000"
    stores = resolve(TrackingConfig(uri="http://option:5000/"))
    assert stores.tracking == stores.registry == "http://option:5000"


def test_relative_addresses_become_absolute(tmp_path: Path) -> None:
    assert absolute("sqlite:///runs/x.db") == f"sqlite:///{tmp_path}/runs/x.db"
    assert absolute("runs") == f"file://{tmp_path}/runs"
    assert absolute("file:runs") == f"file://{tmp_path}/runs"
    assert absolute("file:///runs") == "file:///runs"


MANAGED = "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server/bins"


def test_a_managed_server_is_its_arn() -> None:
    stores = resolve(TrackingConfig(uri=MANAGED))
    assert stores.tracking == stores.registry == MANAGED
    assert without_credentials(MANAGED) == redact(MANAGED) == MANAGED
    for uri in (MANAGED.replace("eu-west-1", ""), MANAGED.rpartition("/")[0], "arn:aws:s3:::bucket"):
        with pytest.raises(StocktakeError, match="is no managed MLflow"):
            absolute(uri)


@pytest.mark.parametrize("uri", ["http://ann:12/pa55@host/", "http://ann:pa55/w@host:5000"])
def test_a_password_that_reads_as_a_host_is_refused_without_being_shown(uri: str) -> None:
    """Credentials of the environment would be sent to `ann`."""
    with pytest.raises(StocktakeError, match="%2F") as caught:
        absolute(uri)
    assert "pa55" not in str(caught.value)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "http://", "http://:5000"])
def test_an_address_of_nothing_is_refused(uri: str) -> None:
    with pytest.raises(StocktakeError):
        absolute(uri)
