"""One promotion at a time, whatever machine it is started on.

MLflow has no compare-and-swap, but no store makes two registered models of one name: whoever makes
`<model>.promotion` has the lock. It is removed at the end, on errors and on SIGTERM too; what a killed process leaves
is taken over after a while.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from stocktake.errors import StocktakeError
from stocktake.tracking.local_store import now_ms
from stocktake.tracking.runs import sigterm_raises

LEASE_SECONDS = 300
"""How long after a sign of life a lock is left alone."""
_TOKEN, _OWNER, _SEEN = "token", "owner", "seen_ms"
_ATTEMPTS = 5


def who() -> str:
    """user@host"""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may have no user name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


class PromotionLock:
    """The lock, while it is held."""

    def __init__(self, client: Any, model_name: str, token: str) -> None:
        self._client = client
        self._model_name = model_name
        self._token = token

    def still_held(self) -> None:
        """A sign of life. To be asked before anything is moved.

        Raises:
            StocktakeError: somebody took the lock over, because this process was silent for too long.
        """
        held = _read(self._client, lock_name(self._model_name))
        if held is None or held.get(_TOKEN) != self._token:
            by = held.get(_OWNER, "?") if held else "somebody"
            raise StocktakeError(
                f"the promotion of {self._model_name} took so long that {by} took over; nothing was changed, try again"
            )
        self._client.set_registered_model_tag(lock_name(self._model_name), _SEEN, str(now_ms()))


def lock_name(model_name: str) -> str:
    """The registered model that is the lock."""
    return f"{model_name}.promotion"


@contextmanager
def promotion_lock(client: Any, model_name: str) -> Iterator[PromotionLock]:
    """Alone with the aliases of a model, or told who is at it.

    Raises:
        StocktakeError: somebody else is.
    """
    token = uuid.uuid4().hex[:12]
    with sigterm_raises():
        try:
            _acquire(client, model_name, token)
            yield PromotionLock(client, model_name, token)
        finally:
            held = _read(client, lock_name(model_name))
            if held is not None and held.get(_TOKEN) == token:
                _remove(client, lock_name(model_name))


def _acquire(client: Any, model_name: str, token: str) -> None:
    name = lock_name(model_name)
    for _ in range(_ATTEMPTS):
        if _make(client, name, token):
            return
        held = _read(client, name)
        if held is None:
            continue  # it was removed just now
        if held.get(_TOKEN) == token:
            return  # it was made, but the answer was lost and the request sent again
        seen = int(held.get(_SEEN) or 0)
        if now_ms() - seen < 1000 * LEASE_SECONDS:
            ends = datetime.fromtimestamp(seen / 1000, UTC) + timedelta(seconds=LEASE_SECONDS)
            raise StocktakeError(
                f"{model_name} is being promoted or rolled back by {held.get(_OWNER, '?')}; nothing was changed: try"
                f" again when that is done (if its process was killed, after {ends:%H:%M} UTC)"
            )
        _take_away(client, name, held)
    raise StocktakeError(f"others keep promoting versions of {model_name}; nothing was changed: try again")


def _take_away(client: Any, name: str, stale: dict[str, str]) -> None:
    """Remove a lock whose owner is gone.

    Of several who find it stale one does, and none removes the lock that a quicker one made instead: removing is
    itself locked, by a name made of the stale lock's token.
    """
    removal = f"{name}.{stale.get(_TOKEN, 'unknown')}"
    if not _make(client, removal, uuid.uuid4().hex[:12]):
        other = _read(client, removal)
        if other is not None and now_ms() - int(other.get(_SEEN) or 0) > 1000 * LEASE_SECONDS:
            _remove(client, removal)  # killed while it removed
        time.sleep(0.2)
        return
    try:
        held = _read(client, name)
        if held is not None and held.get(_TOKEN) == stale.get(_TOKEN) and held.get(_SEEN) == stale.get(_SEEN):
            _remove(client, name)
    finally:
        _remove(client, removal)


def _make(client: Any, name: str, token: str) -> bool:
    """Make the registered model; False if there is one of the name."""
    from mlflow.exceptions import MlflowException

    tags = {_TOKEN: token, _OWNER: f"{who()} (process {os.getpid()})", _SEEN: str(now_ms())}
    try:
        client.create_registered_model(name, tags=tags, description="A lock: a promotion is under way. Goes by itself.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True


def _read(client: Any, name: str) -> dict[str, str] | None:
    """The tags of the registered model; None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_registered_model(name).tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _remove(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):  # gone already
        client.delete_registered_model(name)
