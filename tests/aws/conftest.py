"""The local AWS of the session."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from rehearsal_process import RehearsalProcess, start_rehearsal


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RehearsalProcess]:
    """The local AWS of the session. A stopped container has five seconds; tests choose names of their own in it.

    The image `program` runs the file `main` of the channel `program`, as `model-program` runs the model's.
    """
    images = {
        "*/broken:*": f"{sys.executable} -c 'raise SystemExit(3)'",
        "*/program:*": f"{sys.executable} /opt/ml/input/data/program/main",
        "*/model-program:*": f"{sys.executable} /opt/ml/model/main",
    }
    state = tmp_path_factory.mktemp("rehearsal")
    process = start_rehearsal(state, "--grace", "5", "--images", json.dumps(images))
    yield process
    process.close()
    assert not list(state.iterdir()), "the local AWS left something behind"
