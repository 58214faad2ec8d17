from __future__ import annotations

import pytest

from stocktake.redaction import redact, without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://ann:s3cret@host:5000/x", "http://***@host:5000/x"),
        ("cannot reach postgresql://ann:s3cret@db/runs today", "cannot reach postgresql://***@db/runs today"),
        ("postgresql://ann:s3/c@ret@db:5432/runs", "postgresql://***@db:5432/runs"),
        ("http://ann:s3/c@ret@host:5000/x", "http://***@host:5000/x"),
        ("http://ann:12/s3cret@host.example:5000/", "http://***@host.example:5000/"),
        ("http://ann:12/s3cret@host/", "http://***@host/"),
        ("http://ann:12/s3cret@host", "http://***@host"),
        ("http://ann:12/#/s3cret@host/", "http://***@host/"),
        ("http://ann:s3'c\"ret@host/", "http://***@host/"),
        ("https://s3cret@host/", "https://***@host/"),
        ("('http://ann:s3cret@host/').", "('http://***@host/')."),
        ("https://host/?token=s3cret&a=1", "https://host/?token=***&a=1"),
        ("https://host/?X-Amz-Signature=s3cret&API_KEY=s3cret", "https://host/?X-Amz-Signature=***&API_KEY=***"),
        ("https://host/?authuser=s3cret;a=1", "https://host/?authuser=***;a=1"),
        ("no login: host=db password=s3cret user=ann", "no login: host=db password=*** user=ann"),
        ("('password=s3cret&a=1')", "('password=***&a=1')"),
        ("password='s3cret s3cret' user=ann", "password=*** user=ann"),
    ],
)
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert "s3c" not in without_credentials(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/#/models/stocktake@champion",
        "models:/stocktake@champion",
        "sqlite:////tmp/mlflow.db",
        "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server/bins",
        "lr=0.1 epochs=3",
    ],
)
def test_what_holds_no_secret_stays(text: str) -> None:
    assert redact(text) == without_credentials(text) == text


def test_an_address_is_kept_without_its_credentials() -> None:
    assert without_credentials("https://ann:s3/c@ret@host:5000/mlflow?a=1&token=s3cret") == (
        "https://host:5000/mlflow?a=1&"
    )
