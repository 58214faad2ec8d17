"""The local AWS of the session, and a role and a user in it with the rights of deploy/policies and no others."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rehearsal_process import RehearsalProcess, start_rehearsal

POLICIES = Path(__file__).parents[2] / "deploy" / "policies"


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RehearsalProcess]:
    """The local AWS of the session. A stopped container has five seconds; tests choose names of their own in it.

    The image `program` runs the file `main` of the channel `program`, as `model-program` runs the model's; `broken`
    fails once there is a file GATE.
    """
    images = {
        "*/broken:*": "sh -c 'until test -e ${GATE:-/}; do sleep 0.1; done; exit 3'",
        "*/program:*": f"{sys.executable} /opt/ml/input/data/program/main",
        "*/model-program:*": f"{sys.executable} /opt/ml/model/main",
    }
    state = tmp_path_factory.mktemp("rehearsal")
    process = start_rehearsal(state, "--grace", "5", "--images", json.dumps(images))
    yield process
    process.close()
    assert not list(state.iterdir()), "the local AWS left something behind"


@dataclass(frozen=True)
class Rights:
    """Of a user, and of the role that the user's jobs run as."""

    environment: dict[str, str]
    """To add to a program's, so that it talks to the local AWS as the user."""
    role: str


@pytest.fixture(scope="session")
def rights(rehearsal: RehearsalProcess) -> Rights:
    """Made as the README says."""
    iam, account = rehearsal.client("iam"), rehearsal.client("sts").get_caller_identity()["Account"]

    def policy(name: str) -> str:
        text = (POLICIES / f"{name}.json").read_text()
        return text.replace("ACCOUNT", account).replace("BUCKET", rehearsal.bucket)

    role = iam.create_role(RoleName="stocktake-job", AssumeRolePolicyDocument=policy("trust"))["Role"]["Arn"]
    iam.put_role_policy(RoleName="stocktake-job", PolicyName="stocktake", PolicyDocument=policy("job"))
    iam.create_user(UserName="counter")
    iam.put_user_policy(UserName="counter", PolicyName="stocktake", PolicyDocument=policy("caller"))
    key = iam.create_access_key(UserName="counter")["AccessKey"]
    own = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    return Rights({**rehearsal.environment, **own, "STOCKTAKE_ROLE": role}, role)
