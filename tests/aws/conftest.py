"""A role and a user in the emulator with the rights of deploy/policies and no others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from emulated_aws import EmulatedAws

POLICIES = Path(__file__).parents[2] / "deploy" / "policies"


@dataclass(frozen=True)
class Rights:
    """Of a user, and of the role that the user's jobs run as."""

    environment: dict[str, str]
    """To add to a program's, so that it talks to the local AWS as the user."""
    role: str


@pytest.fixture(scope="session")
def rights(emulator: EmulatedAws) -> Rights:
    """Made as the README says."""
    iam, account = emulator.client("iam"), emulator.client("sts").get_caller_identity()["Account"]

    def policy(name: str) -> str:
        text = (POLICIES / f"{name}.json").read_text()
        return text.replace("ACCOUNT", account).replace("BUCKET", emulator.bucket)

    role = iam.create_role(RoleName="stocktake-job", AssumeRolePolicyDocument=policy("trust"))["Role"]["Arn"]
    iam.put_role_policy(RoleName="stocktake-job", PolicyName="stocktake", PolicyDocument=policy("job"))
    iam.create_user(UserName="counter")
    iam.put_user_policy(UserName="counter", PolicyName="stocktake", PolicyDocument=policy("caller"))
    key = iam.create_access_key(UserName="counter")["AccessKey"]
    own = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    return Rights({**emulator.environment, **own, "SAGEMAKER_LOCAL_ROLE": role}, role)
