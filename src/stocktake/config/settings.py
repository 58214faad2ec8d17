"""The base of all settings: dataclasses whose annotations are their bounds."""

import dataclasses
import functools
import typing
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stocktake.errors import StocktakeError


@dataclasses.dataclass
class Settings:
    """Settings whose fields may be bounded: `epochs: Annotated[int, Field(ge=1)] = 6`.

    Bounds hold wherever an object is made: on the command line, in a file, in Python. A module with settings must not
    have `from __future__ import annotations`: jsonargparse reads the annotations as objects.

    Raises:
        StocktakeError: a value is out of bounds.
    """

    def __post_init__(self) -> None:
        settings: Any = type(self)
        for name, adapter in _bounded_fields(settings).items():
            value = getattr(self, name)
            try:
                adapter.validate_python(value)
            except ValidationError as error:
                raise StocktakeError(f"{name} {value!r}: {bound_error(error.errors()[0]['msg'])}") from None


def bound_error(message: str) -> str:
    """Shorten pydantic's words for a value that does not fit: "must be at least 1"."""
    for long, short in _SHORTER.items():
        message = message.replace(long, short)
    return message.partition(", unable to parse")[0].strip()


_SHORTER = {"Input should be": "must be", "greater than or equal to": "at least", "less than or equal to": "at most"}


@functools.cache
def _bounded_fields(settings: Any) -> dict[str, TypeAdapter[Any]]:
    hints = typing.get_type_hints(settings, include_extras=True)
    names = [field.name for field in dataclasses.fields(settings)]
    return {name: TypeAdapter(hints[name]) for name in names if "Annotated" in repr(hints[name])}
