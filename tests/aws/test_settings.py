"""The backend config: every wrong value is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stocktake.aws.settings import read_settings
from stocktake.errors import StocktakeError

GIVEN = {"role": "arn:aws:iam::123456789012:role/jobs", "bucket": "s3://some-bucket/stocktake/", "image": "image:1"}
DEPLOY = Path(__file__).parents[2] / "deploy"


def test_what_is_given_and_what_is_not() -> None:
    settings = read_settings({**GIVEN, "async": True, "_": "a comment", "SYNCHRONOUS": False, "docker_auth": None})
    assert settings.async_
    assert settings.place == "s3://some-bucket/stocktake"
    assert settings.instance_count == 1
    assert settings.wait_seconds is None


def test_spot_waits_an_hour_by_default() -> None:
    assert read_settings({**GIVEN, "spot": True, "max_run_seconds": 600}).wait_seconds == 4200
    assert read_settings({**GIVEN, "spot": True, "max_run_seconds": 600, "max_wait_seconds": 700}).wait_seconds == 700


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"instance_typ": "ml.m5.xlarge"}, "'instance_typ' is no setting of a job: did you mean instance_type?"),
        ({"qqq": 1}, "'qqq' is no setting of a job: they are role, bucket"),
        ({"instance_count": "2"}, 'instance_count "2" must be of type int'),
        ({"instance_count": True}, "instance_count true must be of type int"),
        ({"instance_count": 0}, "instance_count 0 must be from 1 to 128"),
        ({"spot": "yes"}, 'spot "yes" must be of type bool'),
        ({"tags": {"a": 1}}, 'tags {"a": 1} must be of type dict[str, str]'),
        ({"subnets": "subnet-1"}, 'subnets "subnet-1" must be of type list[str]'),
        ({"subnets": ["subnet-1"]}, "subnets and security_groups belong together"),
        ({"max_run_seconds": 5}, "max_run_seconds 5 must be from 60"),
        ({"max_wait_seconds": 90_000}, "max_wait_seconds is for spot jobs"),
        ({"spot": True, "max_wait_seconds": 60}, "max_wait_seconds 60 must be at least max_run_seconds (14400)"),
        ({"spot": True, "keep_alive_seconds": 60}, "spot machines cannot be kept warm"),
        ({"keep_alive_seconds": 30_000}, "keep_alive_seconds 30000 must be from 0 to 21600"),
        ({"tracking_uri": "sqlite:///mlflow.db"}, "a job reaches http(s) servers and SageMaker ARNs only"),
        ({"tracking_uri": "arn:aws:sagemaker:us-east-1:1:x/y"}, "is no managed MLflow: write arn:aws:sagemaker:REGION"),
        ({"role": "admin"}, "role 'admin' must be a role's ARN"),
        ({"role": None}, "role null must be of type str"),
        ({"bucket": "some-bucket"}, "bucket 'some-bucket' must be s3://bucket/prefix"),
        ({"image": " "}, "image is empty"),
    ],
)
def test_a_wrong_value_is_refused_by_name(change: dict[str, Any], told: str) -> None:
    with pytest.raises(StocktakeError) as refused:
        read_settings(GIVEN | change)
    assert told in str(refused.value)


def test_what_must_be_given_is_named() -> None:
    with pytest.raises(StocktakeError, match="role, image must be given"):
        read_settings({"bucket": "s3://some-bucket"})
    with pytest.raises(StocktakeError, match=r"must be a \.json file"):
        read_settings("deploy/sagemaker.yaml")


def test_the_shipped_settings_want_only_the_account() -> None:
    shipped = json.loads((DEPLOY / "sagemaker.json").read_text())
    with pytest.raises(StocktakeError, match="role, bucket, image must be given"):
        read_settings(shipped)
    settings = read_settings(shipped | GIVEN)
    assert settings.spot
    assert (DEPLOY.parent / settings.prices).is_file()
