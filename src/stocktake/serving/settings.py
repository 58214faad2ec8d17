"""How a server runs: what `serve`, `stocktake deploy` and the deployment target all take."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from stocktake.errors import StocktakeError
from stocktake.machine import cores

MEBIBYTE = 2**20


@dataclass(frozen=True)
class ServerSettings:
    """How one server runs. Every default is meant for a container on SageMaker, or a laptop."""

    host: str = "127.0.0.1"
    """Address to listen on. A container listens on 0.0.0.0."""
    port: int = 8080
    """0: any free one. SageMaker's is 8080."""
    workers: int = 1
    """Processes that share the address; each holds the model once."""
    threads: int = dataclasses.field(default_factory=cores)
    """Threads of a worker's forward pass. Default: one a core that this process may use."""
    max_batch: int = 8
    """Photos counted in one forward pass at most."""
    max_wait_ms: float = 2.0
    """How long a photo waits for others to share its forward pass, when others are already being counted."""
    max_queue: int = 256
    """Photos that wait in a worker at most; a request beyond is answered 503 with Retry-After."""
    max_request_bytes: int = 6 * MEBIBYTE
    """Of a request's body; larger ones are answered 413. SageMaker passes on 6 MB at most."""
    body_seconds: float = 20.0
    """How long a client may take to send a body; slower ones are answered 408."""
    drain_seconds: float = 10.0
    """How long a worker that was told to end answers what it has begun."""
    page: bool = False
    """Whether / shows a page to drop photos on. For people; off in a container."""

    def __post_init__(self) -> None:
        bounds = {
            "port": (0, 65535),
            "workers": (1, 256),
            "threads": (1, 1024),
            "max_batch": (1, 1024),
            "max_wait_ms": (0, 1000),
            "max_queue": (1, 1_000_000),
            "max_request_bytes": (1024, 2**30),
            "body_seconds": (0.1, 3600),
            "drain_seconds": (0, 3600),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise StocktakeError(f"{name} {value:g} must be from {least:g} to {most:g}")

    @classmethod
    def read(cls, given: dict[str, Any]) -> ServerSettings:
        """From names and values, which may be text, as a command line or a YAML file gives them.

        Raises:
            StocktakeError: an unknown name, or a value of another type.
        """
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in fields:
                raise StocktakeError(f"{name!r} is no setting of a server: they are {', '.join(fields)}")
            values[name] = _typed(name, value, str(fields[name]))
        return cls(**values)


def _typed(name: str, value: Any, kind: str) -> Any:
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        if kind == "str":
            return text if isinstance(value, str) else str(value)
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        return int(text) if kind == "int" else float(text)
    except (ValueError, KeyError):
        raise StocktakeError(
            f"{name} {text} must be {'true or false' if kind == 'bool' else f'of type {kind}'}"
        ) from None
