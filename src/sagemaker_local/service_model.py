"""The limits of SageMaker's service model (botocore's), by one walk over a request, in the words of AWS's refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from botocore.model import ListShape, MapShape, OperationModel, Shape, StringShape, StructureShape
from botocore.session import get_session
from moto.sagemaker.exceptions import ValidationError


@cache
def operation_model(operation: str) -> OperationModel:
    """Return the description of one of SageMaker's operations."""
    return get_session().get_service_model("sagemaker").operation_model(operation)


def check_request(operation: str, request: dict[str, Any]) -> None:
    """Hold a request against the service model, as AWS does before it does anything else.

    Raises:
        ValidationError: names every constraint that a value does not satisfy.
    """
    shape = operation_model(operation).input_shape
    broken = list(_violations(shape, request, "")) if shape is not None else []
    if broken:
        noun = "validation error" if len(broken) == 1 else "validation errors"
        raise ValidationError(message=f"{len(broken)} {noun} detected: {'; '.join(broken)}")


def require(request: dict[str, Any], *paths: str) -> None:
    """Require members that the model calls optional and an ordinary job needs, such as "ResourceConfig.InstanceType".

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


def without_empty_structures(operation: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer without empty structures that have required members, as moto gives for what was not set.

    AWS leaves them out, and the SageMaker SDK refuses to read them.
    """
    shape = operation_model(operation).output_shape
    members = shape.members if shape is not None else {}
    return {
        name: value
        for name, value in answer.items()
        if value != {} or not (name in members and getattr(members[name], "required_members", None))
    }


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
            yield _violation(value, path, f"Member must satisfy enum value set: [{', '.join(shape.enum)}]")
        pattern = shape.metadata.get("pattern")
        if pattern and not _matches(pattern, value):
            yield _violation(value, path, f"Member must satisfy regular expression pattern: {pattern}")
    elif shape.type_name in ("integer", "long", "float", "double") and isinstance(value, int | float):
        yield from _bounds(shape, value, value, path, "value")


def _bounds(shape: Shape, size: float, value: Any, path: str, what: str) -> Iterator[str]:
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    if least is not None and size < least:
        yield _violation(value, path, f"Member must have {what} greater than or equal to {least}")
    if most is not None and size > most:
        yield _violation(value, path, f"Member must have {what} less than or equal to {most}")


def _violation(value: Any, path: str, constraint: str) -> str:
    return f"Value '{value}' at '{path}' failed to satisfy constraint: {constraint}"


def _matches(pattern: str, value: str) -> bool:
    """Return True if all of the value fits, or if the pattern is one that only Java understands (\\p{L})."""
    try:
        return re.fullmatch(pattern, value, re.DOTALL) is not None
    except re.error:
        return True


def _join(path: str, name: str) -> str:
    """Spell a path as AWS does: trainingJobName, resourceConfig.instanceType."""
    name = name[0].lower() + name[1:]
    return f"{path}.{name}" if path else name
