"""Databases of studies: passwords are not on the command line and not in messages."""

from __future__ import annotations

import pytest

from stocktake.errors import StocktakeError
from stocktake.tuning.storage import STORAGE_VARIABLE, external_storage, open_storage


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:pa55word@host/s",
        "postgresql://u:pa55/word@host/s",
        "postgresql://u:pa55@word@host/s",
        "postgresql://host/s?user=u&password=pa55word",
        "postgresql://host/s?sslkey=pa55word",
        "sqlite:///study.db?auth_token=pa55word",
        "postgresql://u:pa55word@host:port/s",
        "pa55word",
    ],
)
def test_a_password_on_the_command_line_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(StocktakeError) as caught:
        external_storage(url)
    assert "pa55" not in str(caught.value)
    assert "--storage" in str(caught.value)


def test_the_option_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    assert external_storage(None) is None
    monkeypatch.setenv(STORAGE_VARIABLE, "postgresql://u:pa55word@host/s")
    assert external_storage(None) == "postgresql://u:pa55word@host/s"
    assert external_storage("sqlite:///mine.db") == "sqlite:///mine.db"
    assert external_storage("postgresql://u@host/s") == "postgresql://u@host/s"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:////dev/null/s.db", "/dev/null/s.db"),
        ("sqlite:////proc/s.db", "/proc/s.db"),
        ("sqlite://", "sqlite:///study.db"),
        ("sqlite:///:memory:", "sqlite:///study.db"),
        ("nosuchdb://u:pa55word@host/s", "nosuchdb://host/s"),
        ("mysql+nosuchdriver://u:pa55word@host/s", "mysql+nosuchdriver://host/s"),
        ("postgresql://u:pa55word@[::1]:5432/s", "postgresql://[::1]:5432/s"),
        ("postgresql://host/s?user=u&password=pa55word", "postgresql://host/s"),
        ("postgresql://u:pa55word@host:port/s", STORAGE_VARIABLE),
        ("postgresql://u:pa55/word@host/s", "%2F"),
        ("postgresql://u:a@pa55word@host/s", "%40"),
        ("redis://:pa55word@host", "redis://host"),
    ],
)
def test_an_unusable_url_is_one_line_without_its_password(url: str, shown: str) -> None:
    with pytest.raises(StocktakeError) as caught:
        open_storage(url)
    message = str(caught.value)
    assert shown in message
    assert "\n" not in message
    assert "pa55" not in message
