"""The stack before the endpoint, and the function's package: checked offline."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cfnlint import decode, lint_file

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = REPOSITORY / "deploy" / "stack" / "template.yaml"


@pytest.fixture(scope="module")
def resources() -> dict[str, Any]:
    """The template's resources, intrinsic functions as CloudFormation's JSON has them."""
    template, _ = decode.decode(str(TEMPLATE))
    return dict(template["Resources"])


def test_cfn_lint_finds_nothing() -> None:
    assert [str(match) for match in lint_file(TEMPLATE)] == []


def test_a_fault_in_the_template_would_be_found(tmp_path: Path) -> None:
    broken = tmp_path / "template.yaml"
    broken.write_text(TEMPLATE.read_text().replace("MemorySize: 512", "MemorySize: much"))
    assert lint_file(broken)


def test_roles_name_what_they_reach(resources: dict[str, Any]) -> None:
    """No action is a pattern, and a resource's pattern stands for the objects of one named bucket only."""
    statements = [
        statement
        for resource in resources.values()
        if resource["Type"] == "AWS::IAM::Role"
        for policy in resource["Properties"]["Policies"]
        for statement in policy["PolicyDocument"]["Statement"]
    ]
    assert {statement["Sid"] for statement in statements} >= {"AskTheEndpoint", "ReadPhotos"}
    for statement in statements:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not [action for action in actions if "*" in action]
        resource = statement["Resource"]["Fn::Sub"]
        text = resource[0] if isinstance(resource, list) else resource
        assert "*" not in text.replace("s3:::${Bucket}/*", "")


def test_the_function_can_be_called_by_this_api_only(resources: dict[str, Any]) -> None:
    permission = resources["Permission"]["Properties"]
    assert permission["Principal"] == "apigateway.amazonaws.com"
    assert permission["SourceArn"]["Fn::Sub"].endswith(":${Api}/*/POST/predict")
    route = resources["Route"]["Properties"]
    assert route["AuthorizationType"]["Fn::If"] == ["UsesJwt", "JWT", "AWS_IAM"]


def test_everything_that_can_bear_the_projects_tag_bears_it(resources: dict[str, Any]) -> None:
    """By which costs are added up, and by which it is found again."""
    bare = {
        "AWS::Lambda::Permission",
        "AWS::ApiGatewayV2::Integration",
        "AWS::ApiGatewayV2::Route",
        "AWS::ApiGatewayV2::Authorizer",
        "AWS::CloudWatch::Dashboard",
        "AWS::Budgets::Budget",
    }
    for name, resource in resources.items():
        if resource["Type"] not in bare:
            assert "'project'" in repr(resource["Properties"]["Tags"]), name


def test_the_functions_settings_are_those_that_it_reads(resources: dict[str, Any]) -> None:
    read = set(re.findall(r"STOCKTAKE_\w+", (REPOSITORY / "deploy" / "lambda" / "settings.py").read_text()))
    given = set(resources["Function"]["Properties"]["Environment"]["Variables"])
    assert {name for name in given if name.startswith("STOCKTAKE_")} <= read
    assert "STOCKTAKE_ENDPOINT" in given


@pytest.mark.slow
def test_the_package_is_small_and_holds_what_the_handler_imports(tmp_path: Path) -> None:
    for name in ("Makefile", "deploy", "requirements-build.lock"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    subprocess.run(["make", "lambda"], cwd=tmp_path, check=True, capture_output=True)
    package = tmp_path / "workspace" / "lambda.zip"
    assert package.stat().st_size < 15 * 2**20
    names = zipfile.ZipFile(package).namelist()
    assert {"handler.py", "photos.py", "photo_url.py", "settings.py"} <= set(names)
    folders = {name.partition("/")[0] for name in names}
    assert {"aws_lambda_powertools", "aws_xray_sdk", "pydantic", "pydantic_core"} <= folders
    assert not folders & {"boto3", "botocore", "torch", "numpy"}
    assert [name for name in names if name.startswith("pydantic_core/") and "cpython-313" in name]
