"""How a server runs: the settings of `serve`, `stocktake deploy` and the deployment target."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from stocktake.errors import StocktakeError
from stocktake.machine import cores

MEBIBYTE = 2**20


@dataclass(frozen=True)
class ServerSettings:
    """How one server runs. Every default is meant for a container on SageMaker, or a laptop."""

    host: str = "127.0.0.1"
    """Address to listen on. A container listens on 0.0.0.0."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """0: any free one. SageMaker's is 8080."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that share the address; each loads the model."""
    threads: Annotated[int, Field(ge=1, le=1024)] = dataclasses.field(default_factory=cores)
    """Threads of a worker's forward pass. Default: one a core that this process may use."""
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Photos that wait in a worker; a request that arrives while so many wait is answered 503 with Retry-After."""
    max_request_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 6 * MEBIBYTE
    """Of a request's body; larger ones are answered 413. SageMaker passes on 6 MB at most."""
    max_request_photos: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    """Photos of a request; more are answered 413."""
    client_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 20.0
    """How long a client may take to send a request or to read its answer; then its connection is closed."""
    drain_seconds: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """How long a worker that ends may take to answer the requests that it has."""
    stuck_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 30.0
    """After a forward pass of this length /ping answers 503: prediction is stuck."""
    page: bool = False
    """Whether / shows a page to drop photos on. For people; off in a container."""

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "ServerSettings":
        """From names and values, which may be text, as a command line or a YAML file gives them.

        Raises:
            StocktakeError: an unknown name, or a value of another type or out of bounds.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := next((name for name in values if name not in names), None):
            raise StocktakeError(f"{unknown!r} is no setting of a server: they are {', '.join(names)}")
        try:
            return _ADAPTER.validate_python(dict(values))
        except ValidationError as error:
            fault = error.errors()[0]
            name = fault["loc"][0]
            raise StocktakeError(f"{name} {fault['input']}: {fault['msg'].lower()}") from None


_ADAPTER = TypeAdapter(ServerSettings)


def setting_descriptions() -> dict[str, str]:
    """Of every setting, its docstring and default, for people."""
    from docstring_parser import parse_from_object

    defaults = ServerSettings()
    parts = {part.arg_name: part.description or "" for part in parse_from_object(ServerSettings).params}
    return {name: f"{' '.join(text.split())} ({getattr(defaults, name)})" for name, text in parts.items()}
