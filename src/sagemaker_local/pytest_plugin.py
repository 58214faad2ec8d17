"""pytest fixtures: one emulator for a test session. In the root conftest.py:

pytest_plugins = ["sagemaker_local.pytest_plugin"]
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sagemaker_local.process import EmulatorProcess, running


@pytest.fixture(scope="session")
def sagemaker_local_options() -> list[str]:
    """Options of `sagemaker-local`; override it in a conftest.py to set some."""
    return []


@pytest.fixture(scope="session")
def sagemaker_local(sagemaker_local_options: list[str]) -> Iterator[EmulatorProcess]:
    """The emulator of the session, with `environment`, `bucket`, `role` and `client(service)`."""
    with running(*sagemaker_local_options) as emulator:
        yield emulator
