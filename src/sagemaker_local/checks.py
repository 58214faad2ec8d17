"""What AWS refuses: the limits of its service model, by one walk over a request; and rules that no model knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from botocore.model import ListShape, MapShape, Shape, StringShape, StructureShape
from botocore.session import get_session
from moto.iam.models import iam_backends
from moto.sagemaker.exceptions import ResourceInUseException, ValidationError
from moto.sagemaker.models import SageMakerModelBackend

from sagemaker_local.storage import Storage


@cache
def input_shape(operation: str) -> StructureShape | None:
    """What an operation of SageMaker takes."""
    return get_session().get_service_model("sagemaker").operation_model(operation).input_shape


def check_request(operation: str, request: dict[str, Any]) -> None:
    """Hold a request against the service model, as AWS does before it does anything else.

    Raises:
        ValidationError: every constraint that a value does not satisfy.
    """
    shape = input_shape(operation)
    broken = list(_violations(shape, request, "")) if shape is not None else []
    if broken:
        noun = "validation error" if len(broken) == 1 else "validation errors"
        raise ValidationError(message=f"{len(broken)} {noun} detected: {'; '.join(broken)}")


def without_hollow(operation: str, answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without structures that lack all they must have, as moto tells of what was not given.

    AWS leaves them out, and the SageMaker SDK refuses to read them.
    """
    shape = get_session().get_service_model("sagemaker").operation_model(operation).output_shape
    members = shape.members if shape is not None else {}
    return {
        name: value
        for name, value in answer.items()
        if value != {} or not (name in members and getattr(members[name], "required_members", None))
    }


def require(request: dict[str, Any], *paths: str) -> None:
    """Members that the model calls optional and an ordinary job cannot do without: "ResourceConfig.InstanceType".

    Raises:
        ValidationError: one is missing.
    """
    for path in paths:
        value: Any = request
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            where = ".".join(name[0].lower() + name[1:] for name in path.split("."))
            reason = f"Value null at '{where}' failed to satisfy constraint: Member must not be null"
            raise ValidationError(message=f"1 validation error detected: {reason}")


def check_new(kind: str, name: str, there: dict[str, Any], arn: str) -> None:
    """Raises ResourceInUseException when the account has one of this name."""
    if name in there:
        raise ResourceInUseException(
            message=f"{kind} names must be unique within an AWS account and region, and a {kind.lower()} with this "
            f"name already exists ({arn})"
        )


def check_role(backend: SageMakerModelBackend, arn: str) -> None:
    """Raises ValidationError when there is no such role, or SageMaker may not assume it."""
    roles = iam_backends[backend.account_id][backend.partition].roles.values()
    role = next((role for role in roles if role.arn == arn), None)
    if role is None or "sagemaker.amazonaws.com" not in str(role.assume_role_policy_document):
        raise ValidationError(
            message=f"Could not assume role {arn}. Please ensure that the role exists and allows principal "
            "'sagemaker.amazonaws.com' to assume the role."
        )


def check_bucket(storage: Storage, uri: str) -> None:
    """Raises ValidationError when a job could not write there."""
    if not storage.has_bucket(uri):
        raise ValidationError(message=f"The S3 bucket of {uri} does not exist or cannot be accessed by the role.")


def check_channels(backend: SageMakerModelBackend, storage: Storage, channels: list[dict[str, Any]]) -> None:
    """Raises ValidationError when a channel's name is there twice, it names no object, or it is no S3 source."""
    names = [channel["ChannelName"] for channel in channels]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValidationError(message=f"Channel names must be unique; {twice} is there more than once.")
    for channel in channels:
        source = channel["DataSource"].get("S3DataSource")
        if source is None or source["S3DataType"] not in ("S3Prefix", "ManifestFile"):
            raise ValidationError(message=f"Channel {channel['ChannelName']}: only S3Prefix and ManifestFile are here.")
        if not storage.keys(source["S3Uri"]):
            raise ValidationError(
                message=f'No S3 objects found under S3 URL "{source["S3Uri"]}" given in input data source. Please '
                f"ensure that the bucket exists in the selected region ({backend.region_name}), that objects exist "
                'under that S3 prefix, and that the role has "s3:ListBucket" permissions on the bucket.'
            )


def check_stopping(condition: dict[str, int], spot: bool) -> None:
    """Raises ValidationError when a managed spot job cannot wait as long as it may run."""
    longest, wait = condition.get("MaxRuntimeInSeconds", 86400), condition.get("MaxWaitTimeInSeconds")
    if spot and (wait is None or wait < longest):
        raise ValidationError(
            message="Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to "
            "MaxRuntimeInSeconds"
        )
    if not spot and wait is not None:
        raise ValidationError(
            message="MaxWaitTimeInSeconds above 0 is not supported when EnableManagedSpotTraining is not enabled"
        )


def _violations(shape: Shape, value: Any, path: str) -> Iterator[str]:
    if value is None:
        return
    if isinstance(shape, StructureShape) and isinstance(value, dict):
        for name in shape.required_members:
            if value.get(name) is None:
                yield f"Value null at '{_join(path, name)}' failed to satisfy constraint: Member must not be null"
        for name, member in shape.members.items():
            yield from _violations(member, value.get(name), _join(path, name))
    elif isinstance(shape, ListShape) and isinstance(value, list):
        yield from _bounds(shape, len(value), value, path, "length")
        for number, member in enumerate(value, 1):
            yield from _violations(shape.member, member, f"{path}.{number}.member")
    elif isinstance(shape, MapShape) and isinstance(value, dict):
        yield from _bounds(shape, len(value), value, path, "length")
        for key, member in value.items():
            yield from _violations(shape.key, key, path)
            yield from _violations(shape.value, member, f"{path}.{key}.member")
    elif isinstance(shape, StringShape) and isinstance(value, str):
        yield from _bounds(shape, len(value), value, path, "length")
        if shape.enum and value not in shape.enum:
            yield _said(value, path, f"Member must satisfy enum value set: [{', '.join(shape.enum)}]")
        pattern = shape.metadata.get("pattern")
        if pattern and not _matches(pattern, value):
            yield _said(value, path, f"Member must satisfy regular expression pattern: {pattern}")
    elif shape.type_name in ("integer", "long", "float", "double") and isinstance(value, int | float):
        yield from _bounds(shape, value, value, path, "value")


def _bounds(shape: Shape, size: float, value: Any, path: str, what: str) -> Iterator[str]:
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    if least is not None and size < least:
        yield _said(value, path, f"Member must have {what} greater than or equal to {least}")
    if most is not None and size > most:
        yield _said(value, path, f"Member must have {what} less than or equal to {most}")


def _said(value: Any, path: str, constraint: str) -> str:
    return f"Value '{value}' at '{path}' failed to satisfy constraint: {constraint}"


def _matches(pattern: str, value: str) -> bool:
    """Whether all of the value fits; a pattern that only Java understands (\\p{L}) refuses nothing."""
    try:
        return re.fullmatch(pattern, value, re.DOTALL) is not None
    except re.error:
        return True


def _join(path: str, name: str) -> str:
    """As AWS spells it: trainingJobName, resourceConfig.instanceType."""
    name = name[0].lower() + name[1:]
    return f"{path}.{name}" if path else name
