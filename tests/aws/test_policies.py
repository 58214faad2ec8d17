"""deploy/policies: every call that the project makes is allowed, nothing else is, and the local AWS holds to it.

That they are enough for jobs from submission to arrival is what test_jobs_training.py runs with.
"""

from __future__ import annotations

import ast
import json
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import xform_name
from botocore.exceptions import ClientError
from botocore.session import get_session

from emulated_aws import EmulatedAws
from stocktake.config.data import S3Config
from stocktake.data.s3_client import Bucket, ObjectError, S3Address

pytestmark = pytest.mark.aws
PROJECT = Path(__file__).parents[2]
CLIENTS = {"sagemaker": "sagemaker", "logs": "logs", "s3": "s3", "_s3": "s3"}
"""What clients are called in the source, and their services."""
ACTIONS = {
    "download_file": "GetObject",
    "head_bucket": "ListBucket",
    "list_objects_v2": "ListBucket",
}
"""Where a method does not bear its action's name."""
IMPLIED = {"sagemaker:AddTags", "iam:PassRole"}
"""What creating a job with tags and a role takes, and nobody calls."""
OF_SAGEMAKER = {
    *("s3:GetObject", "s3:ListBucket", "s3:PutObject", "cloudwatch:PutMetricData"),
    *("logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"),
    *("ecr:GetAuthorizationToken", "ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage"),
    "ecr:GetDownloadUrlForLayer",
}
"""What SageMaker does as a training job's role, by its documentation: CreateTrainingJob, execution role permissions."""


def called_actions(folder: Path) -> set[str]:
    """IAM's names of what the source asks of boto3's clients."""
    actions = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if name in CLIENTS:
                method = node.func.attr
                if method == "get_paginator":
                    method = ast.literal_eval(node.args[0])
                actions |= _actions(CLIENTS[name], method)
    return actions


def _actions(service: str, method: str) -> set[str]:
    action = ACTIONS.get(method) or _operations(service).get(method)
    return {f"{service}:{action}"} if action else set()


@cache
def _operations(service: str) -> dict[str, str]:
    """From boto3's names of methods to the operations."""
    return {xform_name(name): name for name in get_session().get_service_model(service).operation_names}


def granted(name: str) -> set[str]:
    """The actions of a policy."""
    statements = json.loads((PROJECT / "deploy" / "policies" / f"{name}.json").read_text())["Statement"]
    listed = [[entry["Action"]] if isinstance(entry["Action"], str) else entry["Action"] for entry in statements]
    return {action for actions in listed for action in actions}


def test_a_caller_may_do_what_the_project_calls_and_no_more() -> None:
    called = called_actions(PROJECT / "src" / "stocktake" / "aws")
    assert {"sagemaker:CreateTrainingJob", "s3:PutObject", "logs:GetLogEvents"} <= called
    assert granted("caller") == called | IMPLIED


def test_a_job_may_do_what_sagemaker_does_for_it_and_no_more() -> None:
    assert granted("job") == OF_SAGEMAKER
    assert granted("managed-mlflow") == {"sagemaker-mlflow:*"}


def test_roles_are_for_sagemaker_in_this_account_only() -> None:
    (trust,) = json.loads((PROJECT / "deploy" / "policies" / "trust.json").read_text())["Statement"]
    assert trust["Condition"] == {"StringEquals": {"aws:SourceAccount": "ACCOUNT"}}
    caller = json.loads((PROJECT / "deploy" / "policies" / "caller.json").read_text())["Statement"]
    (passing,) = (statement for statement in caller if statement["Action"] == "iam:PassRole")
    assert passing["Condition"] == {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}


def as_user(rights: Any, service: str) -> Any:
    own = rights.environment
    return boto3.client(
        service,
        endpoint_url=own["AWS_ENDPOINT_URL"],
        region_name=own["AWS_DEFAULT_REGION"],
        aws_access_key_id=own["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=own["AWS_SECRET_ACCESS_KEY"],
    )


def test_what_the_policies_do_not_name_is_refused(
    emulator: EmulatedAws, rights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.train("theirs", "true")
    sagemaker = as_user(rights, "sagemaker")
    for asked in (
        lambda: sagemaker.describe_training_job(TrainingJobName="theirs"),
        lambda: sagemaker.create_model(ModelName="stocktake-model", ExecutionRoleArn=rights.role),
        lambda: as_user(rights, "logs").describe_log_groups(),
        lambda: as_user(rights, "logs").get_log_events(
            logGroupName="/aws/sagemaker/TrainingJobs", logStreamName="theirs/algo-1-1"
        ),
        lambda: as_user(rights, "iam").list_users(),
    ):
        with pytest.raises(ClientError, match=r"AccessDenied.* is not authorized to perform"):
            asked()
    other = boto3.client(
        "sagemaker",
        endpoint_url=emulator.endpoint,
        region_name="us-east-1",
        aws_access_key_id="AKIAIOSFODNN7EXAMPLE",
        aws_secret_access_key="none",
    )
    with pytest.raises(ClientError, match="security token included in the request is invalid"):
        other.list_training_jobs()

    emulator.client("s3").create_bucket(Bucket="of-others")
    for name, value in rights.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ObjectError, match=r"of-others.*access is denied"):
        Bucket(S3Address.parse("s3://of-others"), S3Config(retries=0)).put("a.txt", b"a")
    Bucket(S3Address.parse(f"s3://{emulator.bucket}/bins"), S3Config(retries=0)).put("a.txt", b"a")


def test_another_role_cannot_be_passed(emulator: EmulatedAws, rights: Any) -> None:
    name = "stocktake-passed"
    emulator.put("scripts/passed/main", "true")
    request = {
        "TrainingJobName": name,
        "AlgorithmSpecification": {"TrainingImage": "1.dkr.ecr/program:1", "TrainingInputMode": "File"},
        "OutputDataConfig": {"S3OutputPath": f"s3://{emulator.bucket}/stocktake"},
        "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
    }
    sagemaker = as_user(rights, "sagemaker")
    with pytest.raises(ClientError, match="iam:PassRole"):
        sagemaker.create_training_job(**request, RoleArn=emulator.role)
    with pytest.raises(ClientError, match="sagemaker:CreateTrainingJob"):
        sagemaker.create_training_job(**{**request, "TrainingJobName": "mine"}, RoleArn=rights.role)


def test_a_container_acts_as_its_role(emulator: EmulatedAws, rights: Any) -> None:
    script = """
import boto3, botocore, os
print(boto3.client("sts").get_caller_identity()["Arn"])
for key in ("stocktake/jobs/mine", "stocktake/checkpoints/mine", "stocktake/code/theirs", "bins/theirs"):
    try:
        boto3.client("s3").put_object(Bucket=os.environ["BUCKET"], Key=key, Body=b"1")
        print(key, "written")
    except botocore.exceptions.ClientError as error:
        print(key, error.response["Error"]["Code"])
for stream in ("stocktake-mine/algo-1", "theirs/algo-1"):
    try:
        place = {"logGroupName": "/aws/sagemaker/TrainingJobs", "logStreamName": stream}
        boto3.client("logs").create_log_stream(**place)
        print(stream, "written")
    except botocore.exceptions.ClientError as error:
        print(stream, error.response["Error"]["Code"])
"""
    variables = {"BUCKET": emulator.bucket}
    emulator.train("as-role", script, program="python", RoleArn=rights.role, Environment=variables)
    assert emulator.ended("as-role")["TrainingJobStatus"] == "Completed"
    who, *written = emulator.log("as-role/")
    assert ":assumed-role/stocktake-job/" in who
    objects, streams = [line.split()[-1] for line in written[:4]], [line.split()[-1] for line in written[4:]]
    assert objects == ["written", "written", "AccessDenied", "AccessDenied"]
    assert streams == ["written", "AccessDeniedException"]
