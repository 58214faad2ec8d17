"""IAM: who calls, and what their policies let them do; the simulator, which the SageMaker SDK asks about a role.

The credentials that a rehearsal prints may do everything. Users and roles that are made in it may do what their
policies allow, and a container acts as the role of its job or model: policies can be tried before AWS judges them.
What SageMaker does itself with a role (images, inputs, outputs, logs) is not held against it here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from moto.core.authorization import ActionAuthenticatorMixin
from moto.core.exceptions import AccessDeniedError, InvalidClientTokenIdError, JsonRESTError
from moto.core.responses import ActionResult, BaseResponse
from moto.iam.responses import IamResponse
from moto.sagemaker.models import SageMakerModelBackend
from moto.sagemaker.responses import SageMakerResponse
from moto.sts.models import sts_backends

from sagemaker_local.containers import ACCESS_KEY

_SIGNER = re.compile(r"Credential=([^/]+)/")
_IN_JSON = {"AccessDenied": "AccessDeniedException", "InvalidClientTokenId": "UnrecognizedClientException"}
_SESSION_SECONDS = 12 * 3600
_SAGEMAKER = {
    "HyperParameterTuningJobName": "hyper-parameter-tuning-job",
    "TrainingJobName": "training-job",
    "TransformJobName": "transform-job",
    "EndpointName": "endpoint",
    "EndpointConfigName": "endpoint-config",
    "ModelName": "model",
}
"""What a request is about: the first of these that it has, and the kind of its ARN."""


def install() -> None:
    """Hold every signed call against policies; let every role do everything as far as the simulator is asked."""

    def authorize(response: Any, request_type: type[Any], resource: str = "*") -> None:
        signer = _SIGNER.search(response.headers.get("Authorization", ""))
        if signer is None or signer[1] == ACCESS_KEY:
            return
        try:
            request = request_type(
                account_id=response.current_account,
                method=response.method,
                path=response.raw_path,
                data=response.data,
                body=response.raw_body,
                headers=response.headers,
                action=response._get_action(),
            )
            for action, about in _needed(response, request._action, resource):
                request._action = action
                request.check_action_permitted(about)
        except (AccessDeniedError, InvalidClientTokenIdError) as error:
            if "X-Amz-Target" in response.headers:  # the protocol of SageMaker and CloudWatch Logs has its own words
                raise JsonRESTError(_IN_JSON[error.error_type], error.message) from None
            raise

    def simulate_principal_policy(response: IamResponse) -> ActionResult:
        actions = response.params["ActionNames"]
        allowed = [{"EvalActionName": one, "EvalResourceName": "*", "EvalDecision": "allowed"} for one in actions]
        return ActionResult({"EvaluationResults": allowed, "IsTruncated": False})

    setattr(ActionAuthenticatorMixin, "_authenticate_and_authorize_action", authorize)  # noqa: B010 - moto's name
    setattr(IamResponse, simulate_principal_policy.__name__, simulate_principal_policy)


def role_variables(backend: SageMakerModelBackend, role: str) -> dict[str, str]:
    """Credentials of a role, as variables of a container that runs as it."""
    session = sts_backends[backend.account_id][backend.partition].assume_role(
        backend.region_name, "SageMaker", role, "", _SESSION_SECONDS, ""
    )
    return {
        "AWS_ACCESS_KEY_ID": session.access_key_id,
        "AWS_SECRET_ACCESS_KEY": session.secret_access_key,
        "AWS_SESSION_TOKEN": session.session_token,
    }


def _needed(response: BaseResponse, action: str, resource: str) -> Iterator[tuple[str, str]]:
    """Every action that a call has to be allowed, and on what."""
    place = f"{response.region}:{response.current_account}"
    if isinstance(response, SageMakerResponse):
        request = response.params
        name, kind = next(((request[name], kind) for name, kind in _SAGEMAKER.items() if request.get(name)), ("", ""))
        if name:
            resource = f"arn:aws:sagemaker:{place}:{kind}/{name.lower()}"
        resource = request.get("ResourceArn", resource)
        yield action, resource
        if request.get("Tags") and action.startswith("sagemaker:Create"):
            yield "sagemaker:AddTags", resource
        definition = request.get("TrainingJobDefinition") or {}
        role = request.get("RoleArn") or request.get("ExecutionRoleArn") or definition.get("RoleArn")
        if role and action.startswith("sagemaker:Create"):
            yield "iam:PassRole", role
    elif action.startswith("logs:"):
        group, stream = response._get_param("logGroupName"), response._get_param("logStreamName")
        yield action, f"arn:aws:logs:{place}:log-group:{group}:{f'log-stream:{stream}' if stream else '*'}"
    else:
        yield ("s3:ListBucket" if action == "s3:HeadBucket" else action), resource  # there is no right of that name
