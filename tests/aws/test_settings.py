"""The backend config: every wrong value is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stocktake.aws.settings import read_job_settings
from stocktake.errors import StocktakeError

REQUIRED = {"role": "arn:aws:iam::123456789012:role/jobs", "bucket": "s3://some-bucket/stocktake/", "image": "image:1"}
DEPLOY = Path(__file__).parents[2] / "deploy"


def test_comments_and_mlflows_additions_are_no_settings() -> None:
    settings = read_job_settings(
        {**REQUIRED, "async": True, "_": "a comment", "SYNCHRONOUS": False, "docker_auth": None}
    )
    assert settings.async_
    assert settings.prefix == "s3://some-bucket/stocktake"
    assert settings.instance_count == 1
    assert settings.wait_seconds is None


def test_spot_waits_an_hour_by_default() -> None:
    spot = REQUIRED | {"spot": True, "max_run_seconds": 600}
    assert read_job_settings(spot).wait_seconds == 4200
    assert read_job_settings(spot | {"max_wait_seconds": 700}).wait_seconds == 700


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"instance_typ": "ml.m5.xlarge"}, "instance_type"),
        ({"qqq": 1}, "qqq"),
        ({"prices": "prices.yaml"}, "prices"),
        ({"instance_count": "many"}, "instance_count"),
        ({"instance_count": 0}, "instance_count 0"),
        ({"spot": "perhaps"}, "spot"),
        ({"tags": {"a": 1}}, "tags"),
        ({"subnets": "subnet-1"}, "subnets"),
        ({"subnets": ["subnet-1"]}, "security_groups"),
        ({"max_run_seconds": 5}, "max_run_seconds 5"),
        ({"max_wait_seconds": 90_000}, "max_wait_seconds"),
        ({"spot": True, "max_wait_seconds": 60}, "max_wait_seconds 60"),
        ({"spot": True, "keep_alive_seconds": 60}, "keep_alive_seconds"),
        ({"keep_alive_seconds": 30_000}, "keep_alive_seconds 30000"),
        ({"tracking_uri": "sqlite:///mlflow.db"}, "tracking_uri"),
        ({"tracking_uri": "arn:aws:sagemaker:us-east-1:1:x/y"}, "arn:aws:sagemaker:us-east-1:1:x/y"),
        ({"bucket_owner": "me"}, "bucket_owner"),
        ({"role": "admin"}, "role 'admin'"),
        ({"role": None}, "role"),
        ({"bucket": "some-bucket"}, "bucket 'some-bucket'"),
        ({"image": " "}, "image"),
    ],
)
def test_a_wrong_value_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(StocktakeError) as refused:
        read_job_settings(REQUIRED | change)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_password_in_an_address_is_not_shown() -> None:
    with pytest.raises(StocktakeError) as refused:
        read_job_settings(REQUIRED | {"tracking_uri": "postgresql://me:secret@host/mlflow"})
    assert "secret" not in str(refused.value)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(StocktakeError, match="role, image"):
        read_job_settings({"bucket": "s3://some-bucket"})
    with pytest.raises(StocktakeError, match=r"deploy/sagemaker\.yaml"):
        read_job_settings("deploy/sagemaker.yaml")


def test_the_shipped_settings_lack_only_the_account() -> None:
    shipped = json.loads((DEPLOY / "sagemaker.json").read_text())
    with pytest.raises(StocktakeError, match="role"):
        read_job_settings(shipped)
    assert read_job_settings(shipped | REQUIRED).spot
