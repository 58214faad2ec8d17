"""Batch transform on the local AWS: an answer per object, lines, states and failures."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pytest
from botocore.exceptions import ClientError

from emulated_aws import ENDED, EmulatedAws, eventually

pytestmark = pytest.mark.aws

UPPER = b"""
import http.server, os

class Upper(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if b"bad" in body:
            return self.answer(400, b"a bad record")
        kind = self.headers["Content-Type"].encode()
        self.answer(200, kind + b" " + os.environ["SAGEMAKER_BATCH"].encode() + b" " + body.upper())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["SAGEMAKER_BIND_TO_PORT"])), Upper).serve_forever()
"""


@pytest.fixture(scope="module")
def upper(emulator: EmulatedAws) -> str:
    """A model that answers in capital letters, and refuses what is bad."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        member = tarfile.TarInfo("main")
        member.size = len(UPPER)
        archive.addfile(member, io.BytesIO(UPPER))
    uri = emulator.put("models/upper/model.tar.gz", data.getvalue())
    container = {"Image": "1.dkr.ecr/model-program:1", "ModelDataUrl": uri}
    emulator.client("sagemaker").create_model(
        ModelName="upper", ExecutionRoleArn=emulator.role, PrimaryContainer=container
    )
    return "upper"


def transform(emulator: EmulatedAws, name: str, prefix: str, given: dict[str, Any], **changes: Any) -> Any:
    """Run a job over a prefix: how it ended."""
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{emulator.bucket}/{prefix}"}
    emulator.client("sagemaker").create_transform_job(
        **{
            "TransformJobName": name,
            "ModelName": "upper",
            "TransformInput": {"DataSource": {"S3DataSource": source}, "ContentType": "text/plain", **given},
            "TransformOutput": {"S3OutputPath": f"s3://{emulator.bucket}/{name}", "AssembleWith": "Line"},
            "TransformResources": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1},
            **changes,
        }
    )
    describe = emulator.client("sagemaker").describe_transform_job
    return eventually(lambda: (said := describe(TransformJobName=name))["TransformJobStatus"] in ENDED and said)


def test_objects_and_lines_are_answered_under_their_keys(emulator: EmulatedAws, upper: str) -> None:
    emulator.put("texts/a.txt", "one\ntwo\n")
    emulator.put("texts/deep/b.txt", b"\xc3\xa9t\xc3\xa9")
    said = transform(emulator, "whole", "texts/", {}, MaxConcurrentTransforms=2)
    assert said["TransformJobStatus"] == "Completed", said
    assert emulator.keys("whole/") == ["whole/a.txt.out", "whole/deep/b.txt.out"]
    assert emulator.get("whole/a.txt.out") == b"text/plain true ONE\nTWO\n"
    assert emulator.get("whole/deep/b.txt.out") == b"text/plain true \xc3\xa9T\xc3\xa9\n"

    transform(emulator, "lines", "texts/a.txt", {"SplitType": "Line"}, BatchStrategy="SingleRecord")
    assert emulator.get("lines/a.txt.out") == b"text/plain true ONE\ntext/plain true TWO\n"
    listed = emulator.client("sagemaker").list_transform_jobs(NameContains="line")["TransformJobSummaries"]
    assert [(one["TransformJobName"], one["TransformJobStatus"]) for one in listed] == [("lines", "Completed")]


def test_a_refused_object_fails_the_job(emulator: EmulatedAws, upper: str) -> None:
    emulator.put("mixed/a.txt", "good")
    emulator.put("mixed/b.txt", "bad")
    said = transform(emulator, "refusing", "mixed/", {})
    assert said["TransformJobStatus"] == "Failed"
    assert said["FailureReason"].startswith(f"ClientError: 400 a bad record: s3://{emulator.bucket}/mixed/b.txt")
    assert any("a bad record" in line for line in emulator.log("refusing/", "/aws/sagemaker/TransformJobs"))


def test_what_aws_refuses(emulator: EmulatedAws, upper: str) -> None:
    emulator.put("texts/a.txt", "one\ntwo\n")
    with pytest.raises(ClientError, match="No S3 objects found"):
        transform(emulator, "nothing", "no-such-prefix/", {})
    with pytest.raises(ClientError, match="Could not find model"):
        transform(emulator, "no-model", "texts/", {}, ModelName="none")
    transform(emulator, "twice", "texts/a.txt", {})
    with pytest.raises(ClientError, match="ResourceInUse"):
        transform(emulator, "twice", "texts/a.txt", {})
