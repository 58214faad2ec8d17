"""IAM: who calls, and what their policies let them do.

The emulator's own access key may do everything. Users and roles that are made in it may do what their policies allow,
and a container acts as the role of its job or model: policies can be tried before AWS judges them. What SageMaker does
itself with a role (images, inputs, outputs, logs) is not held against it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moto.core.authorization import ActionAuthenticatorMixin
from moto.core.exceptions import AccessDeniedError, JsonRESTError
from moto.core.responses import BaseResponse
from moto.sagemaker.models import SageMakerModelBackend
from moto.sagemaker.responses import SageMakerResponse
from moto.sts.models import sts_backends

from sagemaker_local.authentication import access_key_of
from sagemaker_local.context import EmulatorContext

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


def install(context: EmulatorContext) -> None:
    """Hold calls against policies."""

    def authorize(response: Any, request_type: type[Any], resource: str = "*") -> None:
        key = access_key_of(response.headers.get("Authorization", ""))
        if key is None or key == context.access_key:  # a presigned URL was signed by one who may
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
            for action, target in _required_permissions(response, request._action, resource):
                request._action = action
                request.check_action_permitted(target)
        except AccessDeniedError as error:
            if "X-Amz-Target" in response.headers:  # the protocol of SageMaker and CloudWatch Logs has its own word
                raise JsonRESTError("AccessDeniedException", error.message) from None
            raise

    setattr(ActionAuthenticatorMixin, "_authenticate_and_authorize_action", authorize)  # noqa: B010 - moto's name


def role_variables(backend: SageMakerModelBackend, role: str) -> dict[str, str]:
    """Return credentials of a role, as variables of a container that runs as it."""
    session = sts_backends[backend.account_id][backend.partition].assume_role(
        backend.region_name, "SageMaker", role, "", _SESSION_SECONDS, ""
    )
    return {
        "AWS_ACCESS_KEY_ID": session.access_key_id,
        "AWS_SECRET_ACCESS_KEY": session.secret_access_key,
        "AWS_SESSION_TOKEN": session.session_token,
    }


def _required_permissions(response: BaseResponse, action: str, resource: str) -> Iterator[tuple[str, str]]:
    """Yield every action that a call needs, and its resource."""
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
