"""Batch transform on the local AWS: an answer per object, lines, states and failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError

from emulated_aws import ENDED, EmulatedAws, eventually

pytestmark = pytest.mark.aws


@pytest.fixture
def shout(create_model: Callable[..., str]) -> str:
    """A model that answers in capital letters, and refuses what is bad."""
    return create_model("shout")


def transform(emulator: EmulatedAws, name: str, prefix: str, how: dict[str, Any], **changes: Any) -> Any:
    """Run a job over a prefix: how it ended."""
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{emulator.bucket}/{prefix}"}
    emulator.client("sagemaker").create_transform_job(
        **{
            "TransformJobName": name,
            "ModelName": "shout",
            "TransformInput": {"DataSource": {"S3DataSource": source}, "ContentType": "text/plain", **how},
            "TransformOutput": {"S3OutputPath": f"s3://{emulator.bucket}/{name}", "AssembleWith": "Line"},
            "TransformResources": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1},
            **changes,
        }
    )
    describe = emulator.client("sagemaker").describe_transform_job
    return eventually(lambda: (job := describe(TransformJobName=name))["TransformJobStatus"] in ENDED and job)


def test_objects_and_lines_are_answered_under_their_keys(emulator: EmulatedAws, shout: str) -> None:
    emulator.put("texts/a.txt", "one\ntwo\n")
    emulator.put("texts/deep/b.txt", b"\xc3\xa9t\xc3\xa9")
    job = transform(emulator, "whole", "texts/", {}, MaxConcurrentTransforms=2)
    assert job["TransformJobStatus"] == "Completed", job
    assert emulator.keys("whole/") == ["whole/a.txt.out", "whole/deep/b.txt.out"]
    assert emulator.get("whole/a.txt.out") == b"shout text/plain true ONE\nTWO\n"
    assert emulator.get("whole/deep/b.txt.out") == b"shout text/plain true \xc3\xa9T\xc3\xa9\n"

    transform(emulator, "lines", "texts/a.txt", {"SplitType": "Line"}, BatchStrategy="SingleRecord")
    assert emulator.get("lines/a.txt.out") == b"shout text/plain true ONE\nshout text/plain true TWO\n"
    listed = emulator.client("sagemaker").list_transform_jobs(NameContains="line")["TransformJobSummaries"]
    assert [(job["TransformJobName"], job["TransformJobStatus"]) for job in listed] == [("lines", "Completed")]


def test_a_refused_object_fails_the_job(emulator: EmulatedAws, shout: str) -> None:
    emulator.put("mixed/a.txt", "good")
    emulator.put("mixed/b.txt", "bad")
    job = transform(emulator, "refusing", "mixed/", {})
    assert job["TransformJobStatus"] == "Failed"
    assert job["FailureReason"].startswith(f"ClientError: 400 a bad record: s3://{emulator.bucket}/mixed/b.txt")
    assert any("a bad record" in line for line in emulator.log("refusing/", "/aws/sagemaker/TransformJobs"))


def test_what_aws_refuses(emulator: EmulatedAws, shout: str) -> None:
    emulator.put("texts/a.txt", "one\ntwo\n")
    with pytest.raises(ClientError, match="No S3 objects found"):
        transform(emulator, "nothing", "no-such-prefix/", {})
    with pytest.raises(ClientError, match="Could not find model"):
        transform(emulator, "no-model", "texts/", {}, ModelName="none")
    transform(emulator, "twice", "texts/a.txt", {})
    with pytest.raises(ClientError, match="ResourceInUse"):
        transform(emulator, "twice", "texts/a.txt", {})
