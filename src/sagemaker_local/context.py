"""What all parts of one emulator share: folder, address, keys, settings, and the containers that run."""

from __future__ import annotations

import fnmatch
import itertools
import os
import secrets
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagemaker_local.containers import Container

_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
_KEPT_PREFIXES = ("PIP_", "UV_")
"""Variables of the emulator that containers get: the way to programs and packages, nothing of the user's."""


@dataclass(frozen=True)
class EmulatorContext:
    """One per emulator."""

    folder: Path
    """For what containers write; removed with the emulator."""
    region: str
    endpoint: str
    """URL of the emulator."""
    has_namespaces: bool
    """True if containers get a mount namespace, and so an /opt/ml, of their own."""
    grace: float = 10.0
    """Seconds between SIGTERM and SIGKILL."""
    startup: float = 60.0
    """Seconds that a model server may take until it answers /ping."""
    images: Mapping[str, list[str]] = field(default_factory=dict)
    """Pattern of image names -> words that containers of such an image start with."""
    access_key: str = field(default_factory=lambda: f"LOCAL{secrets.token_hex(12).upper()}")
    """May do everything; new at each start, since whoever knows it can run programs here."""
    secret_key: str = field(default_factory=lambda: secrets.token_hex(20))
    running: set[Container] = field(default_factory=set)
    closed: threading.Event = field(default_factory=threading.Event)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def close(self) -> None:
        """Kill every container; none starts any more."""
        self.closed.set()
        containers = list(self.running)
        for container in containers:
            container.kill()
        for container in containers:
            container.wait()

    def next_number(self) -> int:
        """Number of a job or a model server: it names their folder and loopback addresses."""
        return next(self._numbers)

    def entry_point(self, image: str) -> list[str]:
        """Words that the image's containers start with, before `train` or `serve`; empty for an unmapped image."""
        return next((words for pattern, words in self.images.items() if fnmatch.fnmatchcase(image, pattern)), [])

    def aws_environment(self) -> dict[str, str]:
        """Variables that lead AWS clients here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }

    def container_environment(self, scratch: Path, role: dict[str, str]) -> dict[str, str]:
        """Variables of a container before those of its request.

        `role` holds the credentials of the container's role; empty for an isolated one, which gets no way to AWS.
        """
        kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
        # The programs of this environment stand for the image's.
        kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
        temporary = scratch / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        kept |= {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "AWS_REGION": self.region}
        return kept | self.aws_environment() | role if role else kept
